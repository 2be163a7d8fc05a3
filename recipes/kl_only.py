"""Is the MSE needed beside the KL, or does the KL alone do?"""

TRAIN = "sae"
LOSS = "kl"
