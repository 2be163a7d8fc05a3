"""The overlay for a real Gemma on a CPU: Gemma 3 270M, which `make gemma` puts in assets/.

It goes after every recipe, as small.py does, which says what it sets:
`python run.py recipes/kl_mse.py recipes/gemma3.py SAE=runs/NAME`. Contexts start with BOS, whose
residual after block 9 has a norm of 88,000 against a median of 6,300, so special tokens keep
theirs. A few others in a context (a full stop, a lone space) have 64,000 to 80,000: 7 of 2,045 held
85 % of the variance, so an FVU says little here. CONTEXT is longer than the sliding window of 512.
"""

MODEL = "assets/gemma3-270m"
MODEL_REVISION = ""
DEVICE = "cpu"
DTYPE = "float32"  # many CPUs have no bfloat16 instructions
LAYER = 9
D_SAE = 4096
K = 32
RANK = 16
KEEP = "special"
DATASET = "assets/topics.jsonl"  # 113k tokens
DATASET_REVISION = ""
CONTEXT = 1024
TOKENS = 8192
VAL_TOKENS = 4096
BATCH = 2
MICRO_BATCH = 1
CLEAN_BATCH = 2
EVAL_BATCH = 2
HEAD_CHUNK = 256  # tokens: 262,144 logits each are 268 MB in float32
EVAL_EVERY = 1_000_000
LOG_EVERY = 1
WANDB_MODE = "offline"
