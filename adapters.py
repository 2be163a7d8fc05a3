"""What learns (TRAIN): the SAE itself, an adapter on its output, LoRA on the SAE, LoRA on the LM.

Each learner says how the clean and the spliced pass are made and which parameters move; finetune.py
and eval.py know nothing else of it. The table is LEARNERS, at the end.
"""

import torch
from torch import nn

import formats
import sae as saes
from splice import Splice, put, rows


class SAELearner:
    """The SAE (or whatever stands in `model`) learns; the LM is frozen.

    model: maps x_ND to (y_ND, z_NF) and has sae.SAE's training methods.
    """

    def __init__(self, splice: Splice, model: nn.Module, *, dtype: torch.dtype, device: str):
        self.splice, self.model = splice, model.to(device)
        self.dtype, self.device = dtype, torch.device(device)

    @property
    def sae(self) -> saes.SAE:
        """The SAE to save."""
        return self.model

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def clean(self, tokens_BL):
        """See Splice.clean."""
        return self.splice.clean(tokens_BL)

    def reconstruct(self, x_ND) -> tuple[torch.Tensor, torch.Tensor]:
        """-> y_ND, z_NF; products in the LM's dtype, weights and sums in float32."""
        half = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=half):
            return self.model(x_ND)

    def spliced(self, seen, active_N):
        """-> h_BLD of the spliced pass, and x_ND, y_ND, z_NF at the active positions."""
        x_ND = rows(seen.x_BLD, active_N)
        y_ND, z_NF = self.reconstruct(x_ND)
        h_BLD = self.splice.resume(put(seen.x_BLD, y_ND, active_N), seen.calls)
        return h_BLD, x_ND, y_ND, z_NF

    def state(self) -> dict:
        """Every tensor that training changes."""
        return self.model.state_dict()

    def load_state(self, state: dict) -> None:
        self.model.load_state_dict(state)

    def begin(self, before: dict) -> None:
        """before: the evaluation before training."""
        if isinstance(self.model, saes.ReLU):
            self.model.scale_by(before["mean_square_norm"] ** 0.5, before["l0"])

    def end(self, after: dict) -> None:
        if type(self.model) is saes.TopK:
            self.model.threshold.fill_(after["smallest_active"])


def build(c, source, lm, tokens) -> SAELearner:
    """The learner of TRAIN around the SAE of `source`, read or fresh."""
    splice = Splice(lm, c.LAYER, head_chunk=c.HEAD_CHUNK)
    sae = (
        _fresh(c, source, splice, tokens)
        if source.fresh
        else formats.build(source, source.weights())
    )
    return LEARNERS[c.TRAIN](splice, sae, dtype=getattr(torch, c.DTYPE), device=c.DEVICE)


def _fresh(c, source, splice, tokens) -> nn.Module:
    """Tied random rows and a decoder bias at the mean residual of the first training contexts."""
    device = splice.head.W_VD.device
    firsts = tokens.sequences(0, min(64, len(tokens.order_S))).split(c.EVAL_BATCH)
    means = [splice.residual(part.to(device))[:, 1:].float().mean((0, 1)).cpu() for part in firsts]
    weights = saes.fresh_weights(
        d_in=source.d_in,
        d_sae=source.d_sae,
        mean_D=torch.stack(means).mean(0),
        generator=torch.Generator().manual_seed(c.SEED),
    )
    sae = formats.build(source, weights)
    if isinstance(sae, saes.TopK):
        sae.auxk, sae.dead_after = c.AUXK, c.DEAD_AFTER
    return sae


LEARNERS = {"sae": SAELearner}
