"""More KL at no more FVU: a heavier MSE at a higher rate, beside the residual 4 and 8 blocks above.

On SmolLM2 it removes 1.7 times the KL of the paper's recipe (records/LOG.md); another LM or SAE may
want another LR."""

LOSS = "kl+mse+later"
MSE_WEIGHT = 20.0
LR = 8e-4
