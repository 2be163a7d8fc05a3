"""The last 5 % on KL + MSE: a second run from a fresh run's folder, where its tokens end.

`python run.py recipes/tail.py SAE=runs/NAME SKIP_TOKENS=<that run's TOKENS>`
"""

TRAIN = "sae"
LOSS = "kl+mse"
