"""The rows of a dataset, streamed by the datasets library; only the field with the text matters.

Another field may differ between files: its type, its nesting, or whether it is there. So JSON is
read as lines of text, each parsed by itself, and of parquet one column.
"""

import glob
import json
import tempfile

from klsplice.errors import UserError


def open_rows(text, state: dict | None) -> "Rows":
    """The rows from where a stream's `state` tells, None being the start.

    text: documents.Documents. Raises UserError, and whatever the datasets library raises.
    """
    from datasets import config, load_dataset_builder
    from datasets.packaged_modules.json.json import Json
    from datasets.packaged_modules.parquet.parquet import Parquet
    from datasets.packaged_modules.text.text import Text

    config.STREAMING_READ_MAX_RETRIES = 1  # a second read of text loses what the first one had
    config.STREAMING_READ_RETRY_INTERVAL = 0
    name, split, options = text.cfg.DATASET, text.cfg.SPLIT, {"revision": text.commit}
    files = text.cfg.DATA_FILES or None
    if text.kind != "hub":
        name, split, files = text.kind, "train", [glob.escape(file) for file in text.files]
        options = {"sample_by": "document"} if text.kind == "text" else {}
    with tempfile.TemporaryDirectory() as empty:  # a stream needs no cache, nor HF_HOME
        builder = load_dataset_builder(name, data_files=files, cache_dir=empty, **options)
        if isinstance(builder, Parquet):
            rows = Rows(_of_one_column(builder, split, text.cfg.TEXT_KEY), split)
        elif isinstance(builder, Json) and builder.config.field is None:
            files, encoding = builder.config.data_files, builder.config.encoding
            encoding = "utf-8-sig" if encoding == "utf-8" else encoding  # a file may have a BOM
            options = {"encoding": encoding, "base_path": builder.base_path, "cache_dir": empty}
            lines = Lines(Text(data_files=files, **options), split)
            rows = lines if lines.are_objects() else Rows(builder, split)
        else:
            rows = Rows(builder, split)
    if state:
        rows.stream.load_state_dict(state)
    return rows


def _of_one_column(builder, split: str, key: str):
    """A parquet builder that reads that column alone, in the type that it has in the first file."""
    from datasets import Features, Value

    builder.as_streaming_dataset(split)  # finds the columns
    columns = builder.info.features
    if key not in columns:
        raise no_field(key, columns)
    kind = Value("string") if columns[key] == Value("null") else columns[key]
    builder.info.features = Features({key: kind})
    builder.config.columns = [key]
    return builder


def no_field(key: str, names) -> UserError:
    what = f"documents of DATASET have no {key!r}; they have {', '.join(names)}"
    return UserError(what, "set TEXT_KEY to the field with the text")


class Rows:
    """Iterable: dicts, as a builder of the datasets library makes them of its files."""

    def __init__(self, builder, split: str):
        self.stream = builder.as_streaming_dataset(split)
        self.files = (builder.config.data_files or {}).get(split, [])

    def __iter__(self):
        return iter(self.stream)


class Lines(Rows):
    """Rows of files with one JSON object a line. Blank lines are no rows."""

    def __iter__(self):
        for row in self.stream:
            if line := row["text"].strip():
                try:
                    parsed = json.loads(line)
                except ValueError as e:
                    raise ValueError(f"{self._place()}: {e}") from None
                yield parsed

    def _place(self) -> str:
        state = self.stream.state_dict()
        while "shard_idx" not in state:
            state = state["examples_iterable"]
        return f"{self.files[state['shard_idx']]}, line {state['shard_example_idx']}"

    def are_objects(self) -> bool:
        """Whether the first line may be one. A whole file may be a JSON array, or one object."""
        lines = (row["text"].strip() for row in self.stream)
        first = next(filter(None, lines), "")
        return not first.startswith("[") and first != "{"
