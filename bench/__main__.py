"""How fast is a step, where does its time go, and against what?

    python -m bench                       Gemma-2-2B's shapes on CUDA, SmolLM2-135M's on a CPU
    python -m bench --quick               fewer sizes and repeats
    python -m bench --run runs/demo-sae   that finished run's LM, text and TopK SAE
    python -m bench --out records/bench-h100.json

Without --run weights and tokens are random: nothing is downloaded. Everything is timed in this
process, and beside the loop as it is usually written ("naive": two full passes, eager, bfloat16
softmax, an SAE under autocast with a dense decode, AdamW, .item() a step), that loop with
torch.compile and fused AdamW. Both steps' gradients are held against float64 first; where ours are
the farther, the exit code is 1. The JSON is written after each section, so that an interrupted run
leaves what it had. `python -m bench.parts` has every kernel and product by itself.

"predicted" is counted, not fitted: the FLOPs of the products at PRODUCT_SHARE of the measured
ceiling plus the bytes that must move at the measured bandwidth. A step's time is the mean over as
many as share a clean pass.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from functools import partial

import torch
import transformers

from bench import exact, loops
from bench.clock import Clock, ceilings, fresh_memory
from bench.loops import Naive, Ours, Several
from klsplice import machine
from klsplice.errors import UserError
from klsplice.kernels.topk import sparse_pays
from klsplice.lm.head import kl_head
from klsplice.lm.splice import next_tokens
from klsplice.storage import write_json
from klsplice.tracking import checkpoint
from report import pages

TOGETHER = 5  # SAEs in the paper's loop
PRODUCT_SHARE = 0.75  # of the measured ceiling, for products of a step's shapes


def counted(shape: dict, d_sae: int, k: int, *, cuda: bool) -> dict[str, tuple[float, float]]:
    """FLOPs of products, and further bytes, of a step's stages, from the shapes."""
    config = shape["config"]()
    d, tokens = config.hidden_size, shape["batch"] * shape["context"]
    head_dim = getattr(config, "head_dim", None) or d // config.num_attention_heads
    heads, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    block = 2 * tokens * (2 * d * heads + 2 * d * kv + 3 * d * config.intermediate_size)
    block += 2 * 2 * tokens * shape["context"] * heads  # scores and their use
    above = config.num_hidden_layers - shape["layer"] - 1
    head, sae = 2 * tokens * d * config.vocab_size, 2 * tokens * d * d_sae
    learner = 6 * sae, 0.0
    if sparse_pays(cuda, k, d_sae):
        # one dense product, whose result is read once; k rows a token four times: to decode, for
        # the gradient of z and for those of both matrices, which are written whole
        gathered, written = 4 * tokens * k * d, 2 * d_sae * d
        learner = sae + 2 * gathered, 4.0 * (tokens * d_sae + gathered + written)
    return {
        "clean pass": (config.num_hidden_layers * block, 0.0),
        "spliced pass and its backward": (2 * above * block, 0.0),
        # 16-bit logits read, on a GPU twice, and the gradient written
        "KL head": (3 * head, (5 if cuda else 3) * 2.0 * tokens * config.vocab_size),
        "SAE and its backward": learner,
        # weights and moments read and written, gradients read, in float32
        "optimizer": (0.0, 7 * 4.0 * 2 * d_sae * d),
    }


def stages(ours: Ours, clock: Clock) -> dict:
    """Seconds of each stage of a step, one by one."""
    learner, splice, shape = ours.learner, ours.learner.splice, ours.cfg
    many = torch.cat(
        [ours.tokens.batch(s) for s in range(max(1, shape.CLEAN_BATCH // shape.BATCH))]
    )
    many = many.to(learner.device)
    found = {"clean pass": clock(lambda: learner.clean(many)) * shape.BATCH / len(many)}
    clean = learner.clean(many).part(slice(shape.BATCH))
    x_BLD, h_BLD = clean.x_BLD, clean.h_BLD
    y_BLD = x_BLD.clone().requires_grad_()
    g_BLD = torch.randn_like(h_BLD)

    def again():
        spliced = splice.spliced(clean.tokens_BL, y_BLD)
        torch.autograd.grad(spliced.h_BLD, y_BLD, g_BLD)

    found["spliced pass and its backward"] = clock(again)
    h_ND = h_BLD.flatten(0, 1)
    other_ND = (h_ND + 0.1 * torch.randn_like(h_ND)).requires_grad_()
    target_N = next_tokens(clean.tokens_BL).flatten()
    how = target_N, splice.head, getattr(torch, shape.LOGITS)
    found["KL head"] = clock(
        lambda: torch.autograd.grad(kl_head(h_ND, other_ND, *how).sum(), other_ND)
    )
    x_ND = x_BLD.flatten(0, 1)

    def sae():
        learner.model.zero_grad()
        y_ND, z_NF = learner.reconstruct(x_ND)
        learner.model.error(x_ND, y_ND.float(), z_NF).mean().backward()

    found["SAE and its backward"] = clock(sae)

    grads = [1e-4 * torch.randn_like(p) for p in learner.parameters()]

    def tail():
        for p, g in zip(learner.parameters(), grads):
            p.grad = g
        ours.optimizer.step(shape.LR)

    found["optimizer"] = clock(tail)
    return found


def upkeep(ours: Ours, clock: Clock, step_seconds: float) -> dict:
    """What reliability costs in seconds a step: finite checks, a checkpoint each SAVE_EVERY."""
    learner, optimizer = ours.learner, ours.optimizer
    scalars = ours.step()

    def check():
        optimizer.check(0, {name: float(value) for name, value in scalars.items()})

    with tempfile.TemporaryDirectory() as folder:
        about = {"step": 1, "seconds": 0.0, "run": ""}
        started = time.perf_counter()  # once: at 65k it writes 3.6 GB
        checkpoint.save(folder, learner, optimizer, **about)
        save = time.perf_counter() - started
    every = max(1.0, 60 * ours.cfg.SAVE_EVERY / step_seconds)
    return {
        "finite check and logging": clock(check) / ours.cfg.LOG_EVERY,
        "checkpoint": save / every,
        "a checkpoint, whole": save,
    }


class Record:
    """What was found, written after each section."""

    def __init__(self, path: str, about: dict):
        self.path, self.found = path, about

    def add(self, name: str, value) -> None:
        self.found[name] = value
        if self.path:
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            write_json(self.path, self.found)
        print(f"{name}: {json.dumps(value)}", flush=True)


def whole(builds: dict, clock: Clock, shape: dict, turns: int = 1) -> dict:
    """Seconds a step, tokens a second and GB at the peak of each loop that `builds` makes.

    turns: how often each is timed, one after the other; the median counts.
    """
    fresh_memory(clock.cuda)
    made = {name: build() for name, build in builds.items()}
    times = {name: [] for name in builds}
    for _ in range(turns):
        for name, loop in made.items():
            steps = range(loop.period)
            times[name].append(clock(lambda: [loop.step() for _ in steps]) / len(steps))  # noqa: B023
    found = {}
    for name, loop in made.items():
        loop.close()
        seconds = statistics.median(times[name]) / getattr(loop, "n", 1)
        speed = shape["batch"] * shape["context"] / seconds
        found[name] = {"seconds": seconds, "tokens_per_second": speed}
        found[name]["minutes_per_25M"] = 25e6 / speed / 60
        if clock.cuda:
            found[name]["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def whole_steps(record: Record, lm, shape: dict, clock: Clock, quick: bool) -> dict:
    """Times each loop on each size of SAE -> {size: {loop: what `whole` gives}}."""
    cuda, device, repeats = clock.cuda, clock.device, clock.repeats
    # a CPU's speed drifts, so its loops take turns; not on a GPU, where their memory is measured
    turns, turn = (1, clock) if cuda else (repeats, Clock(device, 3))

    def loop(kind, d_sae, k, **options):
        return kind(lm, shape, device, loops.build_sae(shape, d_sae, k, device), **options)

    steps = {}
    for d_sae, k in shape["quick" if quick else "saes"]:
        ours, detailed = partial(loop, Ours, d_sae, k), (d_sae, k) in shape["quick"]
        timed = {"naive": partial(loop, Naive, d_sae, k)}
        if detailed and cuda:
            timed["naive, compiled"] = partial(loop, Naive, d_sae, k, compiled=True)
        timed["klsplice"] = partial(ours, compiled=cuda)
        if detailed:
            timed[exact.WIDE] = partial(ours, compiled=cuda, LOGITS="float32")
        if detailed and cuda:
            low = {"LOW_MEMORY": True, "HEAD_CHUNK": 256, "MICRO_BATCH": 1, "CLEAN_BATCH": 1}
            timed["klsplice, LOW_MEMORY"] = partial(ours, compiled=False, **low)
            together = partial(loop, Several, d_sae, k, n=TOGETHER, compiled=True)
            timed[f"klsplice, each of {TOGETHER} together"] = together
        size = f"{d_sae // 1024}k, k {k}"
        steps[size] = {}
        for some in [{name: build} for name, build in timed.items()] if cuda else [timed]:
            steps[size] |= whole(some, turn, shape, turns)
            record.add("steps", steps)
    return steps


def single_stages(record: Record, loop: Ours, shape: dict, clock: Clock) -> None:
    """Times each stage of a step, beside what is counted."""
    ceiling, bandwidth = record.found["ceilings"]["product"], record.found["ceilings"]["copy"]
    measured, found = stages(loop, clock), {}
    for name, (flops, size) in counted(shape, *shape["saes"][0], cuda=clock.cuda).items():
        seconds = measured[name]
        predicted = flops / (PRODUCT_SHARE * ceiling) + size / bandwidth
        found[name] = {"seconds": seconds, "predicted": predicted}
        if flops:
            found[name]["share"] = flops / seconds / ceiling
    record.add("stages", found)


def main(argv: list[str]) -> int:
    """-> exit code: 1 where our gradients are farther from float64 than the naive loop's."""
    parser = argparse.ArgumentParser("python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    parser.add_argument("--run", default="", metavar="runs/NAME", help="its LM, text and SAE")
    parser.add_argument("--out", default="", help="a JSON file, written after each section")
    a = parser.parse_args(argv)
    cuda = torch.device(a.device).type == "cuda"
    if cuda:  # events and memory are those of the current device
        torch.cuda.set_device(torch.device(a.device).index or 0)
    try:
        shape = loops.of_run(a.run, a.device) if a.run else loops.SHAPES["cuda" if cuda else "cpu"]
    except UserError as e:
        print(e, file=sys.stderr)
        return e.code
    clock = Clock(a.device, (10 if a.quick else 20) if cuda else (3 if a.quick else 7))
    about = {
        "kind": "bench",
        "model": shape["name"] if a.run else f"random weights of the shapes of {shape['name']}",
        "device": machine.device_name(a.device),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "commit": machine.git_commit(),
        "tokens_a_step": shape["batch"] * shape["context"],
        "repeats": clock.repeats,
    }
    record = Record(a.out, about)
    record.add("ceilings", ceilings(shape, clock))
    lm = loops.build_lm(shape, a.device)
    errors = exact.correctness(lm, shape, a.device)
    record.add("errors", errors)
    steps = whole_steps(record, lm, shape, clock, a.quick)
    d_sae, k = shape["saes"][0]
    fresh_memory(cuda)
    sae = loops.build_sae(shape, d_sae, k, a.device)
    loop = Ours(lm, shape, a.device, sae, compiled=cuda)
    single_stages(record, loop, shape, clock)
    record.add("noise floor, nats", exact.noise_floor(loop))
    size = f"{d_sae // 1024}k, k {k}"
    record.add("upkeep", upkeep(loop, clock, steps[size]["klsplice"]["seconds"]))
    loop.close()
    if not a.quick:
        few = shape if cuda else shape | {"batch": 1, "clean_batch": 1}
        record.add("30 steps differ by", exact.curves(lm, few, a.device, (d_sae, k), compiled=cuda))
    print(pages.bench(record.found))
    if worse := exact.farther(errors):
        print(f"farther from float64 than the naive loop: {', '.join(worse)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
