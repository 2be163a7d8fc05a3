"""An adapter on an SAE that was finetuned before: do the two add up?

`python run.py recipes/two_stage.py SAE=runs/<a finished kl_mse run>`
"""

TRAIN = "adapter"
ADAPTER = "linear"
RANK = 16
SCHEDULE = "constant"
