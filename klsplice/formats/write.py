"""Writes an SAE folder that dictionary_learning, SAE Bench and SAELens read: ae.pt + config.json,
and beside them cfg.json + sae_weights.safetensors.

Of a transcoder SAELens' files alone; of one that is a TopK, which SAELens has not, sparsify's.
Where every block has one, circuit-tracer's set, too.
"""

import os

import torch
import yaml

from klsplice import site
from klsplice.formats.families import SKIP, SPARSIFY, TRACED
from klsplice.storage import public, save_tensors, write_json
from sae import MATRIX

SUBMODULES = {  # dictionary_learning's names; of others TransformerLens'
    site.RESIDUAL: "resid_post_layer_{}",
    "hook_mlp_out": "mlp_out_layer_{}",
    "hook_attn_out": "attention_out_layer_{}",
}
FINETUNE = ("SAE", "TRAIN", "LOSS", "LR", "TOKENS", "PASSES", "DATASET", "KEEP", "SEED")


def save(folder: str, sae, source, constants: dict, *, bos: bool, block: str = "") -> None:
    """Write `sae` (a sae.SAE) for every library that has its architecture.

    source: the read.Source that it was made from. constants: of the run, by name. bos: whether
    contexts start with BOS. block: the LM's module after which it reads, where that is known.
    """
    os.makedirs(folder, exist_ok=True)
    kind, weights = type(sae), sae.to_save()
    if sae.is_transcoder:
        return _save_transcoder(folder, sae, weights, constants, bos)
    torch.save(_renamed(weights, kind.tensors), os.path.join(folder, "ae.pt"))
    config = _dictionary_learning_config(kind, weights, source, constants)
    write_json(os.path.join(folder, "config.json"), config)
    if kind.saelens is not None:
        config, tensors = _saelens(kind, weights, constants, bos, block)
        save_tensors(tensors, os.path.join(folder, "sae_weights.safetensors"))
        write_json(os.path.join(folder, "cfg.json"), config)


def _save_transcoder(folder: str, sae, weights, constants, bos) -> None:
    about = {name.lower(): public(constants[name]) for name in FINETUNE}
    of = site.at(constants["SITE"], constants["LAYER"])
    reads, writes = (f"blocks.{of.layer}.{point}" for point in of[1:])
    skip = SKIP if "W_skip_DD" in weights else {}
    if sae.architecture == "topk":
        tensors = _renamed(weights, SPARSIFY.names | skip)
        d_sae, d_in = weights["W_dec_FD"].shape
        config = {"activation": "topk", "k": int(weights["k"]), "num_latents": d_sae}
        config |= {"d_in": d_in, "expansion_factor": d_sae // d_in, "normalize_decoder": False}
        config |= {"multi_topk": False, "skip_connection": bool(skip)}
        config |= {"transcode": True, "hook_point_in": reads, "hook_point_out": writes}
        config |= {"model_name": public(constants["MODEL"])}
        file = "sae.safetensors"
    else:
        config, tensors = _saelens(type(sae), weights, constants, bos, "")
        name = "jumprelu_" * (type(sae).saelens == "jumprelu") + "skip_" * bool(skip)
        config |= {"architecture": f"{name}transcoder", "apply_b_dec_to_input": False}
        config["d_out"] = config["d_in"]
        config["metadata"] |= {"hook_name": reads, "hook_name_out": writes}
        file, tensors = "sae_weights.safetensors", tensors | _renamed(weights, skip)
    save_tensors(tensors, os.path.join(folder, file))
    write_json(os.path.join(folder, "cfg.json"), config | {"klsplice": about})


def save_set(folder: str, saes: list, reads: str, writes: str, constants: dict) -> None:
    """Transcoders of all blocks, of one architecture and size, as circuit-tracer loads a set."""
    first = saes[0].to_save()
    config = {"model_name": public(constants["MODEL"]), "model_kind": "transcoder_set"}
    config |= {"feature_input_hook": reads, "feature_output_hook": writes}
    config |= {"scan": os.path.basename(os.path.dirname(os.path.abspath(folder)))}
    if saes[0].architecture == "topk":
        config |= {"activation": "topk", "k": int(first["k"])}
    with open(os.path.join(folder, "config.yaml"), "w", encoding="utf-8") as f:
        yaml.safe_dump(config, f)
    for layer, sae in enumerate(saes):
        weights = sae.to_save()
        tensors = _renamed(weights, TRACED | (SKIP if "W_skip_DD" in weights else {}))
        if type(sae).saelens == "jumprelu":
            tensors["activation_function.threshold"] = _thresholds(weights)
        save_tensors(tensors, os.path.join(folder, f"layer_{layer}.safetensors"))


def _renamed(weights: dict, names: dict[str, str]) -> dict:
    """Our tensors under a library's names."""
    theirs = {}
    for ours, name in names.items():
        t = weights[ours]
        theirs[name.removesuffix(".T")] = (t.T if name.endswith(".T") else t).contiguous()
    return theirs


def _dictionary_learning_config(kind, weights: dict, source, constants: dict) -> dict:
    """The source's config.json, with what a reader needs added and nothing changed."""
    d_sae, d_in = weights["W_dec_FD"].shape
    ours = {
        "trainer_class": kind.trainer,
        "dict_class": kind.dict_class,
        "activation_dim": d_in,
        "dict_size": d_sae,
        "layer": constants["LAYER"],
        "lm_name": public(constants["MODEL"]),
        "submodule_name": _submodule(constants),
    }
    if kind.has_k:
        ours["k"] = int(weights["k"])
    if kind.architecture == "relu":
        ours["l1_penalty"] = source.l1 or 0.0
    config = dict(source.config)
    trainer = config.get("trainer", {})
    if trainer.get("dict_class", kind.dict_class) != kind.dict_class:  # converted, or folded
        of_old = ("trainer_class", "dict_class", "k")
        trainer = {n: v for n, v in trainer.items() if n not in of_old}
    config["trainer"] = ours | trainer
    buffer = {"ctx_len": constants["CONTEXT"], "d_submodule": d_in, "io": "out"}
    if isinstance(config.setdefault("buffer", {}), dict):
        config["buffer"] = buffer | config["buffer"]
    config["klsplice"] = {name.lower(): public(constants[name]) for name in FINETUNE}
    return config


def _submodule(constants: dict) -> str:
    layer, where = constants["LAYER"], constants["SITE"]
    return SUBMODULES.get(where, "blocks.{}." + where).format(layer)


def _saelens(kind, weights, constants, bos, block) -> tuple[dict, dict]:
    """-> cfg.json and tensors of SAELens v6, where a topk has no threshold."""
    tensors = _renamed(weights, MATRIX)
    d_sae, d_in = weights["W_dec_FD"].shape
    config = {
        "architecture": kind.saelens,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": kind.centred,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if constants["SITE"] == "attn.hook_z" else "none",
        "metadata": {
            "sae_lens_version": "6.0.0",
            "model_name": os.path.basename(os.path.normpath(constants["MODEL"])),
            "hook_name": f"blocks.{constants['LAYER']}.{constants['SITE']}",
            "prepend_bos": bos,
            "context_size": constants["CONTEXT"],
            "dataset_path": public(constants["DATASET"]),
            "exclude_special_tokens": constants["KEEP"] == "special",
            **({"hf_hook_name": block} if block else {}),
        },
    }
    if kind.saelens == "topk":
        config["k"] = int(weights["k"])
    elif kind.saelens == "jumprelu":
        tensors["threshold"] = _thresholds(weights)
    return config, tensors


def _thresholds(weights: dict) -> torch.Tensor:
    """One a latent; -1 is of a BatchTopK that has not learnt one."""
    return weights["threshold"].clamp(min=0).expand(len(weights["b_enc_F"])).contiguous()
