"""TRAIN = adapter: a small map on the SAE's output learns (arXiv 2503.17272)."""

import copy
import os

import torch
from torch import nn

from klsplice.errors import UserError
from klsplice.storage import save_tensors
from learners.base import OnFrozenLearner, OnFrozenSAE
from sae import SAE


class Adapter(OnFrozenSAE):
    """y + up(down(y)) on the reconstruction y; up starts at zero; the MLP has ReLU and biases."""

    def __init__(self, sae: SAE, *, kind: str, rank: int, seed: int):
        super().__init__(sae)
        width, mlp = sae.W_dec_FD.shape[1], kind == "mlp"
        self.down, self.up = nn.Linear(width, rank, bias=mlp), nn.Linear(rank, width, bias=mlp)
        self.between = nn.ReLU() if mlp else nn.Identity()
        generator, bound = torch.Generator().manual_seed(seed), width**-0.5
        for p in self.down.parameters():  # as nn.Linear does, from a generator of its own
            nn.init.uniform_(p, -bound, bound, generator)
        for p in self.up.parameters():
            nn.init.zeros_(p)

    def forward(self, x_ND):
        with torch.no_grad():
            r_ND, z_NF = self.sae(x_ND)
        return r_ND + self.up(self.between(self.down(r_ND))), z_NF

    @torch.no_grad()
    def folded(self) -> SAE:
        """One plain SAE that equals SAE and linear adapter: W' = W (I + A)^T, b' = (I + A) b."""
        sae = copy.deepcopy(self.sae).cpu()
        A_DD = (self.up.weight @ self.down.weight).cpu()
        b_old_D = sae.b_dec_D.clone()
        sae.W_dec_FD += sae.W_dec_FD @ A_DD.T
        sae.b_dec_D += A_DD @ b_old_D
        if sae.centred:  # the encoder still has to read x - b_old
            sae.b_enc_F += sae.W_enc_FD @ (sae.b_dec_D - b_old_D)
        return sae


class AdapterLearner(OnFrozenLearner):
    """An adapter on the output of a frozen SAE learns; a linear one is folded into the SAE.

    adapter: "linear" or "mlp". Raises UserError where the rank is too large."""

    def __init__(self, sae, splice, *, adapter: str, rank: int, seed: int):
        if sae.W_dec_FD.shape[1] < rank:
            what = f"RANK = {rank} is more than the residual's width {sae.W_dec_FD.shape[1]}"
            raise UserError(what, "an adapter has at most that rank")
        self.folds = adapter == "linear"
        super().__init__(Adapter(sae, kind=adapter, rank=rank, seed=seed), splice)

    @property
    def sae(self):
        return self.model.folded() if self.folds else super().sae

    def save_rest(self, folder):
        if not self.folds:
            save_tensors(self.state(), os.path.join(folder, "sae", "adapter.safetensors"))
