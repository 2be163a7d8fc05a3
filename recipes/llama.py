"""A fresh SAE in Llama-3.2-1B on MSE: the same method on a model without a softcap."""

MODEL = "meta-llama/Llama-3.2-1B"
MODEL_REVISION = "main"
LAYER = 8
SAE = "fresh"
D_SAE = 16_384
LOSS = "mse"
LR = 3e-4
WARMUP = 1000
SHUFFLE = 512
AUXK = 0.03125
