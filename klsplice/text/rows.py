"""The rows of a dataset, streamed by the datasets library; only the field with the text matters.

Another field may differ between files: its type, its nesting, or whether it is there. So JSON is
read as lines of text, each parsed by itself, and of parquet one column.
"""

import glob
import json

from klsplice.errors import UserError


def open_rows(dataset, *, kind, revision, data_files, split, key, seen: int, state) -> "Rows":
    """The rows after the first `seen`, of which a stream's `state` tells where they begin.

    kind: see text.kind_of. dataset: a Hub id, or local files. key: the field that is read. state:
    None at the start. Raises UserError, and whatever the datasets library raises.
    """
    from datasets import load_dataset_builder
    from datasets.packaged_modules.json.json import Json
    from datasets.packaged_modules.parquet.parquet import Parquet

    if kind == "hub":
        builder = load_dataset_builder(dataset, revision=revision, data_files=data_files or None)
    else:
        options = {"sample_by": "document"} if kind == "text" else {}
        files = [glob.escape(file) for file in dataset]
        builder, split = load_dataset_builder(kind, data_files=files, **options), "train"
    if isinstance(builder, Json) and builder.config.field is None:
        rows = _lines(builder, split)
        if (state and "lines" in state) or rows.are_objects():
            return rows.go_on(seen, state)
    if isinstance(builder, Parquet):
        _read_only(builder, split, key)
    return Rows(builder, split).go_on(seen, state)


def _lines(builder, split: str) -> "Lines":
    """The files of a JSON builder, by one that reads lines of text."""
    from datasets.packaged_modules.text.text import Text

    files, encoding = builder.config.data_files, builder.config.encoding
    encoding = "utf-8-sig" if encoding == "utf-8" else encoding  # a file may begin with a BOM
    return Lines(Text(data_files=files, encoding=encoding, base_path=builder.base_path), split)


def _read_only(builder, split: str, key: str) -> None:
    """Have a parquet builder read that column alone, in the type that it has in the first file."""
    from datasets import Features, Value

    builder.as_streaming_dataset(split)  # finds the columns
    columns = builder.info.features
    if key not in columns:
        raise no_field(key, columns)
    kind = Value("string") if columns[key] == Value("null") else columns[key]
    builder.info.features = Features({key: kind})
    builder.config.columns = [key]


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

    def state_dict(self) -> dict:
        return self.stream.state_dict()

    def go_on(self, seen: int, state: dict | None) -> "Rows":
        """The same, from where that state says."""
        if state:
            self.stream.load_state_dict(state)
        return self

    def where(self) -> str:
        """The file that is being read, and how far it is; "" where that is not known."""
        try:
            place = self.stream.state_dict()
            while "shard_idx" not in place:
                place = place["examples_iterable"]
            return f"{self.files[place['shard_idx']]}, row {place['shard_example_idx']}"
        except Exception:  # a layout of the library's own
            return ""


class Lines(Rows):
    """Rows of files with one JSON object a line. Blank lines are no rows."""

    skip = 0  # rows to pass over

    def __iter__(self):
        left = self.skip
        for row in self.stream:
            line = row["text"].strip()
            if line and left:
                left -= 1
            elif line:
                yield self._parse(line)

    def _parse(self, line: str):
        try:
            return json.loads(line)
        except ValueError as e:
            where = self.where().replace(", row ", ", line ")
            raise ValueError(f"{where}: {e}".removeprefix(": ")) from None

    def are_objects(self) -> bool:
        """Whether the first line may be one. A whole file may be a JSON array, or one object."""
        first = next((line for row in self.stream if (line := row["text"].strip())), "")
        return not first.startswith("[") and first != "{"

    def state_dict(self) -> dict:
        return {"lines": self.stream.state_dict()}

    def go_on(self, seen: int, state: dict | None) -> "Lines":
        if state and "lines" not in state:  # of a cache begun when these were not read as lines
            self.skip = seen
            return self
        return super().go_on(seen, state and state["lines"])
