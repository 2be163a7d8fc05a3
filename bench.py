"""How fast is a step, where does its time go, and against what?

    python bench.py                    Gemma-2-2B's shapes on CUDA, SmolLM2-135M's on a CPU
    python bench.py --quick            fewer sizes and repeats
    python bench.py --out records/bench-h100.json

Random weights of the exact shapes: nothing is downloaded. Everything is timed in this process, and
beside the loop as it is usually written ("naive": two full passes, eager, bfloat16 softmax, an SAE
under autocast with a dense decode, AdamW, .item() a step), that loop with torch.compile and fused
AdamW, and, before any timing, both steps' gradients against float64. The JSON is written after each
section, so that an interrupted run leaves what it had.

"predicted" is counted, not fitted: the FLOPs of the products at PRODUCT_SHARE of the measured
ceiling plus the bytes that must move at the measured bandwidth. A step's time is the mean over as
many as share a clean pass.
"""

import argparse
import copy
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import transformers

import checkpoint
import finetune
import language_model
import machine
import ops
import report
import run
import sae as saes
from learner import SAELearner
from splice import Splice, compile_blocks, put, restore_blocks

HALF = "klsplice, bfloat16 logits"
BATCHES = 4  # over which errors are averaged
PRODUCT_SHARE = 0.75  # of the measured ceiling, for products of a step's shapes
SHAPES = {
    "cuda": {
        "name": "Gemma-2-2B",
        "config": lambda: transformers.Gemma2Config(),
        "layer": 12,
        "batch": 2,
        "context": 1024,
        "clean_batch": 8,
        "saes": [(65_536, 80), (16_384, 80), (65_536, 20), (65_536, 320), (65_536, 640)],
        "quick": [(65_536, 80), (16_384, 80)],
        "product": 8192,
    },
    "cpu": {
        "name": "SmolLM2-135M",
        "config": lambda: transformers.LlamaConfig(
            vocab_size=49_152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
            rope_theta=100_000.0,
        ),
        "layer": 15,
        "batch": 4,
        "context": 256,
        "clean_batch": 4,
        "saes": [(4096, 32)],
        "quick": [(4096, 32)],
        "product": 2048,
    },
}


# ---- what is timed ---------------------------------------------------------------------------


def build_lm(shape: dict, device: str):
    """A random LM whose logits spread by about 3, so that a softcap and the KL have work."""
    transformers.AttentionInterface.register(language_model.ATTENTION, ops.attention)
    torch.manual_seed(0)
    with torch.device(device):
        lm = transformers.AutoModelForCausalLM.from_config(
            shape["config"](), dtype=torch.bfloat16, attn_implementation=language_model.ATTENTION
        )
    lm = lm.to(device).eval().requires_grad_(False)
    W_VD = lm.get_output_embeddings().weight
    with torch.no_grad():
        W_VD.normal_(0, 3 / W_VD.shape[1] ** 0.5)
    return lm


def build_sae(d_in: int, d_sae: int, k: int, device: str) -> saes.TopK:
    """Unit rows; log-normal biases make some latents fire for most tokens and most for few."""
    generator = torch.Generator().manual_seed(0)
    mean_D = 0.1 * torch.randn(d_in, generator=generator)
    weights = saes.fresh_weights(d_in=d_in, d_sae=d_sae, mean_D=mean_D, generator=generator)
    weights["b_enc_F"] = torch.randn(d_sae, generator=generator).exp() * 0.5
    return saes.TopK(weights, k=k).to(device)


class RandomTokens:
    """What finetune.py asks of data.Tokens."""

    def __init__(self, shape: dict, vocabulary: int):
        self.batch_size = self.share = shape["batch"]
        self.context, self.vocabulary = shape["context"], vocabulary

    def batch(self, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        size = (self.batch_size, self.context)
        return torch.randint(self.vocabulary, size, generator=generator)

    def first(self, step: int) -> int:
        return step * self.batch_size

    def active(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        return torch.arange(tokens_BL.numel())


class Ours:
    """One step of finetune.py, with run.py's constants."""

    def __init__(self, lm, shape: dict, device: str, sae, *, compiled: bool, **changes):
        c = {name: value for name, value in vars(run).items() if name.isupper()}
        c |= {"DEVICE": device, "BATCH": shape["batch"], "MICRO_BATCH": shape["batch"]}
        c |= {"CLEAN_BATCH": shape["clean_batch"]} | changes
        self.c = SimpleNamespace(**c)
        speed = {"compiled": compiled, "checkpointed": self.c.LOW_MEMORY}
        splice = Splice(lm, shape["layer"], head_chunk=self.c.HEAD_CHUNK, **speed)
        self.tokens = RandomTokens(shape, len(splice.head.W_VD))
        self.learner = SAELearner(self.c, sae, splice)
        keep = {"weight_decay": self.c.WEIGHT_DECAY, "clip": self.c.CLIP}
        self.optimizer = finetune.Optimizer(self.learner, **keep)
        self.feed = finetune.feed_of(self.c, self.learner, self.tokens)
        self.step_no, self.period = 0, max(1, self.c.CLEAN_BATCH // self.c.BATCH)

    def close(self) -> None:
        self.learner.splice.close()

    def kl_at(self, y_BLD, step: int):
        """The KL with y_BLD in the residual's place, of the step's only micro-batch."""
        return self.feed(step)[0].kl_N(y_BLD.flatten(0, 1)).mean()

    def gradients(self) -> dict:
        self.step_no += 1
        return finetune.through_sae(
            self.learner, self.feed(self.step_no), finetune.LOSSES[self.c.LOSS]
        )

    def step(self) -> dict:
        found = self.gradients()
        self.optimizer.step(self.c.LR)
        self.learner.model.after_step(found["l0"], found["fired_F"], found["tokens"])
        return found


class Naive:
    """The loop as it is usually written; compiled: its blocks, SAE and KL through torch.compile."""

    period = 1  # steps that share a clean pass

    def __init__(self, lm, shape: dict, device: str, sae, *, compiled: bool = False):
        self.lm, self.sae, self.device = lm, sae, device
        self.tokens = RandomTokens(shape, lm.config.vocab_size)
        self.blocks = lm.get_decoder().layers
        self.hook = self.blocks[shape["layer"]].register_forward_hook(self.on_residual)
        if compiled:
            self.kl, self.reconstruct = torch.compile(self.kl), torch.compile(self.reconstruct)
            compile_blocks(self.blocks)
        self.adamw = torch.optim.AdamW(sae.parameters(), lr=run.LR, fused=compiled or None)
        self.step_no, self.y_BLD = 0, None

    def close(self) -> None:
        self.hook.remove()
        restore_blocks(self.blocks)

    def on_residual(self, module, args, output):
        whole = torch.is_tensor(output)
        if self.y_BLD is None:
            self.x_BLD = output if whole else output[0]
            return None
        return self.y_BLD if whole else (self.y_BLD, *output[1:])

    def reconstruct(self, x_BLD):
        sae = self.sae
        pre_BLF = F.relu(F.linear(x_BLD - sae.b_dec_D, sae.W_enc_FD, sae.b_enc_F))
        value, index = pre_BLF.topk(sae.k, dim=-1)
        return torch.zeros_like(pre_BLF).scatter(-1, index, value) @ sae.W_dec_FD + sae.b_dec_D

    def kl(self, clean_BLV, spliced_BLV):
        log_q, log_p = F.log_softmax(spliced_BLV, -1), F.log_softmax(clean_BLV, -1)
        return F.kl_div(log_q, log_p, log_target=True, reduction="sum") / log_q[..., 0].numel()

    @torch.no_grad()
    def clean(self, tokens_BL):
        """-> logits; the residual is kept."""
        self.y_BLD = None
        return self.lm(tokens_BL).logits

    def kl_at(self, y_BLD, clean_BLV, tokens_BL):
        """The KL with y_BLD in the residual's place."""
        self.y_BLD = y_BLD
        return self.kl(clean_BLV, self.lm(tokens_BL).logits)

    def loss(self, tokens_BL, *, autocast: bool = True):
        clean_BLV = self.clean(tokens_BL)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=autocast):
            y_BLD = self.reconstruct(self.x_BLD)
        mse = (y_BLD - self.x_BLD.to(y_BLD.dtype)).square().mean()
        kl = self.kl_at(y_BLD.to(self.x_BLD.dtype), clean_BLV, tokens_BL)
        alpha = (mse / kl.clamp(min=1e-8)).detach()
        return 0.5 * (mse + alpha * kl), mse, kl

    def step(self) -> dict:
        self.step_no += 1
        loss, mse, kl = self.loss(self.tokens.batch(self.step_no).to(self.device))
        self.adamw.zero_grad()
        loss.backward()
        with torch.no_grad():
            W_FD = self.sae.W_dec_FD
            W_FD.grad -= (W_FD.grad * W_FD).sum(1, keepdim=True) * W_FD
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), run.CLIP)
        self.adamw.step()
        with torch.no_grad():
            W_FD /= W_FD.norm(dim=1, keepdim=True)
        return {"mse": mse.item(), "kl": kl.item()}


# ---- how it is timed -------------------------------------------------------------------------


class Clock:
    """Medians of seconds a call, after a warm-up; with CUDA events on a GPU."""

    def __init__(self, device: str, repeats: int):
        self.cuda, self.repeats = torch.device(device).type == "cuda", repeats

    def __call__(self, call, repeats: int = 0) -> float:
        for _ in range(3 if self.cuda else 1):
            call()
        times = []
        for _ in range(repeats or self.repeats):
            if self.cuda:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / 1000)
            else:
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
        return statistics.median(times)


def ceilings(device: str, shape: dict, clock: Clock) -> dict:
    """-> FLOP/s of bfloat16 products, a large one and the step's; bytes/s of a copy."""
    n = shape["product"]
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    found = {"product": 2 * n**3 / clock(lambda: a @ b)}
    big = torch.empty(2**28 if clock.cuda else 2**26, device=device)
    other = torch.empty_like(big)
    found["copy"] = 2 * big.nbytes / clock(lambda: other.copy_(big))
    config = shape["config"]()
    n_tokens, width = shape["batch"] * shape["context"], config.hidden_size
    x_ND = torch.randn(n_tokens, width, device=device).bfloat16()
    for name, rows in (("mlp", config.intermediate_size), ("head", config.vocab_size)):
        W = torch.randn(rows, width, device=device).bfloat16()
        found[f"product of the {name}"] = (
            2 * n_tokens * width * rows / clock(lambda W=W: x_ND @ W.T)
        )
    return found


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
    if ops.sparse_pays(cuda, k, d_sae):
        # one dense product, whose result is read once; k rows a token four times: to decode, for
        # the gradient of z and for those of both matrices, which are written whole
        gathered, written = 4 * tokens * k * d, 2 * d_sae * d
        learner = sae + 2 * gathered, 4.0 * (tokens * d_sae + gathered + written)
    return {
        "clean pass": (config.num_hidden_layers * block, 0.0),
        "spliced pass and its backward": (2 * above * block, 0.0),
        "KL head": (3 * head, 0.0),
        "SAE and its backward": learner,
        # weights and moments read and written, gradients read, in float32
        "optimizer": (0.0, 7 * 4.0 * 2 * d_sae * d),
    }


def stages(ours: Ours, clock: Clock) -> dict:
    """Seconds of each stage of a step, one by one."""
    learner, splice, shape = ours.learner, ours.learner.splice, ours.c
    many = torch.cat(
        [ours.tokens.batch(s) for s in range(max(1, shape.CLEAN_BATCH // shape.BATCH))]
    )
    many = many.to(learner.device)
    found = {"clean pass": clock(lambda: learner.clean(many)) * shape.BATCH / len(many)}
    seen = learner.clean(many)
    x_BLD, h_BLD = seen.x_BLD[: shape.BATCH], seen.h_BLD[: shape.BATCH]
    y_BLD = x_BLD.clone().requires_grad_()
    g_BLD = torch.randn_like(h_BLD)
    found["spliced pass and its backward"] = clock(
        lambda: torch.autograd.grad(splice.resume(y_BLD, seen.calls), y_BLD, g_BLD)
    )
    h_ND = h_BLD.flatten(0, 1)
    other_ND = (h_ND + 0.1 * torch.randn_like(h_ND)).requires_grad_()
    dtype = getattr(torch, shape.LOGITS)
    found["KL head"] = clock(
        lambda: torch.autograd.grad(ops.kl_head(h_ND, other_ND, splice.head, dtype).sum(), other_ND)
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
    scalars = {n: v for n, v in ours.step().items() if n not in ("fired_F", "tokens")}

    def check():
        optimizer.check(0, {name: float(value) for name, value in scalars.items()})

    with tempfile.TemporaryDirectory() as folder:
        about = {"step": 1, "seconds": 0.0, "run": ""}
        save = clock(lambda: checkpoint.save(folder, learner, optimizer, **about), 3)
    every = max(1.0, 60 * ours.c.SAVE_EVERY / step_seconds)
    return {
        "finite check and logging": clock(check) / ours.c.LOG_EVERY,
        "checkpoint": save / every,
        "a checkpoint, whole": save,
    }


# ---- is it right? ----------------------------------------------------------------------------


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
    """Relative errors against float64, means over batches: ours, HALF's and the naive loop's.

    "dKL/dy" is the gradient at one and the same reconstruction, which is what the loops make
    differently. A whole step's gradients have also what bfloat16 does to an SAE: ties decide which
    latents win.
    """
    small = shape | {"batch": 1, "context": min(256, shape["context"]), "clean_batch": 1}
    d_in, (d_sae, k) = lm.config.hidden_size, shape["saes"][-1] if device == "cpu" else (16_384, 80)
    make = lambda: build_sae(d_in, d_sae, k, device)  # noqa: E731
    tokens = RandomTokens(small, lm.config.vocab_size)
    batches = [tokens.batch(1 + i).to(device) for i in range(BATCHES)]
    exact, found = exact_steps(lm, small, make(), batches), {}

    def note(name: str, i: int, step: dict) -> None:
        for n, t in step.items():
            error = (t.detach().float() - exact[i][n]).norm() / exact[i][n].norm()
            found.setdefault(f"{name} {n}", []).append(error.item())

    for name, changes in (("ours", {}), (HALF, {"LOGITS": "bfloat16"})):
        ours = Ours(lm, small, device, make(), compiled=False, **changes)
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
    make = lambda: build_sae(lm.config.hidden_size, *sae, device)  # noqa: E731
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


@torch.no_grad()
def noise_floor(ours: Ours) -> float:
    """KL in nats of a splice of the residual itself: not quite 0 where clean passes are batched."""
    part = ours.feed(1)[0]
    x_BLD = put(part.seen.x_BLD, part.x_ND, part.active_N)
    h_BLD = ours.learner.splice.resume(x_BLD, part.seen.calls)
    return float(part.kl_of_h(h_BLD).mean())


# ---- the report ------------------------------------------------------------------------------


class Record:
    """What was found, written after each section."""

    def __init__(self, path: str, about: dict):
        self.path, self.found = path, about

    def add(self, name: str, value) -> None:
        self.found[name] = value
        if self.path:
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            checkpoint.write_json(self.path, self.found)
        print(f"{name}: {json.dumps(value)}", flush=True)


def fresh_memory(cuda: bool) -> None:
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def whole(make, clock: Clock, shape: dict) -> dict:
    """Seconds a step, tokens a second, GB at the peak, of a loop that `make` builds."""
    fresh_memory(clock.cuda)
    loop = make()
    seconds = clock(lambda: [loop.step() for _ in range(loop.period)]) / loop.period
    loop.close()
    tokens = shape["batch"] * shape["context"]
    out = {"seconds": seconds, "tokens_per_second": tokens / seconds}
    out["minutes_per_25M"] = 25e6 / out["tokens_per_second"] / 60
    if clock.cuda:
        out["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return out


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    parser.add_argument("--out", default="", help="a JSON file, written after each section")
    a = parser.parse_args(argv)
    cuda = torch.device(a.device).type == "cuda"
    if cuda:  # events and memory are those of the current device
        torch.cuda.set_device(torch.device(a.device).index or 0)
    shape = SHAPES["cuda" if cuda else "cpu"]
    repeats = (10 if a.quick else 20) if cuda else (3 if a.quick else 7)
    clock = Clock(a.device, repeats)
    about = {
        "kind": "bench",
        "model": f"random weights of the shapes of {shape['name']}",
        "device": machine.device_name(a.device),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "commit": machine.git_commit(),
        "tokens_a_step": shape["batch"] * shape["context"],
        "repeats": repeats,
    }
    record = Record(a.out, about)
    record.add("ceilings", ceilings(a.device, shape, clock))
    lm = build_lm(shape, a.device)
    width = lm.config.hidden_size

    errors = correctness(lm, shape, a.device)
    record.add("errors", errors)
    if worse := farther(errors):
        print(f"farther from float64 than the naive loop: {', '.join(worse)}", file=sys.stderr)
        return 1

    def naive(d_sae: int, k: int, **options) -> Naive:
        return Naive(lm, shape, a.device, build_sae(width, d_sae, k, a.device), **options)

    def ours(d_sae: int, k: int, compiled: bool = cuda, **changes) -> Ours:
        sae = build_sae(width, d_sae, k, a.device)
        return Ours(lm, shape, a.device, sae, compiled=compiled, **changes)

    steps = {}
    for d_sae, k in shape["quick" if a.quick else "saes"]:
        loops, detailed = {"naive": partial(naive, d_sae, k)}, (d_sae, k) in shape["quick"]
        if detailed and cuda:
            loops["naive, compiled"] = partial(naive, d_sae, k, compiled=True)
        loops["klsplice"] = partial(ours, d_sae, k)
        if detailed:
            loops[HALF] = partial(ours, d_sae, k, LOGITS="bfloat16")
        if detailed and cuda:
            low = {"LOW_MEMORY": True, "HEAD_CHUNK": 256, "MICRO_BATCH": 1, "CLEAN_BATCH": 1}
            loops["klsplice, LOW_MEMORY"] = partial(ours, d_sae, k, compiled=False, **low)
        size = f"{d_sae // 1024}k, k {k}"
        steps[size] = {}
        for name, build in loops.items():
            steps[size][name] = whole(build, clock, shape)
            record.add("steps", steps)

    d_sae, k = shape["saes"][0]
    fresh_memory(cuda)
    loop = ours(d_sae, k)
    measured = stages(loop, clock)
    ceiling, bandwidth = record.found["ceilings"]["product"], record.found["ceilings"]["copy"]
    found = {}
    for name, (flops, size) in counted(shape, d_sae, k, cuda=cuda).items():
        seconds = measured[name]
        predicted = flops / (PRODUCT_SHARE * ceiling) + size / bandwidth
        found[name] = {"seconds": seconds, "predicted": predicted}
        if flops:
            found[name]["share"] = flops / seconds / ceiling
    record.add("stages", found)
    record.add("noise floor, nats", noise_floor(loop))
    size = f"{d_sae // 1024}k, k {k}"
    record.add("upkeep", upkeep(loop, clock, steps[size]["klsplice"]["seconds"]))
    loop.close()
    if not a.quick:
        few = shape if cuda else shape | {"batch": 1, "clean_batch": 1}
        record.add("30 steps differ by", curves(lm, few, a.device, (d_sae, k), compiled=cuda))
    print(report.bench(record.found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
