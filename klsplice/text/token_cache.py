"""Text -> packed contexts on disk: an append-only cache, made once and shared by runs.

Documents that have text are joined by the tokeniser's EOS and cut into contexts of CONTEXT tokens;
each context starts with BOS where the constant BOS says so. The first documents are held out until
VAL_TOKENS are full; what is left of the document at the border is dropped, of one long text a
context's length of it. Contexts are appended to CACHE/tokens-<fingerprint>/ before anything trains;
a cache whose making was interrupted is continued where it stopped.
"""

import hashlib
import json
import os
import time

import numpy as np
from tqdm import tqdm

from klsplice.errors import UserError
from klsplice.machine import check_space
from klsplice.storage import lock, mapped, read_json, write_json
from klsplice.text.documents import Documents, added_bos, special_ids


class TokenCache:
    """Append-only files of packed contexts: val.bin and train.bin, uint32, (sequences, CONTEXT).

    state.json says what is durable: sequences in each file, tokens left over from the last
    document, documents read, how many of them had no text and were skipped, and the stream's own
    state. Anything beyond it is cut off on opening. vocabulary: tokens that the LM knows.
    """

    def __init__(self, documents: Documents, *, n_val: int, vocabulary: int):
        cfg = documents.cfg
        self.documents, self.tokenizer, self.bos = documents, documents.tokenizer, documents.bos
        self.eos, self.unsaid = self.tokenizer.eos_token_id, {*special_ids(self.tokenizer)}
        self.context, self.n_val, self.vocabulary = cfg.CONTEXT, n_val, vocabulary
        if self.eos is None:
            what = f"the tokeniser of {cfg.MODEL} has no EOS token"
            raise UserError(what, "documents are joined by it")
        t = self.tokenizer  # what of it decides the token ids, wherever it was loaded from
        parts = [t.backend_tokenizer.to_str(), t.eos_token, t.bos_token, t.chat_template]
        of_tokenizer = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        key = [documents.kind, documents.identity, cfg.TEXT_KEY, of_tokenizer, cfg.CONTEXT, n_val]
        if self.bos != added_bos(self.tokenizer):  # else the tokeniser's digest says it
            key.append(self.bos)
        if documents.one_text:
            key.append("one text")
        self.fingerprint = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        self.cache = cfg.CACHE
        self.folder = os.path.join(self.cache, f"tokens-{self.fingerprint}")

    def sequences(self, name: str) -> np.ndarray:
        """ "val" or "train" -> (sequences, CONTEXT)."""
        n = self.state[name]
        if not n:
            return np.empty((0, self.context), np.uint32)
        return mapped(self._path(f"{name}.bin"), (n, self.context))

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def write(self, n_train: int | None) -> None:
        """Bring the cache to n_train training sequences, or to the end of the text for None."""
        try:
            os.makedirs(self.folder, exist_ok=True)
            with open(self._path("lock"), "w") as file:
                # of runs that need the same text one writes
                lock(file, f"CACHE = {self.cache!r}", wait=True)
                self.state = self._read_state()
                if not self._full(n_train):
                    self._append(n_train)
        except OSError as e:
            what = f"CACHE = {self.cache!r} cannot be written: {e.strerror or e}"
            raise UserError(what, "free some space, or set CACHE to another folder") from None

    def _full(self, n_train: int | None) -> bool:
        if n_train is None or self.state["val"] < self.n_val:
            return self.state["ended"]
        return self.state["ended"] or self.state["train"] >= n_train

    def _read_state(self) -> dict:
        if not os.path.exists(self._path("state.json")):
            nothing = {"val": 0, "train": 0, "left": [], "documents": 0, "skipped": 0}
            return nothing | {"stream": None, "ended": False}
        state = read_json(self._path("state.json"))
        for name in ("val", "train"):
            file = self._path(f"{name}.bin")
            size = os.path.getsize(file) if os.path.exists(file) else 0
            if size < state[name] * self.context * 4:
                what = f"{file} has {size:,} bytes, fewer than its state.json says"
                raise UserError(what, f"remove {self.folder}; it is made again")
        return state

    def _append(self, n_train: int | None) -> None:
        total = None if n_train is None else self.n_val + n_train
        if total is not None:
            left = total - self.state["val"] - self.state["train"]
            check_space("CACHE", self.cache, 4.0 * left * self.context)
            total *= self.context
        files = {name: open(self._path(f"{name}.bin"), "ab") for name in ("val", "train")}
        for name, f in files.items():
            f.truncate(self.state[name] * self.context * 4)
        bar = tqdm(desc="tokenising", unit=" tokens", unit_scale=True, total=total, leave=False)
        saved = time.monotonic()
        try:
            for texts, stream in self.documents.read(self.state["documents"], self.state["stream"]):
                self.pack([text for text in texts if text], files)
                self.state["documents"] += len(texts)
                self.state["skipped"] += texts.count("")
                self.state["stream"] = stream
                bar.n = (self.state["val"] + self.state["train"]) * self.context
                bar.refresh()
                full = self._full(n_train)
                if full or time.monotonic() - saved > 5:
                    self.save(files)
                    saved = time.monotonic()
                if full:
                    return
            self.state["ended"] = True
            self.save(files)
        except UserError:  # of the source, between two batches of documents
            self.save(files)
            raise
        finally:
            bar.close()
            for f in files.values():
                f.close()

    def save(self, files: dict) -> None:
        """Make what was appended durable: first the tokens, then the state that counts them."""
        for f in files.values():
            f.flush()
            os.fsync(f.fileno())
        write_json(self._path("state.json"), self.state)

    def pack(self, texts: list[str], files: dict) -> None:
        """Append whole contexts, keep the rest; held out first, no document on both sides."""
        state, body = self.state, self.context - (self.bos is not None)
        if not texts:
            return
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)
        for text, ids in zip(texts, encoded["input_ids"]):
            if max(ids, default=0) >= self.vocabulary:
                ids = _known(ids, self.tokenizer, self.vocabulary)
            if not self.documents.chats and not self.unsaid.isdisjoint(ids):
                names = ", ".join(self.tokenizer.convert_ids_to_tokens([*self.unsaid & {*ids}]))
                tqdm.write(f"note: a document of DATASET says {names}, which counts as that token")
                self.unsaid -= {*ids}
            ended = text.rstrip().endswith(self.tokenizer.eos_token)  # a chat that ends its turn
            state["left"] += ids if ended else [*ids, self.eos]
            name = "val" if state["val"] < self.n_val else "train"
            self._cut(name, body, files)
            if name == "val" and state["val"] == self.n_val:
                state["left"] = state["left"][body:] if self.documents.one_text else []
                self._cut("train", body, files)

    def _cut(self, name: str, body: int, files: dict) -> None:
        """Append what is left in whole contexts, of those held out as many as are wanted."""
        state = self.state
        n = len(state["left"]) // body
        if name == "val":
            n = min(n, self.n_val - state["val"])
        if n:
            contexts = np.array(state["left"][: n * body], np.uint32).reshape(n, body)
            if self.bos is not None:
                contexts = np.insert(contexts, 0, self.bos, axis=1)
            contexts.tofile(files[name])
            state[name] += n
            state["left"] = state["left"][n * body :]


def _known(ids: list[int], tokenizer, vocabulary: int) -> list[int]:
    """The same with a special token that the LM has no embedding of taken as the text it is."""
    as_text = {"add_special_tokens": False, "split_special_tokens": True}
    known = []
    for i in ids:
        known += [i] if i < vocabulary else tokenizer(tokenizer.decode([i]), **as_text)["input_ids"]
    return known
