"""What is asked of the Hugging Face Hub, and what errors of its libraries mean to the user."""

import difflib
import functools
import glob
import os
import re
import textwrap
from contextlib import contextmanager

from klsplice.errors import UserError, first_line

NETWORK = "check the network; the same command goes on from there"
# The name of a library's exception, or words of its message: (what it means, what helps). Of rows
# that fit the first one holds; without a meaning the message itself is shown.
FAULTS = {
    "GatedRepoError|is a gated dataset": (
        "is gated and this machine may not read it",
        "accept its terms on huggingface.co, then `hf auth login`; `make demo` needs no account",
    ),
    "RepositoryNotFoundError|DatasetNotFoundError": (
        "is neither on this machine nor a repository of the Hub that can be read",
        "check the spelling, or `hf auth login` if it is private",
    ),
    "LocalEntryNotFoundError|OfflineModeIsEnabled": (
        "would come from the Hub, which does not answer or HF_HUB_OFFLINE is set",
        "check the network; or name the folder that `hf download` says of it, which asks its cache",
    ),
    "trust_remote_code": ("brings code of its own, which is never run", "wanted another LM"),
    "Read-only file system": ("", "set HF_HOME to a folder that can be written"),
    "HfHubHTTPError.*([Ss]erver [Ee]rror|Too Many Requests)": ("", NETWORK),
    "TransportError|ConnectionError|TimeoutError|ClientError": ("", NETWORK),
}


def fault(constant: str, value: str, error: Exception, hint: str, code: int = 2) -> UserError:
    """The line for an exception of a library. hint: what helps where no row of FAULTS fits."""
    chain, cause = [], error
    while cause is not None:
        chain += [*(kind.__name__ for kind in type(cause).__mro__), str(cause)]
        cause = cause.__cause__ or cause.__context__
    rows = [row for words, row in FAULTS.items() if re.search(words, " ".join(chain))]
    meaning, helps = (*rows, ("", hint))[0]
    if "Hub" in meaning and (near := near_path(value)):
        meaning, helps = "is not there", f"did you mean {near}?"
    message = textwrap.shorten(str(error), 300, placeholder=" ...")
    meaning = meaning or f"could not be read: {type(error).__name__}: {message}"
    return UserError(f"{constant} = {value!r} {meaning}", helps, code=code)


def near_path(path: str) -> str:
    """What is there of nearly that name; "" where nothing is."""
    found = ""
    for part in path.split("/"):
        names = os.listdir(found or ".") if os.path.isdir(found or ".") else []
        near = difflib.get_close_matches(part, names, n=1, cutoff=0.8)
        if not near:
            return ""
        found = os.path.join(found, near[0])
    return found


@contextmanager
def saying(constant: str, value: str, hint: str):
    """Turns what a library raises into one line that names the constant; see fault."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise fault(constant, value, error, hint) from None


def model_errors(name: str):
    """saying(), for what loads MODEL."""
    hint = "check the name and MODEL_REVISION; `make demo` needs no hub"
    if os.path.exists(name):
        hint = "wanted the folder of a causal LM with its head: of a multimodal one its text part"
    return saying("MODEL", name, hint)


def prefer_cache_if_unreachable(model: str, *others: str) -> None:
    """Use the Hub's cache where it does not answer in seconds; it is not asked of local things."""
    asked = [model, *(name for name in others if "/" in name)]
    if not all(os.path.exists(name) or glob.glob(name) for name in asked):
        _ask_once()


@functools.cache
def _ask_once() -> None:
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as e:  # httpx's, whatever the proxy or the network make of it
        print(f"note: {constants.ENDPOINT} does not answer ({first_line(e, 80)}); using its cache")
        constants.HF_HUB_OFFLINE = True


def dataset_commit(dataset: str, revision: str) -> str:
    """The commit that a dataset's revision stands for. Raises UserError."""
    revision = revision or "main"
    if len(revision) == 40:
        return revision  # which asks nobody
    from huggingface_hub import HfApi

    with saying("DATASET", dataset, "check DATASET_REVISION"):
        return HfApi().dataset_info(dataset, revision=revision).sha


def sae_folder(where: str, revision: str, files: set) -> tuple[str, str]:
    """Download those files of owner/repo/folder -> (local folder, commit). Raises UserError."""
    from huggingface_hub import snapshot_download

    repo, sub = "/".join(where.split("/")[:2]), "/".join(where.split("/")[2:])
    wanted = [f"{sub}/{name}".lstrip("/") for name in (*sorted(files), "README.md")]
    with saying("SAE", where, "check the spelling and SAE_REVISION; or set SAE=runs/<name>"):
        patterns = [*wanted, "README.md"]
        root = snapshot_download(repo, revision=revision or "main", allow_patterns=patterns)
    folder, commit = os.path.join(root, sub), os.path.basename(root)
    if sub and not os.path.isdir(folder):
        what = f"SAE = {where!r}: {repo} has no folder {sub!r} with an SAE that is read here"
        raise UserError(what, f"look at https://huggingface.co/{repo}/tree/{commit}")
    return folder, commit
