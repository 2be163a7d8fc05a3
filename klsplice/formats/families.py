"""The families of public SAEs, a row each: what their files are called, and what they hold.

`describe` of a row reads a config (and shapes, where no config has them) into a Source: the
architecture, where it reads, which tensors of the file are ours, and what is folded into them where
the family computes something else than our class. It raises UserError; where a name is all that
speaks for a family, and the tensors are others, it returns None.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from klsplice.architectures import ARCHITECTURES, BOTH_BIASES, LINEAR, MATRIX
from klsplice.errors import UserError
from klsplice.formats import folds, sites, tensors
from klsplice.formats.dictionary_learning import dictionary_learning
from klsplice.formats.saelens import NORMALISED, saelens
from klsplice.formats.source import Files, Source, integer, name_or_none, number


def sparsify(files: Files) -> Source:
    """EleutherAI's: a TopK whose encoder reads x - b_dec; a folder a layer."""
    config, path = files.config, files.path
    sites.residual_only(files.where, "transcoder" if config.get("transcode") else None)
    for name, wanted in (("activation", "topk"), ("skip_connection", False)):
        if config.get(name, wanted) != wanted:
            what = f"{path}: {name} = {config[name]!r:.60} is not supported"
            raise UserError(what, f"wanted {wanted!r}")
    d_in = integer(config, "d_in", path)
    latents = "num_latents" if config.get("num_latents") else "expansion_factor"
    return Source(
        where=files.where,
        architecture="topk",
        d_in=d_in,
        d_sae=integer(config, latents, path) * (1 if latents == "num_latents" else d_in),
        k=integer(config, "k", path),
        site=sites.of_folder(files.where),
        names=LINEAR | {"W_dec_FD": "W_dec", "b_dec_D": "b_dec"},
    )


def llama_scope(files: Files) -> Source:
    """OpenMOSS's Language-Model-SAEs: a JumpReLU, on activations that are scaled to a norm of
    sqrt(d_model) on average. Which norms they had is in the config, or among the tensors."""
    config, path = files.config, files.path
    sites.residual_only(files.where, config.get("sae_type"))
    for name, wanted in LM_SAES.items():
        if config.get(name, wanted[0]) not in wanted:
            what = f"{path}: {name} = {config[name]!r:.60} is not supported"
            raise UserError(what, f"wanted {' or '.join(map(repr, wanted))}")
    d_in = integer(config, "d_model", path)
    size = "d_sae" if config.get("d_sae") else "expansion_factor"
    d_sae = integer(config, size, path) * (1 if size == "d_sae" else d_in)
    into = config.get("hook_point_in")
    out = config.get("hook_point_out") or into
    found, names = tensors.read(files.file), dict(BOTH_BIASES)
    if "log_jumprelu_threshold" in found:
        names["log_threshold_F"] = "log_jumprelu_threshold"
        folded = (folds.log_threshold,)
    else:
        folded = (partial(folds.one_threshold, value=number(config, "jump_relu_threshold", path)),)
    if config.get("sparsity_include_decoder_norm", True):
        folded += (folds.norms_in_gate,)
    if config.get("norm_activation", "dataset-wise") == "dataset-wise":
        beside = {"norm_in": f"{NORMS}.{into}", "norm_out": f"{NORMS}.{out}"}
        given = config.get(NORMS) if isinstance(config.get(NORMS), dict) else {}
        if set(beside.values()) <= found.keys():
            names, given = names | beside, {}
        else:
            given = {n: number(given, n, f"{path}: {NORMS}") for n in ("in", "out")}
        folded += (partial(folds.average_norms, given=given),)
    return Source(
        files.where,
        "jumprelu",
        d_in,
        d_sae,
        site=sites.of_hooks(into, out),
        names=names,
        unused=tuple(name for name in found if name.startswith(NORMS)),
        folds=folded,
    )


LM_SAES = {  # what is read of Language-Model-SAEs' options
    "act_fn": ("jumprelu",),
    "apply_decoder_bias_to_pre_encoder": (False,),
    "norm_activation": ("dataset-wise", "inference"),  # inference: it is folded in already
}
NORMS = "dataset_average_activation_norm"


def gemma_scope(files: Files) -> Source:
    names = MATRIX | {"threshold": "threshold"}
    site, lm_name = sites.of_folder(files.where), sites.model_of_folder(files.where)
    sizes = files.sizes(names)
    return Source(files.where, "jumprelu", *sizes, site=site, lm_name=lm_name, names=names)


def gemma_scope_2(files: Files) -> Source | None:
    config = files.config  # some folders have none
    names = {ours: theirs.replace("W_", "w_") for ours, theirs in MATRIX.items()}
    names["threshold"] = "threshold"
    if not config and names["W_enc_FD"].removesuffix(".T") not in tensors.read(files.file):
        return None
    into, out = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    kind = config.get("type", "sae")
    sites.residual_only(files.where, "crosscoder" if isinstance(into, list) else kind)
    if config.get("architecture", "jump_relu") not in ("jump_relu", "jumprelu"):
        what = f"{files.path}: architecture = {config.get('architecture')!r:.60} is not supported"
        raise UserError(what, "wanted jump_relu")
    site = sites.of_hooks(into, out)
    return Source(
        files.where,
        "jumprelu",
        *files.sizes(names),
        site=site if site.what else sites.of_folder(files.where),
        lm_name=name_or_none(config.get("model_name")) or sites.model_of_folder(files.where),
        names=names,
    )


def one_file(
    files: Files,
    architecture: str,
    names: dict,
    *,
    centred: bool = False,
    unused: tuple[str, ...] = (),
) -> Source | None:
    """A torch file without a config, whose name says the rest."""
    where = os.path.join(files.where, os.path.basename(files.file))
    found = re.search(r"L0_(\d{1,6})", where)  # of Qwen-Scope's repository
    other = architecture == "relu" and files.architecture not in ("", "relu")
    if other or (architecture == "topk" and not found) or not files.has(names, unused):
        return None
    d_in, d_sae = files.sizes(names, unused)
    k = int(found[1]) if architecture == "topk" else None
    return Source(
        files.where,
        architecture,
        d_in,
        d_sae,
        k=k,
        site=sites.of_folder(where),
        lm_name=sites.model_of_folder(where),
        names=names,
        unused=unused,
        folds=folds.centring(architecture, centred),
        note=_taken(files, architecture, k, centred),
    )


def _taken(files: Files, architecture: str, k: int | None, centred: bool) -> str:
    kind = f"{architecture} with k = {k}" if k else architecture
    reads = "x - b_dec (of one that reads x see README, b_enc)" if centred else "x"
    return f"{files.where} is taken for a {kind}, whose encoder reads {reads}"


def openai(files: Files) -> Source | None:
    """OpenAI's of GPT-2: a ReLU; its TopK read activations that are normalised token by token."""
    unused = ("activation", "activation_state_dict", "stats_last_nonzero")
    source = one_file(files, "relu", OPENAI, centred=True, unused=unused)
    if source is None:
        return None
    activation = tensors.read(files.file, unused).get("activation", "ReLU")
    if activation != "ReLU":
        what = f"{files.file}: a {activation!s:.40} reads activations that are scaled"
        raise UserError(f"{what} {NORMALISED['layer_norm']}", "wanted a ReLU of this family")
    if layer := re.fullmatch(r"(\d{1,4})\.pt", os.path.basename(files.file), re.ASCII):
        source.site = source.site._replace(layer=int(layer[1]))
    return source


def plain(files: Files) -> Source:
    """One's own: a state dict with an encoder and a decoder, each with a bias, under either naming.

    ARCHITECTURE says its class, or else `k`, `threshold` or `log_threshold`; K its k, where there
    is none in it."""
    found = tensors.read(files.file)
    names = {ours: next((n for n in theirs if n in found), None) for ours, theirs in PLAIN.items()}
    if None in names.values():
        wanted = ", ".join(" or ".join(PLAIN[ours]) for ours, name in names.items() if not name)
        raise UserError(f"{files.file} lacks {wanted}", f"found {tensors.listed(found)}")
    d_sae, d_in = found[names["b_enc_F"]].numel(), found[names["b_dec_D"]].numel()
    if d_sae == d_in:
        what = f"{files.file} has as many latents as the residual is wide, {d_in}"
        raise UserError(what, "its matrices may lie either way; use dictionary_learning's format")
    for ours, shape in (("W_enc_FD", (d_in, d_sae)), ("W_dec_FD", (d_in, d_sae))):
        names[ours] += ".T" * (tuple(found[names[ours]].shape) == shape)
    architecture, k = _class_of(files, found), None
    row = ARCHITECTURES[architecture]
    if row.has_k and "k" in found:
        if found["k"].numel() != 1 or found["k"].is_floating_point():
            what = f"{files.file}: k is {found['k'].tolist()!s:.60}"
            raise UserError(what, "wanted one whole number")
        k = int(found["k"])
    elif row.has_k:
        k = files.k
    further = {name: name for name in OWN if name in found and name in row.tensors}
    folded = ()
    if architecture == "jumprelu" and "threshold" not in found:
        further, folded = {"log_threshold_F": "log_threshold"}, (folds.log_threshold,)
    elif architecture == "jumprelu" and found["threshold"].numel() == 1:
        further, folded = {"threshold_of_all": "threshold"}, (folds.shared_threshold,)
    return Source(
        files.where,
        architecture,
        d_in,
        d_sae,
        k=k,
        site=sites.of_folder(files.where),
        names=names | further,
        folds=folded,
        said_without_config="its biases say",
        note=_taken(files, architecture, k, architecture != "jumprelu"),
    )


def _class_of(files: Files, found: dict) -> str:
    """ARCHITECTURE, if its tensors are there; else what they alone tell, which may be converted."""
    needed = {"jumprelu": "threshold", "matryoshka": "group_sizes"}.get(files.architecture)
    if needed == "threshold" and "log_threshold" in found:
        needed = None
    if files.architecture and (needed is None or needed in found):
        return files.architecture
    threshold = found.get("threshold")
    if "log_threshold" in found or (threshold is not None and threshold.numel() > 1):
        return "jumprelu"
    if "k" in found and threshold is None:
        return "topk"
    if needed:
        what = f"{files.file} has no {needed}, as a {files.architecture} has"
        raise UserError(what, f"found {tensors.listed(found)}")
    what = f"{files.file} does not say its activation; found {tensors.listed(found)}"
    if threshold is None:
        hint = "set ARCHITECTURE=relu, or ARCHITECTURE=topk (or batchtopk) and K"
    else:  # a single one
        k = "" if "k" in found else " and K"
        hint = f"set ARCHITECTURE=topk or batchtopk{k}, or ARCHITECTURE=jumprelu"
    raise UserError(what, hint)


OWN = ("k", "threshold", "group_sizes")  # what a file of one's own may have beside PLAIN
PLAIN = {
    "W_enc_FD": ("W_enc", "encoder.weight"),
    "b_enc_F": ("b_enc", "encoder.bias"),
    "W_dec_FD": ("W_dec", "decoder.weight"),
    "b_dec_D": ("b_dec", "decoder.bias", "bias"),
}
QWEN = MATRIX | {"W_enc_FD": "W_enc", "W_dec_FD": "W_dec.T"}
GOODFIRE = {ours: theirs.replace("coder.", "coder_linear.") for ours, theirs in BOTH_BIASES.items()}
OPENAI = LINEAR | {"b_enc_F": "latent_bias", "b_dec_D": "pre_bias"}


PLAIN_ENDINGS = (".pt", ".pth", ".safetensors")


@dataclass(frozen=True)
class Family:
    """name: as people call it. weights: a pattern of its file, in an SAE's folder. config: of the
    file beside it, "" where there is none."""

    name: str
    weights: str
    config: str
    describe: Callable[[Files], Source]


FAMILIES = (  # the first whose files are there is taken
    Family("SAE Bench, dictionary_learning", "ae.pt", "config.json", dictionary_learning),
    Family("SAELens", "sae_weights.safetensors", "cfg.json", saelens),
    Family("sparsify", "sae.safetensors", "cfg.json", sparsify),
    Family("Llama Scope", "checkpoints/final.safetensors", "hyperparams.json", llama_scope),
    Family("Llama Scope R1", "sae_weights.safetensors", "config.json", llama_scope),
    Family("Gemma Scope 2", "params.safetensors", "config.json", gemma_scope_2),
    Family("Gemma Scope 2", "params.safetensors", "", gemma_scope_2),
    Family("Gemma Scope", "params.npz", "", gemma_scope),
    Family("Qwen-Scope", "layer*.sae.pt", "", partial(one_file, architecture="topk", names=QWEN)),
    Family("Goodfire", "*-SAE-l*.pth", "", partial(one_file, architecture="relu", names=GOODFIRE)),
    Family(
        "DeepSeek-R1 of qresearch",
        "*-SAE-l*.pt",
        "",
        partial(one_file, architecture="relu", names=BOTH_BIASES),
    ),
    Family("GPT-2 of OpenAI", "[0-9]*.pt", "", openai),
    # one's own, last, since its names say nothing
    *(Family("a plain state dict", f"*{ending}", "", plain) for ending in PLAIN_ENDINGS),
)
