"""The same with one hidden ReLU layer: is the map's linearity what limits it?"""

TRAIN = "adapter"
ADAPTER = "mlp"
RANK = 768
SCHEDULE = "constant"
