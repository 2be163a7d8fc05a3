"""Reads SAE folders; write.py writes them.

Formats: dictionary_learning and SAE Bench (ae.pt + config.json), SAELens (cfg.json +
sae_weights.safetensors), Gemma Scope 1 (params.npz) and 2 (params.safetensors + config.json), and
the `sae/` of an earlier run.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from klsplice import hub
from klsplice.errors import UserError, near_path
from klsplice.formats import sites, tensors, vintages
from klsplice.formats.architectures import ARCHITECTURES, MATRIX, SAELENS, of_dict_class
from klsplice.formats.sites import Site
from klsplice.storage import digest_of

FILES = ("ae.pt", "config.json", "cfg.json", "sae_weights.safetensors", "params.npz")
FILES += ("params.safetensors", "adapter.safetensors")
MAX_CONFIG_BYTES = 1_000_000


@dataclass
class Source:
    """An SAE whose config has been read, but not its weights; sae.build makes the module."""

    where: str  # as the constant names it
    architecture: str
    d_in: int | None
    d_sae: int
    k: int | None = None
    l1: float | None = None
    site: Site = Site()  # where in the LM it reads
    lm_name: str | None = None
    text: dict = field(default_factory=dict)  # what it was trained on: see fits.check_text
    commit: str | None = None  # of the Hub repository
    files: list[str] = field(default_factory=list)  # local ones that were read
    further: list = field(default_factory=list)  # (layer, Source) of MORE_SAES
    licence: str | None = None  # as its README.md names it
    config: dict = field(default_factory=dict)  # a dictionary_learning config.json to add to
    weights: Callable[[], dict] | None = None  # reads the tensors, under our names

    @property
    def fresh(self) -> bool:
        return self.weights is None

    @cached_property
    def identity(self) -> str | None:
        """The Hub's commit, or a digest of the local files; with MORE_SAES one of each."""
        mine = self.commit or (digest_of(self.files) if self.files else None)
        return ",".join([mine, *(source.identity for _, source in self.further)]) if mine else None

    def read_weights(self) -> dict:
        """The tensors under our names, checked against the config. Raises UserError."""
        weights = self.weights()
        tensors.check_weights(weights, self)
        return weights


def open_sae(where: str, revision: str, *, bare: bool = False) -> Source:
    """Find an SAE folder and read its config. Raises UserError; no weights are read yet.

    bare: take the SAE of a folder that has an adapter beside it, without that.
    """
    folder, commit = _locate(where, revision)
    has = {name: os.path.join(folder, name) for name in FILES if _is_file(folder, name)}
    if "adapter.safetensors" in has and not bare:
        what = f"SAE = {where} is an SAE with an adapter, which no SAE class can hold"
        raise UserError(what, "start from that run's own source SAE instead")
    for names, open_one in READERS.items():
        if set(names) <= has.keys():
            source = open_one(where, has)
            break
    else:
        there = ", ".join(sorted(os.listdir(folder))[:8]) or "nothing"
        wanted = ", ".join(" + ".join(names) for names in READERS)
        raise UserError(
            f"SAE = {where} holds no SAE that is read here; found {there}", f"wanted {wanted}"
        )
    source.files = [has[name] for name in names]
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
            if os.path.isdir(os.path.join(where, "lora")):
                print(f"note: {where} trained LoRA on the LM; its SAE is used without that LoRA")
            return os.path.join(where, "sae"), None
        return where, None
    parts = where.split("/")
    if where.startswith((".", "/", "~")) or len(parts) < 2 or parts[0] == "runs":
        hint = "wanted owner/repo/folder on the Hub, a local folder, runs/<name>, or fresh"
        found = f"no such folder{near_path(where, 'runs')}"
        if os.path.isfile(where):
            found = "that is a file; wanted its folder"
        raise UserError(f"SAE = {where!r}: {found}", hint)
    return hub.sae_folder(where, revision, FILES)


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


SAELENS_TEXT = {"context_size": "context", "prepend_bos": "bos"}
SAELENS_TEXT |= {"exclude_special_tokens": "without_special"}  # a list of ids, too


def _text(config, names: dict) -> dict:
    """What a config says of the contexts that an SAE was trained on, under our names."""
    config = config if isinstance(config, dict) else {}
    found = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    context = found.pop("context", None)
    found = {n: bool(v) for n, v in found.items() if isinstance(v, (bool, list))}
    return found | ({"context": context} if type(context) is int and context > 0 else {})


def _open_dictionary_learning(where, has) -> Source:
    path = has["config.json"]
    config = _read_config(path)
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        raise UserError(f"{path} has no trainer block", "wanted dictionary_learning's config.json")
    dict_class = str(trainer.get("dict_class"))
    architecture = of_dict_class(dict_class)
    if architecture is None:
        what = f"{path}: dict_class = {dict_class!r:.60} is not supported"
        wanted = ", ".join(row.dict_class for row in ARCHITECTURES.values())
        raise UserError(what, f"wanted one of {wanted}")
    row, file = ARCHITECTURES[architecture], has["ae.pt"]
    k = _integer(trainer, "k", path) if row.has_k else None

    def weights() -> dict:
        found = vintages.with_k(vintages.plain(tensors.read_pickle(file), file), k)
        return tensors.renamed(found, row.tensors, row.further, file)

    return Source(
        where=where,
        architecture=architecture,
        d_in=_integer(trainer, "activation_dim", path),
        d_sae=_integer(trainer, "dict_size", path),
        k=k,
        l1=_penalty(trainer, path) if architecture == "relu" else None,
        site=_dictionary_learning_site(config, where),
        lm_name=_name(trainer.get("lm_name")),
        text=_text(config.get("buffer"), {"ctx_len": "context", "remove_bos": "without_special"}),
        config=config,
        weights=weights,
    )


def _dictionary_learning_site(config: dict, where: str) -> Site:
    trainer, buffer = config["trainer"], config.get("buffer")
    site = sites.of_name(trainer.get("submodule_name"))
    if site.what is None:  # older files have the layer alone
        site = sites.of_folder(where)
        layer = trainer.get("layer")
        site = site._replace(layer=layer if type(layer) is int else site.layer)
    if isinstance(buffer, dict) and buffer.get("io") == "in":
        site = site._replace(what=f"the input of {trainer.get('submodule_name') or 'a module'}")
    return site


def _open_saelens(where, has) -> Source:
    path = has["cfg.json"]
    config = vintages.saelens(_read_config(path), path)
    architecture = SAELENS.get(str(config["architecture"]))
    if architecture is None:
        what = f"{path}: architecture = {config['architecture']!r:.60} is not supported"
        raise UserError(what, f"wanted one of {', '.join(SAELENS)}")
    if config.get("reshape_activations", "none") != "none":
        what = f"{path}: reshape_activations = {config['reshape_activations']!r:.60}"
        raise UserError(what, "wanted an SAE that reads the residual stream as it is")
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
    source = Source(
        where=where,
        architecture=architecture,
        d_in=_integer(config, "d_in", path),
        d_sae=_integer(config, "d_sae", path),
        k=_integer(config, "k", path) if architecture == "topk" else None,
        site=sites.of_name(config["hook_name"]),
        lm_name=_name(config.get("model_name")),
        text=_text(config, SAELENS_TEXT),
    )
    further = ("threshold",) if architecture == "jumprelu" else ()
    file = has["sae_weights.safetensors"]

    def weights() -> dict:
        found = vintages.plain(tensors.read_safetensors(file), file)
        found = tensors.renamed(found, MATRIX, further, file)
        tensors.check_shapes(found, source)
        if rescaled and architecture == "topk":  # which k win is decided as with unit rows
            tensors.unit_rows(found)
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


def _open_gemma_scope(where, has) -> Source:
    path = has["params.npz"]
    found = tensors.read_npz(path)
    d_in, d_sae = tensors.encoder_shape(found, "W_enc", path)
    return Source(
        where=where,
        architecture="jumprelu",
        d_in=d_in,
        d_sae=d_sae,
        site=sites.of_folder(where),
        lm_name=sites.model_of_folder(where),
        weights=lambda: tensors.renamed(found, MATRIX, ("threshold",), path),
    )


def _open_gemma_scope_2(where, has) -> Source:
    path, file = has.get("config.json"), has["params.safetensors"]
    config = _read_config(path) if path else {}  # some folders have none
    if config.get("architecture", "jump_relu") not in ("jump_relu", "jumprelu"):
        what = f"{path}: architecture = {config.get('architecture')!r:.60} is not supported"
        raise UserError(what, "wanted jump_relu")
    names = {"W_enc_FD": "w_enc.T", "b_enc_F": "b_enc", "W_dec_FD": "w_dec", "b_dec_D": "b_dec"}
    found = tensors.read_safetensors(file)
    d_in, d_sae = tensors.encoder_shape(found, "w_enc", file)
    return Source(
        where=where,
        architecture="jumprelu",
        d_in=d_in,
        d_sae=d_sae,
        site=_gemma_scope_2_site(config, where),
        lm_name=_name(config.get("model_name")) or sites.model_of_folder(where),
        weights=lambda: tensors.renamed(found, names, ("threshold",), file),
    )


def _gemma_scope_2_site(config: dict, where: str) -> Site:
    hook, out = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    if isinstance(hook, list) or config.get("type", "sae") != "sae":
        kind = config.get("type") if isinstance(config.get("type"), str) else "crosscoder"
        return Site(None, f"several places (it is a {kind[:40]})")
    site = sites.of_name(hook)
    if out is not None and out != hook:
        site = site._replace(what=f"{str(hook)[:80]}, and writes {str(out)[:80]}")
    return site if site.what else sites.of_folder(where)


READERS = {
    ("ae.pt", "config.json"): _open_dictionary_learning,
    ("cfg.json", "sae_weights.safetensors"): _open_saelens,
    ("params.safetensors", "config.json"): _open_gemma_scope_2,
    ("params.safetensors",): _open_gemma_scope_2,
    ("params.npz",): _open_gemma_scope,
}
