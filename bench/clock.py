"""Seconds and memory of a call."""

import gc
import statistics
import time

import torch


class Clock:
    """Medians of seconds a call, after a warm-up; with CUDA events on a GPU."""

    def __init__(self, device: str, repeats: int):
        self.device, self.repeats = device, repeats
        self.cuda = torch.device(device).type == "cuda"

    def __call__(self, call, repeats: int = 0) -> float:
        for _ in range(3 if self.cuda else 1):
            call()
        timed = self._on_gpu if self.cuda else self._on_cpu
        return statistics.median(timed(call) for _ in range(repeats or self.repeats))

    def _on_gpu(self, call) -> float:
        """The GPU first waits, so that the host is ahead of it and its launches are not timed."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)  # clock cycles, about 0.6 ms
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def _on_cpu(self, call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


def fresh_memory(cuda: bool) -> None:
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def ceilings(shape: dict, clock: Clock) -> dict:
    """-> FLOP/s of a large bfloat16 product; bytes/s of a copy, read and written."""
    n = shape["product"]
    a, b = (torch.randn(n, n, device=clock.device).bfloat16() for _ in range(2))
    found = {"product": 2 * n**3 / clock(lambda: a @ b)}
    big = torch.empty(2**28 if clock.cuda else 2**26, device=clock.device)
    other = torch.empty_like(big)
    found["copy"] = 2 * big.nbytes / clock(lambda: other.copy_(big))
    return found
