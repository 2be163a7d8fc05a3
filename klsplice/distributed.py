"""Data parallelism: processes that torchrun started, on several GPUs or several machines.

Each process holds the whole model and works on its part of a step's sequences. The sums of a step
are reduced over all processes, so that all of them take the same step; only the main process (rank
0) writes files. In a single process every function here does nothing, and torch.distributed is not
imported.

On CPUs with AVX2 alone MKL rounds by where a matrix lies in memory: for the very results of one
process, to the last bit, set MKL_CBWR=AUTO,STRICT in the environment.
"""

import functools
import os
import sys
from contextlib import contextmanager
from datetime import timedelta

from klsplice.errors import Stopped, UserError, first_line

WAIT = timedelta(hours=12)  # the others wait while the main process tokenises
LAUNCH = ("RANK", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")  # beside WORLD_SIZE
_in_main = False  # inside a function that only the main process runs


def size() -> int:
    """How many processes there are. Raises UserError where WORLD_SIZE stands alone, as a cluster or
    a notebook may leave it."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        numbers = [world, *(os.environ.get(name, "") for name in LAUNCH[:3])]
        plain = all(number.isdecimal() for number in numbers) and int(world) > 0
        if not plain or not os.environ.get("MASTER_ADDR"):
            what = f"the environment has WORLD_SIZE={world}, and not all of {', '.join(LAUNCH)}"
            raise UserError(what, "start with torchrun, or unset WORLD_SIZE")
    return int(world)


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def start() -> None:
    """Join the other processes, each on a GPU of its own if there is one. Only the main one prints.

    CPU tensors go through gloo, so that exchanging a number does not wait for the GPU.
    """
    if size() == 1:
        return
    if rank() > 0:  # before torch, which imports tqdm, which reads this once
        sys.stdout, os.environ["TQDM_DISABLE"] = open(os.devnull, "w"), "1"
    import torch
    import torch.distributed as dist

    local = int(os.environ["LOCAL_RANK"])
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)  # what DEVICE = cuda means
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=WAIT)
    except RuntimeError as e:
        what = f"the processes do not find each other: {first_line(e)}"
        hint = f"is MASTER_PORT = {os.environ['MASTER_PORT']} another program's? set another number"
        raise UserError(what, hint) from e


def stop() -> None:
    """Leave the group, after a run that went well."""
    if size() > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


def check_device(device) -> None:
    """Raise UserError unless each process can have a `device` (torch.device) of its own."""
    if size() > 1 and device.type == "cuda":
        import torch

        gpus, number = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"]) + 1
        here = int(os.environ.get("LOCAL_WORLD_SIZE", number))  # srun does not say it
        if device.index is not None or here > gpus:
            what = f"DEVICE = {str(device)!r} for {here} processes on a machine with {gpus} GPUs"
            hint = "set DEVICE=cuda and --nproc_per_node to the number of GPUs at most"
            raise UserError(what, hint)


def all_reduce(*tensors) -> None:
    """Sum each tensor over the processes, in place.

    On CPUs they are added in order of rank, which is the order in which a single process adds its
    micro-batches; on GPUs in NCCL's order.
    """
    if size() == 1:
        return
    import torch.distributed as dist

    for t in tensors:
        if t.is_cuda:
            with _naming_lost_processes():
                dist.all_reduce(t)
            continue
        total, *others = _all(t)
        for part in others:
            total += part
        t.copy_(total)


def sum_of(n: int) -> int:
    """The sum of n over the processes."""
    if size() == 1:
        return n
    import torch

    all_reduce(n := torch.tensor(n))
    return int(n)


def largest(*numbers: int) -> tuple[int, ...]:
    """The largest of each number over the processes: whether any of them wants something."""
    if size() == 1:
        return numbers
    import torch

    return tuple(max(column) for column in zip(*(t.tolist() for t in _all(torch.tensor(numbers)))))


def all_gather(t):
    """t of shape (M, ...), equal in all processes -> (processes x M, ...), in their order."""
    if size() == 1:
        return t
    import torch

    return torch.cat(_all(t))


def broadcast(tensors) -> None:
    """Give every process the main one's tensors, in place."""
    if size() == 1:
        return
    import torch.distributed as dist

    with _naming_lost_processes():
        for t in tensors:
            dist.broadcast(t, 0)


def main_process_only(f):
    """Run f in the main process only; all processes get its result, or end as it ended."""

    @functools.wraps(f)
    def wrapped(*args, **options):
        return _from_main(lambda: f(*args, **options))

    return wrapped


def main_process_first(f):
    """Run f in the main process, then in the others: one download, one message if it fails."""

    @functools.wraps(f)
    def wrapped(*args, **options):
        mine = []
        _from_main(lambda: mine.append(f(*args, **options)))
        return mine[0] if mine else f(*args, **options)

    return wrapped


def _from_main(make):
    global _in_main
    if size() == 1 or _in_main:
        return make()
    import torch.distributed as dist

    result = error = None
    if rank() == 0:
        _in_main = True
        try:
            result = make()
        except (UserError, Stopped) as e:
            error = e
        finally:
            _in_main = False
    box = [result, error and error.code]
    with _naming_lost_processes():
        dist.broadcast_object_list(box, 0)
    result, code = box
    if code is not None:
        raise error or SystemExit(code)
    return result


def _all(t) -> list:
    """The t of every process, in order of rank."""
    import torch
    import torch.distributed as dist

    parts = [torch.empty_like(t) for _ in range(size())]
    with _naming_lost_processes():
        dist.all_gather(parts, t)
    return parts


@contextmanager
def _naming_lost_processes():
    try:
        yield
    except RuntimeError as e:
        what = f"another process of this run is gone ({first_line(e, 120)})"
        raise UserError(what, "its own message says why; run the same command again", code=1) from e
