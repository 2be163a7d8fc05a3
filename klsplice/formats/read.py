"""Finds an SAE folder, or file, and reads it; write.py writes them. families.py has the layouts."""

import glob
import os
import re
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial

from klsplice import hub
from klsplice.errors import UserError, near_path
from klsplice.formats.families import FAMILIES, Family, plain
from klsplice.formats.source import Files, Source

BESIDE = {"adapter.safetensors", *(row.config for row in FAMILIES if row.config)}
WEIGHTS = {row.weights for row in FAMILIES if "*" not in row.weights}
ENDINGS = (".pt", ".pth", ".npz", ".safetensors")  # of a file that holds an SAE

# Names of files that no SAE of the residual has -> what they are.
OTHERS = {
    r"params_layer_\d+\.safetensors": "a crosscoder or cross-layer transcoder of Gemma Scope 2",
    r"W_(enc|dec)_\d+\.safetensors": "a cross-layer transcoder",
    r"layer_\d+\.safetensors": "a set of transcoders, one a layer",
    r"latest_ckpt\.safetensors": "a temporal SAE, whose latents depend on earlier tokens",
    r".+_cfg\.json": "an SAE of attention outputs, before they are projected",
    r"sae\.pt": "a BatchTopK in a layout of its own",
}


def open_sae(
    where: str, revision: str, *, bare: bool = False, architecture: str = "", k: int | None = None
) -> Source:
    """Find an SAE and read its config. Raises UserError; no weights are read yet.

    where: a folder of the Hub or of this machine, one file in it, or an earlier run. bare: take the
    SAE of a folder that has an adapter beside it, without that. architecture, k: of a file that
    does not say them, see families.plain.
    """
    folder, named, commit = _locate(where, revision)
    if os.path.isfile(os.path.join(folder, "adapter.safetensors")) and not bare:
        what = f"SAE = {where} is an SAE with an adapter, which no SAE class can hold"
        raise UserError(what, "start from that run's own source SAE instead")
    for family in FAMILIES:
        files = _files(family, where, folder, named)
        if files and (source := family.describe(replace(files, architecture=architecture, k=k))):
            break
    else:
        raise _refusal(where, folder, named, commit)
    source.weights = partial(source.read_from, files.file)
    source.files = sorted({files.file, files.path})
    source.commit = commit
    source.licence = _licence(folder, commit)
    return source


def started_from(folder: str, about: dict, *, bare: bool = False) -> Source:
    """The SAE that a run started from: where its constants name it, of that name beside the run, or
    on the Hub.

    folder: the run's. about: its run.json. bare: see open_sae. Raises UserError where that is not
    here, or is another one now."""
    name, source, resolved = about["constants"]["SAE"], about["source"], about["resolved"]
    if name == "fresh":
        raise UserError(f"{folder} started from no SAE but a fresh one")
    last = os.path.basename(os.path.normpath(name))
    beside = os.path.join(os.path.dirname(os.path.normpath(folder)), last)
    places = [path for path in (name, beside) if os.path.exists(path)]
    places = [path for path in places if os.path.realpath(path) != os.path.realpath(folder)]
    if not _looks_local(name) and name not in places:
        hub.prefer_cache_if_unreachable(name)
        places.append(name)
    revision = resolved.get("sae_commit") or about["constants"]["SAE_REVISION"]
    given = {"architecture": source["architecture"], "k": source.get("k")}  # a file may lack them
    began = resolved.get("sae") or ""
    problems = []
    for where in dict.fromkeys(places):
        try:
            found = open_sae(where, revision, bare=bare, **given)
        except UserError as error:
            problems.append(error)
            continue
        if not began or found.identity == began:
            return found
        what = f"{where} is not the SAE that {folder} started from: its files have changed"
        hint = f"put back the one whose sha256 or commit is {began:.12}..."
        problems.append(UserError(what, hint))
    what = f"the SAE that {folder} started from, {name}, is not here"
    raise (*problems, UserError(what, f"move it back, or put it beside the run as {last}"))[0]


def _looks_local(where: str) -> bool:
    """Whether it is a path on this machine by its look: no owner/repo, runs/..., or a file in a
    folder that is here."""
    parts = where.split("/")
    here = where.endswith(ENDINGS) and os.path.isdir(os.path.dirname(where))
    return where.startswith((".", "/", "~")) or len(parts) < 2 or parts[0] == "runs" or here


def _files(family: Family, where: str, folder: str, named: str) -> Files | None:
    """The files of that family in a folder, `named` being its tensors' if not empty."""
    if family.describe is plain and not named:  # a folder may hold any such file
        return None
    if named:
        found = [os.path.join(folder, named)] if fnmatch(named, family.weights) else []
    else:
        found = glob.glob(os.path.join(glob.escape(folder), family.weights))
    config = os.path.join(folder, family.config or ".")
    if len(found) != 1 or not os.path.exists(config):
        return None
    return Files(where, found[0], config if family.config else found[0])


def _refusal(where: str, folder: str, named: str, commit: str | None) -> UserError:
    """What is there instead of an SAE that is read here, and the next thing to try."""
    there = hub.holds(where, commit) if commit else _entries(folder)
    found = named or ", ".join(there) or "nothing"
    what = f"SAE = {where} holds no SAE that is read here; found {found}"
    hint = "what SAELens can load comes in by `make saelens RELEASE=... ID=...`"
    for form, kind in OTHERS.items():
        if any(re.fullmatch(form, name) for name in ([named] if named else there)):
            return UserError(f"{what}, which looks like {kind}", hint)
    inside = [name for name in there if name.endswith(ENDINGS)]
    inside += [name for name in there if name.endswith("/") and (commit or _is_sae(folder, name))]
    if inside and not named:
        return UserError(what, f"name one of them: SAE={os.path.join(where, inside[0])}; or {hint}")
    wanted = ", ".join(f"{f.weights}{' + ' * bool(f.config)}{f.config}" for f in FAMILIES)
    return UserError(what, f"wanted {wanted}; {hint}")


def _is_sae(folder: str, name: str) -> bool:
    return any(_files(family, name, os.path.join(folder, name), "") for family in FAMILIES)


def _entries(folder: str) -> list[str]:
    names = sorted(os.listdir(folder))
    found = [name + "/" * os.path.isdir(os.path.join(folder, name)) for name in names[:12]]
    return found + ["..."] * (len(names) > 12)


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
    if found := sorted(glob.glob(where)):
        what = f"SAE = {where!r}: patterns are not filled in here"
        raise UserError(what, f"wanted one, or a list: SAE=[{','.join(found)}]")
    if _looks_local(where):
        hint = "wanted owner/repo/folder on the Hub, a local folder or file, runs/<name>, or fresh"
        kind = "file" if where.endswith(ENDINGS) else "folder"
        found = f"no such {kind}{near_path(where, 'runs')}"
        raise UserError(f"SAE = {where!r}: {found}", hint)
    if where.count("/") > 1 and where.endswith(ENDINGS):
        name = os.path.basename(where)
        folder, commit = hub.sae_folder(os.path.dirname(where), revision, {name} | BESIDE)
        return folder, name, commit
    folder, commit = hub.sae_folder(where, revision, WEIGHTS | BESIDE)
    return folder, "", commit
