"""What is known of an SAE before its weights are read, and whether it fits this LM and text."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from klsplice.errors import UserError
from klsplice.formats import tensors
from klsplice.formats.sites import RESIDUAL, Site, same_model
from klsplice.storage import digest_of


@dataclass
class Source:
    """Of it and the weights sae.build makes the module."""

    where: str  # as the constant names it
    architecture: str
    d_in: int | None
    d_sae: int
    k: int | None = None
    l1: float | None = None
    site: Site = Site()  # where in the LM it reads
    lm_name: str | None = None
    text: dict = field(default_factory=dict)  # what it was trained on: see check_text
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
        """The tensors under our names, checked against each other and the config."""
        weights = self.weights()
        tensors.check_weights(weights, self)
        return weights


def check_fits(source: Source, width: int, *, model: str, layer: int, strict: bool) -> None:
    """The SAE must read the residual of this model's width; and be of this model and layer (warned
    if not strict). Raises UserError."""
    site, lm_name = source.site, source.lm_name
    if site.what not in (None, RESIDUAL):
        what = f"SAE = {source.where} reads {site.what}, not {RESIDUAL}"
        raise UserError(what, "wanted an SAE of the residual stream, resid_post")
    if source.d_in is not None and source.d_in != width:
        what = f"the SAE reads width {source.d_in}, {model} has width {width}"
        raise UserError(what, "SAE and MODEL do not belong together")
    doubts = {}
    if site.layer not in (None, layer):
        doubts[f"LAYER = {layer}, the SAE is of layer {site.layer}"] = f"LAYER={site.layer}"
    if lm_name and not same_model(lm_name, model):
        doubts[f"the SAE is of {lm_name}, MODEL = {model}"] = f"MODEL={lm_name}"
    for what, fix in doubts.items():
        if strict:
            raise UserError(what, f"set {fix}, or CHECK_SAE=False if you mean it")
        print(f"warning: {what}")
    if source.note:
        print(f"note: {source.note}")
    if site.what is None:
        print(f"warning: the SAE's files do not say where it reads; LAYER = {layer} is taken")


def check_text(source: Source, *, starts_with_bos: bool, keep: str, context: int) -> None:
    """Warn where its config says that an SAE was trained on other contexts than a run gives it.

    source.text: their length (context); whether they start with BOS (bos); whether it never saw
    BOS, EOS and pad (without_special); the KEEP of its run (keep)."""
    bos, without, length, kept = map(source.text.get, ("bos", "without_special", "context", "keep"))
    doubts = (
        (bos is True and not starts_with_bos, "on contexts that start with BOS", "BOS=always"),
        (bos is False and starts_with_bos, "on contexts that start without BOS", "BOS=never"),
        (without is True and keep == "none", "without special tokens", "KEEP=special"),
        (without is False and keep == "special", "on special tokens too", "KEEP=none"),
        (kept not in (None, keep), f"with KEEP = {kept}", f"KEEP={kept}"),
        (length not in (None, context), f"on contexts of {length} tokens", f"CONTEXT={length}"),
    )
    for differs, how, fix in doubts:
        if differs:
            print(f"warning: the SAE was trained {how}; to match that, set {fix}")
