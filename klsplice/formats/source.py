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
    commit: str | None = None  # of the Hub repository
    files: list[str] = field(default_factory=list)  # local ones that were read
    further: list = field(default_factory=list)  # (layer, Source) of MORE_SAES
    licence: str | None = None  # as its README.md names it
    config: dict = field(default_factory=dict)  # a dictionary_learning config.json to add to
    weights: Callable[[], dict] | None = None  # reads the tensors, under our names

    @property
    def fresh(self) -> bool:
        return self.weights is None

    @cached_property
    def identity(self) -> str | None:
        """The Hub's commit, or a digest of the local files; with MORE_SAES one of each."""
        mine = self.commit or (digest_of(self.files) if self.files else None)
        return ",".join([mine, *(source.identity for _, source in self.further)]) if mine else None

    def read_weights(self) -> dict:
        """The tensors under our names, checked against the config. Raises UserError."""
        weights = self.weights()
        tensors.check_weights(weights, self)
        return weights


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


def penalty(config: dict, path: str) -> float | None:
    value = config.get("l1_penalty")
    if value is None:
        return None
    if not isinstance(value, (int, float)) or not 0 <= value < 1e9:
        raise UserError(f"{path}: l1_penalty = {value!r:.60}", "wanted a number, 0 or more")
    return float(value)


def name_or_none(value) -> str | None:
    return value if isinstance(value, str) and value.isprintable() else None


SAELENS_TEXT = {"context_size": "context", "prepend_bos": "bos"}
SAELENS_TEXT |= {"exclude_special_tokens": "without_special"}  # a list of ids, too


def text_of(config, names: dict) -> dict:
    """What a config says of the contexts that an SAE was trained on, under our names."""
    config = config if isinstance(config, dict) else {}
    found = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    context = found.pop("context", None)
    found = {n: bool(v) for n, v in found.items() if isinstance(v, (bool, list))}
    return found | ({"context": context} if type(context) is int and context > 0 else {})
