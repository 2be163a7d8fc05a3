"""What other libraries compute, folded exactly into the tensors of the classes in sae.py.

Each takes the tensors by our names and the config, whose blocks are all in one dict; it returns the
tensors as they are for our class.
"""

import torch

from klsplice.errors import UserError
from sae import unit_rows


def centre(weights: dict, config: dict) -> dict:
    """Of an encoder that reads x, for a class that reads x - b_dec."""
    weights["b_enc_F"] = weights["b_enc_F"] + weights["W_enc_FD"] @ weights["b_dec_D"]
    return weights


def uncentre(weights: dict, config: dict) -> dict:
    """Of an encoder that reads x - b_dec, for a class that reads x."""
    weights["b_enc_F"] = weights["b_enc_F"] - weights["W_enc_FD"] @ weights["b_dec_D"]
    return weights


def gated(weights: dict, config: dict) -> dict:
    """A gated SAE is a JumpReLU, since gate and magnitude share their rows (arXiv 2404.16014).

    With p = W_enc x a latent is e^r p + b_mag where that and p + b_gate are positive: where it is
    over 0 and over b_mag - e^r b_gate.
    """
    scale_F, magnitude_F = weights["r_mag_F"].exp(), weights["b_mag_F"]
    gate_F = magnitude_F - scale_F * weights["b_gate_F"]
    weights["W_enc_FD"] *= scale_F[:, None]
    return weights | {"b_enc_F": magnitude_F, "threshold": gate_F.clamp(min=0)}


def norms_in_latents(weights: dict, config: dict) -> dict:
    """Of SAELens' latents times the norm of their decoder's row: which k win is decided so."""
    return unit_rows(weights)


def unscaled(weights: dict, config: dict) -> dict:
    """Of SAELens' scale of each latent after its activation, which is 1 in what it publishes."""
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in weights and not (weights[name] == 1).all():
            what = f"the SAE scales its latents by {name} after they are found"
            raise UserError(what, "fold it into the decoder's rows with the library that wrote it")
    return weights


def thresholds(weights: dict, config: dict) -> dict:
    """One a latent, of their logarithms or of one for all."""
    threshold = weights.get("threshold")
    if "log_threshold" in weights:
        threshold = weights["log_threshold"].exp()
    elif threshold is None and "jump_relu_threshold" in config:
        threshold = torch.tensor(number(config, "jump_relu_threshold"))
    if threshold is not None and threshold.numel() == 1:
        threshold = torch.full_like(weights["b_enc_F"], threshold.item())
    return weights if threshold is None else weights | {"threshold": threshold}


def norms_in_gate(weights: dict, config: dict) -> dict:
    """Of Llama Scope, which holds a latent times its row's norm against the threshold."""
    if config.get("sparsity_include_decoder_norm", True):
        norm_F = weights["W_dec_FD"].norm(dim=1).clamp(min=1e-12)
        weights["threshold"] = weights["threshold"] / norm_F
    return weights


def average_norms(weights: dict, config: dict) -> dict:
    """Of Llama Scope, which reads and writes activations of norm sqrt(D) on average. The norms
    before are among the tensors, or in the config; or folded in already."""
    if config.get("norm_activation", "dataset-wise") != "dataset-wise":
        return weights
    root, factors = len(weights["b_dec_D"]) ** 0.5, []
    for name in ("in", "out"):
        norm = weights.get(f"norm_{name}")
        factors.append(root / (number(config, name) if norm is None else norm))
    weights["W_enc_FD"] *= factors[0]
    weights["W_dec_FD"] /= factors[1]
    weights["b_dec_D"] /= factors[1]
    return weights


def groups(weights: dict, config: dict) -> dict:
    """Of SAELens' nested groups, which are given by where each ends."""
    ends = config.get("matryoshka_widths")
    if not isinstance(ends, list) or not ends or not all(type(n) is int for n in ends):
        raise UserError(f"matryoshka_widths = {ends!r:.60}", "wanted whole numbers")
    latents = len(weights["b_enc_F"])
    ends = ends if ends[-1] == latents else [*ends, latents]
    return weights | {"group_sizes": torch.tensor([0, *ends]).diff()}


def number(config: dict, name: str) -> float:
    value = config.get(name)
    if type(value) not in (int, float) or not 0 < value < 1e9:
        raise UserError(f"{name} = {value!r:.60} in its config", "wanted a number over 0")
    return float(value)
