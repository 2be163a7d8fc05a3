"""A learner: what learns (TRAIN), and how the clean and the spliced pass are made with it.

finetune.py and eval.py know nothing of an experiment but its learner. This is the plain one, the
SAE itself; adapters.py and lora.py have the others.
"""

import hashlib

import torch
from torch import nn

import sae as saes
from errors import UserError
from splice import Splice, put, rows


class SAELearner:
    """The SAE (or whatever stands in `model`) learns; the LM is frozen.

    model: maps x_ND to (y_ND, z_NF) and has sae.SAE's training methods.
    """

    def __init__(self, c, sae: saes.SAE, splice: Splice):
        self.device, self.dtype = torch.device(c.DEVICE), getattr(torch, c.DTYPE)
        self.splice, self.model = splice, self.wrap(c, sae.to(self.device)).to(self.device)

    def wrap(self, c, sae: saes.SAE) -> nn.Module:
        norm_F = sae.W_dec_FD.norm(dim=1)
        if sae.unit_norm and ((norm_F - 1).abs() > 1e-3).any():
            what = "this SAE's decoder rows are not of unit norm (adapter folded, LoRA merged?)"
            raise UserError(what, "training would rescale them; use TRAIN=adapter or the original")
        return sae

    @property
    def sae(self) -> saes.SAE:
        """The SAE to save."""
        return self.model

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def clean(self, tokens_BL):
        """See Splice.clean."""
        return self.splice.clean(tokens_BL)

    def zero_ablated(self, seen, active_N) -> torch.Tensor:
        """-> h_BLD of the clean LM with the active positions' residual at zero."""
        nothing_ND = torch.zeros_like(rows(seen.x_BLD, active_N))
        return self.splice.resume(put(seen.x_BLD, nothing_ND, active_N), seen.calls)

    def reconstruct(self, x_ND) -> tuple[torch.Tensor, torch.Tensor]:
        """-> y_ND, z_NF; products in the LM's dtype, weights and sums in float32."""
        with self.half_precision():
            return self.model(x_ND)

    def half_precision(self):
        """Autocast to DTYPE, where that is not float32."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)

    def spliced(self, seen, active_N):
        """-> h_BLD of the spliced pass, and x_ND, y_ND, z_NF at the active positions."""
        x_ND = rows(seen.x_BLD, active_N)
        y_ND, z_NF = self.reconstruct(x_ND)
        h_BLD = self.splice.resume(put(seen.x_BLD, y_ND, active_N), seen.calls)
        return h_BLD, x_ND, y_ND, z_NF

    def identity(self) -> str | None:
        """A checksum of what an evaluation depends on here; None where that is more than an SAE."""
        digest = hashlib.sha256(repr(self.model).encode())
        tensors = dict(self.model.named_parameters())
        for name in ("threshold", "scale"):  # of BatchTopK and ReLU; a TopK does not use its own
            if hasattr(self.model, name) and type(self.model) is not saes.TopK:
                tensors[name] = getattr(self.model, name)
        for name, t in tensors.items():
            digest.update(f"{name} {tuple(t.shape)} {getattr(self.model, 'k', '')}".encode())
            digest.update(t.detach().cpu().contiguous().numpy())
        return digest.hexdigest()

    def train(self, on: bool) -> None:
        self.model.train(on)

    def state(self) -> dict:
        """Every tensor that training changes."""
        return self.model.state_dict()

    def load_state(self, state: dict) -> None:
        self.model.load_state_dict(state)

    def begin(self, c, before: dict) -> None:
        """before: the evaluation before training."""
        if isinstance(self.model, saes.ReLU):
            target = c.K if c.SAE == "fresh" else before["l0"]
            self.model.scale_by(before["mean_square_norm"] ** 0.5, target)

    def end(self, after: dict) -> None:
        """after: the evaluation after training."""
        if type(self.model) is saes.TopK:
            self.model.threshold.fill_(after["smallest_active"])

    def save_rest(self, folder: str) -> None:
        """Write what no SAE file holds; called after the SAE was saved to folder/sae."""


class OnFrozenSAE(saes.Model):
    """An SAE that stays as it is; subclasses have something small that learns on it."""

    def __init__(self, sae: saes.SAE):
        super().__init__()
        self.sae = sae.requires_grad_(False)

    @property
    def d_sae(self) -> int:
        return self.sae.d_sae

    def train(self, mode: bool = True):
        super().train(mode)
        self.sae.eval()  # a BatchTopK keeps its threshold
        return self

    def forward(self, x_ND):
        return self.sae(x_ND)


class OnFrozenLearner(SAELearner):
    """Something on, or around, a frozen SAE learns; `wrap` makes an OnFrozenSAE."""

    def wrap(self, c, sae):
        return OnFrozenSAE(sae).eval()

    @property
    def sae(self):
        return self.model.sae

    def identity(self):
        return None

    def learning(self) -> dict[str, nn.Parameter]:
        """What learns, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def parameters(self):
        return list(self.learning().values())

    def state(self):
        return {name: p.detach() for name, p in self.learning().items()}

    def load_state(self, state):
        mine = self.learning()
        with torch.no_grad():
            for name, t in state.items():
                mine[name].copy_(t)

    def begin(self, c, before):
        pass

    def end(self, after):
        if type(self.model.sae) is saes.TopK:
            self.model.sae.threshold.fill_(after["smallest_active"])
