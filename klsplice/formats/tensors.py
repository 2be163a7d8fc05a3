"""Reads the tensors of an SAE file without running any of its code, under our names, and checks
them."""

import re

import numpy as np
import torch
from safetensors.torch import load_file

from klsplice.errors import UserError
from sae import ARCHITECTURES

SAVED = "wanted tensors alone, as torch.save(sae.state_dict(), PATH) writes them"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
WHOLE = ("k", "group_sizes")  # ours that are whole numbers


def read(path: str) -> tuple[dict, dict]:
    """-> the tensors of a file by name, and whatever else a torch file has.

    The names are without a first part that they all share, as a wrapper (module., _orig_mod.)
    leaves it. Numbers are tensors. Raises UserError."""
    try:
        found = _loaded(path)
        found = found.get("state_dict", found)
        found = {
            str(n): torch.tensor(t) if type(t) in (int, float) else t for n, t in found.items()
        }
    except Exception as e:  # what torch says of it may advise to run the file's code
        what = f"{path} cannot be read as tensors alone ({type(e).__name__})"
        raise UserError(what, SAVED) from None
    while len(shared := {name.partition(".")[0] for name in found}) == 1 and not shared & {*found}:
        found = {name.partition(".")[2]: t for name, t in found.items()}
    found = {name.removeprefix("_orig_mod."): t for name, t in found.items()}
    tensors = {name: t for name, t in found.items() if isinstance(t, torch.Tensor)}
    return tensors, {name: t for name, t in found.items() if name not in tensors}


def _loaded(path: str):
    if path.endswith(".npz"):
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    if path.endswith(".safetensors"):
        return load_file(path)
    safely = {"map_location": "cpu", "weights_only": True}
    try:
        return torch.load(path, mmap=True, **safely)
    except RuntimeError:  # the older form, or a disk that cannot map files
        return torch.load(path, mmap=False, **safely)


def listed(names) -> str:
    return f"{', '.join(sorted(map(str, names))[:8]):.200}"


def is_needed(ours: str) -> bool:
    """Whether a file must have it: all whose name ends in their shape, W_enc_FD."""
    return re.search("_[FD]+$", ours) is not None


def renamed(tensors: dict, names: dict[str, str], path: str) -> dict:
    """Their tensors under our names, as float32 (k and group sizes as they are) and as copies.

    names: ours -> theirs, ".T" where it lies transposed. Raises UserError."""
    weights = {}
    for ours, theirs in names.items():
        name = theirs.removesuffix(".T")
        if name not in tensors:
            continue
        t, kinds = tensors[name].detach(), INTEGERS if ours in WHOLE else FLOATS
        if t.dtype not in kinds or t.layout != torch.strided:
            wanted = "whole numbers" if ours in WHOLE else "floating point"
            raise UserError(f"{path}: {name} is {t.dtype}, {t.layout}", f"wanted {wanted}")
        t = t.T if theirs.endswith(".T") and t.ndim == 2 else t
        t = t if ours in WHOLE else t.float()
        weights[ours] = t.clone(memory_format=torch.contiguous_format)
    return weights


def check_shapes(weights: dict, sizes: dict[str, int], where: str) -> None:
    """sizes: F and D. The capitals at the end of a name are its shape: W_enc_FD is (F, D). Raises
    UserError."""
    for name in filter(is_needed, weights):
        wanted = tuple(sizes[letter] for letter in name.rpartition("_")[2])
        shape = tuple(weights[name].shape)
        if shape != wanted:
            what = f"{where}: {name} is {shape}, the encoder's and the config's sizes say {wanted}"
            turned = len(wanted) == 2 and shape == wanted[::-1]
            raise UserError(what, "it lies transposed" if turned else "they do not belong together")


def check_weights(weights: dict, source) -> None:
    """Against each other and the config. source: source.Source. Raises UserError."""
    check_shapes(weights, {"F": source.d_sae, "D": source.d_in}, source.where)
    for fault in _faults(weights, source.architecture, source.d_sae, source.k):
        raise UserError(f"{source.where}: {fault}", "file and config are damaged, or of two SAEs")
    if ARCHITECTURES[source.architecture].unit_norm:
        norm_F = weights["W_dec_FD"].norm(dim=1)
        least, most = norm_F.min().item(), norm_F.max().item()
        if least < 0.999 or most > 1.001:
            where = source.where
            print(f"warning: {where}: rows of the decoder have norm {least:.3g} to {most:.3g}")


def _faults(weights: dict, architecture: str, F: int, k: int | None):
    """Yields what is wrong, in a few words."""
    for name, t in weights.items():
        if not torch.isfinite(t).all():
            yield f"{name} holds values that are not finite"
    threshold, groups, inside = (weights.get(n) for n in ("threshold", "group_sizes", "k"))
    one_a_latent = architecture == "jumprelu"
    if threshold is None and one_a_latent:
        yield "no threshold, of which a JumpReLU has one a latent"
    elif threshold is not None and threshold.shape != ((F,) if one_a_latent else ()):
        yield f"threshold is {tuple(threshold.shape)}"
    elif one_a_latent and (threshold < 0).any():
        yield "negative thresholds"
    if k is not None and not 1 <= k <= F:
        yield f"k = {k} with {F:,} latents"
    if None not in (k, inside) and (inside.numel() != 1 or int(inside) != k):
        yield f"k is {inside.tolist()!s:.60} in the weights and {k} in the config"
    if groups is None and "group_sizes" in ARCHITECTURES[architecture].tensors:
        yield "no group_sizes"
    elif groups is not None:
        inside = groups.ndim == 1 and ((groups >= 1) & (groups <= F)).all()
        if not inside or int(groups.sum()) != F:
            yield f"the groups {groups.tolist()!s:.60} do not sum to {F:,}"
