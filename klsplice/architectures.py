"""The architectures, a row each: what public formats call them and how they store their tensors.

The class of a row is in sae.py. An SAE's tensors go by our names: W_enc_FD, b_enc_F, W_dec_FD,
b_dec_D, and what a class has beyond them.
"""

from dataclasses import dataclass

# Our tensor: theirs, ".T" where it lies transposed.
LINEAR = {"W_enc_FD": "encoder.weight", "b_enc_F": "encoder.bias", "W_dec_FD": "decoder.weight.T"}
MATRIX = {"W_enc_FD": "W_enc.T", "b_enc_F": "b_enc", "W_dec_FD": "W_dec", "b_dec_D": "b_dec"}
BOTH_BIASES = LINEAR | {"b_dec_D": "decoder.bias"}
THRESHOLD = {"k": "k", "threshold": "threshold"}


@dataclass(frozen=True)
class Architecture:
    """dictionary_learning's names, and where else such an SAE can be loaded.

    dict_class, trainer: of dictionary_learning's config.json; a class that no library has gives
    names of its own there. tensors: what to_save returns, its names -> theirs in its ae.pt.
    saelens: its name in SAELens, None where SAELens has no such class. saebench: module and loader
    in sae_bench.custom_saes, or None.
    has_k: a config says k. fresh: it can be trained from nothing; its class then finds no more than
    the usual four in `weights`. converts: a TopK becomes one, by a row of FROM_TOPK in
    learners/convert.py.
    unit_rows: the norm of its decoder's rows is 1, and which k win depends on that.
    adapts: its reconstruction is f(z) W_dec + b_dec, which is what an adapter that is folded and
    LoRA that is merged rely on.
    """

    dict_class: str
    trainer: str
    tensors: dict[str, str]
    saelens: str | None
    saebench: str | None
    has_k: bool = False
    fresh: bool = False
    converts: bool = False
    unit_rows: bool = False
    adapts: bool = True

    @property
    def ours_alone(self) -> bool:
        """Whether no library has such a class."""
        return self.saelens is None and self.saebench is None


ARCHITECTURES = {
    "topk": Architecture(
        "AutoEncoderTopK",
        "TopKTrainer",
        LINEAR | {"b_dec_D": "b_dec"} | THRESHOLD,
        saelens="topk",
        saebench="topk_sae.load_dictionary_learning_topk_sae",
        has_k=True,
        fresh=True,
        unit_rows=True,
    ),
    "batchtopk": Architecture(
        "BatchTopKSAE",
        "BatchTopKTrainer",
        LINEAR | {"b_dec_D": "b_dec"} | THRESHOLD,
        saelens="jumprelu",
        saebench="batch_topk_sae.load_dictionary_learning_batch_topk_sae",
        has_k=True,
        fresh=True,
        converts=True,
        unit_rows=True,
    ),
    "matryoshka": Architecture(
        "MatryoshkaBatchTopKSAE",
        "MatryoshkaBatchTopKTrainer",
        MATRIX | THRESHOLD | {"group_sizes": "group_sizes"},
        saelens="jumprelu",
        saebench="batch_topk_sae.load_dictionary_learning_matryoshka_batch_topk_sae",
        has_k=True,
        converts=True,
        unit_rows=True,
    ),
    "relu": Architecture(
        "AutoEncoder",
        "StandardTrainerAprilUpdate",
        LINEAR | {"b_dec_D": "bias"},
        saelens="standard",
        saebench="relu_sae.load_dictionary_learning_relu_sae",
        fresh=True,
    ),
    "jumprelu": Architecture(
        "JumpReluAutoEncoder",
        "JumpReluTrainer",
        MATRIX | {"threshold": "threshold"},
        saelens="jumprelu",
        saebench="jumprelu_sae.load_dictionary_learning_jump_relu_sae",
        converts=True,
    ),
}
