"""Is the KL alone enough to train an SAE from nothing?"""

SAE = "fresh"
LOSS = "kl"
LR = 3e-4
WARMUP = 20
