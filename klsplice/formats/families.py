"""The layouts in which SAEs lie in public, a row each, and how one of them is read.

What a config says else goes by the same few names in all of them.
"""

import json
import os
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import yaml

from klsplice.errors import UserError, first_line
from klsplice.formats import folds, sites, tensors
from klsplice.formats.source import Source
from klsplice.site import POINTS, Site
from sae import ARCHITECTURES, LINEAR, MATRIX


class Kind(NamedTuple):
    """What the tensors of a file are."""

    architecture: str
    # ours -> theirs, ".T" where it lies transposed; those without a shape in theirs may be lacking
    names: dict[str, str]
    folds: tuple[Callable[[dict, dict], dict], ...] = ()  # what is done to them, in order
    unused: tuple[str, ...] = ()  # beginnings of the names of what else is in the file


class Family(NamedTuple):
    weights: str  # a pattern of its file, in an SAE's folder
    config: str  # the file beside it, "" where there is none
    kind: Kind | Callable  # or a function of (config, tensors, Files) that says which it is
    options: dict[str, tuple] = {}  # of the config: the values that are read here


class Files(NamedTuple):
    where: str  # as the constant names it
    weights: str  # paths
    config: str  # "" where there is none
    architecture: str  # this and k: what the constants say, for a file that does not
    k: int | None


# ---- what the rows hold ------------------------------------------------------------------------

BOTH_BIASES = LINEAR | {"b_dec_D": "decoder.bias"}
GATED = {"W_enc_FD": "encoder.weight", "W_dec_FD": "decoder.weight.T", "b_dec_D": "decoder_bias"}
GATED |= {"r_mag_F": "r_mag", "b_gate_F": "gate_bias", "b_mag_F": "mag_bias"}
DICT_CLASSES = {  # of dictionary_learning, beside those of sae.py
    "AutoEncoderNew": Kind("relu", BOTH_BIASES, (folds.centre,)),
    "GatedAutoEncoder": Kind("jumprelu", GATED, (folds.gated, folds.uncentre)),
}

LENS = MATRIX | {name: name for name in ("scaling_factor", "finetuning_scaling_factor")}
LENS_GATED = LENS | {"r_mag_F": "r_mag", "b_gate_F": "b_gate", "b_mag_F": "b_mag"}
del LENS_GATED["b_enc_F"]
LENS_TRAINED = LENS | {"threshold": "topk_threshold"}  # as a run leaves it, and not published
SAELENS = {
    "topk": Kind("topk", LENS),
    "standard": Kind("relu", LENS),
    "jumprelu": Kind("jumprelu", LENS | {"threshold": "threshold"}),
    "gated": Kind("jumprelu", LENS_GATED, (folds.gated,)),
    "batchtopk": Kind("batchtopk", LENS_TRAINED),
    "matryoshka_batchtopk": Kind("matryoshka", LENS_TRAINED, (folds.groups,)),
}
SKIP = {"W_skip_DD": "W_skip"}  # (out, in)
for prefix, name in (("", "standard"), ("jumprelu_", "jumprelu")):
    kind = SAELENS[name]
    SAELENS[f"{prefix}transcoder"] = kind
    SAELENS[f"{prefix}skip_transcoder"] = kind._replace(names=kind.names | SKIP)
LENS_OPTIONS = {
    "normalize_activations": ("none", False),
    "reshape_activations": ("none", "hook_z"),
    "activation_fn": ("relu", "topk"),
    "activation_fn_str": ("relu", "topk"),
    "apply_b_dec_to_input": (True, False),
    "rescale_acts_by_decoder_norm": (True, False),
}

TRACED = {"W_enc_FD": "W_enc", "b_enc_F": "b_enc", "W_dec_FD": "W_dec", "b_dec_D": "b_dec"}
SPARSIFY = Kind("topk", LINEAR | {"W_dec_FD": "W_dec", "b_dec_D": "b_dec"})
SPARSIFY_OPTIONS = {"activation": ("topk",)}
LM_SAES_OPTIONS = {  # of OpenMOSS's Language-Model-SAEs; inference: the norms are folded in already
    "sae_type": ("sae",),
    "act_fn": ("jumprelu",),
    "apply_decoder_bias_to_pre_encoder": (False,),
    "norm_activation": ("dataset-wise", "inference"),
}
NORMS = "dataset_average_activation_norm"
GEMMA = Kind("jumprelu", MATRIX | {"threshold": "threshold"})
GEMMA_2 = Kind("jumprelu", {ours: name.replace("W", "w") for ours, name in GEMMA.names.items()})
GEMMA_2_SKIP = {"W_skip_DD": "affine_skip_connection.T"}
GEMMA_2_OPTIONS = {"type": ("sae", "transcoder"), "architecture": ("jump_relu", "jumprelu")}
QWEN = Kind("topk", MATRIX | {"W_enc_FD": "W_enc", "W_dec_FD": "W_dec.T"}, (folds.centre,))
READS_X = Kind("relu", BOTH_BIASES, (folds.centre,))
GOODFIRE = {ours: theirs.replace("coder.", "coder_linear.") for ours, theirs in BOTH_BIASES.items()}
OPENAI_NAMES = LINEAR | {"b_enc_F": "latent_bias", "b_dec_D": "pre_bias"}
OPENAI = Kind("relu", OPENAI_NAMES, unused=("activation", "stats_last_nonzero"))
OWN = {  # a file of one's own: ours -> what it may be called
    "W_enc_FD": ("W_enc", "encoder.weight"),
    "b_enc_F": ("b_enc", "encoder.bias"),
    "W_dec_FD": ("W_dec", "decoder.weight"),
    "b_dec_D": ("b_dec", "decoder.bias", "bias"),
}


def dictionary_learning(config: dict, found: dict, files: Files) -> Kind:
    kinds = {row.dict_class: Kind(name, row.tensors) for name, row in ARCHITECTURES.items()}
    kinds = DICT_CLASSES | kinds
    _check_option("dict_class", config.get("dict_class"), kinds, files.config)
    return kinds[config["dict_class"]]


def saelens(config: dict, found: dict, files: Files) -> Kind:
    """Versions 3 to 5 named the activation instead of the architecture."""
    name = config.get("architecture", "standard")
    activations = (config.get("activation_fn_str"), config.get("activation_fn"))
    if name == "standard" and "topk" in activations:
        name = "topk"
    _check_option("architecture", name, SAELENS, files.config)
    kind = SAELENS[name]
    row, done = ARCHITECTURES[kind.architecture], (folds.unscaled, *kind.folds)
    trained = name in ("batchtopk", "matryoshka_batchtopk")
    if row.has_k and config.get("rescale_acts_by_decoder_norm", trained):
        done += (folds.norms_in_latents,)
    if name.endswith("transcoder"):
        return kind._replace(folds=done)
    centred = config.get("apply_b_dec_to_input", True)
    if centred != row.centred:
        done += (folds.uncentre if centred else folds.centre,)
    return kind._replace(folds=done)


def sparsify(config: dict, found: dict, files: Files) -> Kind:
    """Transcoders of before February 2025 subtracted b_dec, and did not say that they are some."""
    old = config.get("skip_connection") and "transcode" not in config
    names = SPARSIFY.names | (SKIP if config.get("skip_connection") else {})
    return SPARSIFY._replace(names=names, folds=(folds.uncentre,) if old else ())


def gemma_2(config: dict, found: dict, files: Files) -> Kind:
    skips = "affine_skip_connection" in found
    return GEMMA_2._replace(names=GEMMA_2.names | GEMMA_2_SKIP) if skips else GEMMA_2


def circuit_tracer(config: dict, found: dict, files: Files) -> Kind:
    """A block's transcoder of a set."""
    names = TRACED | SKIP if "W_skip" in found else TRACED
    if "activation_function.threshold" in found:
        return Kind("jumprelu", names | {"threshold": "activation_function.threshold"})
    return Kind("topk" if config.get("activation") == "topk" else "relu", names)


def llama_scope(config: dict, found: dict, files: Files) -> Kind:
    """The norms of activations are in the config, or among the tensors under the hook's name."""
    into = config.get("hook_point_in")
    names = {"log_threshold": "log_jumprelu_threshold", "norm_in": f"{NORMS}.{into}"}
    names["norm_out"] = f"{NORMS}.{config.get('hook_point_out') or into}"
    done = (folds.thresholds, folds.norms_in_gate, folds.average_norms)
    return Kind("jumprelu", BOTH_BIASES | names, done, unused=(NORMS,))


def own(config: dict, found: dict, files: Files) -> Kind:
    """A state dict with an encoder and a decoder, each with a bias, under either naming."""
    names = {}
    for ours, theirs in OWN.items():
        names[ours] = next((name for name in theirs if name in found), theirs[0])
    if not set(names.values()) <= found.keys():
        return Kind("relu", names)  # which it lacks is said later
    F, D = found[names["b_enc_F"]].numel(), found[names["b_dec_D"]].numel()
    if F == D:
        what = f"{files.weights} has {D} latents of width {D}: its matrices may lie either way"
        raise UserError(what, "use dictionary_learning's format")
    for ours in ("W_enc_FD", "W_dec_FD"):
        if tuple(found[names[ours]].shape) == (D, F):
            names[ours] += ".T"
    architecture = _own_class(found, files)
    names |= {name: name for name in ARCHITECTURES[architecture].tensors.keys() - OWN.keys()}
    if architecture != "jumprelu":
        return Kind(architecture, names)
    return Kind(architecture, names | {"log_threshold": "log_threshold"}, (folds.thresholds,))


def _own_class(found: dict, files: Files) -> str:
    """ARCHITECTURE, if its tensors are there; else what they alone tell, which may be converted."""
    needed = {"jumprelu": ("threshold", "log_threshold"), "matryoshka": ("group_sizes",)}
    needed = needed.get(files.architecture)
    if files.architecture and (needed is None or any(name in found for name in needed)):
        return files.architecture
    if "log_threshold" in found or ("threshold" in found and found["threshold"].numel() > 1):
        return "jumprelu"
    if "k" in found and "threshold" not in found:
        return "topk"
    what = f"{files.weights} does not say its activation; found {tensors.listed(found)}"
    hint = "set ARCHITECTURE (a jumprelu has threshold, a matryoshka group_sizes), and K of a topk"
    raise UserError(what, hint)


FAMILIES = (  # the first whose files and tensors are there is taken
    Family("ae.pt", "config.json", dictionary_learning),  # and SAE Bench
    Family("sae_weights.safetensors", "cfg.json", saelens, LENS_OPTIONS),  # SAELens 3 to 6
    Family("sae.safetensors", "cfg.json", sparsify, SPARSIFY_OPTIONS),
    Family("checkpoints/final.safetensors", "hyperparams.json", llama_scope, LM_SAES_OPTIONS),
    Family("sae_weights.safetensors", "config.json", llama_scope, LM_SAES_OPTIONS),  # of R1
    Family("params.safetensors", "config.json", gemma_2, GEMMA_2_OPTIONS),
    Family("params.safetensors", "", gemma_2),
    Family("layer_*.safetensors", "config.yaml", circuit_tracer),
    Family("params.npz", "", GEMMA),
    Family("layer*.sae.pt", "", QWEN),
    Family("*-SAE-l*.pth", "", Kind("relu", GOODFIRE, (folds.centre,))),
    Family("*-SAE-l*.pt", "", READS_X),  # DeepSeek-R1 of qresearch
    Family("[0-9]*.pt", "", OPENAI, {"activation": ("ReLU",)}),  # its TopK normalises each token
    # one's own, last, since its names say nothing
    *(Family(f"*{ending}", "", own) for ending in (".pt", ".pth", ".safetensors")),
)


# ---- how a row is read -------------------------------------------------------------------------

BLOCKS = ("buffer", "klsplice", "trainer", "metadata", "activation_fn_kwargs", NORMS)
READS = ("submodule_name", "hook_name", "hook_point", "hook_point_in", "hf_hook_point_in")
READS += ("feature_input_hook",)
WRITES = ("hook_point_out", "hf_hook_point_out", "hook_name_out", "feature_output_hook")
SIZES = {"activation_dim": "D", "d_in": "D", "d_model": "D"}
SIZES |= {"dict_size": "F", "d_sae": "F", "num_latents": "F"}
TEXT = {"ctx_len": "context", "context_size": "context", "prepend_bos": "bos"}
TEXT |= {"remove_bos": "without_special", "exclude_special_tokens": "without_special"}


def describe(family: Family, files: Files) -> Source | None:
    """The SAE in those files, without its weights; None where no config says that they are of this
    family, and they hold other tensors. Raises UserError."""
    found, rest = tensors.read(files.weights)
    raw = _read_config(files.config) if files.config else {}
    config = {name: value for name, value in rest.items() if isinstance(value, str)} | raw
    for block in BLOCKS:
        config |= raw[block] if isinstance(raw.get(block), dict) else {}
    config = {name: value for name, value in config.items() if value is not None}
    kind = family.kind
    if not isinstance(kind, Kind):
        kind = kind(config, found, files)
    there = {*found, *rest}
    theirs = {name.removesuffix(".T"): ours for ours, name in kind.names.items()}
    lacks = {name for name, ours in theirs.items() if tensors.is_needed(ours)} - there
    surplus = {name for name in there - theirs.keys() if not name.startswith(kind.unused)}
    by_name_alone = not files.config and family.kind is not own
    other = kind.architecture == "relu" and files.architecture not in ("", "relu")
    if by_name_alone and (lacks or surplus or other):
        return None
    path = files.config or files.weights
    for name in family.options.keys() & config.keys():
        _check_option(name, config[name], family.options[name], path)
    if lacks or surplus:
        verb, which = ("lacks", lacks) if lacks else ("has also", surplus)
        hint = f"wanted {tensors.listed(theirs)}, of a {kind.architecture}"
        raise UserError(f"{files.weights} {verb} {tensors.listed(which)}", hint)
    sizes = _sizes(kind, found, config, path)
    at = os.path.join(files.where, os.path.basename(files.weights))
    site = _site(config, at)
    if site.is_transcoder:  # its encoder subtracts nothing
        kind = kind._replace(folds=tuple(f for f in kind.folds if f is not folds.centre))
    row = ARCHITECTURES[kind.architecture]
    has_penalty = kind.architecture == "relu" and config.get("l1_penalty")
    source = Source(
        where=files.where,
        architecture=kind.architecture,
        d_in=sizes["D"],
        d_sae=sizes["F"],
        k=_k(config, found, files, path) if row.has_k else None,
        l1=folds.number(config, "l1_penalty") if has_penalty else None,
        site=site,
        lm_name=_name(config, "lm_name", "model_name") or sites.model_of_path(at),
        text=_text(config),
        files=sorted({files.weights, path}),
        config=raw if "trainer" in raw else {},
    )
    source.weights = partial(_weights, kind, config, files.weights, sizes)
    if "*" in family.weights and not files.config:
        centred = row.centred and folds.centre not in kind.folds and not site.is_transcoder
        reads = "x - b_dec" if centred else "x"
        source.note = f"the SAE is taken for a {kind.architecture} whose encoder reads {reads}"
    return source


def _weights(kind: Kind, config: dict, path: str, sizes: dict) -> dict:
    """The tensors of its file under our names, as our class computes with them."""
    weights = tensors.renamed(tensors.read(path)[0], kind.names, sizes, path)
    for fold in kind.folds:
        weights = fold(weights, config)
    known = {*ARCHITECTURES[kind.architecture].tensors, *SKIP}
    return {n: t for n, t in weights.items() if n in known}


def _check_option(name: str, value, known, path: str) -> None:
    if value not in [*known]:
        what = f"{path}: {name} = {value!r:.60} is not supported"
        raise UserError(what, f"wanted {' or '.join(map(repr, known))}")


def _sizes(kind: Kind, found: dict, config: dict, path: str) -> dict[str, int]:
    """-> F and D of the encoder, which are the config's where it has them. Raises UserError."""
    name = kind.names["W_enc_FD"]
    shape = tuple(found[name.removesuffix(".T")].shape)
    if len(shape) != 2:
        raise UserError(f"{path}: {name.removesuffix('.T')} is {shape}", "wanted a matrix")
    sizes = dict(zip("DF" if name.endswith(".T") else "FD", shape))
    for key, letter in SIZES.items():
        if config.get(key) and config[key] != sizes[letter]:
            what = f"{path}: {key} = {config[key]!r:.60}, its encoder is {shape}"
            raise UserError(what, "the file and its config do not belong together")
    return sizes


def _k(config: dict, found: dict, files: Files, path: str) -> int:
    in_name = re.search(r"-L0_(\d{1,6})", files.where)  # of Qwen-Scope's repositories
    k = config.get("k", None if files.config else files.k)
    if "k" not in config and "k" in found:
        k = found["k"].tolist()
    elif "k" not in config and in_name:
        k = int(in_name[1])
    if type(k) is float and k.is_integer():  # a BatchTopK's is a mean
        k = int(k)
    if type(k) is not int or k < 1:
        raise UserError(f"{path}: k is {k!r:.60}", "wanted a whole number, 1 or more")
    return k


def _site(config: dict, at: str) -> Site:
    reads = next((config[name] for name in READS if config.get(name)), None)
    writes = next((config[name] for name in WRITES if config.get(name)), None)
    site = sites.of_path(at)
    if reads is not None:
        layer, point = sites.of_name(reads)
        site = Site(site.layer if layer is None and point in POINTS else layer, point, point)
    elif type(config.get("layer")) is int:  # older files of dictionary_learning
        site = site._replace(layer=config["layer"])
    if writes is not None:
        return site._replace(writes=sites.of_name(writes)[1])
    if config.get("io") == "in":
        return site._replace(reads=f"the input of {reads or 'a module'}")
    if site.reads is None:
        return site  # SITE decides
    # of sparsify, whose hookpoint is a module; skip_connection: see sparsify
    if config.get("transcode", config.get("skip_connection")) and site.writes == "mlp.hook_out":
        return site._replace(reads="mlp.hook_in")
    names = config.get("transcode"), config.get("skip_connection"), config.get("type")
    if any(name in (True, "transcoder") for name in names):
        return site._replace(reads=f"the input of {site.reads}")
    return site


def _name(config: dict, *keys: str) -> str | None:
    named = (config.get(key) for key in keys)
    return next((name for name in named if isinstance(name, str) and name.isprintable()), None)


def _text(config: dict) -> dict:
    """What it was trained on, under our names; of one of klsplice its KEEP alone."""
    text = {ours: config[theirs] for theirs, ours in TEXT.items() if theirs in config}
    if "without_special" in text:  # may be a list of tokens
        text["without_special"] = bool(text["without_special"])
    if keep := _name(config, "keep"):
        text |= {"keep": keep, "without_special": None}
    return text


def _read_config(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as f:
            return dict(yaml.safe_load(f) if path.endswith(".yaml") else json.load(f))
    except (OSError, TypeError, ValueError, RecursionError, yaml.YAMLError) as e:
        raise UserError(f"{path}: {first_line(e)}", "wanted an SAE's config, in JSON") from None
