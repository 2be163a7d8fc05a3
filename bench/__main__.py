"""How fast is a step, where does its time go, and against what?

    python -m bench                       Gemma-2-2B's shapes on CUDA, SmolLM2-135M's on a CPU
    python -m bench --quick               fewer sizes and repeats
    python -m bench --out records/bench-h100.json
    python -m bench --profile             the kernels of a step, by torch.profiler

Weights and tokens are random: nothing is downloaded. Everything is timed in this process, beside
the loop as it is usually written ("naive") and, on CUDA, that loop with torch.compile and fused
AdamW. Both steps' gradients are held against float64 first; where ours are the farther, the exit
code is 1.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from functools import partial

import pandas
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from bench import exact
from bench.loops import SHAPES, Naive, Ours, build_lm, build_sae
from klsplice import machine
from klsplice.lm.head import kl_head
from klsplice.lm.splice import next_tokens
from klsplice.storage import write_json

LOW_MEMORY = {"LOW_MEMORY": True, "HEAD_CHUNK": 256, "MICRO_BATCH": 1, "CLEAN_BATCH": 1}
# The naive loops come first: once ours has run, compiled blocks have the masks of flex attention.
LOOPS = {
    "cpu": {"naive": Naive, "klsplice": Ours},
    "cuda": {
        "naive": Naive,
        "naive, compiled": partial(Naive, compiled=True),
        "klsplice": partial(Ours, compiled=True),
        "klsplice, LOW_MEMORY": partial(Ours, **LOW_MEMORY),
    },
}


def medians(calls: dict, repeats: int) -> dict[str, float]:
    """Seconds of each call, after a warm-up. They take turns, since a CPU's speed drifts."""
    seconds = {name: [] for name in calls}
    for i in range(-1, repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= 0:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def some_steps(loop) -> None:
    for _ in range(steps_a_pass(loop.cfg)):
        loop.step()


def steps_a_pass(cfg) -> int:
    """How many steps share a clean pass; they are timed as one."""
    return max(1, cfg.CLEAN_BATCH // cfg.BATCH)


def whole_steps(lm, shape: dict, kind: str, sizes: list, repeats: int) -> dict:
    """-> {size of the SAE: {loop: seconds a step, tokens a second, GB at the peak on CUDA}}."""
    loops, steps = LOOPS[kind], {f"{d_sae // 1024}k, k {k}": {} for d_sae, k in sizes}
    # on CUDA a loop is alone, since its memory is measured
    groups = [loops] if kind == "cpu" else [{name: loop} for name, loop in loops.items()]
    for group in groups:
        for (d_sae, k), found in zip(sizes, steps.values()):
            gc.collect()
            if kind == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            built = {
                name: loop(lm, shape, build_sae(shape, d_sae, k, lm.device))
                for name, loop in group.items()
            }
            calls = {name: partial(some_steps, loop) for name, loop in built.items()}
            for name, seconds in medians(calls, repeats).items():
                seconds /= steps_a_pass(built[name].cfg)
                speed = tokens_a_step(shape) / seconds
                found[name] = {"seconds": seconds, "tokens_per_second": speed}
                found[name]["minutes_per_25M"] = 25e6 / speed / 60
                if kind == "cuda":
                    found[name]["peak_gb"] = machine.peak_memory_gb("cuda")
            del built, calls
    return steps


def tokens_a_step(shape: dict) -> int:
    return shape["constants"]["BATCH"] * shape["constants"]["CONTEXT"]


def stages(ours: Ours, repeats: int) -> dict:
    """-> {stage: its seconds in a step}, each by itself."""
    learner, splice, cfg = ours.learner, ours.splice, ours.cfg
    batches = [ours.tokens.batch(step) for step in range(steps_a_pass(cfg))]
    tokens_SL = torch.cat(batches).to(learner.device)
    clean = learner.splice.clean(tokens_SL).part(slice(cfg.BATCH))
    x_ND, h_ND = clean.x_BLD.flatten(0, 1), clean.h_BLD.flatten(0, 1)
    y_BLD, g_BLD = clean.x_BLD.clone().requires_grad_(), torch.randn_like(clean.h_BLD)
    other_ND = (h_ND + 0.1 * torch.randn_like(h_ND)).requires_grad_()
    target_N = next_tokens(clean.tokens_BL).flatten()
    grads = [1e-4 * torch.randn_like(p) for p in learner.parameters()]

    def spliced_pass():
        spliced = splice.spliced(clean.tokens_BL, y_BLD)
        torch.autograd.grad(spliced.h_BLD, y_BLD, g_BLD)

    def head():
        kl_N = kl_head(h_ND, other_ND, target_N, splice.head, ours.logits_dtype)
        torch.autograd.grad(kl_N.sum(), other_ND)

    def sae():
        learner.model.zero_grad()
        y_ND, z_NF = learner.reconstruct(x_ND)
        mse_N, _ = learner.losses(x_ND, y_ND.float(), z_NF)
        mse_N.mean().backward()

    def optimizer():
        for p, g in zip(learner.parameters(), grads):
            p.grad = g
        ours.optimizer.step(cfg.LR)

    calls = {
        "clean pass": lambda: learner.splice.clean(tokens_SL),
        "spliced pass and its backward": spliced_pass,
        "KL head": head,
        "SAE and its backward": sae,
        "optimizer": optimizer,
    }
    seconds = medians(calls, repeats)
    seconds["clean pass"] /= len(batches)
    return {name: {"seconds": s} for name, s in seconds.items()}


def kernels(ours: Ours, kind: str) -> str:
    """torch.profiler's table of the steps of one clean pass."""
    some_steps(ours)
    with profile(activities=[getattr(ProfilerActivity, kind.upper())]) as profiler:
        some_steps(ours)
        if kind == "cuda":
            torch.cuda.synchronize()
    total = {"cuda": "self_device_time_total", "cpu": "self_cpu_time_total"}[kind]
    return profiler.key_averages().table(sort_by=total, row_limit=60, max_name_column_width=90)


def table(record: dict) -> str:
    steps = {
        f"{size}: {name}": times | {"times naive": loops["naive"]["seconds"] / times["seconds"]}
        for size, loops in record["steps"].items()
        for name, times in loops.items()
    }
    errors = pandas.Series(record["errors"], name="relative error against float64").to_frame()
    tables = pandas.DataFrame(steps).T, pandas.DataFrame(record["stages"]).T, errors
    return "\n\n".join(frame.to_string(float_format="{:,.4g}".format) for frame in tables)


def main(argv: list[str]) -> int:
    """-> exit code: 1 where our gradients are farther from float64 than the naive loop's."""
    parser = argparse.ArgumentParser("python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="float32 on a CPU")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    parser.add_argument("--profile", action="store_true", help="only a step's kernels")
    parser.add_argument("--out", default="", help="a JSON file")
    a = parser.parse_args(argv)
    kind = torch.device(a.device).type
    if kind == "cuda":  # the peak of memory is that of the current device
        torch.cuda.set_device(torch.device(a.device).index or 0)
    dtype = a.dtype or {"cuda": "bfloat16", "cpu": "float32"}[kind]
    shape = SHAPES[kind]
    sizes = shape["saes"][:2] if a.quick else shape["saes"]
    record = {
        "kind": "bench",
        "model": f"random weights of the shapes of {shape['name']}",
        "device": machine.device_name(a.device),
        "dtype": dtype,
        "instructions": torch.backends.cpu.get_cpu_capability(),  # of the CPU
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "commit": machine.git_commit(),
        "tokens_a_step": tokens_a_step(shape),
        "repeats": (repeats := 3 if a.quick else 9),
    }
    lm = build_lm(shape, a.device, getattr(torch, dtype))
    ours = partial(LOOPS[kind]["klsplice"], lm, shape)
    if a.profile:
        print(kernels(ours(build_sae(shape, *sizes[0], a.device)), kind))
        return 0
    record["errors"] = exact.errors(lm, shape)
    record["steps"] = whole_steps(lm, shape, kind, sizes, repeats)
    record["stages"] = stages(ours(build_sae(shape, *sizes[0], a.device)), repeats)
    if a.out:
        os.makedirs(os.path.dirname(a.out) or ".", exist_ok=True)
        write_json(a.out, record)
    print(table(record))
    print(f"\n{record['device']}, {record['instructions']}, {dtype}; torch {torch.__version__}")
    print(f"{record['model']}, {record['tokens_a_step']:,} tokens a step; medians of {repeats}")
    if farther := exact.farther(record["errors"]):
        print(f"farther from float64 than the naive loop: {', '.join(farther)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
