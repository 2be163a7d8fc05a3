"""Texts on which latents are tried: windows of held-out text, or a JSON of texts."""

import os

import numpy as np
import torch
from einops import reduce

from klsplice.errors import UserError
from klsplice.lm.head import score_head
from klsplice.lm.splice import next_tokens, put
from klsplice.storage import read_json

NEGATIVES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "negatives.json")


class Windows:
    """Held-out contexts cut into windows of `length` tokens, BOS left out: tokens_WL.

    tuning_W: windows of contexts with an even index are for tuning, the others for reporting.
    Raises UserError where there are no two.
    """

    def __init__(self, run, contexts: int, length: int):
        self.length, self.bos = length, int(run.tokens.bos)
        self.contexts = min(contexts, len(run.tokens.val_SL))
        self.each = (run.cfg.CONTEXT - self.bos) // length
        if self.each < 1 or self.contexts < 2:
            what = f"no two windows of {length} tokens in contexts of {run.cfg.CONTEXT}"
            raise UserError(what, "lower --length, or raise --contexts")
        body_SL = np.asarray(run.tokens.val_SL[: self.contexts])[:, self.bos :]
        self.tokens_WL = body_SL[:, : self.each * length].reshape(-1, length).astype(np.int64)
        self.tuning_W = np.arange(len(self.tokens_WL)) // self.each % 2 == 0

    def largest(self, z_NF: torch.Tensor, active_N: torch.Tensor, shape) -> torch.Tensor:
        """Each latent's largest activation in each window of a batch (W, F), on the CPU.

        shape: (B, L) of the batch; active_N: the positions of z_NF in it."""
        nothing_BLF = z_NF.new_zeros((*shape, z_NF.shape[1]), dtype=torch.float32)
        z_BLF = put(nothing_BLF, z_NF, active_N)[:, self.bos :][:, : self.each * self.length]
        return reduce(z_BLF, "b (w l) f -> (b w) f", "max", l=self.length).cpu()


class Batch:
    """Texts as one batch: tokens_BL, padded on the right, which causal attention does not see.

    ids: of each text; it is cut to `length` tokens. scored_BL: positions whose next token belongs
    to the text. target_N: those next tokens. active_N: where the SAE stands in.
    """

    def __init__(self, run, ids: list[list[int]], length: int):
        bos = [int(run.tokens.val_SL[0, 0])] if run.tokens.bos else []
        ids = [(bos + list(x))[: length + len(bos)] for x in ids]
        if min(map(len, ids)) < 2:
            raise UserError("a text of fewer than two tokens", "there is no next token in it")
        width = max(map(len, ids))
        tokens_BL = torch.tensor([x + x[-1:] * (width - len(x)) for x in ids])
        scored_BL = torch.arange(width) < torch.tensor([[len(x) - 1] for x in ids])
        device = run.cfg.DEVICE
        self.tokens_BL, self.scored_BL = tokens_BL.to(device), scored_BL.to(device)
        self.target_N = next_tokens(self.tokens_BL)[self.scored_BL]
        self.active_N = run.active(tokens_BL)

    def log_likelihood(self, h_BLD, head) -> np.ndarray:
        """Mean over each text's tokens, from the final hidden state -> (B,) float64."""
        h_ND = h_BLD[self.scored_BL]
        _, ce_N, _ = score_head(h_ND, h_ND, self.target_N, head)
        ce_BL = torch.zeros(self.scored_BL.shape, dtype=torch.float64, device=h_ND.device)
        ce_BL[self.scored_BL] = ce_N
        return -(ce_BL.sum(1) / self.scored_BL.sum(1)).cpu().numpy()


def from_json(path: str) -> dict[str, list[str]]:
    """{"latent or name": ["text", "another", ...], ...}, two or more each. Raises UserError."""
    try:
        sets = read_json(path)
    except (OSError, ValueError):
        sets = None
    if not isinstance(sets, dict) or any(len(texts) < 2 for texts in sets.values()):
        raise UserError(f"{path} holds no lists of texts", 'wanted {"name": ["a text", ...], ...}')
    return sets
