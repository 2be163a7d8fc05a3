"""LoRA on the blocks above the SAE only: the SAE's input stays what it was."""

TRAIN = "lm_lora"
LOSS = "kl"
LORA_BLOCKS = "after"
RANK = 64
SCHEDULE = "constant"
