"""Reads the tensors of an SAE file safely, under our names, and checks them.

Whoever made a file, none of its code runs, and no tensor is larger than the file.
"""

import os
import zipfile

import numpy as np
import torch
from safetensors.torch import load_file

from klsplice.errors import UserError, whole
from klsplice.formats.architectures import ARCHITECTURES

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _unreadable(path: str, e: Exception) -> UserError:
    """Torch's own text may advise weights_only=False, which would run the file's code."""
    unsafe = any(word in str(e) for word in ("weights_only", "Unsupported", "pickle", "mmap"))
    cause = " it asks to run code, or is no zip of tensors" if unsafe else whole(e)
    hint = "wanted plain tensors; take the file from its author's repository again"
    return UserError(f"{path} cannot be read safely:{cause}", hint)


def read_pickle(path: str) -> dict:
    """The tensors of a torch file, without running what may be pickled in it. Raises UserError."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:
        raise _unreadable(path, e) from None
    if not isinstance(tensors, dict) or not tensors:
        raise UserError(f"{path} holds a {type(tensors).__name__}", "wanted a dict of tensors")
    for name, t in tensors.items():
        kind = f"a {type(t).__name__}"
        if isinstance(t, torch.Tensor):
            kind = f"nested or {t.layout}, {t.dtype}"
            plain = t.layout == torch.strided and not (t.is_meta or t.is_nested)
            if plain and t.dtype in FLOATS + INTEGERS:
                if t.numel() * t.element_size() <= os.path.getsize(path):
                    continue
                kind = f"{tuple(t.shape)}, larger than the file"
        raise UserError(f"{path}: {name!r:.60} is {kind}", "wanted dense real tensors")
    return tensors


def read_safetensors(path: str) -> dict:
    """Raises UserError."""
    try:
        return load_file(path)
    except Exception as e:
        raise _unreadable(path, e) from None


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
        raise _unreadable(path, e) from None


def encoder_shape(tensors: dict, name: str, path: str) -> tuple[int, int]:
    """-> D, F of an encoder (D, F)."""
    if name not in tensors or tensors[name].ndim != 2:
        raise UserError(f"{path} has no {name} (D, F)", f"found {_list(tensors)}")
    return tuple(tensors[name].shape)


def _list(names) -> str:
    return f"{', '.join(sorted(map(str, names))[:8])!s:.200}"


def renamed(tensors: dict, names: dict, further: tuple, path: str) -> dict:
    """Their tensors under our names; nothing missing, nothing left over."""
    wanted = {theirs.removesuffix(".T") for theirs in names.values()}
    missing = wanted - tensors.keys() - {"threshold"}
    missing |= {n for n in further if n not in tensors and n != "threshold"}
    surplus = tensors.keys() - wanted - set(further)
    if missing or surplus:
        parts = {"lacks": missing, "has also": surplus}
        said = " and ".join(f"{verb} {_list(names)}" for verb, names in parts.items() if names)
        what = f"{path} {said}"
        raise UserError(what, "the file and its config do not belong together")
    weights = {}
    theirs_of = names | {name: name for name in further if name in tensors}
    for ours, theirs in theirs_of.items():
        t = tensors[theirs.removesuffix(".T")].detach()
        whole = ours in ("k", "group_sizes")
        if t.dtype not in (INTEGERS if whole else FLOATS):
            kind = "whole numbers" if whole else "floating point"
            raise UserError(f"{path}: {theirs} is {t.dtype}", f"wanted {kind}")
        if theirs.endswith(".T") and t.ndim == 2:
            t = t.T
        weights[ours] = (t if whole else t.float()).clone(memory_format=torch.contiguous_format)
    return weights


def check_shapes(weights: dict, source) -> None:
    """The shapes that the config of `source` (read.Source) asks for. Raises UserError.

    The capitals at the end of a name are its shape: W_enc_FD is (F, D)."""
    sizes, where = {"F": source.d_sae, "D": source.d_in}, source.where
    shapes = {}
    for name in weights:
        ending = name.rpartition("_")[2]
        if set(ending) <= sizes.keys():
            shapes[name] = tuple(sizes[letter] for letter in ending)
    if source.architecture == "jumprelu":
        if "threshold" not in weights:
            raise UserError(f"{where} has no thresholds", "a JumpReLU SAE has one a latent")
        shapes["threshold"] = (source.d_sae,)
    elif "threshold" in weights:
        shapes["threshold"] = ()
    for name, shape in shapes.items():
        t = weights[name]
        if tuple(t.shape) != shape:
            what = f"{where}: {name} is {tuple(t.shape)}, its config says {shape}"
            turned = len(shape) == 2 and tuple(t.shape) == shape[::-1]
            hint = (
                "it lies transposed" if turned else "the file and its config do not belong together"
            )
            raise UserError(what, hint)


def check_weights(weights: dict, source) -> None:
    """Shapes, finiteness, norms and k, against the config. Raises UserError."""
    F, where = source.d_sae, source.where
    check_shapes(weights, source)
    for name, t in weights.items():
        if not torch.isfinite(t).all():
            bad = int((~torch.isfinite(t)).sum())
            what = f"{where}: {name} holds {bad:,} values that are not finite"
            raise UserError(what, "the file is damaged; take it from its source again")
    if ARCHITECTURES[source.architecture].unit_rows:
        norm_F = weights["W_dec_FD"].norm(dim=1)
        least, most = norm_F.min().item(), norm_F.max().item()
        if least == 0:
            what = f"{where}: {int((norm_F == 0).sum()):,} rows of the decoder are zero"
            raise UserError(what, "wanted rows of norm 1, which training keeps so")
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


def unit_rows(weights: dict) -> None:
    """Put the norms of the decoder's rows into the encoder, in place."""
    norm_F1 = weights["W_dec_FD"].norm(dim=1, keepdim=True).clamp(min=1e-12)
    weights["W_dec_FD"] /= norm_F1
    weights["W_enc_FD"] *= norm_F1
    weights["b_enc_F"] *= norm_F1[:, 0]
    if "threshold" in weights:
        weights["threshold"] *= norm_F1[:, 0]
