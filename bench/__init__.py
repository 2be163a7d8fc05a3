"""How fast is a step, and how near to float64?"""

import os

import torch

if not torch.cuda.is_available():  # read by triton when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
