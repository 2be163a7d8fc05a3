"""What does each part of a step cost, beside the least that it could, and is it right?

    python -m bench.parts                              Gemma-2-2B's shapes on CUDA, tiny on a CPU
    python -m bench.parts --only checks step
    python -m bench.parts --out records/parts-h100.json

checks: kernels against float64, at real sizes. attention: flex attention against plain, with its
options. times: kernels and products in variants. step: a whole step's waits of the host, memory and
kernels. Nothing stops at a failure; what failed is printed first and makes the exit code 1. A bound
is the larger of the bytes that must move at a copy's measured speed and the FLOPs at that of a
large product.
"""

import argparse
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from types import SimpleNamespace

import torch
import transformers

from bench import kernels, loops
from bench.clock import Clock, ceilings, fresh_memory
from klsplice import machine
from klsplice.storage import write_json

CUDA = torch.cuda.is_available()
REAL = {"n": 2048, "d": 2304, "f": 65_536, "k": 80, "v": 256_000, "mlp": 9216, "heads": 2048}
REAL |= {"many": 8192, "batch": 2, "length": 1024, "head": 256, "rows": 256}
TINY = {"n": 16, "d": 24, "f": 96, "k": 4, "v": 1008, "mlp": 40, "heads": 32}
TINY |= {"many": 32, "batch": 1, "length": 16, "head": 8, "rows": 4}


def _little():
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    return transformers.Gemma2Config(**sizes, **heads)


LITTLE = {"config": _little, "layer": 1, "batch": 2, "context": 16, "clean_batch": 4}
LITTLE |= {"saes": [(1024, 8)], "product": 64}


class Parts:
    """Runs parts one by one and keeps what was found: failures too."""

    def __init__(self, device: str, shape: dict, sizes: dict, repeats: int):
        self.device, self.shape, self.found = device, shape, {}
        self.size = SimpleNamespace(**sizes)
        self.clock = Clock(device, repeats)
        self.ceilings = ceilings(shape, self.clock)
        self.generator = torch.Generator(device).manual_seed(0)

    def draw(self, *shape: int, dtype=torch.float32, scale: float = 1.0) -> torch.Tensor:
        t = torch.randn(*shape, generator=self.generator, device=self.device)
        return (scale * t).to(dtype)

    def try_(self, name: str, make) -> None:
        """found[name] = make(), or what it raised."""
        try:
            self.found[name] = make()
        except Exception as e:
            traceback.print_exc(limit=-3)
            self.found[name] = {"failed": f"{type(e).__name__}: {str(e)[:300]}"}
        print(f"{name}: {self.found[name]}", flush=True)

    def right(self, name: str, most: float, pairs) -> None:
        """The largest relative error of pairs (found, wanted), which has to be at most `most`."""

        def check():
            error = max(_off(found, wanted) for found, wanted in pairs())
            return {"error": error} | ({} if error <= most else {"failed": f"over {most:g}"})

        self.try_(f"check: {name}", check)

    def time(self, name: str, call, *, moved: float = 0, flops: float = 0) -> None:
        """moved: bytes."""
        least = max(moved / self.ceilings["copy"], flops / self.ceilings["product"])
        self.try_(name, lambda: {"ms": 1000 * self.clock(call), "least": 1000 * least})

    def failed(self) -> list[str]:
        return [name for name, part in self.found.items() if "failed" in part]


def _off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    error = (found.double() - wanted.double()).norm() / wanted.double().norm()
    return error.item() if error.isfinite() else float("inf")


def step(parts: Parts) -> None:
    """Of our loop with the largest SAE: waits of the host, memory, time, and its kernels."""
    shape, device = parts.shape, parts.device
    lm, (d_sae, k) = loops.build_lm(shape, device), shape["saes"][0]
    sae = loops.build_sae(shape, d_sae, k, device)
    ours = loops.Ours(lm, shape, device, sae, compiled=CUDA)
    some = range(4 * ours.period)
    steps = lambda: [ours.step() for _ in some]  # noqa: E731
    parts.try_("step: the first ones, in s", lambda: {"s": _seconds(steps)})
    parts.try_("step: waits of the host", lambda: _waits(steps))
    fresh_memory(CUDA)
    parts.try_("step: all", lambda: {"ms": 1000 * parts.clock(steps, 5) / len(some)})
    gb = torch.cuda.max_memory_allocated() / 1e9 if CUDA else machine.peak_memory_gb(device)
    parts.try_("step: GB at the peak", lambda: {"gb": gb})
    parts.try_("step: of the host", lambda: {"ms": 1000 * _seconds(ours.step, wait=False)})
    parts.try_("step: kernels", lambda: {"ms a step": _kernels(steps, len(some))})
    ours.close()


def _seconds(call, *, wait: bool = True) -> float:
    """wait: for the GPU at the end."""
    if CUDA:
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if CUDA and wait:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _waits(call) -> dict:
    """How often the host waits for the GPU, and where in our code: it never should."""
    if not CUDA:
        call()
        return {"waits": 0}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    places = Counter(f"{os.path.basename(w.filename)}:{w.lineno}" for w in waits)
    return {"waits": len(waits)} | ({"failed": str(dict(places))} if waits else {})


def _kernels(call, steps: int) -> dict:
    """-> {kernel: ms a step}, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CUDA] if CUDA else [ProfilerActivity.CPU]
    with profile(activities=kinds) as profiler:
        call()
        if CUDA:
            torch.cuda.synchronize()
    total = "self_device_time_total" if CUDA else "self_cpu_time_total"
    found = {e.key[:90]: getattr(e, total) / 1000 / steps for e in profiler.key_averages()}
    longest = sorted(found, key=found.get, reverse=True)[:60]
    return {name: round(found[name], 4) for name in longest}


SECTIONS = {"checks": kernels.checks, "attention": kernels.attentions, "times": kernels.times}
SECTIONS |= {"step": step}


def table(parts: Parts) -> str:
    """What failed, then every time beside its bound."""
    lines = [f"FAILED {name}: {parts.found[name]['failed']}" for name in parts.failed()]
    lines += ["", "| part | ms | at least | share |", "| --- | ---: | ---: | ---: |"]
    for name, part in parts.found.items():
        if "ms" in part:
            least = part.get("least", 0)
            cells = f"{least:.3f} | {least / part['ms']:.0%}" if least else "- | -"
            lines.append(f"| {name} | {part['ms']:.3f} | {cells} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """-> exit code: 1 where a part failed."""
    parser = argparse.ArgumentParser("python -m bench.parts", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[*SECTIONS])
    parser.add_argument("--out", default="", help="a JSON file, written after each section")
    a = parser.parse_args(argv)
    device, sizes = ("cuda", REAL) if CUDA else ("cpu", TINY)
    parts = Parts(device, loops.SHAPES[device] if CUDA else LITTLE, sizes, 20 if CUDA else 1)
    record = {"kind": "parts", "device": machine.device_name(device), "ceilings": parts.ceilings}
    record |= {"versions": {"torch": torch.__version__}, "commit": machine.git_commit()}
    for name in a.only:
        seconds = _seconds(lambda name=name: parts.try_(name, lambda: SECTIONS[name](parts) or {}))
        parts.found[name] |= {"s": seconds}
        fresh_memory(CUDA)
        if a.out:
            write_json(a.out, record | {"parts": parts.found})
    print(table(parts))
    return 1 if parts.failed() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
