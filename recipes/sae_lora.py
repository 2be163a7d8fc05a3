"""Low-rank updates of encoder and decoder instead of all their weights; merged on saving."""

TRAIN = "sae_lora"
RANK = 64
LORA_ALPHA = 32
SCHEDULE = "constant"
