"""What the splice costs: cross-entropy clean, spliced and zero-ablated, KL, FVU, L0, dead latents.

All on the same held-out tokens, per token, summed in float64. A prediction belongs to the position
that it is made from, so the last position of a context has no cross-entropy but has a KL. `ce_*` is
over all positions, `ce_*_no_special` over those whose input token is not BOS, EOS or pad. What the
SAE does is over the positions that KEEP leaves to it: fvu, mse (a number of what it stands in for),
l0, dead_fraction (latents that never fire), mean_square_norm (of that), and smallest_active,
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
from klsplice.lm.activations import outliers
from klsplice.lm.head import score_head
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
    """Calling it measures learners on their runs' held-out tokens.

    What learners share is made once: clean passes, and the zero-ablated pass of an LM, which is
    kept in CACHE. So is the whole evaluation of an SAE that other runs may start from. CACHE knows
    all of them by content, the program's code included: lm_identity is that of lm.load.Opened.
    """

    def __init__(self, cfg, tokens, lm_identity: str, sites):
        self.tokens, self.batch, self.cache = tokens, cfg.EVAL_BATCH, cfg.CACHE
        self.key = [lm_identity, cfg.DTYPE, cfg.DEVICE, cfg.KEEP, tokens.fingerprint, *sites]
        # a product of another shape rounds otherwise
        self.key += [len(tokens.val_SL), self.batch, cfg.HEAD_CHUNK]
        self.key += [versions()["torch"], versions()["transformers"], code_digest()]
        # of EVAL_TOKENS all sequences, or whole batches
        n, few = len(tokens.val_SL), cfg.EVAL_TOKENS // cfg.CONTEXT
        self.few = n if few >= n else min(n, max(few // self.batch, 1) * self.batch)
        self.kept_bytes = KEPT_BYTES
        if torch.device(cfg.DEVICE).type == "cuda":
            memory = 0 if cfg.LOW_MEMORY else torch.cuda.mem_get_info(cfg.DEVICE)[1]
            self.kept_bytes = KEPT_SHARE * memory
        self.zero_path = self._path("zero", [])
        self.clean_passes, self.zero = {}, {}  # zero: start of a batch -> its ce_zero

    def __call__(self, learners: list) -> list[Found]:
        """Of each on all held-out tokens, or as it was found before."""
        paths = [self._known_path(learner) for learner in learners]
        found = {i: _read(path) for i, path in enumerate(paths)}
        new = [i for i in found if found[i] is None]
        measured = self.measure([learners[i] for i in new], len(self.tokens.val_SL))
        for i, one in zip(new, measured):
            found[i] = one
            if paths[i]:
                kept = json.dumps([one.numbers, one.few])
                write_npz(paths[i], **one.arrays, found=np.array(kept))
        return list(found.values())

    def known(self, learner) -> Found | None:
        """The evaluation of just this SAE on all held-out tokens, where CACHE has it."""
        return _read(self._known_path(learner))

    def keep_that_helps(self, splice, n: int) -> str:
        """The KEEP that leaves out the residuals of outlying norm in the first n held-out
        sequences, or "" where the SAE stands in for none of them."""
        tokens_SL, outlier_SL, replaced = self.tokens.val(0, n), [], False
        for tokens_BL in tokens_SL.split(self.batch):
            there_BL = tokens_BL.to(splice.head.W_VD.device)
            x_BLD = splice.clean(there_BL, to_end=False).base_BLD
            outlier_SL.append(outliers(x_BLD).cpu())
            active_N = self.tokens.active(tokens_BL, x_BLD).cpu()
            replaced |= bool(outlier_SL[-1].flatten()[active_N].any())
        outlier_SL = torch.cat(outlier_SL)
        if not replaced:
            return ""
        if torch.isin(tokens_SL[outlier_SL], torch.tensor(self.tokens.special)).all():
            return "special"
        return "outliers" if outlier_SL[:, 1:].any() else "first"

    def _path(self, kind: str, further: list) -> str:
        name = hashlib.sha256(json.dumps(self.key + further).encode()).hexdigest()[:16]
        return os.path.join(self.cache, f"{kind}-{name}.npz")

    def _known_path(self, learner) -> str | None:
        """Where CACHE has, or would have, the evaluation of this SAE; None where it keeps none."""
        identity = learner.identity()
        return identity and self._path("eval", [identity, self.few])

    @torch.no_grad()
    def measure(self, learners: list, n: int, poll=lambda: None) -> list[Found]:
        """Of each on the first n held-out sequences. poll: called after each batch."""
        if not learners:
            return []
        splice, length = learners[0].splice, self.tokens.val_SL.shape[1]
        scores = [_Scores(learner, (n, length)) for learner in learners]
        zero = read_npz(self.zero_path)
        ce_zero_SL = zero["ce_zero"][:n] if zero else np.zeros((n, length), np.float32)
        few = None
        for learner in learners:
            learner.train(False)
        for start in tracked(range(0, n, self.batch), "measuring"):
            part = slice(start, min(start + self.batch, n))
            tokens_BL = self.tokens.val(part.start, part.stop)
            clean = self._clean(splice, start, tokens_BL.to(splice.head.W_VD.device))
            active_N = self.tokens.active(tokens_BL, clean.base_BLD).to(clean.base_BLD.device)
            kept = {} if len(learners) > 1 or scores[0].alone else None
            for score in scores:
                score.add(part, clean, active_N, kept)
            if not zero:
                ce_zero_SL[part] = self._ce_zero(splice, start, clean, active_N)
            if part.stop == self.few:
                few = [self._numbers(score, ce_zero_SL, self.few) for score in scores]
            poll()
        for learner in learners:
            learner.train(True)
        if not zero and n == len(self.tokens.val_SL):
            write_npz(self.zero_path, ce_zero=ce_zero_SL)
        found = [self._numbers(score, ce_zero_SL, n) for score in scores]
        arrays = [score.per_token | score.per_latent() for score in scores]
        return [Found(*one) for one in zip(found, few or found, arrays)]

    def _clean(self, splice, start: int, tokens_BL: torch.Tensor) -> Pass:
        """The clean pass of a batch; the first ones, as many as there is room for, are kept."""
        key = start, len(tokens_BL)  # `check_sae` may end in a smaller batch
        clean = self.clean_passes.get(key) or splice.clean(tokens_BL)
        held = {clean.base_BLD, clean.h_BLD, *(t for site in clean.sites for t in site)}
        size = sum(t.nbytes for t in held)
        if size / len(tokens_BL) * (start + len(tokens_BL)) < self.kept_bytes:
            self.clean_passes[key] = clean
        return clean

    def _ce_zero(self, splice, start: int, clean: Pass, active_N: torch.Tensor) -> np.ndarray:
        key = start, len(clean.tokens_BL)
        if key not in self.zero:
            h_ND = splice.zero_ablated(clean, active_N).h_BLD.flatten(0, 1)
            target_N = next_tokens(clean.tokens_BL).flatten()
            _, ce_N, _ = score_head(h_ND, h_ND, target_N, splice.head)
            self.zero[key] = ce_N.view_as(clean.tokens_BL).float().cpu().numpy()
        return self.zero[key]

    def _numbers(self, score: "_Scores", ce_zero_SL: np.ndarray, n: int) -> dict:
        """Of the first n sequences: means in float64, over all scored positions and over those
        without special tokens."""
        ce_SL = {"ce_clean": score.per_token["ce_clean"], "ce_spliced": score.per_token["ce"]}
        ce_SL["ce_zero"], kl_SL = ce_zero_SL, score.per_token["kl"][:n]
        ordinary_SL = ~np.isin(self.tokens.val_SL[:n], self.tokens.special)
        has_next_SL = np.broadcast_to(np.arange(kl_SL.shape[1]) < kl_SL.shape[1] - 1, kl_SL.shape)
        out = {}
        for ending, scored_SL in (("", np.ones_like(ordinary_SL)), ("_no_special", ordinary_SL)):
            for name, values_SL in ce_SL.items():
                values = values_SL[:n][scored_SL & has_next_SL]
                out[name + ending] = float(values.mean(dtype=np.float64))
            out["kl" + ending] = float(kl_SL[scored_SL].mean(dtype=np.float64))
            out["ce_recovered" + ending] = recovered(*(out[name + ending] for name in ce_SL))
        for ending in score.alone:
            ce_SL, kl_SL = (score.per_token[name + ending][:n] for name in ("ce", "kl"))
            out["ce_spliced" + ending] = float(ce_SL[has_next_SL].mean(dtype=np.float64))
            out["kl" + ending] = float(kl_SL.mean(dtype=np.float64))
        return out | score.means()


def _read(path: str | None) -> Found | None:
    arrays = path and read_npz(path)
    return Found(*json.loads(str(arrays.pop("found"))), arrays) if arrays else None


class _Scores:
    """What an evaluation of one learner adds up: per_token, (S, L) each, and of each site what its
    SAE does over the active tokens.

    Where there are several, each is spliced alone, too."""

    def __init__(self, learner, shape: tuple[int, int]):
        self.learner = learner
        sites = learner.splice.sites
        self.alone = [f"_alone_{site.short}" for site in sites] if len(sites) > 1 else []
        names = ["ce_clean", "ce", "kl", *(n + end for end in self.alone for n in ("ce", "kl"))]
        self.per_token = {n: np.zeros(shape, np.float32) for n in names}
        self.sites = [_SiteScores(learner.device) for _ in sites]

    def add(self, part: slice, clean: Pass, active_N: torch.Tensor, kept: dict | None) -> None:
        """part: the sequences of this batch. kept: see kl_head."""
        spliced, found = self.learner.spliced(clean, active_N)
        target_N = next_tokens(clean.tokens_BL).flatten()
        passes = {"": spliced}
        for m, ending in enumerate(self.alone):
            ys = [y_ND if i == m else None for i, (_, y_ND, _) in enumerate(found)]
            passes[ending] = self.learner.splice.spliced(clean, active_N, *ys)
        for ending, spliced in passes.items():
            clean_ND, h_ND = clean.h_BLD.flatten(0, 1), spliced.h_BLD.flatten(0, 1)
            scores = score_head(clean_ND, h_ND, target_N, self.learner.splice.head, kept)
            for name, score_N in zip((f"kl{ending}", "ce_clean", f"ce{ending}"), scores):
                self.per_token[name][part] = score_N.view_as(clean.tokens_BL).cpu()
        for site, one in zip(self.sites, found):
            site.add(*one)

    def means(self) -> dict:
        """Over the sites, and of each where there are several."""
        each = [site.means() for site in self.sites]
        out = {name: sum(one[name] for one in each) / len(each) for name in each[0]}
        if len(each) > 1:
            for site, one in zip(self.learner.splice.sites, each):
                out |= {f"{name}_{site.short}": value for name, value in one.items()}
        return out

    def per_latent(self) -> dict[str, np.ndarray]:
        """See Found."""
        each = [site.per_latent() for site in self.sites]
        return {n: torch.cat([one[n] for one in each]).float().cpu().numpy() for n in each[0]}


class _SiteScores:
    """What an SAE does at its site."""

    def __init__(self, device):
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)
        self.o_sum_D = self.fired_F = self.z_sum_F = 0

    def add(self, o_ND: torch.Tensor, y_ND: torch.Tensor, z_NF: torch.Tensor) -> None:
        o_ND, on_NF = o_ND.double(), z_NF > 0
        smallest_N = z_NF.masked_fill(~on_NF, float("inf")).amin(1).double()
        size = torch.tensor(len(o_ND), dtype=torch.float64, device=o_ND.device)
        squares = (y_ND.double() - o_ND).square().sum(), o_ND.square().sum()
        active, smallest = on_NF.sum().double(), smallest_N.nan_to_num(posinf=0.0).sum()
        self.sums += torch.stack((size, *squares, active, smallest))
        self.o_sum_D = self.o_sum_D + o_ND.sum(0)
        self.fired_F = self.fired_F + on_NF.sum(0)
        self.z_sum_F = self.z_sum_F + z_NF.sum(0, dtype=torch.float64)

    def means(self) -> dict:
        n, squared_error, square, active, smallest = self.sums.tolist()
        variance = square - float(self.o_sum_D.square().sum()) / n
        return {
            "fvu": squared_error / variance,
            "mse": squared_error / n / len(self.o_sum_D),
            "l0": active / n,
            "dead_fraction": float((self.fired_F == 0).double().mean()),
            "mean_square_norm": square / n,
            "smallest_active": smallest / n,
        }

    def per_latent(self) -> dict[str, torch.Tensor]:
        fires_F = self.fired_F / self.sums[0]
        return {"fires": fires_F, "mean": self.z_sum_F / self.fired_F.clamp(min=1)}


def recovered(ce_clean: float, ce_spliced: float, ce_zero: float) -> float:
    """(CE_zero - CE_spliced) / (CE_zero - CE_clean): 1 is the clean LM, 0 the ablated one.

    NaN where the ablation costs nothing."""
    return share(ce_zero - ce_spliced, ce_zero - ce_clean)


@distributed.main_process_only
def check_sae(evaluation: Evaluation, learner, source, *, strict: bool) -> None:
    """Measure an SAE just loaded on a few batches; stop (or warn) where it does not do what its
    config says, with the usual cause. source: formats.read.Source."""
    if source.fresh:
        return
    n = len(evaluation.tokens.val_SL)
    few = min(n, 4 * evaluation.batch, max(evaluation.batch, n // 4))
    found = (evaluation.known(learner) or evaluation.measure([learner], few)[0]).numbers
    recovered = found["ce_recovered"]
    # that the ablation costs nothing is no fault of the SAE
    undefined = math.isnan(recovered) and abs(found["ce_zero"] - found["ce_clean"]) <= NO_GAP
    # within a block zero costs little, so that nothing is told by what is recovered of it
    undefined |= not learner.splice.at_residual
    costs, doubts, fits = not (undefined or recovered >= 0.5), [], True
    for one, sae, ending in learner.each(source):
        name = f"{one.where}: " if source.parts else ""
        l0, fvu, k = found[f"l0{ending}"], found[f"fvu{ending}"], one.k
        least = 0.9 if sae.architecture == "topk" else 0.5  # of k; a threshold lets L0 drift
        if k is not None and not least * k <= l0 <= 1.5 * k:
            cause = "wrong LAYER, or a missing BOS"
            doubts.append(f"{name}L0 = {l0:.1f} where k = {k}: {cause}")
        if not fvu <= 0.9:
            fits = False
            cause = "wrong LAYER, SITE or MODEL, or biases of scaled activations"
            doubts.append(f"{name}FVU = {fvu:.3g}: {cause}")
    if costs:
        doubts.append(f"ce_recovered = {recovered:.3g}: wrong LAYER, or wrong architecture")
    keep = evaluation.keep_that_helps(learner.splice, few) if costs or not fits else ""
    if keep:
        doubts.append(f"residuals of outlying norm, which it may never have seen: set KEEP={keep}")
    if not doubts:
        return
    what = "this SAE does not reconstruct this model:\n       " + "\n       ".join(doubts)
    if strict:
        raise UserError(what, "put the cause right, or continue with CHECK_SAE=False")
    print(f"warning: {what}")
