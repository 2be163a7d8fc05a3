"""What does KL + MSE reach from the first token, against MSE with a short tail (tail.py)?"""

SAE = "fresh"
LOSS = "kl+mse"
LR = 3e-4
WARMUP = 20
