"""Does a short finetune on KL + MSE close the cross-entropy gap of a trained SAE? (the defaults)"""

TRAIN = "sae"
LOSS = "kl+mse"
