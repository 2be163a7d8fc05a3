"""What is known of an SAE before its weights are read."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from klsplice.formats import tensors
from klsplice.formats.sites import Site
from klsplice.storage import digest_of


@dataclass
class Source:
    """An SAE whose config and sizes are known, but whose weights are not read; sae.build makes the
    module of it and them."""

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
    note: str = ""  # what its files do not say, and is taken to be so
    files: list[str] = field(default_factory=list)  # local ones that were read
    licence: str | None = None  # as its README.md names it
    config: dict = field(default_factory=dict)  # a dictionary_learning config.json to add to
    weights: Callable[[], dict] | None = None  # reads the tensors, under our names

    @property
    def fresh(self) -> bool:
        return self.weights is None

    @cached_property
    def identity(self) -> str | None:
        """The Hub's commit, or a digest of the local files."""
        return self.commit or (digest_of(self.files) if self.files else None)

    def read_weights(self) -> dict:
        """The tensors under our names, checked. Raises UserError."""
        weights = self.weights()
        tensors.check_weights(weights, self)
        return weights
