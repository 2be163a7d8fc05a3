"""How likely does the model find a text, and how much likelier with a push along a latent?"""

import numpy as np
import torch

from klsplice.errors import UserError
from klsplice.lm.splice import next_tokens, put, rows


class Batch:
    """Texts as one batch: tokens_BL, padded on the right, which causal attention does not see.

    scored_BL: positions whose next token belongs to the text. target_N: those next tokens.
    """

    def __init__(self, run, ids: list[list[int]], length: int):
        bos = [int(run.tokens.val_SL[0, 0])] if run.tokens.bos else []
        ids = [(bos + list(x))[: length + len(bos)] for x in ids]
        if min(map(len, ids)) < 2:
            raise UserError("a text of fewer than two tokens", "there is no next token in it")
        width = max(map(len, ids))
        self.tokens_BL = torch.tensor([x + x[-1:] * (width - len(x)) for x in ids])
        self.scored_BL = torch.arange(width) < torch.tensor([[len(x) - 1] for x in ids])
        self.target_N = next_tokens(self.tokens_BL)[self.scored_BL]
        self.active_N = run.active(self.tokens_BL)
        for name in ("tokens_BL", "scored_BL", "target_N", "active_N"):
            setattr(self, name, getattr(self, name).to(run.cfg.DEVICE))

    def log_likelihood(self, h_BLD, head) -> np.ndarray:
        """Mean over each text's tokens, from the final hidden state -> (B,) float64."""
        h_ND, parts = h_BLD[self.scored_BL], []
        for some_ND, target_N in zip(h_ND.split(head.chunk), self.target_N.split(head.chunk)):
            logits_NV = head.logits(some_ND, torch.float32)
            parts.append(-torch.nn.functional.cross_entropy(logits_NV, target_N, reduction="none"))
        text_N = self.scored_BL.nonzero()[:, 0]
        sum_B = torch.zeros(len(self.tokens_BL), dtype=torch.float64, device=h_ND.device)
        sum_B.index_add_(0, text_N, torch.cat(parts).double())
        return (sum_B / self.scored_BL.sum(1)).cpu().numpy()


@torch.no_grad()
def scorer(learner, batch: Batch, *, spliced: bool):
    """-> a function from pushes_SD to the change in each text's mean log-likelihood (S, B)."""
    splice = learner.splice
    clean = splice.clean(batch.tokens_BL)
    y_ND = rows(clean.x_BLD, batch.active_N)
    if spliced:
        y_ND, _ = learner.reconstruct(y_ND)

    @torch.no_grad()
    def score(push_D):
        pushed_BLD = put(clean.x_BLD, y_ND + push_D, batch.active_N)
        h_BLD = splice.spliced(batch.tokens_BL, pushed_BLD).h_BLD
        return batch.log_likelihood(h_BLD, splice.head)

    base_B = score(0)
    return lambda pushes_SD: np.stack([score(push_D) - base_B for push_D in pushes_SD])
