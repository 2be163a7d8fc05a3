"""TRAIN = adapter, a small map on the SAE's output; and the table of all that can learn.

Source: arXiv 2503.17272.
"""

import os

import torch
from torch import nn

import export
import formats
import lora
import sae as saes
from errors import UserError
from learner import OnFrozenLearner, OnFrozenSAE, SAELearner
from splice import Splice, rows


class Adapter(OnFrozenSAE):
    """y + up(down(y)) on the reconstruction y; up starts at zero; the MLP has ReLU and biases."""

    def __init__(self, sae: saes.SAE, *, kind: str, rank: int, seed: int):
        super().__init__(sae)
        width, mlp = sae.W_dec_FD.shape[1], kind == "mlp"
        self.down, self.up = nn.Linear(width, rank, bias=mlp), nn.Linear(rank, width, bias=mlp)
        self.between = nn.ReLU() if mlp else nn.Identity()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.down.parameters():  # as nn.Linear does, from a generator of its own
                p.uniform_(-(width**-0.5), width**-0.5, generator=generator)
            for p in self.up.parameters():
                p.zero_()

    def forward(self, x_ND):
        with torch.no_grad():
            r_ND, z_NF = self.sae(x_ND)
        return r_ND + self.up(self.between(self.down(r_ND))), z_NF

    @torch.no_grad()
    def folded(self) -> saes.SAE:
        """One plain SAE that equals SAE and linear adapter: W' = W (I + A)^T, b' = (I + A) b."""
        sae = formats.copy_of(self.sae)
        A_DD = (self.up.weight @ self.down.weight).cpu()
        b_old_D = sae.b_dec_D.clone()
        sae.W_dec_FD += sae.W_dec_FD @ A_DD.T
        sae.b_dec_D += A_DD @ b_old_D
        if sae.centred:  # the encoder still has to read x - b_old
            sae.b_enc_F += sae.W_enc_FD @ (sae.b_dec_D - b_old_D)
        return sae


class AdapterLearner(OnFrozenLearner):
    """An adapter on the output of a frozen SAE learns."""

    def wrap(self, c, sae):
        if sae.W_dec_FD.shape[1] < c.RANK:
            what = f"RANK = {c.RANK} is more than the residual's width {sae.W_dec_FD.shape[1]}"
            raise UserError(what, "an adapter has at most that rank")
        self.folds = c.ADAPTER == "linear" and c.FOLD
        return Adapter(sae, kind=c.ADAPTER, rank=c.RANK, seed=c.SEED)

    @property
    def sae(self):
        return self.model.folded() if self.folds else super().sae

    def save_rest(self, folder):
        if not self.folds:
            export.save_tensors(self.state(), os.path.join(folder, "sae", "adapter.safetensors"))


LEARNERS = {
    "sae": SAELearner,
    "adapter": AdapterLearner,
    "sae_lora": lora.SAELoRALearner,
    "lm_lora": lora.LMLoRALearner,
}


def build(c, source, lm, tokens) -> SAELearner:
    """The learner of TRAIN around the SAE of `source`: read, converted or fresh."""
    speed = {"compiled": c.COMPILE and lm.device.type == "cuda", "checkpointed": c.LOW_MEMORY}
    splice = Splice(lm, c.LAYER, head_chunk=c.HEAD_CHUNK, **speed)
    sae = (
        _fresh(c, source, splice, tokens)
        if source.fresh
        else formats.build(source, source.weights())
    )
    if c.ARCHITECTURE not in ("", source.architecture):
        sae = _converted(c, sae, splice, tokens)
    if isinstance(sae, saes.JumpReLU):
        sae.threshold_F.requires_grad_(c.JUMPRELU_THRESHOLD == "ste")
    return LEARNERS[c.TRAIN](c, sae, splice)


def _first_residuals(c, splice, tokens) -> torch.Tensor:
    """x_ND float32 at the active positions of the first training contexts (64 at most)."""
    parts = tokens.sequences(0, min(64, len(tokens.order_S))).split(c.EVAL_BATCH)
    device = splice.head.W_VD.device
    found = [rows(splice.residual(p.to(device)), tokens.active(p).to(device)) for p in parts]
    return torch.cat(found).float().cpu()


def _fresh(c, source, splice, tokens) -> saes.SAE:
    """Tied random rows and a decoder bias at the mean residual."""
    weights = saes.fresh_weights(
        d_in=source.d_in,
        d_sae=source.d_sae,
        mean_D=_first_residuals(c, splice, tokens).mean(0),
        generator=torch.Generator().manual_seed(c.SEED),
    )
    sae = formats.build(source, weights)
    if isinstance(sae, saes.TopK):
        sae.auxk, sae.dead_after = c.AUXK, c.DEAD_AFTER
    return sae


def _converted(c, sae, splice, tokens) -> saes.SAE:
    """A TopK as the ARCHITECTURE asked for, with a threshold fitted to the same L0."""
    if type(sae) is not saes.TopK or c.ARCHITECTURE not in saes.FROM_TOPK:
        what = f"ARCHITECTURE = {c.ARCHITECTURE}, the SAE is a {type(sae).__name__}"
        hint = f"leave it empty; only a TopK is converted, to {', '.join(saes.FROM_TOPK)}"
        raise UserError(what, hint)
    print(
        f"note: the TopK SAE is converted to {c.ARCHITECTURE}, its threshold fitted to L0 = {sae.k}"
    )
    return saes.FROM_TOPK[c.ARCHITECTURE](sae, _first_residuals(c, splice, tokens))
