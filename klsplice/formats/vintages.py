"""Older layouts of SAE files, put as the newest version of their format has them."""

import torch

from klsplice.errors import UserError

NORMALISED = {  # SAELens: what the SAE was trained on -> why its files do not say enough
    "expected_average_only_in": "by a constant that its files do not hold",
    "constant_norm_rescale": "to one norm, each token by its own factor",
    "layer_norm": "to mean 0 and variance 1, each token by its own",
}


def saelens(config: dict, path: str) -> dict:
    """A cfg.json of SAELens 3 to 6 as version 6 has it. Raises UserError.

    Versions 3 to 5 named the activation instead of the architecture, kept k among its arguments,
    and had what is in metadata now at the top.
    """
    metadata = config.get("metadata")
    new = config | (metadata if isinstance(metadata, dict) else {})
    activation = new.get("activation_fn_str") or new.get("activation_fn") or "relu"
    options = new.get("activation_fn_kwargs")
    architecture = new.get("architecture") or "standard"
    if architecture == "standard" and activation == "topk":
        architecture = "topk"
    elif architecture == "standard" and activation != "relu":
        what = f"{path}: activation_fn = {activation!r:.60} is not supported"
        raise UserError(what, "wanted 'relu' or 'topk'")
    if architecture == "topk" and "k" not in new and isinstance(options, dict):
        new["k"] = options.get("k")
    scale = new.get("normalize_activations") or "none"  # false or null before version 4
    if scale != "none":
        why = NORMALISED.get(str(scale), "in a way not known here")
        what = f"{path}: the SAE reads activations that are scaled {why}"
        raise UserError(what, f"normalize_activations is {str(scale)[:40]!r}; wanted 'none'")
    new["hook_name"] = new.get("hook_name") or new.get("hook_point")
    return new | {"architecture": architecture, "normalize_activations": "none"}


def plain(tensors: dict, path: str) -> dict:
    """Tensors without torch.compile's prefix, and without scales of 1. Raises UserError."""
    found = {str(name).removeprefix("_orig_mod."): t for name, t in tensors.items()}
    for name in ("scaling_factor", "finetuning_scaling_factor"):  # of each latent, in SAELens
        if name in found and not (torch.is_tensor(found[name]) and (found.pop(name) == 1).all()):
            what = f"{path} scales its latents by {name} after they are found"
            raise UserError(what, "fold it into the decoder's rows with the library that wrote it")
    return found


def with_k(tensors: dict, k: int | None) -> dict:
    """dictionary_learning kept k in the config alone before December 2024."""
    if k is None or "k" in tensors:
        return tensors
    return tensors | {"k": torch.tensor(min(k, 2**31))}
