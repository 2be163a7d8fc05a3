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
        hint = "training would rescale them, and so change which k win: TRAIN=adapter trains on it,"
        hint += " TOKENS=0 measures it"
        raise UserError(what, hint)


@torch.no_grad()
def check_saves(sae: SAE, source) -> None:
    """Raises UserError where a file of this SAE would not hold all that it reconstructs with.

    source: formats.read.Source. What the class has beside the usual four tensors is changed in a
    copy of the SAE, which is then saved and made again: both have to give the same y. The copy
    shares the matrices, which may be large."""
    kind, row = type(sae).__name__, ARCHITECTURES[sae.architecture]
    shared = sae.W_enc_FD, sae.W_dec_FD
    versions = [W_FD._version for W_FD in shared]
    copy = deepcopy(sae, {id(W_FD): W_FD for W_FD in shared}).eval()
    if absent := [name for name in sae.decides if not hasattr(copy, name)]:
        raise UserError(f"`decides` of {kind} names {', '.join(absent)}, which it does not have")
    some = torch.linspace(0, sae.d_sae - 1, 8).long()
    size = 100 * sae.W_dec_FD[some].abs().mean()
    x_ND = sae.b_dec_D + 100 * sae.W_dec_FD[some]  # latents fire on these
    y_ND, parameters = copy(x_ND)[0], dict(copy.named_parameters())
    plain = {name: t for name, t in vars(copy).items() if torch.is_tensor(t)}
    for name, t in (parameters | dict(copy.named_buffers()) | plain).items():
        if name in USUAL:
            continue
        changed_ND = _changed(copy, t, size, x_ND)
        known = name in parameters or name in sae.decides
        if not known and not torch.equal(changed_ND, y_ND):
            what = f"the reconstruction of {kind} depends on its buffer {name}"
            raise UserError(what, f'add "{name}" to `decides` of the class, and save it')
        y_ND = changed_ND
    saved = copy.to_save()
    if versions != [W_FD._version for W_FD in shared]:
        raise UserError(f"{kind}.to_save() changes the SAE itself", "let it change a copy")
    _check_names(kind, set(saved), set(row.tensors))
    k = int(saved["k"]) if row.has_k else source.k
    again = build(replace(source, architecture=sae.architecture, k=k), saved).eval()
    size_N = (y_ND - sae.b_dec_D).norm(dim=1).clamp(min=1e-9)
    if not ((again(x_ND)[0] - y_ND).norm(dim=1) / size_N).median() < 1e-3:  # a few may round over
        what = f"what {kind}.to_save() returns, read again, does not reconstruct as the SAE did"
        lost = [n for n in (*parameters, *sae.decides) if n not in saved and n not in USUAL]
        lost = f" ({', '.join(lost)}?)" if lost else ""
        raise UserError(what + lost, "save all that it depends on, and take it from `weights`")


def _changed(sae: SAE, t: torch.Tensor, size: float, x_ND: torch.Tensor) -> torch.Tensor:
    """y after the values of one of its tensors were changed, each otherwise; or left as they were,
    where it cannot work with others."""
    old = t.clone()
    if t.dtype == torch.bool:
        t.logical_not_()
    elif t.is_floating_point():
        t.mul_(1.5).add_(size * torch.linspace(0.5, 1.5, t.numel()).view(t.shape))
    elif t.dim():
        t.copy_(t.flip(0))
    try:
        y_ND = sae(x_ND)[0]
        if y_ND.isfinite().all():
            return y_ND
    except (ArithmeticError, LookupError, RuntimeError, ValueError):
        pass
    t.copy_(old)
    return sae(x_ND)[0]


def _check_names(kind: str, saved: set, wanted: set) -> None:
    """What the class saves has to be what its row names."""
    if further := sorted(saved - wanted):
        what = f"{kind}.to_save() returns {', '.join(further)}, which its row does not have"
        raise UserError(what, f"add it to the tensors of that row in {TABLE}")
    if missing := sorted(wanted - saved):
        what = f"{kind}.to_save() leaves out {', '.join(missing)}"
        raise UserError(what, f"its row in {TABLE} has it")
