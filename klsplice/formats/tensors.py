"""Reads the tensors of an SAE file safely, under our names, and checks them.

Whoever made a file, none of its code runs, and no tensor is larger than the file.
"""

import os
import zipfile

import numpy as np
import torch
from safetensors.torch import load_file

from klsplice.architectures import ARCHITECTURES
from klsplice.errors import UserError, whole

SAVED = "wanted tensors alone, as torch.save(sae.state_dict(), PATH) writes them"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _unreadable(path: str, e: Exception, hint: str = SAVED) -> UserError:
    """Torch's own text may advise weights_only=False, which would run the file's code."""
    unsafe = any(word in str(e) for word in ("weights_only", "Unsupported", "pickle", "mmap"))
    cause = " it asks to run code, or is no zip of tensors" if unsafe else whole(e)
    return UserError(f"{path} cannot be read safely:{cause}", hint)


def read_pickle(path: str, unused: tuple = ()) -> dict:
    """The tensors of a torch file, without running what may be pickled in it; numbers as tensors.

    A state_dict may stand among other things. unused: names of what need not be tensors. Raises
    UserError."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:
        raise _unreadable(path, e) from None
    if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
        tensors = tensors["state_dict"]
    if not isinstance(tensors, dict) or not tensors:
        raise UserError(f"{path} holds a {type(tensors).__name__}", SAVED)
    for name, t in tensors.items():
        if name in unused:
            continue
        if type(t) is float or (type(t) is int and abs(t) < 2**63):
            tensors[name] = torch.tensor(t)
            continue
        kind = f"a {type(t).__name__}"
        if isinstance(t, torch.Tensor):
            kind = f"nested or {t.layout}, {t.dtype}"
            plain = t.layout == torch.strided and not (t.is_meta or t.is_nested)
            if plain and t.dtype in FLOATS + INTEGERS:
                if t.numel() * t.element_size() <= os.path.getsize(path):
                    continue
                kind = f"{tuple(t.shape)}, larger than the file"
        raise UserError(f"{path}: {name!r:.60} is {kind}", SAVED)
    return tensors


def read_safetensors(path: str) -> dict:
    """Raises UserError."""
    try:
        return load_file(path)
    except Exception as e:
        hint = "wanted what safetensors.torch.save_file(tensors, PATH) writes"
        raise _unreadable(path, e, hint) from None


def read_npz(path: str) -> dict:
    """The arrays of an .npz that is not compressed. Raises UserError."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > os.path.getsize(path):
            what = f"{path} is compressed: {unpacked:,} bytes are unpacked from it"
            raise UserError(what, "wanted the plain zip that np.savez makes")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except UserError:
        raise
    except Exception as e:
        raise _unreadable(path, e, "wanted what numpy.savez(PATH, **arrays) writes") from None


def read(path: str, unused: tuple = ()) -> dict:
    """The tensors of a file, without the first part that all their names share, as a wrapper
    (module., _orig_mod.) leaves it. Raises UserError.

    unused: what a torch file may have beside tensors."""
    if path.endswith((".pt", ".pth")):
        found = read_pickle(path, unused)
    else:
        found = (read_npz if path.endswith(".npz") else read_safetensors)(path)
    found = {str(name): t for name, t in found.items()}
    while len(shared := {name.partition(".")[0] for name in found}) == 1 and not shared & {*found}:
        found = {name.partition(".")[2]: t for name, t in found.items()}
    return {name.removeprefix("_orig_mod."): t for name, t in found.items()}


def listed(names) -> str:
    return f"{', '.join(sorted(map(str, names))[:8])!s:.200}"


def renamed(tensors: dict, source, path: str) -> dict:
    """Their tensors under our names; nothing missing, nothing left over. source: a source.Source"""
    names, unused = source.names, source.unused
    theirs = {ours: name.removesuffix(".T") for ours, name in names.items()}
    found = _without_scales(tensors, path)
    may_lack = {theirs.get(ours) for ours in ("k", "threshold")}  # the config has k
    missing = set(theirs.values()) - found.keys() - may_lack
    surplus = found.keys() - set(theirs.values()) - set(unused)
    if missing or surplus:
        parts = {"lacks": missing, "has also": surplus}
        said = " and ".join(f"{verb} {listed(names)}" for verb, names in parts.items() if names)
        what = f"{path} {said}"
        hint = f"wanted {listed(theirs.values())}, of a {source.architecture}"
        if not missing:
            hint += "; if it computes the same without the others, save it without them"
        raise UserError(what, hint)
    weights = {}
    for ours, name in theirs.items():
        if name not in found:
            continue
        t, whole = found[name], ours in ("k", "group_sizes")
        if t.dtype not in (INTEGERS if whole else FLOATS):
            kind = "whole numbers" if whole else "floating point"
            raise UserError(f"{path}: {name} is {t.dtype}", f"wanted {kind}")
        t = t.detach().T if names[ours].endswith(".T") and t.ndim == 2 else t.detach()
        weights[ours] = (t if whole else t.float()).clone(memory_format=torch.contiguous_format)
    return weights


def _without_scales(tensors: dict, path: str) -> dict:
    """Without SAELens' scale of each latent, where those are 1."""
    found = dict(tensors)
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in found and not (torch.is_tensor(found[name]) and (found.pop(name) == 1).all()):
            what = f"{path} scales its latents by {name} after they are found"
            raise UserError(what, "fold it into the decoder's rows with the library that wrote it")
    return found


def check_shapes(weights: dict, source) -> None:
    """The shapes that the config of `source` (read.Source) asks for, or where there is none the
    other tensors. Raises UserError, with their name and shape.

    The capitals at the end of a name are its shape: W_enc_FD is (F, D)."""
    sizes, where = {"F": source.d_sae, "D": source.d_in}, source.where
    shapes = {}
    for name in weights:
        ending = name.rpartition("_")[2]
        if set(ending) <= sizes.keys():
            shapes[name] = tuple(sizes[letter] for letter in ending)
    if "threshold" in weights:
        shapes["threshold"] = (source.d_sae,) if source.architecture == "jumprelu" else ()
    for name, wanted in shapes.items():
        found, theirs = tuple(weights[name].shape), source.names.get(name, name)
        if found != wanted:
            if theirs.endswith(".T"):  # as they lie in the file; only a matrix was turned
                wanted, found = wanted[::-1], found[::-1] if len(found) == 2 else found
            what = f"{where}: {theirs.removesuffix('.T')} is {found}, {source.said_by} {wanted}"
            turned = len(wanted) == 2 and found == wanted[::-1]
            raise UserError(what, "it lies transposed" if turned else "they do not belong together")


def check_weights(weights: dict, source) -> None:
    """Shapes, finiteness, norms and k, against the config. Raises UserError."""
    F, where = source.d_sae, source.where
    if source.architecture == "jumprelu" and "threshold" not in weights:
        raise UserError(f"{where} has no thresholds", "a JumpReLU SAE has one a latent")
    check_shapes(weights, source)
    for name, t in weights.items():
        if not torch.isfinite(t).all():
            bad = int((~torch.isfinite(t)).sum())
            what = f"{where}: {name} holds {bad:,} values that are not finite"
            raise UserError(what, "the file is damaged; take it from its source again")
    if ARCHITECTURES[source.architecture].unit_rows:
        norm_F = weights["W_dec_FD"].norm(dim=1)
        least, most = norm_F.min().item(), norm_F.max().item()
        if least < 0.999 or most > 1.001:
            print(f"warning: {where}: rows of the decoder have norm {least:.3g} to {most:.3g}")
    if source.architecture == "jumprelu" and (weights["threshold"] < 0).any():
        what = f"{where}: {int((weights['threshold'] < 0).sum())} negative thresholds"
        raise UserError(what, "a JumpReLU threshold is 0 or more")
    if source.k is not None:
        k = weights.get("k")
        if k is not None and (k.numel() != 1 or int(k) != source.k):
            what = f"{where}: k is {k.tolist()!s:.60} in the weights and {source.k} in the config"
            raise UserError(what, "the file and its config do not belong together")
        if not 1 <= source.k <= F:
            raise UserError(
                f"{where}: k = {source.k} with {F:,} latents", "wanted 1 <= k <= latents"
            )
    if "group_sizes" in weights:
        groups = weights["group_sizes"]
        if groups.ndim != 1 or int(groups.sum()) != F or ((groups < 1) | (groups > F)).any():
            what = f"{where}: group sizes {groups.tolist()!s:.60} do not sum to {F:,}"
            raise UserError(what, "the file and its config do not belong together")
