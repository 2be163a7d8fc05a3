"""What is asked of the Hugging Face Hub, and what its errors mean to the person at the keyboard."""

import functools
import os
from contextlib import contextmanager

from klsplice.errors import UserError, first_line, near_path


def prefer_cache_if_unreachable(model: str, *others: str) -> None:
    """Use the local Hub cache where the Hub does not answer within seconds.

    Its own retries would take half a minute. Nothing is asked where all of these are local."""
    if not all(map(os.path.exists, [model, *(name for name in others if "/" in name)])):
        from huggingface_hub import constants

        _ask_once(constants.ENDPOINT)


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


def load_options(name: str, revision: str) -> dict:
    """from_pretrained's keywords: a local folder has no revision and is never looked up online."""
    where = {"local_files_only": True} if os.path.isdir(name) else {"revision": revision or "main"}
    return where | {"trust_remote_code": False}


@contextmanager
def model_errors(name: str):
    """Turns what the Hub's libraries raise while they load MODEL into one line that helps."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
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
        elif isinstance(e, (OSError, ValueError, KeyError, RuntimeError, SafetensorError)):
            cause = first_line(e, 200)
            here = "" if os.path.isdir(name) else "is no folder here and "
            what = f"MODEL = {name!r} {here}could not be loaded: {cause}{near_path(name)}"
            hint = "check the name, MODEL_REVISION and the network; `make demo` needs no hub"
        else:
            raise
        raise UserError(what, hint) from None


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
        raise UserError(
            f"DATASET = {dataset!r} at {revision!r} could not be found: {first_line(e)}",
            "wanted a Hub id, or a local path",
        ) from None


def sae_folder(where: str, revision: str, files: tuple) -> tuple[str, str]:
    """Download those files of owner/repo/folder -> (local folder, commit). Raises UserError."""
    from huggingface_hub import snapshot_download

    repo, sub = "/".join(where.split("/")[:2]), "/".join(where.split("/")[2:])
    wanted = [f"{sub}/{name}".lstrip("/") for name in (*files, "README.md")] + ["README.md"]
    try:
        root = snapshot_download(repo, revision=revision or "main", allow_patterns=wanted)
    except Exception as e:
        found = {"GatedRepoError": "it is gated", "RepositoryNotFoundError": "no such repository"}
        cause = found.get(type(e).__name__, first_line(e))
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
