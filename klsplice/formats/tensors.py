"""Reads and checks the tensors of an SAE file, without running any of its code."""

import re

import numpy as np
import torch
from safetensors.torch import load

from klsplice.errors import UserError
from sae import ARCHITECTURES

WHOLE = ("k", "group_sizes")  # ours that are whole numbers


def read(path: str) -> tuple[dict, dict]:
    """-> the tensors and numbers of a file by name, without what a wrapper (module., _orig_mod.)
    put before all of them; and whatever else a torch file has. Raises UserError."""
    try:
        found = _loaded(path)
        found = found.get("state_dict", found)
        numbers = {n: torch.tensor(t) for n, t in found.items() if type(t) in (int, float)}
        found = {str(name): t for name, t in (found | numbers).items()}
    except Exception as e:  # what torch says of it may advise to run the file's code
        what = f"{path} cannot be read as tensors alone ({type(e).__name__})"
        raise UserError(what, "wanted what torch.save(sae.state_dict(), PATH) writes") from None
    while len(shared := {name.partition(".")[0] for name in found}) == 1 and not shared & {*found}:
        found = {name.partition(".")[2]: t for name, t in found.items()}
    tensors = {name: t for name, t in found.items() if isinstance(t, torch.Tensor)}
    return tensors, {name: t for name, t in found.items() if name not in tensors}


def _loaded(path: str):
    if path.endswith(".npz"):
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    if path.endswith(".safetensors"):
        with open(path, "rb") as file:  # which works where files cannot be mapped, too
            return load(file.read())
    return torch.load(path, map_location="cpu", weights_only=True)


def listed(names) -> str:
    return f"{', '.join(sorted(map(str, names))[:8]):.200}"


def is_needed(ours: str) -> bool:
    """Whether a file must have it: all whose name ends in their shape, W_enc_FD."""
    return re.search("_[FD]+$", ours) is not None


def renamed(tensors: dict, names: dict[str, str], sizes: dict[str, int], path: str) -> dict:
    """Their tensors under our names, as float32 (k and group sizes as they are) and as copies.

    names: ours -> theirs, ".T" where it lies transposed. sizes: F and D; the capitals at the end of
    a name of ours are its shape, so W_enc_FD is (F, D). Raises UserError."""
    weights = {}
    for ours, theirs in names.items():
        name = theirs.removesuffix(".T")
        if name not in tensors:
            continue
        t = tensors[name].detach()
        if t.is_floating_point() == (ours in WHOLE) or t.layout != torch.strided:
            raise UserError(f"{path}: {name} is {t.dtype}, {t.layout}", "wanted plain numbers")
        t = t.T if theirs.endswith(".T") and t.ndim == 2 else t
        t = t if ours in WHOLE else t.float()
        if is_needed(ours):
            shape = [sizes[letter] for letter in ours.rpartition("_")[2]]
            if list(t.shape) != shape:
                what = f"{path}: {name} is {list(t.shape)}, the encoder's sizes say {shape}"
                raise UserError(what, "it lies transposed, or they do not belong together")
        weights[ours] = t.clone(memory_format=torch.contiguous_format)
    return weights


def check_weights(weights: dict, source) -> None:
    """Against each other and the config. source: source.Source. Raises UserError."""
    for fault in _faults(weights, source.architecture, source.d_sae, source.k):
        raise UserError(f"{source.where}: {fault}", "file and config are damaged, or of two SAEs")
    if ARCHITECTURES[source.architecture].unit_norm and not source.site.is_transcoder:
        norm_F = weights["W_dec_FD"].norm(dim=1)
        if ((norm_F - 1).abs() > 1e-3).any():
            norms = f"{norm_F.min():.3g} to {norm_F.max():.3g}"
            print(f"warning: {source.where}: rows of the decoder have norm {norms}")


def _faults(weights: dict, architecture: str, F: int, k: int | None):
    """Yields what is wrong, in a few words."""
    for name, t in weights.items():
        if not torch.isfinite(t).all():
            yield f"{name} holds values that are not finite"
    threshold, groups, inside = (weights.get(n) for n in ("threshold", "group_sizes", "k"))
    jumprelu = architecture == "jumprelu"
    shape = None if threshold is None else tuple(threshold.shape)
    if shape not in ([(F,)] if jumprelu else [None, ()]):
        yield f"threshold is {shape}"
    elif jumprelu and (threshold < 0).any():
        yield "negative thresholds"
    if k is not None and not 1 <= k <= F:
        yield f"k = {k} with {F:,} latents"
    if None not in (k, inside) and inside.tolist() != k:
        yield f"k is {inside.tolist()!s:.60} in the weights and {k} in the config"
    if architecture == "matryoshka":
        sizes = groups.tolist() if groups is not None and groups.ndim == 1 else []
        if min(sizes, default=0) < 1 or sum(sizes) != F:
            yield f"group_sizes {sizes!s:.60} do not sum to {F:,}"
