"""Finds an SAE folder, or file, and reads it; write.py writes them. families.py has the layouts."""

import glob
import os
import re
from fnmatch import fnmatch
from pathlib import Path

from klsplice import hub
from klsplice.errors import UserError
from klsplice.formats.families import FAMILIES, Files, describe, own
from klsplice.formats.source import Source

BESIDE = {"adapter.safetensors", *(row.config for row in FAMILIES if row.config)}
WEIGHTS = {row.weights for row in FAMILIES if "*" not in row.weights}
ENDINGS = (".pt", ".pth", ".npz", ".safetensors")  # of a file that holds an SAE


def open_sae(
    where: str, revision: str, *, bare: bool = False, architecture: str = "", k: int | None = None
) -> Source:
    """Find an SAE and read its config and sizes, not its weights. Raises UserError.

    where: a folder of the Hub or of this machine, one file in it, or an earlier run. bare: without
    the adapter beside it. architecture, k: of a file that does not say them, see families.own.
    """
    folder, named, commit = _locate(where, revision)
    if os.path.isfile(os.path.join(folder, "adapter.safetensors")) and not bare:
        what = f"SAE = {where} is an SAE with an adapter, which no SAE class can hold"
        raise UserError(what, "start from that run's own source SAE instead")
    for family in FAMILIES:
        weights = _weights(family, folder, named)
        config = os.path.join(folder, family.config) if family.config else ""
        if not weights or (config and not os.path.exists(config)):
            continue
        source = describe(family, Files(where, weights, config, architecture, k))
        if source:
            source.commit, source.licence = commit, _licence(folder, commit)
            return source
    there = named or ", ".join(sorted(os.listdir(folder))[:12]) or "nothing"
    hint = "see klsplice/formats/families.py for the layouts, and `make saelens` for others"
    raise UserError(f"SAE = {where} holds no SAE that is read here; found {there}", hint)


def started_from(folder: str, about: dict, *, bare: bool = False) -> Source:
    """The SAE that a run started from: where its constants name it, or of that name beside the run.

    about: its run.json. Raises UserError where that is not here, or is another one now."""
    name, resolved = about["constants"]["SAE"], about["resolved"]
    beside = os.path.join(os.path.dirname(os.path.normpath(folder)), os.path.basename(name))
    where = beside if os.path.exists(beside) and not os.path.exists(name) else name
    if not os.path.exists(where):
        hub.prefer_cache_if_unreachable(where)
    revision = resolved.get("sae_commit") or about["constants"]["SAE_REVISION"]
    given = {name: about["source"].get(name) for name in ("architecture", "k")}
    source, began = open_sae(where, revision, bare=bare, **given), resolved.get("sae")
    if began and source.identity != began:
        what = f"{where} is not the SAE that {folder} started from: its files have changed"
        raise UserError(what, f"put back the one whose sha256 or commit is {began:.12}...")
    return source


def _weights(family, folder: str, named: str) -> str | None:
    """The path of the tensors of that family in a folder; `named` if not empty."""
    if named:
        return os.path.join(folder, named) if fnmatch(named, family.weights) else None
    if family.kind is own:  # a folder may hold any such file
        return None
    found = glob.glob(os.path.join(glob.escape(folder), family.weights))
    return found[0] if len(found) == 1 else None


def _licence(folder: str, commit: str | None) -> str | None:
    """The licence in the front matter of the README.md beside an SAE, or of its Hub repository."""
    from huggingface_hub import ModelCard

    root = folder.partition(commit)[0] + commit if commit else folder
    for place in (folder, root):
        try:
            card = ModelCard.load(Path(place, "README.md"), ignore_metadata_errors=True)
        except Exception:  # there is none, or its front matter is no YAML
            continue
        named = card.data.license
        named = named[0] if isinstance(named, list) and len(named) == 1 else named
        if re.fullmatch(r"[\w.-]{1,60}", str(named or "")):
            return str(named)
    return None


def _locate(where: str, revision: str) -> tuple[str, str, str | None]:
    """-> (local folder, the file in it that `where` names or "", commit or None)."""
    if os.path.isfile(os.path.join(where, "run.json")):  # an earlier run
        if not os.path.isdir(os.path.join(where, "sae")):
            raise UserError(f"SAE = {where} is a run without sae/", "let that run finish first")
        if os.path.isdir(os.path.join(where, "lora")):
            print(f"note: {where} trained LoRA on the LM; its SAE is used without that LoRA")
        return os.path.join(where, "sae"), "", None
    if os.path.isdir(where):
        return where, "", None
    if os.path.isfile(where):
        return os.path.dirname(where) or ".", os.path.basename(where), None
    parts, file = where.split("/"), where.endswith(ENDINGS)
    by_its_look = where.startswith((".", "/", "~")) or len(parts) < 2 or parts[0] == "runs"
    if by_its_look or (file and os.path.isdir(os.path.dirname(where))):
        hint = "wanted owner/repo/folder on the Hub, a local folder or file, runs/<name>, or fresh"
        raise UserError(f"SAE = {where!r} is not there", hint)
    if near := hub.near_path(where):  # before the Hub is asked
        raise UserError(f"SAE = {where!r} is not there", f"did you mean {near}?")
    if len(parts) > 2 and file:
        folder, commit = hub.sae_folder(os.path.dirname(where), revision, {parts[-1]} | BESIDE)
        return folder, parts[-1], commit
    folder, commit = hub.sae_folder(where, revision, WEIGHTS | BESIDE)
    return folder, "", commit
