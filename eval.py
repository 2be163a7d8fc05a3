"""What the splice costs: cross-entropy clean, spliced and zero-ablated, KL, FVU, L0, dead latents.

All on the same held-out tokens, per token, summed in float64. A prediction belongs to the position
that it is made from, so the last position of a context has no cross-entropy but has a KL. `ce_*` is
over all positions, `ce_*_no_special` over those whose input token is not BOS, EOS or pad. What the
SAE does is over the positions that KEEP leaves to it: fvu, mse (a number of the residual), l0,
dead_fraction (latents that never fire), mean_square_norm (of the residual), and smallest_active,
the mean over tokens of the least latent that is active, which is a TopK's threshold when it is
saved.
"""

import hashlib
import json
import math
import os
from typing import NamedTuple

import numpy as np
import torch

from klsplice import distributed
from klsplice.errors import UserError
from klsplice.lm.head import Kept, score_head
from klsplice.lm.splice import Pass, next_tokens
from klsplice.machine import code_digest, versions
from klsplice.metrics import NO_GAP, share
from klsplice.progress import tracked
from klsplice.storage import read_npz, write_npz

# Of clean residuals and hidden states, from one evaluation to the next: bytes on a CPU, and a share
# of a GPU's memory.
KEPT_BYTES, KEPT_SHARE = 1e9, 1 / 8


class Found(NamedTuple):
    """An evaluation: its numbers; those on the first EVAL_TOKENS, which all evaluations of a run
    have; and float32 arrays: ce_clean, ce (spliced) and kl, (S, L), and of each latent fires, at
    which share of tokens it is active, and mean, what it is then, (F,)."""

    numbers: dict[str, float]
    few: dict[str, float]
    arrays: dict[str, np.ndarray]


class Evaluation:
    """Calling it measures a learner on the run's held-out tokens.

    What learners share is made once: clean passes, and the zero-ablated pass of an LM, which is
    kept in CACHE. So is the whole evaluation of an SAE that other runs may start from. CACHE knows
    all of them by content, the program's code included: lm_identity is that of lm.load.Opened.
    shared: several learners are measured in turns, a batch each.
    """

    def __init__(self, cfg, tokens, lm_identity: str, *, shared: bool = False):
        self.tokens, self.batch, self.cache = tokens, cfg.EVAL_BATCH, cfg.CACHE
        self.shared, self.newest = shared, None  # the batch under way: its start, pass and logits
        key = [lm_identity, cfg.DTYPE, cfg.DEVICE, cfg.LAYER, cfg.KEEP, tokens.fingerprint]
        found = versions()
        # a product of another shape rounds otherwise
        key += [len(tokens.val_SL), self.batch, cfg.HEAD_CHUNK]
        self.key = [*key, found["torch"], found["transformers"], code_digest()]
        self.few = _few(cfg, len(tokens.val_SL))
        self.kept_bytes = _kept_bytes(cfg)
        self.zero_path = self._path("zero", [])
        self.clean_passes, self.zero = {}, {}  # zero: start of a batch -> its ce_zero

    def __call__(self, learner, poll=lambda: None) -> Found:
        """On all held-out tokens, or as it was found before. poll: called after each batch."""
        path = self._known_path(learner)
        found = _read(path)
        if found is None:
            found = self.measure(learner, len(self.tokens.val_SL), poll)
            if path:
                kept = json.dumps([found.numbers, found.few])
                write_npz(path, **found.arrays, found=np.array(kept))
        return found

    def midway(self, learner, poll=lambda: None, *, whole: bool = False) -> Found:
        """On the first EVAL_TOKENS, or on all held-out tokens; measured anew."""
        return self.measure(learner, len(self.tokens.val_SL) if whole else self.few, poll)

    def known(self, learner) -> Found | None:
        """The evaluation of just this SAE on all held-out tokens, where CACHE has it."""
        return _read(self._known_path(learner))

    def _path(self, kind: str, further: list) -> str:
        name = hashlib.sha256(json.dumps(self.key + further).encode()).hexdigest()[:16]
        return os.path.join(self.cache, f"{kind}-{name}.npz")

    def _known_path(self, learner) -> str | None:
        """Where CACHE has, or would have, the evaluation of this SAE; None where it keeps none."""
        identity = learner.identity()
        return identity and self._path("eval", [identity, self.few])

    @torch.no_grad()
    def measure(self, learner, n: int, poll=lambda: None) -> Found:
        """On the first n held-out sequences."""
        length, head = self.tokens.val_SL.shape[1], learner.splice.head
        per_token = {name: np.zeros((n, length), np.float32) for name in ("ce_clean", "ce", "kl")}
        ce_zero_SL = self._cached_zero(n)
        known = ce_zero_SL is not None
        if not known:
            ce_zero_SL = np.zeros((n, length), np.float32)
        total, few = _Totals(learner.device), None
        learner.train(False)
        for start in tracked(range(0, n, self.batch), "measuring"):
            part = slice(start, min(start + self.batch, n))
            tokens_BL = self.tokens.val(part.start, part.stop)
            clean, kept = self._clean(learner, start, tokens_BL.to(learner.device))
            active_N = self.tokens.active(tokens_BL, clean.x_BLD).to(learner.device)
            spliced, x_ND, y_ND, z_NF = learner.spliced(clean, active_N)
            target_N = next_tokens(clean.tokens_BL).flatten()
            clean_ND, h_ND = clean.h_BLD.flatten(0, 1), spliced.h_BLD.flatten(0, 1)
            scores = score_head(clean_ND, h_ND, target_N, head, kept)
            for name, score_N in zip(("kl", "ce_clean", "ce"), scores):
                per_token[name][part] = score_N.view_as(clean.tokens_BL).cpu()
            if not known:
                ce_zero_SL[part] = self._ce_zero(learner, start, clean, active_N)
            total.add(x_ND, y_ND, z_NF)
            if part.stop == self.few:
                so_far = {name: t[: self.few] for name, t in per_token.items()}
                few = self._means(so_far | {"ce_zero": ce_zero_SL[: self.few]}) | total.means()
            poll()
        learner.train(True)
        if not known and n == len(self.tokens.val_SL):
            write_npz(self.zero_path, ce_zero=ce_zero_SL)
        numbers = self._means(per_token | {"ce_zero": ce_zero_SL}) | total.means()
        return Found(numbers, few or numbers, per_token | total.per_latent())

    def _clean(self, learner, start: int, tokens_BL: torch.Tensor) -> tuple[Pass, Kept | None]:
        """The clean pass of a batch, and the head's product where others are measured on it too.

        The first ones, as many as there is room for, are kept for the next evaluation."""
        key = start, len(tokens_BL)  # `check_sae` may end in a smaller batch
        if self.newest is not None and self.newest[0] == key:
            return self.newest[1:]
        clean = self.clean_passes.get(key) or learner.clean(tokens_BL)
        size = clean.x_BLD.nbytes + clean.h_BLD.nbytes
        if size / len(tokens_BL) * (start + len(tokens_BL)) < self.kept_bytes:
            self.clean_passes[key] = clean
        if not self.shared:
            return clean, None
        self.newest = key, clean, Kept("held out")
        return self.newest[1:]

    def _ce_zero(self, learner, start: int, clean: Pass, active_N: torch.Tensor) -> np.ndarray:
        key = start, len(clean.tokens_BL)
        if key not in self.zero:
            h_ND = learner.zero_ablated(clean, active_N).h_BLD.flatten(0, 1)
            target_N = next_tokens(clean.tokens_BL).flatten()
            _, ce_N, _ = score_head(h_ND, h_ND, target_N, learner.splice.head)
            self.zero[key] = ce_N.view_as(clean.tokens_BL).float().cpu().numpy()
        return self.zero[key]

    def _cached_zero(self, n: int) -> np.ndarray | None:
        arrays = read_npz(self.zero_path)
        return arrays["ce_zero"][:n] if arrays else None

    def _means(self, per_token: dict) -> dict:
        """In float64, over all scored positions and over those without special tokens."""
        n, length = per_token["kl"].shape
        ordinary_SL = ~np.isin(self.tokens.val_SL[:n], self.tokens.special)
        has_next_SL = np.broadcast_to(np.arange(length) < length - 1, (n, length))
        names = {"ce_clean": "ce_clean", "ce": "ce_spliced", "ce_zero": "ce_zero"}
        out = {}
        for ending, scored_SL in (("", np.ones_like(ordinary_SL)), ("_no_special", ordinary_SL)):
            for mine, name in names.items():
                values = per_token[mine][scored_SL & has_next_SL]
                out[name + ending] = float(values.mean(dtype=np.float64))
            out["kl" + ending] = float(per_token["kl"][scored_SL].mean(dtype=np.float64))
            ce = (out[name + ending] for name in ("ce_clean", "ce_spliced", "ce_zero"))
            out["ce_recovered" + ending] = recovered(*ce)
        return out


def _few(cfg, n: int) -> int:
    """How many of n held-out sequences EVAL_TOKENS are: all, or whole batches."""
    few = cfg.EVAL_TOKENS // cfg.CONTEXT
    return n if few >= n else min(n, max(few // cfg.EVAL_BATCH, 1) * cfg.EVAL_BATCH)


def _kept_bytes(cfg) -> float:
    if torch.device(cfg.DEVICE).type != "cuda":
        return KEPT_BYTES
    return 0 if cfg.LOW_MEMORY else KEPT_SHARE * torch.cuda.mem_get_info(cfg.DEVICE)[1]


def _read(path: str | None) -> Found | None:
    arrays = path and read_npz(path)
    return Found(*json.loads(str(arrays.pop("found"))), arrays) if arrays else None


class _Totals:
    """Sums over the active tokens of what the SAE itself does."""

    def __init__(self, device):
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)
        self.x_sum_D = self.fired_F = self.z_sum_F = 0

    def add(self, x_ND, y_ND, z_NF):
        x_ND = x_ND.double()
        on_NF = z_NF > 0
        smallest_N = z_NF.masked_fill(~on_NF, float("inf")).amin(1).double()
        self.sums += torch.stack(
            (
                torch.tensor(len(x_ND), dtype=torch.float64, device=x_ND.device),
                (y_ND.double() - x_ND).square().sum(),
                x_ND.square().sum(),
                on_NF.sum().double(),
                smallest_N.nan_to_num(posinf=0.0).sum(),
            )
        )
        self.x_sum_D = self.x_sum_D + x_ND.sum(0)
        self.fired_F = self.fired_F + on_NF.sum(0)
        self.z_sum_F = self.z_sum_F + z_NF.sum(0, dtype=torch.float64)

    def means(self) -> dict:
        n, squared_error, square, active, smallest = self.sums.tolist()
        variance = square - float(self.x_sum_D.square().sum()) / n
        return {
            "fvu": squared_error / variance,
            "mse": squared_error / n / len(self.x_sum_D),
            "l0": active / n,
            "dead_fraction": float((self.fired_F == 0).double().mean()),
            "mean_square_norm": square / n,
            "smallest_active": smallest / n,
        }

    def per_latent(self) -> dict[str, np.ndarray]:
        """See Found."""
        found = {
            "fires": self.fired_F / self.sums[0],
            "mean": self.z_sum_F / self.fired_F.clamp(min=1),
        }
        return {name: t.float().cpu().numpy() for name, t in found.items()}


def recovered(ce_clean: float, ce_spliced: float, ce_zero: float) -> float:
    """(CE_zero - CE_spliced) / (CE_zero - CE_clean): 1 is the clean LM, 0 the ablated one.

    NaN where the ablation costs nothing."""
    return share(ce_zero - ce_spliced, ce_zero - ce_clean)


def note_no_gap(before: dict) -> None:
    """Say it where the SAE costs nothing before training. before: that evaluation."""
    clean, spliced = before["ce_clean"], before["ce_spliced"]
    if abs(spliced - clean) <= NO_GAP:
        said = f"(CE {spliced:.4f} with it, {clean:.4f} without): gap closed is not defined"
        print(f"note: this SAE leaves no gap to close {said}")


@distributed.main_process_only
def check_sae(evaluation: Evaluation, learner, source, *, strict: bool) -> None:
    """Measure an SAE just loaded on a few batches; stop (or warn) where it does not do what its
    config says, with the usual cause. source: formats.read.Source."""
    if source.fresh:
        return
    n = len(evaluation.tokens.val_SL)
    few = min(n, 4 * evaluation.batch, max(evaluation.batch, n // 4))
    found = (evaluation.known(learner) or evaluation.measure(learner, few)).numbers
    k, l0 = source.k, found["l0"]
    sae = getattr(learner.model, "sae", learner.model)  # inside an adapter; converted or not
    least = 0.9 if sae.architecture == "topk" else 0.5  # of k; a threshold lets L0 drift
    doubts = []
    if k is not None and not least * k <= l0 <= 1.5 * k:
        doubts.append(f"L0 = {l0:.1f} where k = {k}: wrong LAYER, or a missing BOS")
    if not found["fvu"] <= 0.9:
        doubts.append(
            f"FVU = {found['fvu']:.3g}: wrong LAYER or MODEL, or biases of scaled activations"
        )
    undefined = math.isnan(found["ce_recovered"])  # fine where the ablation costs nothing
    undefined = undefined and abs(found["ce_zero"] - found["ce_clean"]) <= NO_GAP
    if not undefined and not found["ce_recovered"] >= 0.5:
        doubts.append(
            f"ce_recovered = {found['ce_recovered']:.3g}: wrong LAYER, wrong architecture, or a "
            "token that it never saw (set KEEP)"
        )
    if not doubts:
        return
    what = "this SAE does not reconstruct this model:\n       " + "\n       ".join(doubts)
    if strict:
        raise UserError(what, "put the cause right, or continue with CHECK_SAE=False")
    print(f"warning: {what}")
