"""Text -> tokens on disk -> batches.

Documents are joined by the tokeniser's EOS and cut into contexts of CONTEXT tokens; each context
starts with BOS if the tokeniser adds one to a plain encode. The first documents are held out until
VAL_TOKENS are full; what is left of the document at the border is dropped. Contexts are appended to
a journal, cache/tokens-<fingerprint>/, before anything trains: a sequence is then an index, runs
on the same text share it, and an interrupted journal goes on where it stopped.
"""

import fcntl
import glob
import hashlib
import json
import os
import time
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

import distributed
from errors import UserError, first_line, near_path
from machine import check_space

DOCUMENTS_AT_A_TIME = 64
PIECE = 200_000_000  # tokens of a stream that are written before training goes on
LOCAL = {".jsonl": "json", ".jsonl.zst": "json", ".parquet": "parquet", ".txt": "text"}
RETRY_SECONDS = (1, 2, 4, 8, 15, 30, 60, 120, 240, 480, 840)  # half an hour in all


class Tokens:
    """Held-out and training sequences of one run.

    val_SL: (S, CONTEXT) uint32, held out. order_S: indices into train_SL, in training order.
    more: sequences wanted -> a train_SL that has them, where it is written in pieces.
    special: ids of BOS, EOS and pad. bos: whether contexts start with BOS. steps: how many steps
    TOKENS x PASSES make. fingerprint: of text, tokeniser and packing. commit: of a Hub dataset.
    """

    def __init__(
        self,
        val_SL,
        train_SL,
        order_S,
        *,
        c,
        special,
        bos: bool,
        fingerprint: str,
        commit: str | None = None,
        more=None,
    ):
        self.val_SL, self.train_SL, self.order_S = val_SL, train_SL, order_S
        self.batch_size, self.keep, self.special = c.BATCH, c.KEEP, special
        self.bos, self.fingerprint, self.commit, self.more = bos, fingerprint, commit, more
        self.steps_a_pass = len(order_S) // c.BATCH
        self.steps = c.PASSES * self.steps_a_pass

    def batch(self, step: int) -> torch.Tensor:
        """-> (BATCH, CONTEXT) int64, on the CPU; of several processes, this one's part of it."""
        first = self.first(step) % (self.steps_a_pass * self.batch_size)
        return self.sequences(first, first + self.share)

    def first(self, step: int) -> int:
        """How many sequences come before those of `batch`, passes counted."""
        return step * self.batch_size + distributed.rank() * self.share

    @property
    def share(self) -> int:
        """Sequences a step in this process."""
        return self.batch_size // distributed.size()

    def sequences(self, first: int, end: int) -> torch.Tensor:
        """Training sequences [first, end) in this run's order -> int64, on the CPU."""
        wanted_S = self.order_S[first:end]
        if self.more is not None and wanted_S.max() >= len(self.train_SL):
            self.train_SL = self.more(int(wanted_S.max()) + 1)
        return torch.from_numpy(self.train_SL[wanted_S].astype(np.int64))

    def val(self, first: int, end: int) -> torch.Tensor:
        return torch.from_numpy(self.val_SL[first:end].astype(np.int64))

    def active(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """-> indices into B*L of the positions where the SAE stands in (KEEP says which do not)."""
        kept_BL = torch.zeros_like(tokens_BL, dtype=torch.bool)
        if self.keep == "first":
            kept_BL[:, 0] = True
        elif self.keep == "special":
            kept_BL = torch.isin(tokens_BL, torch.tensor(self.special))
        return (~kept_BL.flatten()).nonzero().squeeze(1)

    @property
    def tokens_a_step(self) -> int:
        return self.batch_size * self.val_SL.shape[1]

    @property
    def tokens(self) -> int:
        """Training tokens, rounded down to whole steps, passes counted."""
        return self.steps * self.tokens_a_step


@distributed.in_turn
def prepare(c, tokenizer, lm_config) -> Tokens:
    """Tokenise what the run needs (or find it done) -> Tokens.

    Raises UserError: dataset unreadable or shorter than VAL_TOKENS + SKIP_TOKENS + TOKENS.
    """
    n_val, n_skip = c.VAL_TOKENS // c.CONTEXT, c.SKIP_TOKENS // c.CONTEXT
    n_train = c.TOKENS // (c.BATCH * c.CONTEXT) * c.BATCH
    kind, more = kind_of(c.DATASET), None
    piece = max(1, PIECE // c.CONTEXT)
    if kind == "npy":
        val_SL, rest_SL, fingerprint = _pretokenised(c, n_val)
        finite = True
    else:
        journal = Journal(c, tokenizer, kind, n_val)
        finite = kind != "hub"
        everything = finite and c.SEED > 0  # to permute it
        wanted = n_skip + (c.SEED + 1) * n_train
        if not finite and wanted > piece:
            wanted, more = piece, partial(_further, c, journal, piece)
        journal.write(None if everything else wanted)
        more = None if journal.state["ended"] else more
        val_SL, rest_SL, fingerprint = journal.val(), journal.train(), journal.fingerprint
    slices = 1 if finite else c.SEED + 1
    needed = n_skip + slices * n_train
    if more is None and (len(val_SL) < n_val or len(rest_SL) < needed):
        have = (len(val_SL) + len(rest_SL)) * c.CONTEXT
        share = "TOKENS" if slices == 1 else "(SEED + 1) x TOKENS"
        wanted = (n_val + needed) * c.CONTEXT
        what = (
            f"DATASET = {c.DATASET} has {have:,} tokens in whole contexts; wanted {wanted:,} "
            f"(VAL_TOKENS + SKIP_TOKENS + {share})"
        )
        hint = "lower TOKENS, or set PASSES to train on fewer tokens more often"
        if len(val_SL) < n_val or len(rest_SL) <= n_skip:
            hint = "lower VAL_TOKENS and SKIP_TOKENS, or take a longer text"
        if kind == "text":
            hint = "a .txt is one document and is not split between held-out and training tokens"
        raise UserError(what, hint)
    largest = max(int(val_SL.max()), int(rest_SL.max()))
    vocabulary = lm_config.get_text_config().vocab_size
    if largest >= vocabulary:
        what = f"DATASET holds token {largest}, but {c.MODEL} knows only {vocabulary:,}"
        raise UserError(what, "the text was tokenised for another model")
    if not finite:  # seed s takes the s-th slice of a stream
        order_S = n_skip + c.SEED * n_train + np.arange(n_train)
    elif c.SEED == 0:
        order_S = n_skip + np.arange(n_train)
    else:  # its own permutation of a finite text
        order_S = (
            n_skip + np.random.default_rng(c.SEED).permutation(len(rest_SL) - n_skip)[:n_train]
        )
    special, bos = special_ids(tokenizer), added_bos(tokenizer) is not None
    fit = {"c": c, "special": special, "bos": bos, "fingerprint": fingerprint, "more": more}
    commit = journal.source[1] if kind == "hub" else None
    tokens = Tokens(val_SL[:n_val], rest_SL, order_S, commit=commit, **fit)
    print(
        f"tokens: {tokens.tokens:,} to train on ({tokens.steps:,} steps), "
        f"{n_val * c.CONTEXT:,} held out"
    )
    return tokens


def _further(c, journal, piece: int, n: int) -> np.ndarray:
    """train_SL with n sequences at least, written a piece at a time."""
    journal.write(-(-n // piece) * piece)
    if len(journal.train()) < n:
        what = f"DATASET = {c.DATASET} ended after {journal.state['train'] * c.CONTEXT:,} tokens"
        hint = "the state is saved now and then (SAVE_EVERY); lower TOKENS in a run of its own"
        raise UserError(what, hint, code=1)
    return journal.train()


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


def _local_files(dataset: str) -> list[str]:
    path = os.path.expanduser(dataset)
    files = [path] if os.path.exists(path) else sorted(glob.glob(path))
    if not files:
        raise UserError(
            f"DATASET = {dataset!r}: no such file{near_path(dataset)}", "check the path"
        )
    return files


def _pretokenised(c, n_val):
    """A .npy of shape (sequences, CONTEXT): the first n_val sequences are held out."""
    (path, *more) = _local_files(c.DATASET)
    hint = "wanted a plain integer array, np.save of (sequences, CONTEXT)"
    try:
        all_SL = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as e:  # numpy lets out OSError, ValueError, EOFError, TokenError ...
        cause = first_line(e, 100)
        cause = "it holds pickled objects" if "pickle" in cause else cause
        raise UserError(f"DATASET = {path} is not a readable .npy: {cause}", hint) from None
    if not isinstance(all_SL, np.ndarray):
        raise UserError(f"DATASET = {path} is an archive of arrays", hint)
    right = all_SL.ndim == 2 and all_SL.dtype.kind in "iu" and all_SL.shape[1] == c.CONTEXT
    if not right or more:
        what = f"DATASET = {c.DATASET} holds {all_SL.shape} {all_SL.dtype}"
        raise UserError(what, f"wanted one integer array (sequences, CONTEXT = {c.CONTEXT})")
    if all_SL.dtype.kind == "i" and len(all_SL) and int(all_SL.min()) < 0:
        raise UserError(f"DATASET = {path} holds negative tokens", "wanted token ids, without -100")
    digest = _file_digest(path)
    return all_SL[:n_val], all_SL[n_val:], hashlib.sha256(digest.encode()).hexdigest()[:16]


def _file_digest(path: str) -> str:
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
            self.source = [_file_digest(f) for f in _local_files(c.DATASET)]
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
        files = _local_files(c.DATASET)
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
