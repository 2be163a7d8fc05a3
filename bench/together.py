"""What does a run of a sweep cost, beside one alone? Steps and evaluations of several SAEs.

python -m bench.together runs/demo-sae                 that run's LM, text and SAE, five times
python -m bench.together runs/demo-sae --runs 3 --out records/together.json

Both are timed in turns, in this process, on the same tokens. Then the same ratio as counted from
the FLOPs of the products, for these shapes and for Gemma-2-2B's.
"""

import argparse
import copy
import itertools
import statistics
import sys
import time

import torch

import eval as evaluation
import finetune
from bench.__main__ import counted
from bench.loops import SHAPES
from evals.open import Finished
from klsplice import machine
from klsplice.errors import UserError
from klsplice.settings import Config
from klsplice.storage import write_json
from klsplice.turns import Turns
from learners.base import SAELearner


class Sweep:
    """n learners on one LM, and what a step and an evaluation of all of them are."""

    def __init__(self, run: Finished, n: int):
        changes = {"LOSS": "kl+mse", "SHUFFLE": 0}
        cfg, tokens = Config(**run.cfg.constants() | changes), run.tokens
        sae, splice = run.after().sae, run.after().splice
        self.cfg, self.tokens = cfg, tokens
        saes = [copy.deepcopy(sae).requires_grad_().train() for _ in range(n)]
        self.learners = [SAELearner(one, splice) for one in saes]
        how = {"weight_decay": cfg.WEIGHT_DECAY, "clip": cfg.CLIP}
        self.optimizers = [finetune.Optimizer(learner, **how) for learner in self.learners]
        self.batches = finetune.batches_of(cfg, self.learners[0], tokens, ["kl+mse"] * n)
        self.evaluation = evaluation.Evaluation(cfg, tokens, run.identity, shared=n > 1)
        self.steps = itertools.count()

    def step(self) -> None:
        """Of all learners, each as training_step makes it."""
        step, loss = next(self.steps), finetune.LOSSES["kl+mse"]
        how = {"lr": 1e-6, "logits_dtype": getattr(torch, self.cfg.LOGITS)}
        for learner, optimizer in zip(self.learners, self.optimizers):
            finetune.training_step(learner, optimizer, self.batches(step), loss, **how)

    def evaluate(self) -> None:
        """All learners on the held-out tokens, in turns; nothing is known but the zero-ablated
        pass."""
        self.evaluation.clean_passes.clear()
        self.evaluation.newest, turns = None, Turns()

        def job(learner):
            batch = itertools.count(1)
            n = len(self.tokens.val_SL)
            self.evaluation.measure(learner, n, lambda: turns.wait(next(batch)))
            return 0

        turns.run([lambda one=learner: job(one) for learner in self.learners])


def in_turns(calls: dict, repeats: int) -> dict[str, float]:
    """Medians of seconds, after one call of each."""
    seconds = {name: [] for name in calls}
    for i in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name] += [time.perf_counter() - started] * (i > 0)
    return {name: statistics.median(found) for name, found in seconds.items()}


def counted_ratio(shape: dict, n: int, cuda: bool) -> float:
    """A step's FLOPs for each of n, over those of one alone."""
    found = {
        name: flops for name, (flops, _) in counted(shape, *shape["saes"][0], cuda=cuda).items()
    }
    shared = found["clean pass"] + found["KL head"] / 3
    alone = sum(found.values())
    return (alone - shared + shared / n) / alone


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a finished run of a TopK SAE")
    parser.add_argument("--runs", type=int, default=5, help="how many go together")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="")
    parser.add_argument("--out", help="write a record there")
    a = parser.parse_args(argv)
    try:
        run = Finished(a.run, a.device)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    one, several = Sweep(run, 1), Sweep(run, a.runs)
    steps = in_turns({"alone": one.step, "together": several.step}, a.repeats)
    looks = in_turns({"alone": one.evaluate, "together": several.evaluate}, max(1, a.repeats // 2))
    shapes = {shape["name"]: (shape, kind == "cuda") for kind, shape in SHAPES.items()}
    found = {
        "runs": a.runs,
        "repeats": a.repeats,
        "step": {**steps, "ratio": steps["together"] / a.runs / steps["alone"]},
        "evaluation": {**looks, "ratio": looks["together"] / a.runs / looks["alone"]},
        "counted": {
            name: counted_ratio(shape, a.runs, cuda) for name, (shape, cuda) in shapes.items()
        },
        "device": machine.device_name(run.cfg.DEVICE),
        "commit": machine.git_commit(),
    }
    for name in ("step", "evaluation"):
        t = found[name]
        print(
            f"{name}: {t['alone']:.3f} s alone, {t['together'] / a.runs:.3f} s for each of "
            f"{a.runs} together ({t['ratio']:.2f})"
        )
    for name, ratio in found["counted"].items():
        print(f"counted, a step on {name}: {ratio:.2f}")
    if a.out:
        write_json(a.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
