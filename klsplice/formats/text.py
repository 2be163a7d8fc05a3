"""Texts: which kind a DATASET is, and its documents, streamed through the Hub's faults."""

import glob
import hashlib
import json
import os
import time

from tqdm import tqdm

from klsplice import hub
from klsplice.errors import UserError, first_line, near_path
from klsplice.storage import digest

DOCUMENTS_AT_A_TIME = 64
LOCAL = {".jsonl": "json", ".jsonl.zst": "json", ".parquet": "parquet", ".txt": "text"}
RETRY_SECONDS = (1, 2, 4, 8, 15, 30, 60, 120, 240, 480, 840)  # half an hour in all


def kind_of(dataset: str) -> str:
    """ "npy", a builder of the datasets library for local files, or "hub". Raises UserError."""
    if os.path.exists(dataset) or dataset.startswith((".", "/", "~")) or glob.glob(dataset):
        if dataset.endswith(".npy"):
            return "npy"
        for ending, kind in LOCAL.items():
            if dataset.endswith(ending):
                return kind
        what = f"DATASET = {dataset!r} is a local path of a kind not read here"
        raise UserError(what, f"wanted a Hub id or {', '.join(LOCAL)}, .npy")
    if dataset.endswith((".npy", *LOCAL)):
        raise _no_file(dataset)
    return "hub"


def local_files(dataset: str) -> list[str]:
    """The files of a path or glob, sorted. Raises UserError where there are none."""
    path = os.path.expanduser(dataset)
    files = [path] if os.path.exists(path) else sorted(glob.glob(path))
    if not files:
        raise _no_file(dataset)
    return files


def _no_file(dataset: str) -> UserError:
    return UserError(f"DATASET = {dataset!r}: no such file{near_path(dataset)}", "check the path")


def file_digest(path: str) -> str:
    """sha256 of a file of DATASET. Raises UserError."""
    try:
        return digest(path)
    except OSError as e:
        raise UserError(f"DATASET = {path} cannot be read: {e.strerror}") from None


class Documents:
    """The documents of a text, in their order: of a Hub dataset, streamed, or of local files.

    kind: see kind_of. model: named where its chat template refuses a conversation.
    identity: what decides which documents these are (a Hub commit, or digests of files).
    """

    def __init__(
        self,
        dataset: str,
        *,
        kind: str,
        revision: str,
        split: str,
        data_files: str,
        text_key: str,
        tokenizer,
        model: str,
    ):
        self.dataset, self.kind, self.split, self.data_files = dataset, kind, split, data_files
        self.text_key, self.tokenizer, self.model = text_key, tokenizer, model
        self.commit = None
        if kind == "hub":
            self.commit = hub.dataset_commit(dataset, revision)
            self.identity = [dataset, self.commit, split, data_files]
        else:
            self.identity = [file_digest(f) for f in local_files(dataset)]

    def read(self, seen: int, stream_state: dict | None):
        """Yields (texts, stream state after them) from where stream_state says.

        seen: how many documents came before. Raises UserError; what was yielded stays good.
        """
        from datasets import load_dataset, logging

        logging.set_verbosity(logging.CRITICAL)  # what it would say is in our own line
        failures = 0
        while True:
            try:
                # opened inside the try: the Hub's faults come as often here as between rows
                stream = self.open(load_dataset)
                if stream_state:
                    stream.load_state_dict(stream_state)
                texts = []
                for row in stream:
                    texts.append(self._text(row, seen + len(texts)))
                    if len(texts) == DOCUMENTS_AT_A_TIME:
                        seen += len(texts)
                        stream_state = stream.state_dict()
                        yield texts, stream_state
                        texts, failures = [], 0
                if texts:
                    yield texts, stream.state_dict()
                return
            except UserError:
                raise
            except Exception as e:
                passing = self.kind == "hub" and _passing(e) and failures < len(RETRY_SECONDS)
                if not passing:
                    raise self._unreadable(e, seen) from None
                tqdm.write(f"the hub did not answer; trying again in {RETRY_SECONDS[failures]} s")
                time.sleep(RETRY_SECONDS[failures])
                failures += 1

    def open(self, load_dataset):
        """The stream, by the datasets library."""
        if self.kind == "hub":
            return load_dataset(
                self.dataset,
                revision=self.commit,
                data_files=self.data_files or None,
                split=self.split,
                streaming=True,
            )
        options = {"sample_by": "document"} if self.kind == "text" else {}
        files = local_files(self.dataset)
        return load_dataset(self.kind, data_files=files, split="train", streaming=True, **options)

    def _unreadable(self, e: Exception, seen: int) -> UserError:
        where = f"after {seen:,} documents" if seen else "from the start"
        cause = f"{type(e).__name__}: {first_line(e)}"
        what = f"DATASET = {self.dataset!r} could not be read {where}: {cause}"
        hint = "what was read is kept; run the same command to continue from there"
        if self.kind != "hub":
            hint = "put the file right: one JSON object a line, parquet, or plain text"
        return UserError(what, hint, code=1 if seen else 2)

    def _text(self, row: dict, index: int) -> str:
        text = row.get(self.text_key)
        if isinstance(text, str):
            return text
        if isinstance(text, list):
            return self._chat(text, index)
        if self.text_key in row:
            what = f"document {index} of DATASET has {type(text).__name__} as {self.text_key!r}"
            raise UserError(
                what, "wanted a text, or a list of chat messages", code=1 if index else 2
            )
        what = f"documents of DATASET have no {self.text_key!r}; they have {', '.join(row)}"
        raise UserError(what, "set TEXT_KEY to the field with the text")

    def _chat(self, messages: list, index: int) -> str:
        """A conversation through the tokeniser's chat template, without BOS: packing adds it."""
        empty = [
            not isinstance(m, dict) or m.get("role") is None or m.get("content") is None
            for m in messages
        ]
        if not messages or any(empty):
            what = f"document {index} of DATASET has a message without role or content"
            hint = 'wanted [{"role": "user", "content": "..."}, ...]'
            raise UserError(what, hint, code=1 if index else 2)
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as e:
            what = f"the chat template of {self.model} refused document {index}: {first_line(e)}"
            hint = "wanted messages as that model's template takes them"
            raise UserError(what, hint, code=1 if index else 2) from None
        return text.removeprefix(self.tokenizer.bos_token or "")


def _passing(e: Exception) -> bool:
    """Whether a fault of the hub may pass: not for what is missing, forbidden or not text."""
    if "OfflineModeIsEnabled" in f"{type(e).__name__} {e}":
        return False
    status = getattr(getattr(e, "response", None), "status_code", None)
    if status is not None:
        return status >= 500 or status in (408, 429)
    return isinstance(e, (ConnectionError, TimeoutError)) or "httpx" in type(e).__module__


def added_bos(tokenizer) -> int | None:
    """The BOS that a plain encode puts first, or None (SmolLM2, Pythia)."""
    ids = tokenizer("a")["input_ids"]
    return ids[0] if ids and ids[0] == tokenizer.bos_token_id else None


def bos_of(tokenizer, which: str) -> int | None:
    """BOS -> the token that each context starts with, or None. Raises UserError."""
    if which == "tokenizer":
        return added_bos(tokenizer)
    if which == "always" and tokenizer.bos_token_id is None:
        raise UserError("BOS = always: the tokeniser has no BOS token", "set BOS=tokenizer")
    return tokenizer.bos_token_id if which == "always" else None


def special_ids(tokenizer) -> list[int]:
    """BOS, EOS and pad, as far as there are any."""
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return sorted({i for i in ids if i is not None})


def tokenizer_digest(tokenizer) -> str:
    """Of what decides the token ids, wherever the tokeniser was loaded from."""
    backend = tokenizer.backend_tokenizer.to_str()
    parts = [backend, tokenizer.eos_token, tokenizer.bos_token, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
