"""How much of the gap closes with a low-rank linear map on the reconstruction alone?"""

TRAIN = "adapter"
ADAPTER = "linear"
RANK = 768
SCHEDULE = "constant"
