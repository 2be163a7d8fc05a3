"""Where in an LM an SAE reads, and what it stands in for, by TransformerLens' names.

klsplice/lm/points.py finds them in a block:

  hook_resid_post                the residual after the block
  hook_resid_mid, mlp.hook_in    the residual before the MLP's norm; what the MLP is given
  ln2.hook_normalized            the same before the norm's gain, as with TransformerLens' fold_ln
  hook_mlp_out, hook_attn_out    what is added to the residual, after a norm of its own if there is
  mlp.hook_out                   what the MLP returns, before that norm
  attn.hook_z                    all heads' outputs, joined, before the output projection
"""

from typing import NamedTuple

RESIDUAL = "hook_resid_post"
READ_ONLY = ("hook_resid_mid", "ln2.hook_normalized", "mlp.hook_in")
# In the order in which a block makes them:
POINTS = ("attn.hook_z", "hook_attn_out", *READ_ONLY, "mlp.hook_out", "hook_mlp_out", RESIDUAL)


class Site(NamedTuple):
    """layer: the 0-based block, None where nothing says it. reads, writes: of POINTS, or what else
    a file calls them, or None. A transcoder writes elsewhere than it reads."""

    layer: int | None = None
    reads: str | None = RESIDUAL
    writes: str | None = RESIDUAL

    @property
    def at_residual(self) -> bool:
        return self.reads == self.writes == RESIDUAL

    @property
    def is_transcoder(self) -> bool:
        return self.reads != self.writes

    @property
    def place(self) -> tuple:
        """What comes first in the LM is less."""
        return self.layer, POINTS.index(self.writes) if self.writes in POINTS else 0

    @property
    def short(self) -> str:
        """In names of numbers and folders: the block, and the point where it is no residual."""
        return f"{self.layer}" + (f".{self.writes}" if self.writes != RESIDUAL else "")

    @property
    def name(self) -> str:
        """As SITE says it: the point, or of a transcoder both, with a colon between them."""
        return f"{self.reads}:{self.writes}" if self.is_transcoder else f"{self.reads}"


def at(name: str, layer: int | None) -> Site:
    """The site that SITE names in that block."""
    reads, _, writes = name.partition(":")
    return Site(layer, reads, writes or reads)


def problem(names: str) -> str:
    """What is wrong with a SITE, or with those of several SAEs; or ""."""
    return next((wrong for name in names.split(",") if (wrong := _problem(name))), "")


def _problem(name: str) -> str:
    site = at(name, None)
    if not {site.reads, site.writes} <= {*POINTS}:
        return f"wanted one of {', '.join(POINTS)}, or two of them with a colon for a transcoder"
    if site.writes in READ_ONLY:
        return f"nothing can stand in for {site.writes}: an SAE writes hook_mlp_out, say"
    if site.is_transcoder and RESIDUAL in site:
        return "a transcoder reads and writes within a block"
    if POINTS.index(site.reads) > POINTS.index(site.writes):
        return f"{site.reads} is made after {site.writes}, which is to stand on it"
    return ""
