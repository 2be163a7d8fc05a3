"""Text -> packed contexts on disk: an append-only journal, made once and shared by runs.

Documents are joined by the tokeniser's EOS and cut into contexts of CONTEXT tokens; each context
starts with BOS if the tokeniser adds one to a plain encode. The first documents are held out until
VAL_TOKENS are full; what is left of the document at the border is dropped. Contexts are appended to
cache/tokens-<fingerprint>/ before anything trains; an interrupted journal goes on where it stopped.
"""

import fcntl
import glob
import hashlib
import json
import os
import time

import numpy as np
from tqdm import tqdm

from errors import UserError, first_line, near_path
from machine import check_space

DOCUMENTS_AT_A_TIME = 64
LOCAL = {".jsonl": "json", ".jsonl.zst": "json", ".parquet": "parquet", ".txt": "text"}
RETRY_SECONDS = (1, 2, 4, 8, 15, 30, 60, 120, 240, 480, 840)  # half an hour in all


def kind_of(dataset: str) -> str:
    """ "npy", a datasets builder for local files, or "hub"."""
    if os.path.exists(dataset) or dataset.startswith((".", "/", "~")) or glob.glob(dataset):
        if dataset.endswith(".npy"):
            return "npy"
        for ending, kind in LOCAL.items():
            if dataset.endswith(ending):
                return kind
        what = f"DATASET = {dataset!r} is a local path of a kind not read here"
        raise UserError(what, f"wanted a Hub id or {', '.join(LOCAL)}, .npy")
    if dataset.endswith((".npy", *LOCAL)):
        raise UserError(
            f"DATASET = {dataset!r}: no such file{near_path(dataset)}", "check the path"
        )
    return "hub"


def local_files(dataset: str) -> list[str]:
    path = os.path.expanduser(dataset)
    files = [path] if os.path.exists(path) else sorted(glob.glob(path))
    if not files:
        raise UserError(
            f"DATASET = {dataset!r}: no such file{near_path(dataset)}", "check the path"
        )
    return files


def file_digest(path: str) -> str:
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise UserError(f"DATASET = {path} cannot be read: {e.strerror}") from None


class Journal:
    """Append-only files of packed contexts: val.bin and train.bin, uint32, (sequences, CONTEXT).

    state.json holds what is durable: sequences in each file, tokens left over from the last
    document, documents read and the stream's own state. Anything beyond it is cut off on opening.
    """

    def __init__(self, c, tokenizer, kind: str, n_val: int):
        self.c, self.kind, self.n_val, self.tokenizer = c, kind, n_val, tokenizer
        self.bos = added_bos(tokenizer)
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokeniser of {c.MODEL} has no EOS token", "documents are joined by it"
            )
        if kind == "hub":
            self.source = [c.DATASET, self._commit(), c.SPLIT, c.DATA_FILES]
        else:
            self.source = [file_digest(f) for f in local_files(c.DATASET)]
        key = [kind, self.source, c.TEXT_KEY, _tokenizer_digest(tokenizer), c.CONTEXT, n_val]
        self.fingerprint = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        self.folder = os.path.join(c.CACHE, f"tokens-{self.fingerprint}")

    def _commit(self) -> str:
        """The commit that DATASET_REVISION stands for; asks the Hub unless it is one already."""
        revision = self.c.DATASET_REVISION or "main"
        if len(revision) == 40:
            return revision
        from huggingface_hub import HfApi

        try:
            return HfApi().dataset_info(self.c.DATASET, revision=revision).sha
        except Exception as e:
            raise UserError(
                f"DATASET = {self.c.DATASET!r} at {revision!r} could not be found: {first_line(e)}",
                "wanted a Hub id, or a local path",
            ) from None

    def val(self) -> np.ndarray:
        return self._map("val")

    def train(self) -> np.ndarray:
        return self._map("train")

    def _map(self, name):
        rows = self.state[name]
        if not rows:
            return np.empty((0, self.c.CONTEXT), np.uint32)
        path = os.path.join(self.folder, f"{name}.bin")
        return np.memmap(path, np.uint32, "r", shape=(rows, self.c.CONTEXT))

    def write(self, n_train: int | None) -> None:
        """Bring the journal to n_train training sequences, or to the end of the text for None."""
        try:
            os.makedirs(self.folder, exist_ok=True)
            with open(os.path.join(self.folder, "lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # two runs that need the same text: one writes
                self.state = self._read_state()
                if not self._full(n_train):
                    self._append(n_train)
        except OSError as e:
            what = f"CACHE = {self.c.CACHE!r} cannot be written: {e.strerror or e}"
            hint = "what was saved before is kept; set CACHE to a folder that can be written"
            raise UserError(what, hint) from None

    def _full(self, n_train) -> bool:
        s = self.state
        enough = n_train is not None and s["val"] >= self.n_val and s["train"] >= n_train
        return s["ended"] or enough

    def _read_state(self) -> dict:
        path = os.path.join(self.folder, "state.json")
        if not os.path.exists(path):
            return {
                "val": 0,
                "train": 0,
                "left": [],
                "documents": 0,
                "stream": None,
                "ended": False,
            }
        with open(path) as f:
            state = json.load(f)
        for name in ("val", "train"):
            file = os.path.join(self.folder, f"{name}.bin")
            size = os.path.getsize(file) if os.path.exists(file) else 0
            if size < state[name] * self.c.CONTEXT * 4:
                what = f"{file} has {size:,} bytes, fewer than its state.json says"
                raise UserError(what, f"remove {self.folder}; it is made again")
        return state

    def _append(self, n_train) -> None:
        if n_train is not None:
            left = self.n_val + n_train - self.state["val"] - self.state["train"]
            check_space("CACHE", self.c.CACHE, 4.0 * left * self.c.CONTEXT)
        files = {
            name: open(os.path.join(self.folder, f"{name}.bin"), "ab") for name in ("val", "train")
        }
        for name, f in files.items():
            f.truncate(self.state[name] * self.c.CONTEXT * 4)
            f.seek(0, os.SEEK_END)
        total = None if n_train is None else (self.n_val + n_train) * self.c.CONTEXT
        bar = tqdm(desc="tokenising", unit=" tokens", unit_scale=True, total=total, leave=False)
        saved = time.monotonic()
        try:
            for texts, stream in self._documents():
                self._pack(texts, files)
                self.state["documents"] += len(texts)
                self.state["stream"] = stream
                bar.n = (self.state["val"] + self.state["train"]) * self.c.CONTEXT
                bar.refresh()
                full = self._full(n_train)
                if full or time.monotonic() - saved > 5:
                    self._save(files)
                    saved = time.monotonic()
                if full:
                    return
            self.state["ended"] = True
            self._save(files)
        except UserError:  # of the source, between two batches of documents
            self._save(files)
            raise
        finally:
            bar.close()
            for f in files.values():
                f.close()

    def _save(self, files) -> None:
        for f in files.values():
            f.flush()
            os.fsync(f.fileno())
        path = os.path.join(self.folder, "state.json")
        with open(path + ".tmp", "w") as f:
            json.dump(self.state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)

    def _pack(self, texts: list[str], files) -> None:
        """Append whole contexts, keep the rest; held out first, no document on both sides."""
        state, body = self.state, self.c.CONTEXT - (self.bos is not None)
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)
        for ids in encoded["input_ids"]:
            state["left"] += [*ids, self.tokenizer.eos_token_id]
            name = "val" if state["val"] < self.n_val else "train"
            rows = len(state["left"]) // body
            if name == "val":
                rows = min(rows, self.n_val - state["val"])
            if not rows:
                continue
            contexts = np.array(state["left"][: rows * body], np.uint32).reshape(rows, body)
            if self.bos is not None:
                contexts = np.insert(contexts, 0, self.bos, axis=1)
            contexts.tofile(files[name])
            state[name] += rows
            border = name == "val" and state["val"] == self.n_val
            state["left"] = [] if border else state["left"][rows * body :]

    def _documents(self):
        """Yields (texts, stream state after them) from where the state says, through hub faults."""
        from datasets import load_dataset, logging

        logging.set_verbosity(logging.CRITICAL)  # what it would say is in our own line
        failures, seen = 0, self.state["documents"]
        while True:
            try:
                stream = self._open(load_dataset)
                if self.state["stream"]:
                    stream.load_state_dict(self.state["stream"])
                texts = []
                for row in stream:
                    texts.append(self._text(row, seen + len(texts)))
                    if len(texts) == DOCUMENTS_AT_A_TIME:
                        seen += len(texts)
                        yield texts, stream.state_dict()
                        texts, failures = [], 0
                if texts:
                    yield texts, stream.state_dict()
                return
            except UserError:
                raise
            except Exception as e:
                final = self.kind != "hub" or not _passing(e) or failures >= len(RETRY_SECONDS)
                if final:
                    where = f"after {seen:,} documents" if seen else "from the start"
                    cause = f"{type(e).__name__}: {first_line(e)}"
                    what = f"DATASET = {self.c.DATASET!r} could not be read {where}: {cause}"
                    hint = "what was read is kept; run the same command to go on from there"
                    if self.kind != "hub":
                        hint = "put the file right: one JSON object a line, parquet, or plain text"
                    raise UserError(what, hint, code=1 if seen else 2) from None
                tqdm.write(f"the hub did not answer; trying again in {RETRY_SECONDS[failures]} s")
                time.sleep(RETRY_SECONDS[failures])
                failures += 1

    def _open(self, load_dataset):
        c = self.c
        if self.kind == "hub":
            return load_dataset(
                c.DATASET,
                revision=self.source[1],
                data_files=c.DATA_FILES or None,
                split=c.SPLIT,
                streaming=True,
            )
        options = {"sample_by": "document"} if self.kind == "text" else {}
        files = local_files(c.DATASET)
        return load_dataset(self.kind, data_files=files, split="train", streaming=True, **options)

    def _text(self, row: dict, index: int) -> str:
        text = row.get(self.c.TEXT_KEY)
        if isinstance(text, str):
            return text
        if isinstance(text, list):
            return self._chat(text, index)
        if self.c.TEXT_KEY in row:
            what = f"document {index} of DATASET has {type(text).__name__} as {self.c.TEXT_KEY!r}"
            raise UserError(
                what, "wanted a text, or a list of chat messages", code=1 if index else 2
            )
        what = f"documents of DATASET have no {self.c.TEXT_KEY!r}; they have {', '.join(row)}"
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
            what = f"the chat template of {self.c.MODEL} refused document {index}: {first_line(e)}"
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


def _tokenizer_digest(tokenizer) -> str:
    """Of what decides the token ids, wherever the tokeniser was loaded from."""
    backend = tokenizer.backend_tokenizer.to_str()
    parts = [backend, tokenizer.eos_token, tokenizer.bos_token, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def special_ids(tokenizer) -> list[int]:
    """BOS, EOS and pad, as far as there are any."""
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return sorted({i for i in ids if i is not None})
