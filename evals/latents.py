"""Which latents are steered, and which texts are theirs?

Latents: half are those whose decoder row turned most in the finetune, half are drawn at random, out
of those active in enough windows of held-out text; or they are given. Texts: the windows in which a
latent is most active, before and after together, each relative to its largest; or given ones.
"""

import os

import numpy as np
import torch
from einops import reduce

from evals import texts
from evals.scores import Batch
from klsplice.errors import UserError
from klsplice.lm.splice import put, rows

NEGATIVES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "negatives.json")


class Windows:
    """Held-out contexts cut into windows of `length` tokens, BOS left out: tokens_WL, context_W.

    Windows of contexts with an even index are for tuning, the others for reporting.
    """

    def __init__(self, run, contexts: int, length: int):
        self.run, self.length, self.bos = run, length, int(run.tokens.bos)
        self.contexts = min(contexts, len(run.tokens.val_SL))
        self.each = (run.cfg.CONTEXT - self.bos) // length
        if not self.each or self.contexts < 2:
            what = f"no two windows of {length} tokens in contexts of {run.cfg.CONTEXT}"
            raise UserError(what, "lower --length, or raise --contexts")
        body_SL = np.asarray(run.tokens.val_SL[: self.contexts])[:, self.bos :]
        self.tokens_WL = body_SL[:, : self.each * length].reshape(-1, length).astype(np.int64)
        self.tuning_W = np.arange(len(self.tokens_WL)) // self.each % 2 == 0

    @torch.no_grad()
    def activations(self, learner) -> tuple[torch.Tensor, float]:
        """-> each latent's largest activation in each window (W, F); the residual's mean norm."""
        largest, norms = [], []
        for _, tokens_BL, active_N in self.run.batches(self.contexts):
            x_BLD = learner.splice.residual(tokens_BL)
            x_ND = rows(x_BLD, active_N)
            _, z_NF = learner.reconstruct(x_ND)
            nothing_BLF = x_BLD.new_zeros((*x_BLD.shape[:2], z_NF.shape[1]), dtype=torch.float32)
            z_BLF = put(nothing_BLF, z_NF, active_N)[:, self.bos :][:, : self.each * self.length]
            largest.append(reduce(z_BLF, "b (w l) f -> (b w) f", "max", l=self.length).cpu())
            norms.append(x_ND.float().norm(dim=1).cpu())
        return torch.cat(largest), float(torch.cat(norms).mean())


def choose(a, enough_F: torch.Tensor, cosine_F: torch.Tensor) -> tuple[list[int], str]:
    """-> latents, and the rule by which they were chosen."""
    if a.latents:
        return a.latents, "given"
    fit = enough_F.nonzero()[:, 0].tolist()
    if not fit:
        what = f"no latent is active in {a.texts_each} windows of each half, before and after"
        raise UserError(what, "lower --texts-each, or raise --contexts")
    turned = sorted(fit, key=lambda f: float(cosine_F[f]))[: a.n // 2]
    turned = [f for f in turned if cosine_F[f] < 1 - 1e-6]  # none where the SAE did not learn
    rest = [f for f in fit if f not in turned]
    some = np.random.default_rng(a.seed).permutation(rest)[: a.n - len(turned)].tolist()
    rule = f"{len(turned)} whose decoder row turned most, {len(some)} at random"
    return turned + some, f"{rule}, of {len(fit)} active in {a.texts_each} windows of each half"


def positives(run, a, given, windows, latents, active) -> dict[int, tuple[Batch, np.ndarray, list]]:
    """{latent: (texts, which of them tune, the texts as read)}."""
    found = {}
    for latent in latents:
        score_W = sum(z_WF[:, latent] / z_WF[:, latent].max().clamp(min=1e-9) for z_WF in active)
        both_W = np.minimum(*(z_WF[:, latent].numpy() for z_WF in active)) > 0
        order_W = score_W.argsort(descending=True, stable=True).numpy()
        order_W = order_W[both_W[order_W]]
        halves = [order_W[windows.tuning_W[order_W] == tunes] for tunes in (True, False)]
        best_W = np.concatenate([half_W[: a.texts_each] for half_W in halves])
        ids, tuning_T = windows.tokens_WL[best_W].tolist(), windows.tuning_W[best_W]
        if a.texts or a.endpoint:
            read = given.get(str(latent)) if a.texts else None
            if a.endpoint:
                passages = run.tokenizer.batch_decode(ids)
                size = {"n": 2 * a.texts_each, "words": max(1, a.length // 2)}
                read = texts.from_endpoint(a.endpoint, a.model, passages, **size)
            if read is None:
                raise UserError(f"{a.texts} has no texts for latent {latent}", texts.SHAPE)
            ids = run.tokenizer(read, add_special_tokens=False)["input_ids"]
            tuning_T = np.arange(len(read)) % 2 == 0
        if tuning_T.all() or not tuning_T.any():
            what = f"latent {latent} is not active in windows of both halves, before and after"
            raise UserError(what, "choose another, raise --contexts, or give --texts")
        batch = Batch(run, ids, a.length)
        found[latent] = batch, tuning_T, run.tokenizer.batch_decode(ids)
    return found


def negatives(run, length: int) -> tuple[Batch, np.ndarray]:
    """-> the negative texts, and of which set each is."""
    sets = texts.from_json(NEGATIVES)
    everything = [text for of_set in sets.values() for text in of_set]
    ids = run.tokenizer(everything, add_special_tokens=False)["input_ids"]
    return Batch(run, ids, length), np.repeat([*sets], [*map(len, sets.values())])
