"""What is known of an SAE before its weights are read, and whether it fits this LM and text."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256

from klsplice.errors import UserError
from klsplice.formats import tensors
from klsplice.formats.sites import same_model
from klsplice.site import POINTS, Site, at
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
    site: Site = Site(None, None, None)  # where in the LM it reads and writes
    lm_name: str | None = None
    text: dict = field(default_factory=dict)  # what it was trained on: see check_text
    commit: str | None = None  # of the Hub repository
    note: str = ""  # what its files do not say, and is taken to be so
    files: list[str] = field(default_factory=list)  # local ones that were read
    licence: str | None = None  # as its README.md names it
    config: dict = field(default_factory=dict)  # a dictionary_learning config.json to add to
    weights: Callable[[], dict] | None = None  # reads the tensors, under our names
    parts: list["Source"] = field(default_factory=list)  # of several at once: each

    @property
    def fresh(self) -> bool:
        return self.weights is None

    @cached_property
    def identity(self) -> str | None:
        """The Hub's commit, or a digest of the local files."""
        if self.parts:
            return sha256(" ".join(str(p.identity) for p in self.parts).encode()).hexdigest()
        return self.commit or (digest_of(self.files) if self.files else None)

    def read_weights(self) -> dict:
        """The tensors under our names, checked against each other and the config."""
        weights = self.weights()
        tensors.check_weights(weights, self)
        return weights


def several(where: str, parts: list[Source]) -> Source:
    """Of several SAEs that are spliced at once, from the lowest site up. Raises UserError."""
    for part in parts:
        if part.site.layer is None:
            what = f"{part.where} does not say of which block it is"
            raise UserError(what, "of several SAEs each has to, in its config or its path")
    parts = sorted(parts, key=lambda part: part.site.place)
    ends = [(part.site.layer, part.site.writes) for part in parts]
    for one, other in zip(ends, ends[1:]):
        if one == other:
            raise UserError(f"two of the SAEs write {one[1]} of block {one[0]}", "leave one out")
    first, ks = parts[0], {part.k for part in parts}
    return Source(
        where,
        first.architecture,
        first.d_in,
        sum(part.d_sae for part in parts),
        k=first.k if len(ks) == 1 else None,
        l1=first.l1,
        site=first.site,
        licence=first.licence if len({part.licence for part in parts}) == 1 else None,
        weights=dict,
        parts=parts,
    )


def check_site(source: Source, where: str) -> None:
    """The SAE must be of that SITE, as far as its files say it. Raises UserError."""
    site = source.site
    if site.reads is None or site.name == where:
        return
    what = f"SAE = {source.where} reads {site.reads}"
    what += f" and writes {site.writes}" * site.is_transcoder
    known = {site.reads, site.writes} <= {*POINTS}
    hint = f"set SITE={site.name}" if known else f"wanted one of {', '.join(POINTS)}"
    raise UserError(f"{what}, SITE = {where}", hint)


def check_fits(
    source: Source, width: int, *, model: str, layer: int, where: str, strict: bool
) -> None:
    """The SAE must be of that site, and of its width there in this model; and of this model and
    layer (warned if not strict). where: SITE. Raises UserError."""
    site, lm_name = source.site, source.lm_name
    check_site(source, where)
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
    if site.reads is None:
        taken = f"SITE = {where}, LAYER = {layer}"
        print(f"warning: the SAE's files do not say where it reads; {taken} is taken")
        source.site = at(where, site.layer)


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
