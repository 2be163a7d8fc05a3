"""Reads SAE folders; write.py writes them.

Formats: dictionary_learning and SAE Bench (ae.pt + config.json), SAELens (cfg.json +
sae_weights.safetensors), those of families.py, and the `sae/` of an earlier run.
"""

import os
import re

from klsplice import hub
from klsplice.errors import UserError, near_path
from klsplice.formats import families, sites, tensors, vintages
from klsplice.formats.architectures import ARCHITECTURES, MATRIX, SAELENS, of_dict_class
from klsplice.formats.sites import Site
from klsplice.formats.source import (
    SAELENS_TEXT,
    Source,
    integer,
    name_or_none,
    penalty,
    read_config,
    text_of,
)

FILES = ("ae.pt", "config.json", "cfg.json", "sae_weights.safetensors", "params.npz")
FILES += ("params.safetensors", "sae.safetensors", "hyperparams.json")
FILES += ("checkpoints/final.safetensors", "adapter.safetensors")


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
        there = hub.holds(where, commit) if commit else sorted(os.listdir(folder))[:8]
        there = ", ".join(there) or "nothing"
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


def _open_dictionary_learning(where, has) -> Source:
    path = has["config.json"]
    config = read_config(path)
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
    k = integer(trainer, "k", path) if row.has_k else None

    def weights() -> dict:
        found = vintages.with_k(vintages.plain(tensors.read_pickle(file), file), k)
        return tensors.renamed(found, row.tensors, row.further, file)

    return Source(
        where=where,
        architecture=architecture,
        d_in=integer(trainer, "activation_dim", path),
        d_sae=integer(trainer, "dict_size", path),
        k=k,
        l1=penalty(trainer, path) if architecture == "relu" else None,
        site=_dictionary_learning_site(config, where),
        lm_name=name_or_none(trainer.get("lm_name")),
        text=text_of(config.get("buffer"), {"ctx_len": "context", "remove_bos": "without_special"}),
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
    config = vintages.saelens(read_config(path), path)
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
        d_in=integer(config, "d_in", path),
        d_sae=integer(config, "d_sae", path),
        k=integer(config, "k", path) if architecture == "topk" else None,
        site=sites.of_name(config["hook_name"]),
        lm_name=name_or_none(config.get("model_name")),
        text=text_of(config, SAELENS_TEXT),
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


READERS = {
    ("ae.pt", "config.json"): _open_dictionary_learning,
    ("cfg.json", "sae_weights.safetensors"): _open_saelens,
    ("cfg.json", "sae.safetensors"): families.open_sparsify,
    ("hyperparams.json", "checkpoints/final.safetensors"): families.open_llama_scope,
    ("params.safetensors", "config.json"): families.open_gemma_scope_2,
    ("params.safetensors",): families.open_gemma_scope_2,
    ("params.npz",): families.open_gemma_scope,
}
