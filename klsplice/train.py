"""TRAIN, a row each: the name of what learns, and which constants matter to it alone.

learners/start.py has the class of each row.
"""

from typing import NamedTuple


class Row(NamedTuple):
    sentence: str = ""  # of the card: "A TopK SAE finetuned{sentence} on kl+mse"
    constants: tuple[str, ...] = ()  # that matter to it, in the order in which a card shows them


LORA = ("RANK", "LORA_ALPHA", "LORA_DROPOUT")
TRAIN = {
    "sae": Row(),
    "adapter": Row(" through a {adapter} adapter", ("ADAPTER", "RANK")),
    "sae_lora": Row(" through LoRA", LORA),
    "lm_lora": Row(", itself unchanged, by LoRA on the LM,", (*LORA, "LORA_BLOCKS")),
}
