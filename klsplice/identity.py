"""What a run depends on beside its constants, known by content and not by name."""

from klsplice.errors import UserError

CONTENT = {  # a name in run.json -> the constants that it stands for
    "model": "MODEL (at MODEL_REVISION)",
    "sae": "SAE (at SAE_REVISION)",
    "tokens": "DATASET (at DATASET_REVISION), or how it is tokenised,",
}


def resolved(opened, source, tokens) -> dict:
    """What the names in the constants stood for: commits of the Hub, digests of local files.

    opened: lm.load.Opened. source: formats.read.Source. tokens: data.Tokens."""
    return {
        "model": opened.identity,
        "sae": source.identity,
        "sae_commit": source.commit,
        "dataset_commit": tokens.commit,
        "tokens": tokens.fingerprint,
        "documents_without_text": tokens.skipped,
    }


def check_same(folder: str, old: dict, new: dict) -> None:
    """Raises UserError where a run began with another LM, SAE or text than there is now."""
    for name, what in CONTENT.items():
        if old.get(name) is not None and old[name] != new[name]:
            what = f"{what} is not what {folder} began with: {old[name]:.40} -> {new[name]:.40}"
            raise UserError(what, "put it back as it was, or start another run (RUN_NAME)")
