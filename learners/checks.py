"""Can this SAE be trained, and will its file hold all of it? Asked before training.

Shapes as in sae.py.
"""

from dataclasses import replace

import torch

from klsplice.errors import UserError
from sae import SAE, build


def check_rows(sae: SAE) -> None:
    """Raises UserError where an SAE cannot be trained: its decoder's rows are not of norm 1."""
    norm_F = sae.W_dec_FD.norm(dim=1)
    if not sae.unit_norm or not ((norm_F - 1).abs() > 1e-3).any():
        return
    what = "this SAE's decoder rows are not of norm 1 (zero, adapter folded, LoRA merged?)"
    hint = "TRAIN=adapter trains on it, TOKENS=0 measures it"
    raise UserError(what, f"training would rescale them, and so change which k win: {hint}")


@torch.no_grad()
def check_saves(sae: SAE, source) -> None:
    """Raises UserError where what the class saves, built again, does not reconstruct as the SAE.

    source: formats.source.Source."""
    kind, saved = type(sae), sae.to_save()
    if saved.keys() != sae.tensors.keys():
        names = ", ".join(sorted(saved.keys() ^ sae.tensors.keys()))
        what = f"{kind.__name__}: to_save() and `tensors` do not have the same names: {names}"
        raise UserError(what, "give both of them in its class in sae.py")
    k = int(saved["k"]) if kind.has_k else None
    again = build(replace(source, architecture=sae.architecture, k=k), saved).eval()
    W_FD = sae.W_enc_FD if sae.is_transcoder else sae.W_dec_FD  # which each latent reads
    rows_ND = W_FD[torch.linspace(0, sae.d_sae - 1, 8).long()]
    mode = sae.training
    y_ND, again_ND = (one.eval()(sae.b_dec_D + 100 * rows_ND)[0] for one in (sae, again))
    sae.train(mode)
    size_N = (y_ND - sae.b_dec_D).norm(dim=1).clamp(min=1e-9)
    if not ((again_ND - y_ND).norm(dim=1) / size_N).median() < 1e-3:  # a few may round over
        what = f"what {kind.__name__}.to_save() returns does not reconstruct as the SAE does"
        raise UserError(what, "save all that it depends on, and take it from `weights`")
