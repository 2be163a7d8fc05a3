"""KL + MSE for the end of a training: a second run from a fresh run's folder, where its tokens end.

`python run.py recipes/tail.py SAE=runs/NAME SKIP_TOKENS=<that run's> TOKENS=<5 % of that, say>`
"""

TRAIN = "sae"
LOSS = "kl+mse"
