"""TRAIN, a row each: the name of what learns, and which constants matter to it alone.

learners/start.py has the class of each row.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    legend: str  # in figures, filled with the constants in lower case
    sentence: str  # of the card: "A TopK SAE finetuned{sentence} on kl+mse"
    constants: tuple[str, ...] = ()  # that matter to it, in the order in which a card shows them
    seeded: bool = True  # whether SEED decides how it starts


LORA = ("RANK", "LORA_ALPHA", "LORA_DROPOUT")
TRAIN = {
    "sae": Row("SAE", "", seeded=False),
    "adapter": Row("{adapter} adapter", " through a {adapter} adapter", ("ADAPTER", "RANK")),
    "sae_lora": Row("LoRA on the SAE", " through LoRA", LORA),
    "lm_lora": Row(
        "LoRA on the LM, {blocks}",
        ", itself unchanged, by LoRA on the LM,",
        (*LORA, "LORA_BLOCKS"),
    ),
}
BLOCKS = {"all": "all blocks", "after": "blocks above", "one": "next block"}  # of LORA_BLOCKS
