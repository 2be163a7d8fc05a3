"""What is asked of the Hugging Face Hub, and what its errors mean to the person at the keyboard."""

import ast
import functools
import glob
import os
import re
from contextlib import contextmanager

from klsplice.errors import UserError, near_path, whole


def prefer_cache_if_unreachable(model: str, *others: str) -> None:
    """Use the local Hub cache where the Hub does not answer within seconds.

    Its own retries would take half a minute. Nothing is asked where all of these are local, or
    meant to be: runs/..."""
    asked = [model, *(name for name in others if "/" in name and not name.startswith("runs/"))]
    if not all(map(is_local, asked)):
        from huggingface_hub import constants

        _ask_once(constants.ENDPOINT)


def is_local(path: str) -> bool:
    """Whether a path or glob names something on this machine."""
    path = os.path.expanduser(path)
    return os.path.exists(path) or bool(glob.glob(path))


@functools.cache
def _ask_once(endpoint: str) -> None:
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(endpoint, timeout=5)
    except Exception as e:  # httpx's, whatever the proxy or the network make of it
        print(f"note: {endpoint} does not answer ({str(e)[:80]}); using its cache")
        constants.HF_HUB_OFFLINE = True


def load_options(name: str, revision: str | None) -> dict:
    """from_pretrained's keywords: a local folder has no revision and is never looked up online."""
    where = {"local_files_only": True} if os.path.isdir(name) else {"revision": revision or "main"}
    return where | {"trust_remote_code": False}


@contextmanager
def model_errors(name: str):
    """Turns what the Hub's libraries raise while they load MODEL into one line that helps."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )
    from safetensors import SafetensorError

    try:
        yield
    except Exception as e:
        chain, cause = [], e
        while cause is not None:
            chain.append(cause)
            cause = cause.__cause__ or cause.__context__
        if any(isinstance(x, GatedRepoError) for x in chain):
            what = f"{name} is gated and this machine may not read it"
            hint = (
                f"accept its licence at https://huggingface.co/{name}, then `hf auth login`; "
                "`make demo` needs no account"
            )
        elif any(isinstance(x, RepositoryNotFoundError) for x in chain):
            what = f"MODEL = {name!r} is neither a local folder nor a repository that can be read"
            hint = "check the spelling, or `hf auth login` if it is private"
        elif any(isinstance(x, LocalEntryNotFoundError) for x in chain):
            what = f"MODEL = {name!r} is no folder here and not in the Hub's cache{near_path(name)}"
            hint = "the Hub does not answer: check the network; `make demo` needs no hub"
        elif "trust_remote_code" in str(e):
            what = f"MODEL = {name!r} brings code of its own, which is never run"
            hint = "wanted an LM whose class is part of transformers"
        elif isinstance(e, ImportError):
            what = f"MODEL = {name!r} needs a package that is not installed:{whole(e)}"
            hint = "install it, or take another LM"
        elif isinstance(e, (OSError, ValueError, KeyError, RuntimeError, SafetensorError)):
            here = "" if os.path.isdir(name) else "is no folder here and "
            what = f"MODEL = {name!r} {here}could not be loaded:{whole(e)}{near_path(name)}"
            hint = "check the name, MODEL_REVISION and the network; `make demo` needs no hub"
        else:
            raise
        raise UserError(what, hint) from None


def model_commit(model: str, revision: str) -> str | None:
    """The commit that an LM's revision stands for, here or in the Hub's cache; None of a folder.

    Raises what the Hub's libraries raise."""
    if os.path.isdir(model):
        return None
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(model, "config.json", revision=revision or "main")
    return os.path.basename(os.path.dirname(path))  # cache/.../snapshots/COMMIT/config.json


def tokenizer_file(model: str, commit: str | None) -> str | None:
    """The path of an LM's tokenizer.json, or None where it has none."""
    path = os.path.join(model, "tokenizer.json")
    if commit is None:
        return path if os.path.isfile(path) else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return hf_hub_download(model, "tokenizer.json", revision=commit)
    except EntryNotFoundError:
        return None


def dataset_commit(dataset: str, revision: str) -> str:
    """The commit that a dataset's revision stands for; asks the Hub unless it is one already.

    Raises UserError."""
    revision = revision or "main"
    if len(revision) == 40:
        return revision
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(dataset, revision=revision).sha
    except Exception as e:
        what, hint = dataset_fault(e, dataset) or (
            f"at {revision!r} could not be found:{whole(e)}",
            "wanted a Hub id, or a local path; check DATASET_REVISION and the network",
        )
        raise UserError(f"DATASET = {dataset!r} {what}", hint) from None


def dataset_fault(e: Exception, dataset: str, **where) -> tuple[str, str] | None:
    """What is wrong with a dataset of the Hub and what helps, for the causes that have a remedy.

    where: revision and split, as far as they are known."""
    said = f"{type(e).__name__}: {e}"
    if "Config name is missing" in said:
        return _configurations(said, dataset, **where)
    if found := re.search(r"Bad split: (.*)\. Available splits: \[(.*)\]", said):
        there = found[2].replace("'", "")
        return f"has no split {found[1]!r}; it has {there}", "set SPLIT to one that is there"
    if "gated" in said.lower() and "private or gated" not in said:
        page = f"https://huggingface.co/datasets/{dataset}"
        hint = f"accept its terms at {page}, then `hf auth login`"
        return "is gated and this machine may not read it", hint
    if re.match("(DatasetNotFound|RepositoryNotFound)Error", said):
        what = "is neither a local path nor a dataset of the Hub that can be read"
        return what, "check the spelling, or `hf auth login` if it is private"
    return None


def _configurations(said: str, dataset: str, *, revision: str, split: str) -> tuple[str, str]:
    """Which ones a dataset has, and the files of one of them."""
    found = re.search(r"\[.*\]", said)
    names = ast.literal_eval(found[0]) if found else []
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    what = f"has several configurations: {', '.join(names[:20])}{more}"
    hint = "set DATA_FILES to the files of one"
    if example := _files_of(dataset, revision, split):
        hint += f", for example DATA_FILES={example}"
    return what, hint


def _files_of(dataset: str, revision: str, split: str) -> str | None:
    """A pattern of the files of its first configuration, as its card says it."""
    from datasets.load import dataset_module_factory

    try:
        module = dataset_module_factory(dataset, revision=revision)
        config = next(iter(module.builder_configs_parameters.metadata_configs.values()))
        files = config.get("data_files") or f"{config['data_dir']}/*"
        parts = files if isinstance(files, list) else [files]
        named = [part for part in parts if isinstance(part, dict)]
        part = next((x for x in named if x.get("split") == split), parts[0])
        path = part["path"] if isinstance(part, dict) else part
        return path[0] if isinstance(path, list) else path
    except Exception:  # the names are said without it
        return None


def sae_folder(where: str, revision: str, files: set) -> tuple[str, str]:
    """Download those files of owner/repo/folder -> (local folder, commit). Raises UserError."""
    from huggingface_hub import snapshot_download

    repo, sub = "/".join(where.split("/")[:2]), "/".join(where.split("/")[2:])
    wanted = [f"{sub}/{name}".lstrip("/") for name in (*sorted(files), "README.md")]
    wanted.append("README.md")
    try:
        root = snapshot_download(repo, revision=revision or "main", allow_patterns=wanted)
    except Exception as e:
        found = {"GatedRepoError": "it is gated", "RepositoryNotFoundError": "no such repository"}
        found["LocalEntryNotFoundError"] = "nothing, and its cache has no such SAE"
        cause = found.get(type(e).__name__)
        cause = f" {cause}" if cause else whole(e)
        near = near_path(where)
        what = f"SAE = {where!r} is no local folder{near}, and the Hub says:{cause}"
        hint = (
            "check the spelling, SAE_REVISION, the network, `hf auth login`; or set SAE=runs/<name>"
        )
        raise UserError(what, hint) from None
    folder, commit = os.path.join(root, sub), os.path.basename(root)
    if sub and not os.path.isdir(folder):
        what = f"SAE = {where!r}: {repo} has no folder {sub!r} with an SAE that is read here"
        found = f"{what}; it holds {', '.join(holds(where, commit)) or 'nothing there'}"
        raise UserError(found, f"look at https://huggingface.co/{repo}/tree/main")
    return folder, commit


def holds(where: str, commit: str) -> list[str]:
    """What is in owner/repo/folder on the Hub, or in the repository where there is no such folder:
    names of files and folders, 12 at most. [] where the Hub does not say."""
    from huggingface_hub import HfApi

    repo, sub = "/".join(where.split("/")[:2]), "/".join(where.split("/")[2:]).strip("/")
    try:
        files = [file.rfilename for file in HfApi().model_info(repo, revision=commit).siblings]
    except Exception:  # the refusal that this is for has been made already
        return []
    inside = [file.removeprefix(f"{sub}/") for file in files if file.startswith(f"{sub}/")]
    names = sorted({file.split("/")[0] + "/" * ("/" in file) for file in inside or files})
    return names[:12] + ["..."] * (len(names) > 12)
