"""What the splice costs: cross-entropy clean, spliced and zero-ablated, KL, FVU, L0, dead latents.

All on the same held-out tokens, per token, summed in float64. A prediction belongs to the position
that it is made from, so the last position of a context has no cross-entropy but has a KL. `ce_*` is
over all positions, `ce_*_no_special` over those whose input token is not BOS, EOS or pad.
"""

import hashlib
import json
import os
import zipfile
import zlib

import numpy as np
import torch

import distributed
import ops
from errors import UserError
from splice import next_tokens

VERSION = 1  # raise it when an evaluation comes to mean something else: CACHE is then made anew
KEPT_BYTES = 1e9  # of clean residuals and hidden states, from one evaluation to the next


class Measure:
    """Calling it measures a learner on the held-out tokens -> dict of floats.

    After a call `per_token` holds ce_clean, ce (spliced) and kl as float32 arrays (S, CONTEXT).
    What runs share is made once and kept in CACHE: the zero-ablated pass of a LM, and the whole
    evaluation of an SAE, such as that after one run and before the next, which starts from it.
    """

    def __init__(self, c, tokens, learner):
        self.tokens, self.learner, self.batch = tokens, learner, c.EVAL_BATCH
        key = [_identity(c.MODEL), c.MODEL_REVISION, c.DTYPE, c.DEVICE, c.LAYER, c.KEEP]
        key += [tokens.fingerprint, len(tokens.val_SL), torch.__version__]
        self.key, self.cache = [*key, VERSION], c.CACHE
        self.zero_path = self._path("zero", [])
        self.per_token, self.seen = {}, {}

    def _path(self, kind: str, further: list) -> str:
        name = hashlib.sha256(json.dumps(self.key + further).encode()).hexdigest()[:16]
        return os.path.join(self.cache, f"{kind}-{name}.npz")

    def __call__(self, poll=lambda: None, *, keep: bool = True) -> dict:
        """On all held-out tokens, or as it was found before. poll: called after each batch.

        keep: whether CACHE is asked and keeps it, as for an SAE that other runs may start from.
        """
        path = self._known_path() if keep else None
        found = self._read(path)
        if found is None:
            found, self.per_token = self.measure(len(self.tokens.val_SL), poll)
            if path:
                _save(path, **self.per_token, found=np.array(json.dumps(found)))
        return found

    def known(self) -> dict | None:
        """The evaluation of just this SAE on all held-out tokens, where CACHE has it."""
        return self._read(self._known_path())

    def _read(self, path: str | None) -> dict | None:
        arrays = path and _load(path)
        if not arrays:
            return None
        found = json.loads(str(arrays.pop("found")))
        self.per_token = arrays
        return found

    def _known_path(self) -> str | None:
        """Where CACHE has, or would have, the evaluation of this SAE; None where it keeps none."""
        identity = self.learner.identity()
        return identity and self._path("eval", [identity])

    @torch.no_grad()
    def measure(self, n: int, poll=lambda: None) -> tuple[dict, dict]:
        """On the first n held-out sequences -> (numbers, per-token arrays)."""
        learner, device = self.learner, self.learner.device
        length = self.tokens.val_SL.shape[1]
        per_token = {name: np.zeros((n, length), np.float32) for name in ("ce_clean", "ce", "kl")}
        zero_SL = self._cached_zero(n)
        ce_zero_SL = np.zeros((n, length), np.float32) if zero_SL is None else zero_SL
        total = _Totals(device)
        learner.train(False)
        for start in range(0, n, self.batch):
            part = slice(start, min(start + self.batch, n))
            tokens_BL = self.tokens.val(part.start, part.stop)
            active_N = self.tokens.active(tokens_BL).to(device)
            tokens_BL = tokens_BL.to(device)
            seen = self._clean(start, tokens_BL)
            h_BLD, x_ND, y_ND, z_NF = learner.spliced(seen, active_N)
            target_N = next_tokens(tokens_BL).flatten()
            clean_ND = seen.h_BLD.flatten(0, 1)
            scores = ops.score_head(clean_ND, h_BLD.flatten(0, 1), target_N, learner.splice.head)
            for name, score_N in zip(("kl", "ce_clean", "ce"), scores):
                per_token[name][part] = score_N.view_as(tokens_BL).cpu()
            if zero_SL is None:
                h_BLD = learner.zero_ablated(seen, active_N)
                h_ND = h_BLD.flatten(0, 1)
                _, ce_N, _ = ops.score_head(h_ND, h_ND, target_N, learner.splice.head)
                ce_zero_SL[part] = ce_N.view_as(tokens_BL).cpu()
            total.add(x_ND, y_ND, z_NF)
            poll()
        learner.train(True)
        if zero_SL is None and n == len(self.tokens.val_SL):
            _save(self.zero_path, ce_zero=ce_zero_SL)
        return self._summary(per_token | {"ce_zero": ce_zero_SL}) | total.summary(), per_token

    def _clean(self, start: int, tokens_BL: torch.Tensor):
        """The clean pass of a batch, kept for the next evaluation while all fit in KEPT_BYTES."""
        key = start, len(tokens_BL)  # `check` may end in a smaller batch
        if key in self.seen:
            return self.seen[key]
        seen = self.learner.clean(tokens_BL)
        size = seen.x_BLD.nbytes + seen.h_BLD.nbytes
        if size / len(tokens_BL) * len(self.tokens.val_SL) < KEPT_BYTES:
            self.seen[key] = seen
        return seen

    def _cached_zero(self, n: int) -> np.ndarray | None:
        arrays = _load(self.zero_path)
        return arrays["ce_zero"][:n] if arrays else None

    def _summary(self, per_token: dict) -> dict:
        """Means in float64 over all scored positions and over those without special tokens."""
        n, length = per_token["kl"].shape
        ordinary_SL = ~np.isin(self.tokens.val_SL[:n], self.tokens.special)
        has_next_SL = np.broadcast_to(np.arange(length) < length - 1, (n, length))
        out = {}
        for ending, scored_SL in (("", np.ones_like(ordinary_SL)), ("_no_special", ordinary_SL)):
            for ours, name in (
                ("ce_clean", "ce_clean"),
                ("ce", "ce_spliced"),
                ("ce_zero", "ce_zero"),
            ):
                values = per_token[ours][scored_SL & has_next_SL]
                out[name + ending] = float(values.mean(dtype=np.float64))
            out["kl" + ending] = float(per_token["kl"][scored_SL].mean(dtype=np.float64))
            out["ce_recovered" + ending] = recovered(
                out["ce_clean" + ending], out["ce_spliced" + ending], out["ce_zero" + ending]
            )
        return out


def _load(path: str) -> dict | None:
    """The arrays of an .npz, or None where it is absent or damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        return None


def losses_of(folder: str) -> tuple[dict, dict]:
    """-> the arrays of a run's before.npz and after.npz. Raises UserError."""
    paths = [os.path.join(folder, f"{when}.npz") for when in ("before", "after")]
    found = [_load(path) for path in paths]
    if None in found:
        what = f"{paths[found.index(None)]} is missing or damaged"
        raise UserError(what, "wanted the folder of a finished run, whole")
    return tuple(found)


def _save(path: str, **arrays) -> None:
    """An .npz, whole or not at all."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = f"{path}.{os.getpid()}.npz"
    np.savez(part, **arrays)
    os.replace(part, path)


def _identity(model: str) -> list:
    """A Hub id stands for itself (with its revision), a local folder for its weights' files."""
    if not os.path.isdir(model):
        return [model]
    files = sorted(f for f in os.listdir(model) if f.endswith((".safetensors", ".json")))
    stats = [os.stat(os.path.join(model, f)) for f in files]
    return [[f, s.st_size, s.st_mtime_ns] for f, s in zip(files, stats)]


class _Totals:
    """Sums over the active tokens of what the SAE itself does."""

    def __init__(self, device):
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)
        self.x_sum_D = self.fired_F = 0

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

    def summary(self) -> dict:
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


def recovered(ce_clean: float, ce_spliced: float, ce_zero: float) -> float:
    """(CE_zero - CE_spliced) / (CE_zero - CE_clean): 1 is the clean LM, 0 the ablated one."""
    return (ce_zero - ce_spliced) / (ce_zero - ce_clean)


def gap_closed(ce_clean: float, ce_before: float, ce_after: float) -> float:
    """(CE_before - CE_after) / (CE_before - CE_clean)."""
    return (ce_before - ce_after) / (ce_before - ce_clean)


@distributed.alone
def check(measure: Measure, source, *, strict: bool) -> None:
    """Measure an SAE just loaded on a few batches; stop (or warn) where it does not do what its
    config says, with the usual cause."""
    if source.fresh:
        return
    n = len(measure.tokens.val_SL)
    few = min(n, 4 * measure.batch, max(measure.batch, n // 4))
    found = measure.known() or measure.measure(few)[0]
    k, l0 = source.k, found["l0"]
    least = 0.9 if source.architecture == "topk" else 0.5  # of k; a threshold lets L0 drift
    doubts = []
    if k is not None and not least * k <= l0 <= 1.5 * k:
        doubts.append(f"L0 = {l0:.1f} where its config says k = {k}: wrong LAYER, or a missing BOS")
    if not found["fvu"] <= 0.9:
        doubts.append(
            f"FVU = {found['fvu']:.3g}: wrong LAYER or MODEL, or biases of scaled activations"
        )
    if not found["ce_recovered"] >= 0.5:
        doubts.append(
            f"ce_recovered = {found['ce_recovered']:.3g}: wrong LAYER, wrong architecture, or a "
            "token that it never saw (set KEEP)"
        )
    if not doubts:
        return
    what = "this SAE does not reconstruct this model:\n       " + "\n       ".join(doubts)
    if strict:
        raise UserError(what, "put the cause right, or go on with CHECK_SAE=False")
    print(f"warning: {what}")
