"""Writes an SAE folder that dictionary_learning, SAE Bench and SAELens read: ae.pt + config.json,
and beside them cfg.json + sae_weights.safetensors."""

import json
import os

import torch
from safetensors.torch import save_file

import sae as saes
from checkpoint import write_json
from formats import DICT_CLASSES, Source, unit_rows

TRAINERS = {  # written when the source had none of its own
    "topk": "TopKTrainer",
    "batchtopk": "BatchTopKTrainer",
    "matryoshka": "MatryoshkaBatchTopKTrainer",
    "relu": "StandardTrainerAprilUpdate",
    "jumprelu": "JumpReluTrainer",
}


def save(folder: str, sae: saes.SAE, source: Source, c, tokens, *, block: str = "") -> None:
    """Write `sae` as ae.pt + config.json and as cfg.json + sae_weights.safetensors.

    source: what it was made from, whose config is added to. c: the constants. tokens: data.Tokens.
    block: name of the LM's module after which it reads, where that is known (Splice.name).
    """
    os.makedirs(folder, exist_ok=True)
    weights = _writable(sae)
    config = _dictionary_learning_config(source, sae, c)
    _, names, further = DICT_CLASSES[config["trainer"]["dict_class"]]
    tensors = {}
    for ours, theirs in names.items():
        t = weights[ours]
        tensors[theirs.removesuffix(".T")] = (t.T if theirs.endswith(".T") else t).contiguous()
    extra = {
        "k": lambda: torch.tensor(sae.k, dtype=torch.int32),
        "threshold": lambda: weights["threshold"],
        "group_sizes": lambda: torch.tensor(sae.groups, dtype=torch.int64),
    }
    torch.save(tensors | {name: extra[name]() for name in further}, os.path.join(folder, "ae.pt"))
    write_json(os.path.join(folder, "config.json"), config)
    _save_saelens(folder, sae, weights, c, tokens, block)


def public(value):
    """A local path by its last part, since the rest says something of a machine; else as it is."""
    local = isinstance(value, str) and (os.path.isabs(value) or os.path.exists(value))
    return os.path.basename(os.path.normpath(value)) if local and value else value


def _writable(sae: saes.SAE) -> dict:
    """float32 CPU tensors; a ReLU SAE in the folded form in which every library reads it alike."""
    if isinstance(sae, saes.ReLU):
        sae.unscale()
    weights = {
        name: getattr(sae, name).detach().float().cpu().clone()
        for name in ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D")
    }
    if isinstance(sae, saes.JumpReLU):
        weights["threshold"] = sae.threshold_F.detach().float().cpu().clone()
    elif isinstance(sae, saes.TopK):
        weights["threshold"] = sae.threshold.float().cpu().clone()
    if not sae.unit_norm:  # the scale of a latent is free
        unit_rows(weights)
    return weights


def _dictionary_learning_config(source, sae, c) -> dict:
    """The source's config.json with what a reader needs added, never changed."""
    dict_class = next(n for n, (a, *_) in DICT_CLASSES.items() if a == sae.architecture)
    ours = {
        "trainer_class": TRAINERS[sae.architecture],
        "dict_class": dict_class,
        "activation_dim": sae.W_dec_FD.shape[1],
        "dict_size": sae.W_dec_FD.shape[0],
        "layer": c.LAYER,
        "lm_name": public(c.MODEL),
        "submodule_name": f"resid_post_layer_{c.LAYER}",
    }
    if isinstance(sae, saes.TopK):
        ours["k"] = sae.k
    if isinstance(sae, saes.ReLU):
        ours["l1_penalty"] = source.l1 or 0.0
    config = json.loads(json.dumps(source.config))  # a copy
    trainer = config.get("trainer", {})
    if sae.architecture != source.architecture:  # a converted SAE is of its new class
        trainer = {
            n: v for n, v in trainer.items() if n not in ("trainer_class", "dict_class", "k")
        }
    config["trainer"] = ours | trainer
    buffer = {"ctx_len": c.CONTEXT, "d_submodule": ours["activation_dim"], "io": "out"}
    if isinstance(config.setdefault("buffer", {}), dict):
        config["buffer"] = buffer | config["buffer"]
    finetune = ("SAE", "TRAIN", "LOSS", "LR", "TOKENS", "PASSES", "DATASET", "KEEP", "SEED")
    config["klsplice"] = {name.lower(): public(getattr(c, name)) for name in finetune}
    return config


def _save_saelens(folder, sae, weights, c, tokens, block) -> None:
    """SAELens v6: topk without a threshold; batchtopk and matryoshka are jumprelu there."""
    tensors = {
        "W_enc": weights["W_enc_FD"].T.contiguous(),
        "b_enc": weights["b_enc_F"],
        "W_dec": weights["W_dec_FD"],
        "b_dec": weights["b_dec_D"],
    }
    config = {
        "architecture": {"topk": "topk", "relu": "standard"}.get(sae.architecture, "jumprelu"),
        "d_in": sae.W_dec_FD.shape[1],
        "d_sae": sae.W_dec_FD.shape[0],
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.centred,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.0.0",
            "model_name": os.path.basename(os.path.normpath(c.MODEL)),
            "hook_name": f"blocks.{c.LAYER}.hook_resid_post",
            "prepend_bos": tokens.bos,
            "context_size": c.CONTEXT,
            "dataset_path": public(c.DATASET),
            "exclude_special_tokens": c.KEEP == "special",
            **({"hf_hook_name": block} if block else {}),
        },
    }
    if sae.architecture == "topk":
        config["k"] = sae.k
    elif config["architecture"] == "jumprelu":
        threshold = weights["threshold"].clamp(min=0)  # -1: a BatchTopK that has not learnt one
        tensors["threshold"] = threshold.expand(config["d_sae"]).contiguous()
    save_tensors(tensors, os.path.join(folder, "sae_weights.safetensors"))
    write_json(os.path.join(folder, "cfg.json"), config)


def save_tensors(tensors: dict, path: str) -> None:
    """A .safetensors that others may read as they may what stands beside it."""
    save_file(tensors, path)  # for its owner alone
    os.umask(mask := os.umask(0))
    os.chmod(path, 0o666 & ~mask)
