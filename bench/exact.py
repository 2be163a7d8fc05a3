"""How near to float64 is a step, ours and the naive loop's?"""

import copy
import statistics
from collections import defaultdict

import torch

from bench.loops import Naive, Ours, build_sae

BATCHES = 4  # over which errors are averaged


def errors(lm, shape: dict) -> dict[str, float]:
    """Relative errors of a step against one in float64, from the definition, by autograd: means
    over batches, of each gradient, of mse and kl, as "ours W_enc_FD" and "naive W_enc_FD".

    "dKL/dy" is the KL's gradient at one and the same reconstruction, in which alone the loops
    differ. The SAE's gradients have also what bfloat16 does to it: ties decide which latents win.
    """
    one = {"CONTEXT": min(256, shape["constants"]["CONTEXT"]), "BATCH": 1}
    small = shape | {"constants": one | {"MICRO_BATCH": 1, "CLEAN_BATCH": 1}}
    exact_lm = copy.deepcopy(lm).double()
    exact_lm.set_attn_implementation("eager")
    make_sae = lambda: build_sae(shape, *min(shape["saes"]), lm.device)  # noqa: E731
    exact = Naive(exact_lm, small, make_sae().double())
    loops = {"ours": Ours(lm, small, make_sae()), "naive": Naive(lm, small, make_sae())}
    found = defaultdict(list)
    for step in range(BATCHES):
        wanted = exact.gradients(step)
        y_BLD = exact.y_BLD.detach().to(lm.dtype)
        wanted["dKL/dy"] = _gradient_at(exact, y_BLD.double(), step)
        for loop_name, loop in loops.items():
            values = loop.gradients(step) | {"dKL/dy": _gradient_at(loop, y_BLD, step)}
            for name, value in values.items():
                error = (value.double() - wanted[name]).norm() / wanted[name].norm()
                found[f"{loop_name} {name}"].append(error.item())
    return {name: statistics.mean(values) for name, values in found.items()}


def _gradient_at(loop, y_BLD: torch.Tensor, step: int) -> torch.Tensor:
    leaf_BLD = y_BLD.clone().requires_grad_()
    return torch.autograd.grad(loop.kl_at(leaf_BLD, step), leaf_BLD)[0]


def farther(errors: dict) -> list[str]:
    """Where our gradients are farther from float64 than the naive loop's, by more than a quarter.

    Under a hundredth, as in float32, both are near: a tie that is broken otherwise makes that."""
    names = ("dKL/dy", "W_enc_FD", "W_dec_FD")
    most = {name: max(0.01, 1.25 * errors[f"naive {name}"]) for name in names}
    return [name for name in names if not errors[f"ours {name}"] <= most[name]]
