"""Texts: which kind a DATASET is, and its documents, streamed through the Hub's faults."""

import glob
import hashlib
import json
import os
import re
import time
from datetime import datetime

from tqdm import tqdm

from klsplice import hub
from klsplice.errors import UserError, near_path, whole
from klsplice.storage import digest
from klsplice.text.rows import no_field, open_rows

DOCUMENTS_AT_A_TIME = 64
LOCAL = {".txt": "text", ".jsonl": "json", ".jsonl.zst": "json", ".jsonl.gz": "json"}
LOCAL |= {".json": "json", ".parquet": "parquet", ".npy": "npy"}
RETRY_SECONDS = (1, 2, 4, 8, 15, 30, 60, 120, 240, 480, 840)  # half an hour in all


def kind_of(dataset: str) -> str:
    """ "npy", a builder of the datasets library for local files, or "hub". Raises UserError."""
    if hub.is_local(dataset) or dataset.startswith((".", "/", "~")):
        files = {_ending(file): file for file in local_files(dataset)}
        found = sorted(files)
        if "" in files:
            what = f"DATASET = {dataset!r}: {files['']} is of a kind not read here"
            hint = f"wanted a Hub id, or a file, glob or folder of {', '.join(LOCAL)}"
            raise UserError(what, hint)
        # packed or not, lines of JSON are of one kind; a .json is one whole
        if len({ending.split(".")[1] for ending in found}) > 1:
            what = f"DATASET = {dataset!r} holds files of several kinds: {', '.join(found)}"
            raise UserError(what, "name those of one kind by a glob, as in DATASET='texts/*.jsonl'")
        return LOCAL[found[0]]
    if dataset.endswith(tuple(LOCAL)) or dataset.count("/") > 1:  # the Hub's are owner/name
        raise _no_file(dataset)
    return "hub"


def local_files(dataset: str) -> list[str]:
    """The files of a path, glob or folder, sorted; of a folder those that LOCAL has, at any depth.
    Raises UserError where there are none."""
    path = os.path.expanduser(dataset)
    files = [path] if os.path.exists(path) else sorted(glob.glob(path))
    if os.path.isdir(path):
        inside = sorted(glob.glob(os.path.join(glob.escape(path), "**"), recursive=True))
        files = [file for file in inside if _ending(file)]
    if not files:
        raise _no_file(dataset)
    return files


def _ending(file: str) -> str:
    """Which of LOCAL's a file's name has, "" where it has none."""
    return next((ending for ending in LOCAL if file.endswith(ending)), "")


def _no_file(dataset: str) -> UserError:
    what = f"DATASET = {dataset!r}: no such file or folder{near_path(dataset)}"
    return UserError(what, "check the path")


def file_digest(path: str) -> str:
    """sha256 of a file of DATASET. Raises UserError."""
    try:
        return digest(path)
    except OSError as e:
        raise UserError(f"DATASET = {path} cannot be read: {e.strerror}") from None


class Documents:
    """The documents of a text, in their order: of a Hub dataset, streamed, or of local files.

    kind: see kind_of. bos: what contexts start with, or None. model: named where its chat template
    refuses a conversation.
    identity: what decides which documents these are (a Hub commit, or digests of files).
    one_text: whether they are one long text, which is cut in two.
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
        bos: int | None,
        model: str,
    ):
        self.dataset, self.kind, self.split, self.data_files = dataset, kind, split, data_files
        self.text_key, self.tokenizer, self.bos, self.model = text_key, tokenizer, bos, model
        self.commit, self.one_text = None, False
        if kind == "hub":
            self.commit = hub.dataset_commit(dataset, revision)
            self.identity = [dataset, self.commit, split, data_files]
        else:
            files = local_files(dataset)
            self.identity = [file_digest(f) for f in files]
            self.one_text = kind == "text" and len(files) == 1

    def read(self, seen: int, state: dict | None):
        """Yields (texts, state of the stream after them) from where `state` says; "" where a
        document has no text.

        seen: how many documents came before. Raises UserError; what was yielded stays good.
        """
        from datasets import logging

        logging.set_verbosity(logging.CRITICAL)  # what it would say is in our own line
        failures, rows = 0, None
        while True:
            try:
                # opened inside the try: the Hub's faults come as often here as between rows
                rows = self.open(seen, state)
                texts = []
                for row in rows:
                    texts.append(self._text(row, seen + len(texts)))
                    if len(texts) == DOCUMENTS_AT_A_TIME:
                        seen += len(texts)
                        state = rows.state_dict()
                        yield texts, state
                        texts, failures = [], 0
                if texts:
                    yield texts, rows.state_dict()
                return
            except UserError:
                raise
            except Exception as e:
                passing = self.kind == "hub" and _passing(e) and failures < len(RETRY_SECONDS)
                if not passing:
                    raise self._unreadable(e, seen, rows) from None
                tqdm.write(f"the hub did not answer; trying again in {RETRY_SECONDS[failures]} s")
                time.sleep(RETRY_SECONDS[failures])
                failures += 1

    def open(self, seen: int, state: dict | None):
        """The rows after the first `seen`; state: of the stream there."""
        return open_rows(
            self.dataset if self.kind == "hub" else local_files(self.dataset),
            kind=self.kind,
            revision=self.commit,
            data_files=self.data_files,
            split=self.split,
            key=self.text_key,
            seen=seen,
            state=state,
        )

    def _unreadable(self, e: Exception, seen: int, rows) -> UserError:
        code = 1 if seen else 2
        where = {"revision": self.commit, "split": self.split}
        if self.kind == "hub" and (found := hub.dataset_fault(e, self.dataset, **where)):
            what, hint = found
            return UserError(f"DATASET = {self.dataset!r} {what}", hint, code=code)
        after = f"after {seen:,} documents" if seen else "from the start"
        place = rows.where() if hasattr(rows, "where") else ""
        after += f" ({place})" if place and place not in str(e) else ""
        what = f"DATASET = {self.dataset!r} could not be read {after}:{whole(e, named=True)}"
        return UserError(what, self._hint(e, seen), code=code)

    def _hint(self, e: Exception, seen: int) -> str:
        """What helps against a fault of reading."""
        if self.kind != "hub":
            return "put the file right: one JSON object a line, parquet, or plain text, in UTF-8"
        page = f"https://huggingface.co/datasets/{self.dataset}/tree/{self.commit}"
        if isinstance(e, ValueError):  # of JSON, UTF-8 or parquet: it will not pass
            return f"a file there is damaged or no text; set DATA_FILES to others of {page}"
        if isinstance(e, FileNotFoundError) and not seen and not _passing(e):
            return f"set DATA_FILES to files with text of {page}"
        kept = "what was read is kept" if seen else "check the network"
        return f"{kept}; run the same command to continue from there"

    def _text(self, row, index: int) -> str:
        """ "" where there is none."""
        if not isinstance(row, dict):
            raise _refused(index, f"is a {type(row).__name__}", "wanted a JSON object a line")
        if index == 0 and self.text_key not in row:
            raise no_field(self.text_key, row)
        text = row.get(self.text_key)
        if text is None or text == []:
            return ""
        if isinstance(text, list):
            text = self._chat(text, index)
        if not isinstance(text, str):
            found = f"has {type(text).__name__} as {self.text_key!r}"
            raise _refused(index, found, "wanted a text, or a list of chat messages")
        # half a surrogate pair, which JSON may hold, is no text
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text if text.strip() else ""

    def _chat(self, messages: list, index: int) -> str:
        """A conversation through the tokeniser's chat template, on a fixed day.

        Without the BOS at its start where each context starts with BOS, as no document has one of
        its own; but whole where BOS also marks turns."""
        hint = 'wanted [{"role": "user", "content": "..."}, ...]'
        empty = [
            not isinstance(m, dict) or m.get("role") is None or m.get("content") is None
            for m in messages
        ]
        if any(empty):
            raise _refused(index, "has a message without role or content", hint)
        messages = [m | {"content": _joined(m["content"])} for m in messages]
        if any(m["content"] is None for m in messages):
            raise _refused(index, "has a message whose content is no text", hint)
        try:
            template = _of_one_day(self.tokenizer.get_chat_template())
            given = {"chat_template": template, "date_string": DAY.strftime("%d %b %Y")}
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, **given)
        except Exception as e:
            what = f"the chat template of {self.model} refused document {index}:{whole(e)}"
            hint = "wanted messages as that model's template takes them"
            raise UserError(what, hint, code=1 if index else 2) from None
        bos = self.tokenizer.bos_token
        return text.removeprefix(bos) if self.bos is not None and text.count(bos) == 1 else text


DAY = datetime(2024, 7, 26)  # Llama's own for templates that are told no date


def _of_one_day(template: str) -> str:
    """A chat template that gives the same text on any day."""
    today = r"""strftime_now\(\s*(["'])(.*?)\1\s*\)"""
    return re.sub(today, lambda found: repr(DAY.strftime(found[2])), template)


def _joined(content) -> str | None:
    """The text of a message that may come in parts; None where there is something else in it."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    kinds = {part.get("type", "text") if isinstance(part, dict) else None for part in parts}
    return "".join(texts) if kinds == {"text"} and all(isinstance(t, str) for t in texts) else None


def _refused(index: int, what: str, hint: str) -> UserError:
    return UserError(f"document {index} of DATASET {what}", hint, code=1 if index else 2)


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
