"""Texts: which kind a DATASET is, and its documents, streamed by the datasets library.

Of a row only the field with the text matters; another may differ between files: its type, its
nesting, or whether it is there. So JSON is read as lines of text, each parsed by itself, and of
parquet one column.
"""

import glob
import json
import os
import re
import tempfile
import time
from datetime import datetime

from tqdm import tqdm

from klsplice import hub
from klsplice.errors import UserError
from klsplice.storage import digest

DOCUMENTS_AT_A_TIME = 64
WAITS = (1, 4, 15, 60, 240, 480, 1000)  # seconds between tries of the Hub, half an hour in all
# The ending of a local file: its kind, which is a builder of the datasets library, or npy.
KINDS = {".txt": "text", ".jsonl": "json", ".ndjson": "json", ".json": "json"}
KINDS |= {".parquet": "parquet", ".npy": "npy"}
PACKED = (".gz", ".zst", ".zstd", ".bz2", ".xz")
# Files of a folder that say something of it, and are no documents of it.
ABOUT = r"(readme|licen[cs]e|requirements)\b.*|(dataset_infos?|dataset_dict|state)\.json"
FILES = f"wanted owner/name of the Hub, or a file, glob or folder of one of {', '.join(KINDS)}"
CHAT = '[{"role": "user", "content": "..."}, ...]'
DAY = datetime(2024, 7, 26)  # Llama's own for templates that are told no date


def kind_of(dataset: str) -> str:
    """ "npy", a builder of the datasets library for local files, or "hub". Raises UserError."""
    files, others = local_files(dataset)
    kinds = sorted({_kind(file) for file in files})
    if len(kinds) > 1:
        raise UserError(f"DATASET = {dataset!r} holds files of {' and '.join(kinds)}", FILES)
    if others:
        print(f"note: not read of DATASET: {', '.join(others[:5])} ({len(others)} in all)")
    return kinds[0] if kinds else "hub"


def local_files(dataset: str) -> tuple[list[str], list[str]]:
    """-> the files of a path, glob or folder that are read, sorted, and the others; of a folder at
    any depth; none of the Hub. Raises UserError where none is read."""
    paths = [dataset] if os.path.exists(dataset) else sorted(glob.glob(dataset))
    files = [path for path in paths if _kind(path)]
    if os.path.isdir(dataset):
        inside = glob.glob(os.path.join(glob.escape(dataset), "**"), recursive=True)
        paths = sorted(path for path in inside if os.path.isfile(path))
        about = [path for path in paths if re.fullmatch(ABOUT, os.path.basename(path), re.I)]
        files = [path for path in paths if _kind(path) and path not in about]
    of_hub = re.fullmatch(r"[^./][^/:]*(/[^/]+)?", dataset) and not _kind(dataset)  # owner/name
    if not files and any(path.endswith(".arrow") for path in paths):
        hint = "datasets.load_from_disk reads it; write it by to_parquet or to_json"
        raise UserError(f"DATASET = {dataset!r} is what save_to_disk writes", hint)
    if not files and (paths or os.path.exists(dataset) or not of_hub):
        near = "" if paths else hub.near_path(dataset)
        hint = f"did you mean {near}?" if near else FILES
        raise UserError(f"DATASET = {dataset!r}: no file there that is read here", hint)
    return files, sorted({*paths} - {*files})


def _kind(file: str) -> str:
    """The kind of a file by its name, packed or not; "" of others."""
    name, ending = os.path.splitext(file.lower())
    if ending in PACKED:
        ending = os.path.splitext(name)[1]
    return KINDS.get(ending, "")


class Documents:
    """The documents of a text, in their order: of a Hub dataset, streamed, or of local files.

    kind: see kind_of. bos: what contexts start with, or None. commit: of a Hub dataset.
    identity: what decides which documents these are (a Hub commit, or digests of files).
    one_text: whether they are one long text, which is cut in two.
    """

    def __init__(self, cfg, kind: str, tokenizer):
        self.cfg, self.kind, self.tokenizer = cfg, kind, tokenizer
        self.bos, self.files = bos_of(tokenizer, cfg.BOS), local_files(cfg.DATASET)[0]
        self.commit, self.one_text = None, kind == "text" and len(self.files) == 1
        self.chats = False  # until one is met
        if kind == "hub":
            self.commit = hub.dataset_commit(cfg.DATASET, cfg.DATASET_REVISION)
            self.identity = [cfg.DATASET, self.commit, cfg.SPLIT, cfg.DATA_FILES]
        else:
            with hub.saying("DATASET", cfg.DATASET, "check who may read it"):
                self.identity = [digest(file) for file in self.files]

    def read(self, seen: int, state: dict | None):
        """Yields (texts, state of the stream after them) from where `state` says, which `seen`
        documents came before; "" where one has no text.

        Raises UserError; what was yielded stays good."""
        from datasets import logging

        logging.set_verbosity(logging.CRITICAL)  # what it would say is in our own line
        hint = "see its files: JSON objects, a line each, parquet or text in UTF-8"
        if self.kind == "hub":
            hint = "see DATA_FILES, SPLIT and DATASET_REVISION (of a script: refs/convert/parquet)"
        waits = iter(WAITS)
        while True:
            texts = []
            try:
                rows = self.open(state)
                for row in rows:
                    texts.append(self._text(row, seen + len(texts)))
                    if len(texts) == DOCUMENTS_AT_A_TIME:
                        seen += len(texts)
                        state = rows.stream.state_dict()
                        yield texts, state
                        texts, waits = [], iter(WAITS)
                if texts:
                    yield texts, rows.stream.state_dict()
                return
            except UserError:
                raise
            except Exception as error:
                where = f"{self.cfg.DATASET} after {seen + len(texts):,} documents"
                problem = hub.fault("DATASET", where, error, hint, code=1 if seen else 2)
                wait = next(waits, None)
                if wait is None or problem.hint != hub.NETWORK:
                    raise problem from None
                tqdm.write(f"the Hub does not answer; trying again in {wait} s")
                time.sleep(wait)

    def open(self, state: dict | None) -> "Rows":
        """The rows from where a stream's state says, None being the start. Raises UserError, and
        whatever the datasets library raises."""
        from datasets import config, load_dataset_builder
        from datasets.packaged_modules.json.json import Json
        from datasets.packaged_modules.parquet.parquet import Parquet
        from datasets.packaged_modules.text.text import Text

        config.STREAMING_READ_MAX_RETRIES = 1  # a second read of text loses what the first one had
        config.STREAMING_READ_RETRY_INTERVAL = 0
        name, split, options = self.cfg.DATASET, self.cfg.SPLIT, {"revision": self.commit}
        files = self.cfg.DATA_FILES or None
        if self.kind != "hub":
            name, split, files = self.kind, "train", [glob.escape(file) for file in self.files]
            options = {"sample_by": "document"} if self.kind == "text" else {}
        with tempfile.TemporaryDirectory() as empty:  # a stream needs no cache, nor HF_HOME
            builder = load_dataset_builder(name, data_files=files, cache_dir=empty, **options)
            if isinstance(builder, Parquet):
                builder = _of_one_column(builder, split, self.cfg.TEXT_KEY)
            rows = None
            if isinstance(builder, Json) and builder.config.field is None:
                files, encoding = builder.config.data_files, builder.config.encoding
                encoding = "utf-8-sig" if encoding == "utf-8" else encoding  # a file may have a BOM
                options = {"encoding": encoding, "base_path": builder.base_path}
                rows = Lines(Text(data_files=files, cache_dir=empty, **options), split)
            if rows is None or not rows.are_objects():
                rows = Rows(builder, split)
        if state:
            rows.stream.load_state_dict(state)
        return rows

    def _text(self, row, index: int) -> str:
        """ "" where there is none."""
        if index == 0 and isinstance(row, dict) and self.cfg.TEXT_KEY not in row:
            raise _no_field(self.cfg.TEXT_KEY, row)
        text = row.get(self.cfg.TEXT_KEY) if isinstance(row, dict) else row
        if text is None or text == []:
            return ""
        if isinstance(text, list) and not isinstance(text[0], int):
            text = self._chat(text, index)
        if not isinstance(text, str) or not isinstance(row, dict):
            what = f"document {index} of DATASET has {str(text):.40}... as {self.cfg.TEXT_KEY!r}"
            hint = f"wanted a text, or {CHAT}; token ids as a .npy of (sequences, CONTEXT)"
            raise UserError(what, hint, code=1 if index else 2)
        # half a surrogate pair, which JSON may hold, is no text
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text if text.strip() else ""

    def _chat(self, messages: list, index: int) -> str:
        """A conversation through the tokeniser's chat template, on a fixed day.

        Without the BOS at its start where each context starts with BOS, as no document has one of
        its own; but whole where BOS also marks turns."""
        self.chats, code = True, 1 if index else 2
        try:
            messages = [m | {"role": m["role"], "content": _joined(m["content"])} for m in messages]
            if any(m["role"] is None for m in messages):
                raise ValueError
        except (AttributeError, KeyError, TypeError, ValueError):
            what = f"document {index} of DATASET has a message without role or text"
            raise UserError(what, f"wanted {CHAT}", code=code) from None
        hint = f"its chat template refused document {index} of DATASET"
        try:
            template = _of_one_day(self.tokenizer.get_chat_template())
            given = {"chat_template": template, "date_string": DAY.strftime("%d %b %Y")}
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, **given)
        except Exception as error:
            raise hub.fault("MODEL", self.cfg.MODEL, error, hint, code) from None
        bos = self.tokenizer.bos_token
        return text.removeprefix(bos) if self.bos is not None and text.count(bos) == 1 else text


class Rows:
    """Iterable: dicts, as a builder of the datasets library makes them of its files."""

    def __init__(self, builder, split: str):
        self.stream = builder.as_streaming_dataset(split)

    def __iter__(self):
        return iter(self.stream)


class Lines(Rows):
    """Rows of files with one JSON object a line. Blank lines are no rows."""

    def __iter__(self):
        return map(json.loads, self.lines())

    def lines(self):
        return filter(None, (row["text"].strip() for row in self.stream))

    def are_objects(self) -> bool:
        """Whether the first line may be one. A whole file may be a JSON array, or one object."""
        first = next(self.lines(), "")
        return not first.startswith("[") and first != "{"


def _of_one_column(builder, split: str, key: str):
    """A parquet builder that reads that column alone, in the type that it has in the first file."""
    from datasets import Features, Value

    builder.as_streaming_dataset(split)  # finds the columns
    columns = builder.info.features
    if key not in columns:
        raise _no_field(key, columns)
    kind = Value("string") if columns[key] == Value("null") else columns[key]
    builder.info.features = Features({key: kind})
    builder.config.columns = [key]
    return builder


def _no_field(key: str, names) -> UserError:
    what = f"documents of DATASET have no {key!r}; they have {', '.join(names)}"
    return UserError(what, "set TEXT_KEY to the field with the text")


def _of_one_day(template: str) -> str:
    """A chat template that gives the same text on any day."""
    today = r"""strftime_now\(\s*(["'])(.*?)\1\s*\)"""
    return re.sub(today, lambda call: repr(DAY.strftime(call[2])), template)


def _joined(content) -> str:
    """The text of a message that may come in parts. Raises what it is where it is none."""
    if isinstance(content, str):
        return content
    if any(part.get("type", "text") != "text" for part in content):
        raise ValueError
    return "".join(part["text"] for part in content)


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
