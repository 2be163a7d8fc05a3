"""What the training loop asks of whatever learns, an SAE or something around one.

Shapes: N tokens, D residual width, F latents.
"""

import torch
from torch import nn


class Trainable(nn.Module):
    """Maps the residual x_ND to (reconstruction y_ND, latents z_NF)."""

    def error(self, x_ND, y_ND, z_NF) -> torch.Tensor:
        """The MSE of each token -> (N,): mean over D; a class may have another, as ReLU has."""
        return squared_error(x_ND, y_ND)

    def extra(self, x_ND, y_ND, z_NF) -> torch.Tensor | None:
        """What is added to each token's loss outside LOSS -> (N,), or None."""
        return None

    def begin(self, before: dict) -> None:
        """before: the evaluation before training (eval.py)."""

    def end(self, after: dict) -> None:
        """after: the evaluation after training."""

    def before_clip(self) -> None:
        """Change the gradients before their norm is taken."""

    def renormalise(self) -> None:
        """Put right what an update moved."""

    def after_step(self, l0: torch.Tensor, fired_F: torch.Tensor, tokens: int) -> None:
        """l0: mean of the step; fired_F: which latents did; tokens: how many the step had.

        What is learnt without a gradient changes here, from what `forward` has kept, as BatchTopK
        does: `forward` is also run where no step is made."""

    def problem(self) -> str | None:
        """What has gone wrong in training, if anything; asked when a step is logged."""
        return None


def squared_error(x_ND: torch.Tensor, y_ND: torch.Tensor) -> torch.Tensor:
    """(y - x)^2, mean over D -> (N,)."""
    return (y_ND - x_ND.float()).square().mean(-1)
