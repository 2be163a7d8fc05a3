"""The step and the loop.

A step takes the clean pass of its micro-batches, reconstructs their residual x as y = SAE(x), and
runs the LM again from y, which gives the KL and its gradient at y. Only then are MSE and KL of the
whole step known, and with them alpha, so the SAE's own backward pass comes last and runs once, from
0.5 (dMSE/dy + alpha dKL/dy). Then: project the decoder's gradient off its rows, clip the norm of
the projected gradients, AdamW, renormalise.

Shapes: N active tokens of a micro-batch, D residual width, F latents.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch

from klsplice import distributed
from klsplice.errors import UserError
from klsplice.lm.activations import MicroBatch, Passes, ShuffledResiduals
from klsplice.lm.head import kl_head
from klsplice.lm.splice import Pass, Splice, rows
from klsplice.tracking.loop import Live, Loop
from sae import SAE, squared_error

KEPT_BYTES = 8e9  # of a step's clean logits, where several runs are held against them


# ---- losses ----------------------------------------------------------------------------------


def kl(part: MicroBatch, spliced: Pass, splice: Splice, dtype: torch.dtype) -> torch.Tensor:
    """KL(clean || spliced) of each active token -> (N,), nats, from logits in `dtype`."""
    clean_ND, h_ND = (rows(h_BLD, part.active_N) for h_BLD in (part.clean.h_BLD, spliced.h_BLD))
    return kl_head(clean_ND, h_ND, part.target_N, splice.head, dtype, part.kept)


def later(blocks: int) -> Callable:
    """A term: the squared error of the residual that many blocks above LAYER, over the mean square
    of the clean one (arXiv 2405.12241)."""

    def term(part: MicroBatch, spliced: Pass, splice: Splice, dtype) -> torch.Tensor:
        both = (rows(p.after[blocks], part.active_N).float() for p in (part.clean, spliced))
        clean_ND, spliced_ND = both
        return squared_error(clean_ND, spliced_ND) / clean_ND.square().mean()

    term.__name__ = f"later_{blocks}"
    return term


def balanced(mse, *terms):
    """0.5 (MSE + alpha KL), or the mean of MSE and several terms, each brought to its size."""
    share = 1 / (1 + len(terms))
    return share, *(share * alpha(mse, term) for term in terms)


def alpha(mse, term):
    """MSE / max(term, 1e-8), without gradient: what brings a term to the MSE's size."""
    return mse / term.clamp(min=1e-8)


def name_of(function) -> str:
    """Of a function, of a functools.partial of one, or of an object's class."""
    return getattr(getattr(function, "func", function), "__name__", type(function).__name__)


class Loss(NamedTuple):
    """A weighted sum of the SAE's own MSE and terms of the spliced pass.

    weigh: (mse, *terms), their values over the whole step -> their weights. terms: functions like
    `kl`, (part, spliced, splice, dtype) -> (N,), each logged under its name; alpha is logged of the
    first. mse_weight: what the MSE's weight is multiplied by. after: later blocks, counted from
    LAYER, whose residuals the terms find in Pass.after, of part.clean and of spliced.

    A term, or functools.partial of one, is given part.active_N, where the SAE stands in;
    part.target_N, the token after each, of a context's last (active_N % L == L - 1) itself;
    part.clean and spliced, whose h_BLD is the residual after the final norm: splice.head.logits(
    rows(h_BLD, part.active_N), dtype) are its logits. Its mean is over all active tokens of a step.
    """

    weigh: Callable
    terms: tuple[Callable, ...] = ()
    after: tuple[int, ...] = ()
    mse_weight: float = 1.0

    def weights(self, *values) -> tuple:
        """`weigh`, which has to give as many as it is given. Raises UserError."""
        found = self.weigh(*values)
        if not isinstance(found, (tuple, list)) or len(found) != len(values):
            what = f"{name_of(self.weigh)} returned {found!r:.60}"
            raise UserError(what, f"wanted {len(values)} weights: of the MSE and each term", code=1)
        return self.mse_weight * found[0], *found[1:]


LOSSES = {
    "kl+mse": Loss(balanced, (kl,)),
    "kl+mse+later": Loss(balanced, (kl, later(4), later(8)), after=(4, 8)),
    "mse": Loss(lambda mse: (1.0,)),
    "kl": Loss(lambda mse, term: (0.0, 1.0), (kl,)),
}


def loss_of(cfg) -> Loss:
    """LOSS with its MSE_WEIGHT."""
    return LOSSES[cfg.LOSS]._replace(mse_weight=cfg.MSE_WEIGHT)


# ---- the step --------------------------------------------------------------------------------


def training_step(
    learner, optimizer: "Optimizer", batch: list[MicroBatch], loss: Loss, *, lr: float, logits_dtype
) -> dict:
    """One step of the method -> mse, kl, alpha, l0, lr, grad_norm: means over its active tokens.

    batch: the step's micro-batches. logits_dtype: of the logits in the KL. The values stay on the
    device, so that the host does not wait for them.
    """
    sums = gradients(learner, batch, loss, logits_dtype)
    distributed.all_reduce(*(p.grad for p in learner.parameters()))
    grad_norm = optimizer.step(lr)
    l0 = sums.l0[0] if len(sums.l0) == 1 else sums.l0
    learner.model.after_step(l0, sums.fired_F > 0, sums.tokens)
    return sums.means() | {"lr": lr, "grad_norm": grad_norm}


def gradients(learner, batch: list[MicroBatch], loss: Loss, logits_dtype) -> "Sums":
    """The gradients of a step, left in .grad."""
    if learner.in_lm:
        return through_lm(learner, batch, loss, logits_dtype)
    through = through_sites if len(learner.splice.sites) > 1 else through_sae
    return through(learner, batch, loss, logits_dtype)


def through_sae(learner, batch: list[MicroBatch], loss: Loss, logits_dtype) -> "Sums":
    """The gradients of a step whose learner is an SAE, or something on one."""
    sums, pending = Sums(learner, batch, loss), []
    for part in batch:
        torch.manual_seed(part.seed)
        y_ND, z_NF = learner.reconstruct(part.x_ND)
        y_ND = y_ND.float()
        mse_N, extra_N = learner.losses(part.x_ND, part.o_ND, y_ND, z_NF)
        mse = sums.share_of_mean(mse_N, part, "error")
        extra = 0.0 if extra_N is None else sums.share_of_mean(extra_N, part, "extra")
        terms, at_y = terms_and_gradients(learner, part, y_ND, loss, logits_dtype, sums)
        sums.add(mse, terms, [z_NF])
        pending.append((y_ND, mse, extra, at_y))
    # the weights are of the whole step, known only now; the SAE's own backward pass comes last
    sums.all_reduce()
    mse_weight, *weights = loss.weights(sums.mse, *sums.terms)
    for y_ND, mse, extra, at_y in pending:
        total = mse_weight * mse + extra
        for weight, g_ND in zip(weights, at_y):
            total = total + weight * (g_ND * y_ND).sum()  # its derivative in y is weight * g
        total.backward()
    return sums


def terms_and_gradients(learner, part: MicroBatch, y_ND, loss: Loss, logits_dtype, sums):
    """The terms of the spliced pass from y_ND on, and their gradients at y_ND."""
    if not loss.terms:
        return [], []
    leaf_ND = y_ND.detach().requires_grad_()
    spliced = learner.splice.spliced(part.clean, part.active_N, leaf_ND)
    given = part, spliced, learner.splice, logits_dtype
    terms = [sums.share_of_mean(term(*given), part, name_of(term)) for term in loss.terms]
    at_y = []
    for term in terms:
        at_y += torch.autograd.grad(term, leaf_ND, retain_graph=term is not terms[-1])
    return [term.detach() for term in terms], at_y


def through_sites(learner, batch: list[MicroBatch], loss: Loss, logits_dtype) -> "Sums":
    """The gradients of a step of several SAEs: an upper one's reach those below it through the LM.

    The weights are known only after the whole step, and a gradient is linear in them: what else
    there is, the MSE and each term have sums of their own, which are weighted at the end."""
    sums, params = Sums(learner, batch, loss), learner.parameters()
    parts = [[torch.zeros_like(p) for p in params] for _ in range(2 + len(loss.terms))]

    def add(to: list, value: torch.Tensor, keep: bool) -> None:
        found = torch.autograd.grad(value, params, retain_graph=keep, allow_unused=True)
        for total, g in zip(to, found):
            if g is not None:
                total += g

    for part in batch:
        torch.manual_seed(part.seed)
        mse_N, extra_N, latents = learner.losses_at(part.sites)
        mse = sums.share_of_mean(mse_N, part, "error")
        if extra_N is not None:
            add(parts[0], sums.share_of_mean(extra_N, part, "extra"), True)
        add(parts[1], mse, False)
        terms = []
        if loss.terms:
            given = part, learner.resumed(part.clean, part.active_N), learner.splice, logits_dtype
            terms = [sums.share_of_mean(term(*given), part, name_of(term)) for term in loss.terms]
            for to, term in zip(parts[2:], terms):
                add(to, term, term is not terms[-1])
        sums.add(mse, [term.detach() for term in terms], latents)
    sums.all_reduce()
    weights = 1.0, *loss.weights(sums.mse, *sums.terms)
    for p, *of_p in zip(params, *parts):
        p.grad = sum(weight * g for weight, g in zip(weights, of_p))
    return sums


def through_lm(learner, batch: list[MicroBatch], loss: Loss, logits_dtype) -> "Sums":
    """The gradients of a step whose learner is in the LM: the KL's own backward pass. Its weight is
    1 (LOSS = kl), so that nothing has to wait for the whole step."""
    sums = Sums(learner, batch, loss)
    for part in batch:
        torch.manual_seed(part.seed)
        spliced, ((o_ND, y_ND, z_NF),) = learner.spliced(part.clean, part.active_N)
        (make,), given = loss.terms, (part, spliced, learner.splice, logits_dtype)
        term = sums.share_of_mean(make(*given), part, name_of(make))
        term.backward()
        mse = sums.share_of_mean(squared_error(o_ND, y_ND.detach().float()), part, "error")
        sums.add(mse, [term.detach()], [z_NF])
    sums.all_reduce()
    return sums


class Sums:
    """What a step's micro-batches add up to: means over all its active tokens, in all processes."""

    def __init__(self, learner, batch: list[MicroBatch], loss: Loss):
        names = [name_of(term) for term in loss.terms]
        self.names = [n + f"_{i + 1}" * (n in names[:i]) for i, n in enumerate(names)]
        self.tokens = max(1, distributed.sum_of(sum(len(part.x_ND) for part in batch)))
        # views of one tensor, which are added to in place
        sites = len(learner.splice.sites)
        zeros = torch.zeros(1 + sites + len(self.names), device=learner.device)
        self.mse, *self.l0, self.terms = zeros[0], *zeros[1 : 1 + sites], [*zeros[1 + sites :]]
        self.fired_F = torch.zeros(learner.model.d_sae, dtype=torch.int32, device=learner.device)

    def share_of_mean(self, value_N: torch.Tensor, part: MicroBatch, name: str) -> torch.Tensor:
        """What a micro-batch adds to the step's mean; not its own mean, since sizes differ.

        name: of the function that made it. Raises UserError where it is not a value a token."""
        if getattr(value_N, "shape", ()) != part.x_ND.shape[:1]:
            what = f"{name} returned {value_N!r:.60}"
            wanted = f"wanted a value for each of the {len(part.x_ND)} active tokens, and no mean"
            raise UserError(what, wanted, code=1)
        return value_N.sum() / self.tokens

    def add(self, mse: torch.Tensor, terms: list[torch.Tensor], latents: list) -> None:
        """latents: z_NF of each site."""
        fired = [(z_NF > 0).sum(0) for z_NF in latents]  # tokens; both statistics from one reading
        self.mse += mse.detach()
        for total, term in zip(self.terms, terms):
            total += term
        for total, fired_F in zip(self.l0, fired):
            total += fired_F.sum() / self.tokens
        self.fired_F += torch.cat(fired) > 0

    def all_reduce(self) -> None:
        distributed.all_reduce(self.mse, *self.l0, *self.terms, self.fired_F)

    def means(self) -> dict:
        nothing = torch.full_like(self.mse, torch.nan)  # where the loss has no such term
        first = self.terms[0] if self.terms else nothing
        values = {"mse": self.mse, "kl": nothing} | dict(zip(self.names, self.terms))
        values["alpha"] = torch.where(first > 0, alpha(self.mse, first), torch.nan)
        return values | {"l0": sum(self.l0) / len(self.l0)}


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
        from klsplice.kernels import triton_adamw

        model = self.learner.model
        unit_rows = model.W_dec_FD if model.unit_norm else None
        norm = triton_adamw.projected_norm(self.learner.parameters(), unit_rows)
        self._note(norm)
        triton_adamw.adamw(self.adamw, norm, self.clip, unit_rows)
        return norm

    def _note(self, norm: torch.Tensor) -> None:
        self.adamw.found_inf = torch.maximum(self.adamw.found_inf, (~norm.isfinite()).float())

    def check(self, step: int, scalars: dict) -> None:
        """Raise UserError (exit 1) if a step was refused. One device sync."""
        if self.adamw.found_inf.item():
            found = ", ".join(f"{n} = {v:.3g}" for n, v in scalars.items())
            what = f"the gradient was not finite by step {step} ({found}) and was not applied"
            hint = "lower LR, or look at the batch; the last checkpoint is kept"
            raise UserError(what, hint, code=1)


# ---- the loop --------------------------------------------------------------------------------


def batches_of(cfg, learner, tokens, losses=()) -> Callable:
    """-> a function step -> its micro-batches, with what LOSS and SHUFFLE need of the LM.

    losses: the LOSS of each run that trains on these, where there are several."""
    names = losses or (cfg.LOSS,)
    if missing := {*names} - LOSSES.keys():
        raise UserError(f"LOSS = {min(missing)} has no row in LOSSES of finetune.py")
    splice, common = learner.splice, {"seed": cfg.SEED, "device": learner.device}
    if cfg.SHUFFLE:
        sizes = {"shuffle": cfg.SHUFFLE, "batch": cfg.BATCH, "lm_batch": cfg.EVAL_BATCH}
        return ShuffledResiduals(splice, tokens, **sizes, **common)
    wanted = [LOSSES[name] for name in names]
    splice.kept = tuple({i for loss in wanted for i in loss.after})
    most = len(splice.blocks) - 1 - splice.layer
    if splice.kept and max(splice.kept) > most:
        what = f"LOSS reads {max(splice.kept)} blocks above LAYER = {splice.layer}"
        raise UserError(what, f"this LM has {most} there: set a lower LAYER, or LOSS=kl+mse")
    logits = cfg.BATCH * cfg.CONTEXT * splice.head.W_VD.shape[0] * 4
    return Passes(
        splice,
        tokens,
        whole=any(loss.terms for loss in wanted),
        micro_batch=cfg.MICRO_BATCH,
        clean_batch=cfg.CLEAN_BATCH,
        keep_head=len(losses) > 1 and logits <= KEPT_BYTES,
        **common,
    )


def learning_rate(step: int, steps: int, *, lr: float, schedule: str, warmup: int) -> float:
    """linear: lr (1 - step / steps); constant: lr; after a linear warm-up. step counts from 0."""
    decay = 1 - step / steps if schedule == "linear" else 1.0
    return lr * decay * min(1.0, (step + 1) / (warmup + 1))


def dry_step(cfg, learner, batches) -> None:
    """Make the gradients of one step, to run out of memory now and not hours later. Nothing is
    changed or written. Not on a CPU, where memory swaps and a step may take long."""
    if cfg.DEVICE == "cpu" or not cfg.TOKENS:
        return
    print("trying one step: the first one compiles what learns", flush=True)
    learner.train(True)
    moments = [torch.empty_like(p) for p in learner.parameters() for _ in range(2)]
    gradients(learner, batches(0), loss_of(cfg), getattr(torch, cfg.LOGITS))
    for p in learner.parameters():
        p.grad = None
    del moments


class Training:
    """What one run trains with: its learner, its optimizer, and its place in the steps.

    run: tracking.run_folder.Run."""

    def __init__(self, cfg, learner, tokens, run):
        self.cfg, self.learner = cfg, learner
        self.optimizer = Optimizer(learner, weight_decay=cfg.WEIGHT_DECAY, clip=cfg.CLIP)
        sizes = {"total": tokens.steps, "tokens_a_step": tokens.tokens_a_step}
        self.loop = Loop(run, learner, self.optimizer, **sizes)
        learner.train(True)

    def step(self, step: int, make_batch: Callable) -> None:
        """make_batch: -> the step's micro-batches."""
        cfg, loop = self.cfg, self.loop
        schedule = {"lr": cfg.LR, "schedule": cfg.SCHEDULE, "warmup": cfg.WARMUP}
        with loop.timed():
            given = self.learner, self.optimizer, make_batch(), loss_of(cfg)
            lr = learning_rate(step, loop.total, **schedule)
            scalars = training_step(*given, lr=lr, logits_dtype=getattr(torch, cfg.LOGITS))
            if loop.wants_log(step):
                scalars = {name: float(value) for name, value in scalars.items()}
                self.optimizer.check(step + 1, scalars)
                loop.log(step, scalars)
                loop.stop_on(self.learner.model.problem(), step)


def finetune(live: Live, batches: Callable, evaluation) -> None:
    """Train all that are live, each from its checkpoint or from step 0, to the end.

    They make a step one after the other, on the same micro-batches. batches: step -> micro-batches.
    evaluation: eval.Evaluation."""
    for step in live.steps():
        batch = cache(partial(batches, step))  # made by the first one; that of the last step goes
        live.evaluate(step, evaluation)
        live.each(lambda run: run.training.step(step, batch), live.at(step))  # noqa: B023
