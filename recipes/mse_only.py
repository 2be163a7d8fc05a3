"""The control: is it the KL, or would the same tokens of plain MSE do as well?"""

TRAIN = "sae"
LOSS = "mse"
