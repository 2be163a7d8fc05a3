"""The LM as we run it, held against the LM itself, on a few tokens."""

import torch

from klsplice.errors import UserError
from klsplice.lm.splice import Pass, Splice

HEAD_OFF, SKIP_OFF = 0.05, 0.01  # of the largest number: how far either may be off the LM's own


@torch.no_grad()
def check(splice: Splice, tokens_BL: torch.Tensor) -> None:
    """Set splice.whole where no block can be skipped.

    Raises UserError where the LM's head is not as Head computes it.
    """
    tokens_BL = tokens_BL.to(splice.lm.device)
    with splice.plain():  # nothing is compiled for these few tokens
        clean = splice.clean(tokens_BL)
        _check_head(splice, clean)
        splice.whole = not _may_skip(splice, clean)
    if splice.whole:
        print("note: upper blocks of this LM read what lower ones leave: no block is skipped")


def _check_head(splice: Splice, clean: Pass) -> None:
    theirs_BLV = splice.lm(clean.tokens_BL, use_cache=False).logits.float()
    h_ND = clean.h_BLD.flatten(0, 1)
    ours_BLV = splice.head.logits(h_ND, torch.float32).view_as(theirs_BLV)
    error = (ours_BLV - theirs_BLV).abs().max()
    if not error < HEAD_OFF * theirs_BLV.abs().max().clamp(min=1.0):
        name = type(splice.lm).__name__
        what = f"the head of {name} is not as klsplice computes it (off by {error:.3g})"
        raise UserError(what, "its logits are scaled, shifted or capped in a way not supported yet")


def _may_skip(splice: Splice, clean: Pass) -> bool:
    """Whether the spliced pass equals a whole pass with the same edit."""
    other_BLD = clean.x_BLD.roll(1, 1)  # far from what the LM had there
    right_BLD = splice.edited(clean.tokens_BL, {splice.layer: lambda x_BLD: other_BLD}).h_BLD
    try:
        found_BLD = splice.spliced(clean.tokens_BL, other_BLD).h_BLD
    except Exception:  # whatever an upper block makes of what is missing
        return False
    return bool((found_BLD - right_BLD).abs().max() < SKIP_OFF * right_BLD.abs().max())
