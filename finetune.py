"""The step and the loop.

A step: the clean pass gives x and the clean hidden states; y = SAE(x); the spliced pass gives the
KL and its gradient at y. Only then is alpha known (of the whole batch), so the SAE's own backward
pass comes last, once, from 0.5 (dMSE/dy + alpha dKL/dy). Then: project the decoder's gradient, clip
the norm of the projected gradients, AdamW, renormalise.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch

import distributed
import ops
from errors import UserError
from sae import SAE, squared_error
from splice import next_tokens, put, rows


def balance(mse, kl):
    """alpha = MSE / max(KL, 1e-8), without gradient."""
    return mse / kl.clamp(min=1e-8)


# LOSS: the weights of MSE and KL from their values over the whole batch.
LOSSES = {
    "kl+mse": lambda mse, kl: (0.5, 0.5 * balance(mse, kl)),
    "mse": lambda mse, kl: (1.0, 0.0),
    "kl": lambda mse, kl: (0.0, 1.0),
}


class Sums:
    """What a step's micro-batches add up to: means over all its active tokens, in all processes."""

    def __init__(self, learner, batch: list[SimpleNamespace]):
        self.tokens = distributed.total(sum(len(part.x_ND) for part in batch))
        self.mse, self.kl, self.l0 = torch.zeros(3, device=learner.device)
        self.fired_F = torch.zeros(learner.model.d_sae, dtype=torch.int32, device=learner.device)

    def add(self, mse: torch.Tensor, z_NF: torch.Tensor) -> None:
        on_NF = z_NF > 0
        self.mse += mse
        self.l0 += on_NF.sum() / self.tokens
        self.fired_F += on_NF.any(0)

    def add_up(self) -> None:
        distributed.add_up(self.mse, self.kl, self.l0, self.fired_F)

    def scalars(self) -> dict:
        alpha = torch.where(self.kl > 0, balance(self.mse, self.kl), torch.nan)  # nan: no KL
        means = {"mse": self.mse, "kl": self.kl, "alpha": alpha, "l0": self.l0}
        return means | {"fired_F": self.fired_F > 0, "tokens": self.tokens}


def through_sae(learner, batch: list[SimpleNamespace], weigh: Callable) -> dict:
    """Backward of one step's loss, summed over its micro-batches -> detached scalars and fired_F.

    batch: micro-batches as `contexts` and the others make them: x_ND, the residual at the active
    positions; kl_N: y_ND -> KL of those tokens, or None when the loss has none; seed, of dropout.
    weigh: an entry of LOSSES. Means are over all active tokens of the step.
    """
    model, held, sums = learner.model, [], Sums(learner, batch)
    n = sums.tokens
    for part in batch:
        torch.manual_seed(part.seed)
        y_ND, z_NF = learner.reconstruct(part.x_ND)
        y_ND = y_ND.float()
        with learner.half_precision():  # their products are like those of reconstruct
            error = model.error(part.x_ND, y_ND, z_NF).sum() / n
            extra_N = model.extra(part.x_ND, y_ND, z_NF)
        dkl_ND = None
        if part.kl_N is not None:
            leaf_ND = y_ND.detach().requires_grad_()
            part_kl = part.kl_N(leaf_ND).sum() / n
            (dkl_ND,) = torch.autograd.grad(part_kl, leaf_ND)
            sums.kl += part_kl.detach()
        sums.add(error.detach(), z_NF)
        held.append((y_ND, error, None if extra_N is None else extra_N.sum() / n, dkl_ND))
    sums.add_up()
    mse_weight, kl_weight = weigh(sums.mse, sums.kl)
    for y_ND, error, extra, dkl_ND in held:
        roots, seeds = [mse_weight * error if extra is None else mse_weight * error + extra], [None]
        if dkl_ND is not None:
            roots, seeds = [*roots, y_ND], [*seeds, kl_weight * dkl_ND]
        torch.autograd.backward(roots, seeds)
    return sums.scalars()


def through_lm(learner, batch: list[SimpleNamespace], weigh: Callable) -> dict:
    """The same for what learns inside the LM: the KL's own backward pass, through the LM."""
    sums = Sums(learner, batch)
    n = sums.tokens
    for part in batch:
        torch.manual_seed(part.seed)
        h_BLD, x_ND, y_ND, z_NF = learner.spliced(part.seen, part.active_N)
        part_kl = part.kl_of_h(h_BLD).sum() / n
        part_kl.backward()
        sums.kl += part_kl.detach()
        sums.add(squared_error(x_ND, y_ND.detach().float()).sum() / n, z_NF)
    sums.add_up()
    return sums.scalars()


# TRAIN: how the gradients of a step are made.
GRADIENTS = {
    "sae": through_sae,
    "adapter": through_sae,
    "sae_lora": through_sae,
    "lm_lora": through_lm,
}


def contexts(c, learner, tokens) -> Callable:
    """-> step -> micro-batches with a KL; the spliced pass runs when it is asked for."""
    logits, clean = getattr(torch, c.LOGITS), clean_ahead(c, learner, tokens)

    def micro_batch(step: int, first: int) -> SimpleNamespace:
        tokens_BL, seen = clean(step, first, min(first + c.MICRO_BATCH, tokens.share))
        active_N = _moved(tokens.active(tokens_BL), learner.device)
        clean_ND = rows(seen.h_BLD, active_N)
        target_N = next_tokens(seen.tokens_BL).flatten()[active_N]
        head = learner.splice.head

        def kl_of_h(h_BLD):
            return ops.kl_head(clean_ND, rows(h_BLD, active_N), target_N, head, logits)

        def kl_N(y_ND):
            return kl_of_h(learner.splice.resume(put(seen.x_BLD, y_ND, active_N), seen.calls))

        # dropout is keyed by the micro-batch's first sequence
        seed = _seed(c.SEED, tokens.first(step) + first)
        part = {"x_ND": rows(seen.x_BLD, active_N), "kl_N": kl_N, "seed": seed}
        return SimpleNamespace(**part, seen=seen, active_N=active_N, kl_of_h=kl_of_h)

    def batch(step: int) -> list[SimpleNamespace]:
        return [micro_batch(step, first) for first in range(0, tokens.share, c.MICRO_BATCH)]

    return batch


def clean_ahead(c, learner, tokens) -> Callable:
    """-> (step, first, end) -> those sequences of the step and their clean pass.

    It is made for CLEAN_BATCH sequences at a time: of several steps, or of a part of one.
    """
    steps_a_pool = max(1, c.CLEAN_BATCH // tokens.share)
    pool = SimpleNamespace(first=None)

    def fill(first: int) -> None:
        steps = range(first, first + steps_a_pool)  # beyond the last one, too: one shape for all
        tokens_SL = torch.cat([tokens.batch(s) for s in steps])
        pool.parts = [
            (part_BL, learner.clean(_moved(part_BL, learner.device)))
            for part_BL in tokens_SL.split(c.CLEAN_BATCH)
        ]
        pool.first = first

    def clean(step: int, first: int, end: int):
        if pool.first != step - step % steps_a_pool:
            fill(step - step % steps_a_pool)
        which, first_in_part = divmod(step % steps_a_pool * tokens.share + first, c.CLEAN_BATCH)
        tokens_BL, seen = pool.parts[which]
        mine = slice(first_in_part, first_in_part + end - first)
        parts = {n: getattr(seen, n)[mine] for n in ("tokens_BL", "x_BLD", "h_BLD")}
        return tokens_BL[mine], SimpleNamespace(**parts, calls=seen.calls)

    return clean


def _moved(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """t on `device`; the host does not wait for the copy."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)


def _seed(seed: int, sequence: int) -> int:
    return 1_000_003 * seed + sequence


def residuals(c, learner, tokens) -> Callable:
    """-> step -> micro-batches without a KL: the LM runs up to the splice only."""

    def batch(step: int) -> list[SimpleNamespace]:
        xs = [_residual(learner, tokens, t) for t in tokens.batch(step).split(c.MICRO_BATCH)]
        first = tokens.first(step)
        seeds = [_seed(c.SEED, first + i * c.MICRO_BATCH) for i in range(len(xs))]
        return [SimpleNamespace(x_ND=x, kl_N=None, seed=s) for x, s in zip(xs, seeds)]

    return batch


def shuffled_residuals(c, learner, tokens) -> Callable:
    """`residuals` from a pool of SHUFFLE sequences whose tokens are dealt in random order."""
    pool = SimpleNamespace(first=None, x_ND=None, which=None, parts=None)
    steps_a_pool = max(1, min(c.SHUFFLE // c.BATCH, tokens.steps_a_pass))
    residual = partial(_residual, learner, tokens)
    width = learner.splice.head.W_VD.shape[1]

    def room(tokens_BL) -> torch.Tensor:
        n = len(tokens.active(tokens_BL))
        return torch.empty((n, width), dtype=learner.dtype, device=learner.device)

    def fill(first: int) -> None:
        if pool.first != first:
            steps = [s % tokens.steps_a_pass for s in range(first, first + steps_a_pool)]
            many = torch.cat([tokens.sequences(s * c.BATCH, (s + 1) * c.BATCH) for s in steps])
            parts = many.split(c.EVAL_BATCH)
            pool.x_ND = torch.cat(distributed.each_its_share(parts, residual, room))
            pool.first = first

    def deal(which: int) -> None:
        if pool.which != which:
            generator = torch.Generator().manual_seed(_seed(c.SEED, which))
            order_N = torch.randperm(len(pool.x_ND), generator=generator)
            pool.parts = order_N.split(len(order_N) // steps_a_pool)
            pool.which = which

    def batch(step: int) -> list[SimpleNamespace]:
        which, within = divmod(step, steps_a_pool)
        fill(which * steps_a_pool % tokens.steps_a_pass)
        deal(which)
        mine_N = pool.parts[within].tensor_split(distributed.size())[distributed.rank()]
        x_ND = pool.x_ND[_moved(mine_N, learner.device)]
        return [SimpleNamespace(x_ND=x_ND, kl_N=None, seed=_seed(c.SEED, step))]

    return batch


def _residual(learner, tokens, tokens_BL) -> torch.Tensor:
    """-> x_ND at the active positions."""
    active_N = _moved(tokens.active(tokens_BL), learner.device)
    return rows(learner.splice.residual(_moved(tokens_BL, learner.device)), active_N)


def feed_of(c, learner, tokens) -> Callable:
    """What LOSS and SHUFFLE need of the LM -> step -> micro-batches."""
    if c.LOSS != "mse":
        return contexts(c, learner, tokens)
    return (shuffled_residuals if c.SHUFFLE else residuals)(c, learner, tokens)


def learning_rate(step: int, steps: int, *, lr: float, schedule: str, warmup: int) -> float:
    """linear: lr (1 - step / steps); constant: lr; after a linear warm-up. step counts from 0."""
    decay = 1 - step / steps if schedule == "linear" else 1.0
    return lr * decay * min(1.0, (step + 1) / (warmup + 1))


class Optimizer:
    """Projection, clipping, AdamW, renormalisation; none of it after a gradient that is not finite.

    On CUDA an SAE's step is in our own kernels, fused; everything else's is PyTorch's.
    """

    def __init__(self, learner, *, weight_decay: float, clip: float):
        self.learner, self.clip = learner, clip
        params = learner.parameters()
        self.adamw = torch.optim.AdamW(params, lr=0.0, weight_decay=weight_decay, fused=True)
        self.adamw.found_inf = torch.zeros((), device=learner.device)  # read by the fused step
        model = learner.model
        learns = isinstance(model, SAE) and model.W_dec_FD.requires_grad
        self.fused = learns and learner.device.type == "cuda"

    def step(self, lr: float) -> torch.Tensor:
        """Project, clip, update, renormalise -> the norm before clipping. Gradients are freed."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        norm = self._fused() if self.fused else self._reference()
        self.adamw.zero_grad()
        return norm

    def _reference(self) -> torch.Tensor:
        self.learner.model.before_clip()
        norm = torch.nn.utils.clip_grad_norm_(self.learner.parameters(), self.clip)
        self._note(norm)
        self.adamw.step()
        self.learner.model.renormalise()
        return norm

    def _fused(self) -> torch.Tensor:
        import triton_ops

        model = self.learner.model
        unit_rows = model.W_dec_FD if model.unit_norm else None
        norm = triton_ops.projected_norm(self.learner.parameters(), unit_rows)
        self._note(norm)
        triton_ops.adamw(self.adamw, norm, self.clip, unit_rows)
        return norm

    def _note(self, norm: torch.Tensor) -> None:
        self.adamw.found_inf = torch.maximum(self.adamw.found_inf, (~norm.isfinite()).float())

    def check(self, step: int, scalars: dict) -> None:
        """Raise UserError (exit 1) if a step was refused. One device sync."""
        if self.adamw.found_inf.item():
            found = ", ".join(f"{n} = {v:.3g}" for n, v in scalars.items())
            what = f"the gradient was not finite by step {step} ({found}) and was not applied"
            raise UserError(
                what, "lower LR, or look at the batch; the last checkpoint is kept", code=1
            )


def dry_step(c, learner, tokens) -> None:
    """The memory of a step's gradients and moments, before anything is written; nothing is changed.
    Not on a CPU, where memory swaps and a step may take long."""
    if c.DEVICE == "cpu":
        return
    learner.train(True)
    moments = [torch.empty_like(p) for p in learner.parameters() for _ in range(2)]
    GRADIENTS[c.TRAIN](learner, feed_of(c, learner, tokens)(0), LOSSES[c.LOSS])
    for p in learner.parameters():
        p.grad = None
    del moments


def finetune(c, learner, tokens, run, measure) -> None:
    """Train from the run's checkpoint, or from step 0, to the end; log and evaluate on the way."""
    feed, weigh, gradients = feed_of(c, learner, tokens), LOSSES[c.LOSS], GRADIENTS[c.TRAIN]
    schedule = {"lr": c.LR, "schedule": c.SCHEDULE, "warmup": c.WARMUP}
    optimizer = Optimizer(learner, weight_decay=c.WEIGHT_DECAY, clip=c.CLIP)
    learner.train(True)
    for step in run.steps(learner, optimizer, tokens):
        if run.wants_evaluation(step):
            run.evaluate(step, measure)
        scalars = gradients(learner, feed(step), weigh)
        distributed.add_up(*(p.grad for p in learner.parameters()))
        fired_F, n = scalars.pop("fired_F"), scalars.pop("tokens")
        scalars["lr"] = learning_rate(step, tokens.steps, **schedule)
        scalars["grad_norm"] = optimizer.step(scalars["lr"])
        learner.model.after_step(scalars["l0"], fired_F, n)
        if run.wants_log(step):
            scalars = {name: float(value) for name, value in scalars.items()}
            optimizer.check(step + 1, scalars)
            run.log(step, scalars)
            run.stop_on(learner.model.problem(), step)
