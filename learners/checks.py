"""Can this SAE be trained, and will its file hold all of it? Asked before training.

Shapes as in sae.py.
"""

from copy import deepcopy
from dataclasses import replace

import torch

from klsplice.architectures import ARCHITECTURES
from klsplice.errors import UserError
from sae import SAE, build

USUAL = ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D")
TABLE = "klsplice/architectures.py"


def check_rows(sae: SAE) -> None:
    """Raises UserError where an SAE cannot be trained: its decoder's rows are not of norm 1."""
    norm_F = sae.W_dec_FD.norm(dim=1)
    if sae.unit_norm and ((norm_F - 1).abs() > 1e-3).any():
        what = "this SAE's decoder rows are not of unit norm (adapter folded, LoRA merged?)"
        hint = "training would rescale them: use TRAIN=adapter, the original, or TOKENS=0 to look"
        raise UserError(what, hint)


@torch.no_grad()
def check_saves(sae: SAE, source) -> None:
    """Raises UserError where a file of this SAE would not hold all that it reconstructs with.

    source: formats.read.Source. What the class has beside the usual four tensors is changed in a
    copy of the SAE, which is then saved and made again: both have to give the same y."""
    _check_names(sae)
    kind, row, copy = type(sae).__name__, ARCHITECTURES[sae.architecture], deepcopy(sae).eval()
    some = torch.linspace(0, sae.d_sae - 1, 8).long()
    x_ND = sae.b_dec_D + 100 * sae.W_dec_FD[some]  # latents fire on these
    y_ND, buffers = copy(x_ND)[0], dict(copy.named_buffers())
    for name, t in copy.state_dict().items():
        if name not in USUAL and t.dtype != torch.bool:
            t.copy_(1.5 * t + x_ND.abs().mean() if t.is_floating_point() else t + 1)
            before_ND, y_ND = y_ND, copy(x_ND)[0]
            if name in buffers and name not in sae.decides and not torch.equal(before_ND, y_ND):
                what = f"the reconstruction of {kind} depends on its buffer {name}"
                raise UserError(what, f'add "{name}" to `decides` of the class, and save it')
    saved = copy.to_save()
    k = int(saved["k"]) if row.has_k else source.k
    again = build(replace(source, architecture=sae.architecture, k=k), saved).eval()
    off_N = (again(x_ND)[0] - y_ND).norm(dim=1) / y_ND.norm(dim=1).clamp(min=1e-9)
    if not off_N.median() < 1e-3:  # of a threshold's rounding a few may be
        what = f"what {kind}.to_save() returns, read again, does not reconstruct as the SAE did"
        raise UserError(what, "save all that it depends on, and take it from `weights`")


def _check_names(sae: SAE) -> None:
    """The tensors that the class has, those that it saves, and those of its row."""
    kind = type(sae).__name__
    if absent := [name for name in sae.decides if not hasattr(sae, name)]:
        raise UserError(f"`decides` of {kind} names {', '.join(absent)}, which it does not have")
    wanted, saved = set(ARCHITECTURES[sae.architecture].tensors), set(sae.to_save())
    lost = {n for n, _ in sae.named_parameters() if not wanted & {n, n.removesuffix("_F")}}
    if lost := sorted(lost | saved - wanted):
        what = f"{kind} has {', '.join(lost)}, which would not be saved"
        raise UserError(what, f"add it to to_save, and to the tensors of its row in {TABLE}")
    if missing := wanted - saved:
        what = f"{kind}.to_save() leaves out {', '.join(sorted(missing))}"
        raise UserError(what, f"its row in {TABLE} has it")
