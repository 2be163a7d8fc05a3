"""LoRA on all blocks of the LM around a frozen SAE, on KL alone (arXiv 2501.19406)."""

TRAIN = "lm_lora"
LOSS = "kl"
LORA_BLOCKS = "all"
RANK = 64
SCHEDULE = "constant"
