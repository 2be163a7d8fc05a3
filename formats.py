"""Reads SAE folders; export.py writes them.

Read: dictionary_learning and SAE Bench (ae.pt + config.json), SAELens (cfg.json +
sae_weights.safetensors), Gemma Scope 1 (params.npz) and 2 (params.safetensors + config.json), and
the `sae/` of an earlier run. Whoever made a file, none of its code runs, and no tensor is larger
than the file.
"""

import copy
import json
import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from safetensors.torch import load_file

import distributed
import sae as saes
from errors import UserError, first_line, near_path

# Our tensor: theirs, ".T" where it lies transposed.
LINEAR = {"W_enc_FD": "encoder.weight", "b_enc_F": "encoder.bias", "W_dec_FD": "decoder.weight.T"}
MATRIX = {"W_enc_FD": "W_enc.T", "b_enc_F": "b_enc", "W_dec_FD": "W_dec", "b_dec_D": "b_dec"}
# What a dict_class of dictionary_learning is here: architecture, tensor names, further tensors.
DICT_CLASSES = {
    "AutoEncoderTopK": ("topk", LINEAR | {"b_dec_D": "b_dec"}, ("k", "threshold")),
    "BatchTopKSAE": ("batchtopk", LINEAR | {"b_dec_D": "b_dec"}, ("k", "threshold")),
    "MatryoshkaBatchTopKSAE": ("matryoshka", MATRIX, ("k", "threshold", "group_sizes")),
    "AutoEncoder": ("relu", LINEAR | {"b_dec_D": "bias"}, ()),
    "JumpReluAutoEncoder": ("jumprelu", MATRIX, ("threshold",)),
}
SAELENS = {"topk": "topk", "standard": "relu", "jumprelu": "jumprelu"}
FILES = ("ae.pt", "config.json", "cfg.json", "sae_weights.safetensors", "params.npz")
FILES += ("params.safetensors", "adapter.safetensors")
MAX_CONFIG_BYTES = 1_000_000
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass
class Source:
    """An SAE before its weights are asked for; `build` makes the module of it."""

    where: str  # as the constant names it
    architecture: str
    d_in: int | None
    d_sae: int
    k: int | None = None
    l1: float | None = None
    layer: int | None = None
    lm_name: str | None = None
    commit: str | None = None  # of the Hub repository
    licence: str | None = None  # as its README.md names it
    config: dict = field(default_factory=dict)  # a dictionary_learning config.json to add to
    weights: Callable[[], dict] | None = None  # reads the tensors, under our names

    @property
    def fresh(self) -> bool:
        return self.weights is None


def build(source: Source, weights: dict) -> saes.SAE:
    """The module of `source.architecture` around `weights` (see sae.SAE)."""
    make = {
        "topk": lambda: saes.TopK(weights, k=source.k),
        "batchtopk": lambda: saes.BatchTopK(weights, k=source.k),
        "matryoshka": lambda: saes.Matryoshka(
            weights, k=source.k, groups=weights["group_sizes"].tolist()
        ),
        "relu": lambda: saes.ReLU(weights, l1=source.l1 or 0.0),
        "jumprelu": lambda: saes.JumpReLU(weights),
    }
    return make[source.architecture]()


@distributed.in_turn
def open_source(c, lm_config) -> Source:
    """The SAE that the constants name, found, fitted to the LM, read and checked; or a fresh one.

    Raises UserError in seconds, before any LM is loaded.
    """
    width = lm_config.get_text_config().hidden_size
    if c.SAE == "fresh":
        relu = c.ARCHITECTURE == "relu"
        sizes = {"d_in": width, "d_sae": c.D_SAE, "k": None if relu else c.K, "l1": c.L1}
        return Source("fresh", c.ARCHITECTURE or "topk", **sizes)
    source = open_sae(c.SAE, c.SAE_REVISION)
    if source.architecture == "relu" and not source.l1:  # SAELens files have none
        source.l1 = c.L1
    check_fits(source, width, model=c.MODEL, layer=c.LAYER, strict=c.CHECK_SAE)
    weights = read_weights(source)
    source.weights = lambda: weights
    return source


def read_weights(source: Source) -> dict:
    """The tensors under our names, checked against the config."""
    weights = source.weights()
    _check_weights(weights, source)
    return weights


def copy_of(sae: saes.SAE) -> saes.SAE:
    """A copy on the CPU, for folding and merging."""
    return copy.deepcopy(sae).cpu()


# ---- finding ---------------------------------------------------------------------------------


def open_sae(where: str, revision: str, *, bare: bool = False) -> Source:
    """Find an SAE folder and read its config. Raises UserError; no weights are read yet.

    bare: take the SAE of a folder that has an adapter beside it, without that.
    """
    folder, commit = _locate(where, revision)
    has = {name: os.path.join(folder, name) for name in FILES if _is_file(folder, name)}
    if "adapter.safetensors" in has and not bare:
        what = f"SAE = {where} is an SAE with an adapter, which no SAE class can hold"
        raise UserError(what, "start from that run's own source SAE instead")
    if {"ae.pt", "config.json"} <= has.keys():
        source = _open_dictionary_learning(where, has)
    elif {"cfg.json", "sae_weights.safetensors"} <= has.keys():
        source = _open_saelens(where, has)
    elif {"params.safetensors", "config.json"} <= has.keys():
        source = _open_gemma_scope_2(where, has)
    elif "params.npz" in has:
        source = _open_gemma_scope(where, has)
    else:
        there = ", ".join(sorted(os.listdir(folder))[:8]) or "nothing"
        raise UserError(
            f"SAE = {where} holds no SAE that is read here; found {there}",
            "wanted ae.pt + config.json, cfg.json + sae_weights.safetensors, params.npz, or "
            "params.safetensors + config.json",
        )
    source.commit = commit
    source.licence = _licence(folder, commit)
    return source


def _licence(folder: str, commit: str | None) -> str | None:
    """The licence in the front matter of the README.md beside an SAE, or of its Hub repository."""
    places = [folder]
    while commit and os.path.basename(places[-1]) not in (commit, ""):
        places.append(os.path.dirname(places[-1]))
    for path in (os.path.join(place, "README.md") for place in places):
        if os.path.isfile(path):
            with open(path, encoding="utf-8", errors="replace") as f:
                front = re.match(r"---\n(.*?)\n---", f.read(100_000), re.S)
            found = front and re.search(r"^license: *([\w.-]{1,60}) *$", front[1], re.M)
            if found:
                return found[1]
    return None


def _is_file(folder, name) -> bool:
    return os.path.isfile(os.path.join(folder, name))


def _locate(where: str, revision: str) -> tuple[str, str | None]:
    """-> (local folder, commit or None)."""
    if os.path.isdir(where):
        if _is_file(where, "run.json"):  # an earlier run
            if not os.path.isdir(os.path.join(where, "sae")):
                raise UserError(f"SAE = {where} is a run without sae/", "let that run finish first")
            return os.path.join(where, "sae"), None
        return where, None
    parts = where.split("/")
    if where.startswith((".", "/", "~")) or len(parts) < 2 or parts[0] == "runs":
        hint = "wanted owner/repo/folder on the Hub, a local folder, runs/<name>, or fresh"
        found = f"no such folder{near_path(where, 'runs')}"
        if os.path.isfile(where):
            found = "that is a file; wanted its folder"
        raise UserError(f"SAE = {where!r}: {found}", hint)
    from huggingface_hub import snapshot_download

    repo, sub = "/".join(parts[:2]), "/".join(parts[2:])
    wanted = [f"{sub}/{name}".lstrip("/") for name in (*FILES, "README.md")] + ["README.md"]
    try:
        root = snapshot_download(repo, revision=revision or "main", allow_patterns=wanted)
    except Exception as e:
        found = {"GatedRepoError": "it is gated", "RepositoryNotFoundError": "no such repository"}
        cause = first_line(e)
        cause = found.get(type(e).__name__, cause)
        what = f"SAE = {where!r} is no local folder, and the Hub says: {cause}{near_path(where)}"
        hint = (
            "check the spelling, SAE_REVISION, the network, `hf auth login`; or set SAE=runs/<name>"
        )
        raise UserError(what, hint) from None
    folder = os.path.join(root, sub)
    if not os.path.isdir(folder):
        what = f"SAE = {where!r}: the repository {repo} has no folder {sub!r} with an SAE"
        raise UserError(what, f"look at https://huggingface.co/{repo}/tree/main")
    return folder, os.path.basename(root)


def _read_config(path: str) -> dict:
    if os.path.getsize(path) > MAX_CONFIG_BYTES:
        raise UserError(f"{path} has {os.path.getsize(path):,} bytes", "wanted a small JSON file")
    try:
        with open(path, encoding="utf-8") as f:
            config = json.load(f)
        json.dumps(config, indent=2)  # as it will be written again, hours later
    except (OSError, ValueError, RecursionError) as e:
        hint = "wanted the config.json that was saved with the SAE"
        raise UserError(f"{path} is not JSON: {str(e)[:100]}", hint) from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a {type(config).__name__}", "wanted a JSON object")
    return config


def _integer(config: dict, name: str, path: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{path}: {name} = {value!r:.60}", "wanted a whole number, 1 or more")
    return value


def _penalty(config: dict, path: str) -> float | None:
    value = config.get("l1_penalty")
    if value is None:
        return None
    if not isinstance(value, (int, float)) or not 0 <= value < 1e9:
        raise UserError(f"{path}: l1_penalty = {value!r:.60}", "wanted a number, 0 or more")
    return float(value)


def _name(value) -> str | None:
    return value if isinstance(value, str) and value.isprintable() else None


def _layer(pattern: str, text) -> int | None:
    """The number that `pattern` finds in a name of a layer, if any."""
    found = re.search(pattern, text, re.ASCII) if isinstance(text, str) else None
    return int(found[1]) if found else None


def _open_dictionary_learning(where, has) -> Source:
    path = has["config.json"]
    config = _read_config(path)
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        raise UserError(f"{path} has no trainer block", "wanted dictionary_learning's config.json")
    dict_class = str(trainer.get("dict_class"))
    if dict_class not in DICT_CLASSES:
        what = f"{path}: dict_class = {dict_class!r:.60} is not supported"
        raise UserError(what, f"wanted one of {', '.join(DICT_CLASSES)}")
    architecture, names, further = DICT_CLASSES[dict_class]
    has_k = "k" in further
    return Source(
        where=where,
        architecture=architecture,
        d_in=_integer(trainer, "activation_dim", path),
        d_sae=_integer(trainer, "dict_size", path),
        k=_integer(trainer, "k", path) if has_k else None,
        l1=_penalty(trainer, path) if architecture == "relu" else None,
        layer=trainer.get("layer") if isinstance(trainer.get("layer"), int) else None,
        lm_name=_name(trainer.get("lm_name")),
        config=config,
        weights=lambda: _rename(_read_pickle(has["ae.pt"]), names, further, has["ae.pt"]),
    )


def _open_saelens(where, has) -> Source:
    path = has["cfg.json"]
    config = _read_config(path)
    architecture = SAELENS.get(str(config.get("architecture")))
    if architecture is None:
        what = f"{path}: architecture = {config.get('architecture')!r:.60} is not supported"
        raise UserError(what, f"wanted one of {', '.join(SAELENS)}")
    wanted = {"normalize_activations": "none", "reshape_activations": "none"}
    if architecture == "relu":  # older top-k SAEs call themselves standard, too
        wanted |= {"activation_fn": "relu", "activation_fn_str": "relu"}
    for name, value in wanted.items():
        if config.get(name, value) != value:
            what = f"{path}: {name} = {config[name]!r:.60} is not supported"
            raise UserError(what, f"wanted {value!r}")
    centred, rescaled = (
        config.get(name, default)
        for name, default in (
            ("apply_b_dec_to_input", True),
            ("rescale_acts_by_decoder_norm", False),
        )
    )
    if not isinstance(centred, bool) or not isinstance(rescaled, bool):
        what = f"{path}: apply_b_dec_to_input or rescale_acts_by_decoder_norm is no truth value"
        raise UserError(what, "wanted true or false")
    meta = config.get("metadata") if isinstance(config.get("metadata"), dict) else {}
    hook = meta.get("hook_name")
    layer = _layer(r"^blocks\.(\d{1,4})\.hook_resid_post$", hook)
    if next_layer := _layer(r"^blocks\.(\d{1,4})\.hook_resid_pre$", hook):
        layer = next_layer - 1
    source = Source(
        where=where,
        architecture=architecture,
        d_in=_integer(config, "d_in", path),
        d_sae=_integer(config, "d_sae", path),
        k=_integer(config, "k", path) if architecture == "topk" else None,
        layer=layer,
        lm_name=_name(meta.get("model_name")),
    )
    further = ("threshold",) if architecture == "jumprelu" else ()
    file = has["sae_weights.safetensors"]

    def weights() -> dict:
        found = _rename(_read_safetensors(file), MATRIX, further, file)
        _check_shapes(found, source)
        if rescaled and architecture == "topk":  # which k win is decided as with unit rows
            unit_rows(found)
        return _centre(found, centred, architecture)

    source.weights = weights
    return source


def _centre(weights: dict, centred: bool, architecture: str) -> dict:
    """Fold b_dec into b_enc where the file and our class disagree on what the encoder reads."""
    ours = architecture != "jumprelu"
    if centred != ours:
        shift_F = weights["W_enc_FD"] @ weights["b_dec_D"]
        weights["b_enc_F"] = weights["b_enc_F"] + (shift_F if ours else -shift_F)
    return weights


def unit_rows(weights: dict) -> None:
    """Put the norms of the decoder's rows into the encoder, in place."""
    norm_F1 = weights["W_dec_FD"].norm(dim=1, keepdim=True).clamp(min=1e-12)
    weights["W_dec_FD"] /= norm_F1
    weights["W_enc_FD"] *= norm_F1
    weights["b_enc_F"] *= norm_F1[:, 0]
    if "threshold" in weights:
        weights["threshold"] *= norm_F1[:, 0]


def _open_gemma_scope(where, has) -> Source:
    path = has["params.npz"]
    tensors = _read_npz(path)
    d_in, d_sae = _shape(tensors, "W_enc", path)
    return Source(
        where=where,
        architecture="jumprelu",
        d_in=d_in,
        d_sae=d_sae,
        layer=_layer(r"(?:^|/)layer_(\d{1,4})(?:/|$)", where),
        weights=lambda: _rename(tensors, MATRIX, ("threshold",), path),
    )


def _open_gemma_scope_2(where, has) -> Source:
    path, file = has["config.json"], has["params.safetensors"]
    config = _read_config(path)
    if config.get("architecture") not in ("jump_relu", "jumprelu"):
        what = f"{path}: architecture = {config.get('architecture')!r:.60} is not supported"
        raise UserError(what, "wanted jump_relu")
    names = {"W_enc_FD": "w_enc.T", "b_enc_F": "b_enc", "W_dec_FD": "w_dec", "b_dec_D": "b_dec"}
    tensors = _read_safetensors(file)
    d_in, d_sae = _shape(tensors, "w_enc", file)
    return Source(
        where=where,
        architecture="jumprelu",
        d_in=d_in,
        d_sae=d_sae,
        layer=_layer(r"\.(\d{1,4})(?:\.|$)", config.get("hf_hook_point_in")),
        lm_name=_name(config.get("model_name")),
        weights=lambda: _rename(tensors, names, ("threshold",), file),
    )


# ---- tensors ---------------------------------------------------------------------------------


def _unreadable(path: str, e: Exception) -> UserError:
    """One line; torch's own text advises weights_only=False, which would run the file's code."""
    text = first_line(e, 1000)
    unsafe = any(word in str(e) for word in ("weights_only", "Unsupported", "pickle"))
    cause = "it asks to run code, or is no zip of tensors" if unsafe else text[:120]
    hint = "wanted plain tensors; take the file from its author's repository again"
    return UserError(f"{path} cannot be read safely: {cause}", hint)


def _read_pickle(path: str) -> dict:
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


def _read_safetensors(path: str) -> dict:
    try:
        return load_file(path)
    except Exception as e:
        raise _unreadable(path, e) from None


def _read_npz(path: str) -> dict:
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


def _shape(tensors: dict, name: str, path: str) -> tuple[int, int]:
    """-> D, F of an encoder (D, F)."""
    if name not in tensors or tensors[name].ndim != 2:
        raise UserError(f"{path} has no {name} (D, F)", f"found {_list(tensors)}")
    return tuple(tensors[name].shape)


def _list(names) -> str:
    return f"{', '.join(sorted(map(str, names))[:8])!s:.200}"


def _rename(tensors: dict, names: dict, further: tuple, path: str) -> dict:
    """Their tensors under our names; nothing missing, nothing left over."""
    wanted = {theirs.removesuffix(".T") for theirs in names.values()}
    missing = wanted - tensors.keys() - {"threshold"}
    missing |= {n for n in further if n not in tensors and n != "threshold"}
    surplus = tensors.keys() - wanted - set(further)
    if missing or surplus:
        parts = [f"lacks {_list(missing)}"] * bool(missing)
        parts += [f"has also {_list(surplus)}"] * bool(surplus)
        what = f"{path} {' and '.join(parts)}"
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


def _check_shapes(weights: dict, source: Source) -> None:
    F, D, where = source.d_sae, source.d_in, source.where
    shapes = {"W_enc_FD": (F, D), "b_enc_F": (F,), "W_dec_FD": (F, D), "b_dec_D": (D,)}
    if source.architecture == "jumprelu":
        if "threshold" not in weights:
            raise UserError(f"{where} has no thresholds", "a JumpReLU SAE has one a latent")
        shapes["threshold"] = (F,)
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


def _check_weights(weights: dict, source: Source) -> None:
    """Shapes, finiteness, norms and k, against the config."""
    F, where = source.d_sae, source.where
    _check_shapes(weights, source)
    for name, t in weights.items():
        if not torch.isfinite(t).all():
            bad = int((~torch.isfinite(t)).sum())
            what = f"{where}: {name} holds {bad:,} values that are not finite"
            raise UserError(what, "the file is damaged; take it from its source again")
    if source.architecture in ("topk", "batchtopk", "matryoshka"):
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


def check_fits(source: Source, width: int, *, model: str, layer: int, strict: bool) -> None:
    """The SAE must be of this model's width, and of this model and layer (warned if not strict)."""
    if source.d_in is not None and source.d_in != width:
        what = f"the SAE reads width {source.d_in}, {model} has width {width}"
        raise UserError(what, "SAE and MODEL do not belong together")
    doubts = []
    if source.layer is not None and source.layer != layer:
        doubts.append(
            (f"LAYER = {layer}, the SAE is of layer {source.layer}", f"LAYER={source.layer}")
        )
    if source.lm_name and _base(source.lm_name) != _base(model):
        doubts.append(
            (f"the SAE is of {source.lm_name}, MODEL = {model}", f"MODEL={source.lm_name}")
        )
    for what, fix in doubts:
        if strict:
            raise UserError(what, f"set {fix}, or CHECK_SAE=False if you mean it")
        print(f"warning: {what}")


def _base(name: str) -> str:
    return os.path.basename(os.path.normpath(name)).lower()
