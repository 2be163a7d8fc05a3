"""A fresh TopK SAE on MSE alone: the source that the finetunes start from, or are compared with."""

SAE = "fresh"
LOSS = "mse"
LR = 1e-3
WARMUP = 20
SHUFFLE = 512
AUXK = 0.03125
PASSES = 3
