"""What is known of an SAE before its weights are read, and how its config file is read."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from klsplice.errors import UserError
from klsplice.formats import tensors
from klsplice.formats.sites import Site
from klsplice.storage import digest_of

MAX_CONFIG_BYTES = 1_000_000


@dataclass
class Source:
    """An SAE whose config has been read, but not its weights; sae.build makes the module."""

    where: str  # as the constant names it
    architecture: str
    d_in: int | None
    d_sae: int
    k: int | None = None
    l1: float | None = None
    site: Site = Site()  # where in the LM it reads
    lm_name: str | None = None
    text: dict = field(default_factory=dict)  # what it was trained on: see fits.check_text
    names: dict = field(default_factory=dict)  # our tensors: what they are called in its file
    unused: tuple[str, ...] = ()  # what the file has beside them
    folds: tuple[Callable[[dict], dict], ...] = ()  # from what its file computes to our class
    commit: str | None = None  # of the Hub repository
    note: str = ""  # what its files do not say, and is taken to be so
    files: list[str] = field(default_factory=list)  # local ones that were read
    said_without_config: str = "its other tensors say"  # see said_by
    licence: str | None = None  # as its README.md names it
    config: dict = field(default_factory=dict)  # a dictionary_learning config.json to add to
    weights: Callable[[], dict] | None = None  # reads the tensors, under our names

    @property
    def fresh(self) -> bool:
        return self.weights is None

    @property
    def said_by(self) -> str:
        """What its sizes are known from."""
        return self.said_without_config if len(self.files) == 1 else "its config says"

    @cached_property
    def identity(self) -> str | None:
        """The Hub's commit, or a digest of the local files."""
        return self.commit or (digest_of(self.files) if self.files else None)

    def read_weights(self) -> dict:
        """The tensors under our names, checked against the config. Raises UserError."""
        weights = self.weights()
        tensors.check_weights(weights, self)
        return weights

    def read_from(self, file: str) -> dict:
        """The tensors of its file under our names, as our class computes with them."""
        weights = tensors.renamed(tensors.read(file, self.unused), self, file)
        tensors.check_shapes(weights, self)
        for fold in self.folds:
            weights = fold(weights)
        return weights


@dataclass
class Files:
    """An SAE's files. where: as the constant names it. path: of the config, of the tensors' file
    where there is no config."""

    where: str
    file: str  # of the tensors
    path: str
    architecture: str = ""  # and k: what the constants say, for a file that does not
    k: int | None = None

    @cached_property
    def config(self) -> dict:
        return read_config(self.path) if self.path != self.file else {}

    def has(self, names: dict, unused: tuple = ()) -> bool:
        """Whether just these tensors are in the file. Raises UserError where it cannot be read."""
        found = tensors.read(self.file, unused).keys() - set(unused)
        return found == {name.removesuffix(".T") for name in names.values()}

    def sizes(self, names: dict, unused: tuple = ()) -> tuple[int, int]:
        """-> D, F of the encoder, for files whose config does not say them. Raises UserError."""
        name, found = names["W_enc_FD"], tensors.read(self.file, unused)
        shape = found[name.removesuffix(".T")].shape if name.removesuffix(".T") in found else ()
        if len(shape) != 2:
            what = f"{self.file} has no matrix {name.removesuffix('.T')}"
            raise UserError(what, f"found {tensors.listed(found)}")
        return tuple(shape if name.endswith(".T") else shape[::-1])


def read_config(path: str) -> dict:
    if os.path.getsize(path) > MAX_CONFIG_BYTES:
        raise UserError(f"{path} has {os.path.getsize(path):,} bytes", "wanted a small JSON file")
    try:
        with open(path, encoding="utf-8") as f:
            config = json.load(f)
        json.dumps(config, indent=2)  # as it will be written again, hours later
    except (OSError, ValueError, RecursionError) as e:
        hint = "wanted the config.json that was saved with the SAE"
        raise UserError(f"{path} is not JSON: {str(e)[:100]}", hint) from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a {type(config).__name__}", "wanted a JSON object")
    return config


def integer(config: dict, name: str, path: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{path}: {name} = {value!r:.60}", "wanted a whole number, 1 or more")
    return value


def number(config: dict, name: str, path: str) -> float:
    value = config.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e9:
        raise UserError(f"{path}: {name} = {value!r:.60}", "wanted a number over 0")
    return float(value)


def penalty(config: dict, path: str) -> float | None:
    value = config.get("l1_penalty")
    if value is None:
        return None
    if not isinstance(value, (int, float)) or not 0 <= value < 1e9:
        raise UserError(f"{path}: l1_penalty = {value!r:.60}", "wanted a number, 0 or more")
    return float(value)


def name_or_none(value) -> str | None:
    return value if isinstance(value, str) and value.isprintable() else None


def text_of(config, names: dict) -> dict:
    """What a config says of the contexts that an SAE was trained on, under our names."""
    config = config if isinstance(config, dict) else {}
    found = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    context = found.pop("context", None)
    found = {n: bool(v) for n, v in found.items() if isinstance(v, (bool, list))}
    return found | ({"context": context} if type(context) is int and context > 0 else {})
