"""LoRA on the one block that reads the SAE's output: how local is the repair?"""

TRAIN = "lm_lora"
LOSS = "kl"
LORA_BLOCKS = "one"
RANK = 64
SCHEDULE = "constant"
