"""What other libraries compute, folded exactly into the tensors of the classes in sae.py.

Each takes the tensors by our names, the capitals of a name being its shape, changes them and
returns them.
"""

import torch


def centring(architecture: str, centred: bool) -> tuple:
    """The fold of an encoder that reads x - b_dec (centred) or x."""
    ours = architecture != "jumprelu"
    return () if centred == ours else (centre if ours else uncentre,)


def centre(weights: dict) -> dict:
    """Of an encoder that reads x, for a class that reads x - b_dec."""
    weights["b_enc_F"] = weights["b_enc_F"] + weights["W_enc_FD"] @ weights["b_dec_D"]
    return weights


def uncentre(weights: dict) -> dict:
    """Of an encoder that reads x - b_dec, for a class that reads x."""
    weights["b_enc_F"] = weights["b_enc_F"] - weights["W_enc_FD"] @ weights["b_dec_D"]
    return weights


def gated(weights: dict) -> dict:
    """A gated SAE is a JumpReLU, since gate and magnitude share their rows (arXiv 2404.16014).

    With p = W_enc x a latent is e^r p + b_mag where that and p + b_gate are positive: where it is
    over 0 and over b_mag - e^r b_gate.
    """
    scale_F, magnitude_F = weights.pop("r_mag_F").exp(), weights.pop("b_mag_F")
    gate_F = magnitude_F - scale_F * weights.pop("b_gate_F")
    weights["W_enc_FD"] *= scale_F[:, None]
    return weights | {"b_enc_F": magnitude_F, "threshold": gate_F.clamp(min=0)}


def unit_rows(weights: dict) -> dict:
    """Put the norms of the decoder's rows into the encoder, and into a threshold a latent."""
    norm_F = weights["W_dec_FD"].norm(dim=1).clamp(min=1e-12)
    weights["W_dec_FD"] /= norm_F[:, None]
    weights["W_enc_FD"] *= norm_F[:, None]
    weights["b_enc_F"] *= norm_F
    if "threshold" in weights and weights["threshold"].ndim:
        weights["threshold"] *= norm_F
    return weights


def norms_in_gate(weights: dict) -> dict:
    """Of a threshold that a latent times the norm of its decoder's row is held against."""
    weights["threshold"] = weights["threshold"] / weights["W_dec_FD"].norm(dim=1).clamp(min=1e-12)
    return weights


def average_norms(weights: dict, given: dict) -> dict:
    """Of an SAE that reads and writes activations of norm sqrt(D) on average.

    The norms that they had before are norm_in and norm_out among the tensors, or `in` and `out` of
    `given`."""
    root = len(weights["b_dec_D"]) ** 0.5
    into, out = (root / weights.pop(f"norm_{n}", given.get(n)) for n in ("in", "out"))
    weights["W_enc_FD"] *= into
    weights["W_dec_FD"] /= out
    weights["b_dec_D"] /= out
    return weights


def log_threshold(weights: dict) -> dict:
    return weights | {"threshold": weights.pop("log_threshold_F").exp()}


def shared_threshold(weights: dict) -> dict:
    return one_threshold(weights, weights.pop("threshold_of_all").item())


def one_threshold(weights: dict, value: float) -> dict:
    return weights | {"threshold": torch.full_like(weights["b_enc_F"], value)}


def groups(weights: dict, ends: list[int]) -> dict:
    """Of nested groups that are given by where each ends."""
    sizes = torch.tensor([0, *ends]).diff()
    return weights | {"group_sizes": sizes}
