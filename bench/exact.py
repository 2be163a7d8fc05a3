"""How near to float64 is a step, ours and the naive loop's?"""

import copy
import statistics

import torch

import finetune
from bench.loops import Naive, Ours, Tokens, build_sae

WIDE = "klsplice, float32 logits"
BATCHES = 4  # over which errors are averaged


def exact_steps(lm, shape: dict, sae, batches) -> list[dict]:
    """Each batch's step in float64, from the definition, by autograd: values, gradients, the
    reconstruction y in the LM's dtype, and the KL's gradient there."""
    dtype = lm.dtype
    lm, sae = copy.deepcopy(lm).double(), copy.deepcopy(sae).double()
    lm.set_attn_implementation("eager")
    loop, found = Naive(lm, shape, str(batches[0].device), sae), []
    for tokens_BL in batches:
        sae.zero_grad()
        loss, mse, kl = loop.loss(tokens_BL, autocast=False)
        loss.backward()
        step = {name: p.grad.float() for name, p in sae.named_parameters()}
        y_BLD = loop.y_BLD.detach().to(dtype)
        step["dKL/dy"] = gradient_at(
            y_BLD.double(), lambda y, t=tokens_BL: loop.kl_at(y, loop.clean(t), t)
        )
        found.append(step | {"y": y_BLD, "kl": kl.detach(), "mse": mse.detach()})
    loop.close()
    return found


def gradient_at(y_BLD, kl) -> torch.Tensor:
    leaf_BLD = y_BLD.clone().requires_grad_()
    return torch.autograd.grad(kl(leaf_BLD), leaf_BLD)[0].float()


def correctness(lm, shape: dict, device: str) -> dict:
    """Relative errors against float64, means over batches: ours, WIDE's and the naive loop's.

    "dKL/dy" is the gradient at one and the same reconstruction, which is what the loops make
    differently. A whole step's gradients have also what bfloat16 does to an SAE: ties decide which
    latents win.
    """
    small = shape | {"batch": 1, "context": min(256, shape["context"]), "clean_batch": 1}
    d_sae, k = shape["saes"][-1] if device == "cpu" else (16_384, 80)
    make = lambda: build_sae(small, d_sae, k, device)  # noqa: E731
    tokens = Tokens(small)
    batches = [tokens.batch(1 + i).to(device) for i in range(BATCHES)]
    exact, found = exact_steps(lm, small, make(), batches), {}

    def note(name: str, i: int, step: dict) -> None:
        for n, t in step.items():
            error = (t.detach().float() - exact[i][n]).norm() / exact[i][n].norm()
            found.setdefault(f"{name} {n}", []).append(error.item())

    cuda = torch.device(device).type == "cuda"
    for name, changes in (("ours", {}), (WIDE, {"LOGITS": "float32"})):
        ours = Ours(lm, small, device, make(), compiled=cuda, **changes)
        for i in range(BATCHES):
            ours.learner.model.zero_grad()
            scalars = ours.gradients()
            step = {n: p.grad for n, p in ours.learner.model.named_parameters()}
            at_y = gradient_at(exact[i]["y"].float(), lambda y, o=ours, s=1 + i: o.kl_at(y, s))
            note(name, i, step | {n: scalars[n] for n in ("mse", "kl")} | {"dKL/dy": at_y})
        ours.close()
    naive = Naive(lm, small, device, make())
    for i, tokens_BL in enumerate(batches):
        naive.sae.zero_grad()
        loss, mse, kl = naive.loss(tokens_BL)
        loss.backward()
        step = {n: p.grad for n, p in naive.sae.named_parameters()} | {"mse": mse, "kl": kl}
        at_y = gradient_at(exact[i]["y"], lambda y, t=tokens_BL: naive.kl_at(y, naive.clean(t), t))
        note("naive", i, step | {"dKL/dy": at_y})
    naive.close()
    return {name: statistics.mean(errors) for name, errors in found.items()}


def farther(errors: dict) -> list[str]:
    """Where our gradients are farther from float64 than the naive loop's, by more than noise."""
    slack = {"dKL/dy": 1.05, "W_enc_FD": 1.25, "W_dec_FD": 1.25}
    return [n for n, by in slack.items() if not errors[f"ours {n}"] <= by * errors[f"naive {n}"]]


def curves(lm, shape: dict, device: str, sae: tuple, *, compiled: bool, steps: int = 30) -> float:
    """The largest relative difference of the two loops' losses, smoothed over 5 steps."""
    make = lambda: build_sae(shape, *sae, device)  # noqa: E731
    ours = Ours(lm, shape, device, make(), compiled=compiled)
    a = [{n: float(v) for n, v in ours.step().items() if n in ("mse", "kl")} for _ in range(steps)]
    ours.close()
    naive = Naive(lm, shape, device, make())
    b = [naive.step() for _ in range(steps)]
    naive.close()
    return max(
        abs(sum(x[n] for x in a[i : i + 5]) / sum(x[n] for x in b[i : i + 5]) - 1)
        for n in ("mse", "kl")
        for i in range(steps - 4)
    )


def noise_floor(ours: Ours) -> float:
    """KL in nats of a splice of the residual itself, as a step makes it: not quite 0 where the
    clean pass is of more sequences, or its attention another kernel."""
    part, learner = ours.batches(1)[0], ours.learner
    spliced = learner.resumed(part.clean, part.x_ND, part.active_N)
    return float(finetune.kl(part, spliced, learner.splice, ours.logits).mean())
