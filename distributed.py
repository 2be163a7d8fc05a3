"""Several processes that torchrun started, as one: on several GPUs, or several machines.

Each holds the whole model and works on its part of a step's sequences. What a step adds up is added
up over the processes, so all of them take the same step; the first one alone writes. In one process
every function here does nothing, and torch.distributed is not imported.
"""

import functools
import os
import sys
from contextlib import contextmanager
from datetime import timedelta

from errors import Stopped, UserError, first_line

WAIT = timedelta(hours=12)  # the others wait while the first one tokenises
_in_first = False  # within a function that the first process runs on its own


def size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which one this is, from 0."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def start() -> None:
    """Meet the other processes, on a GPU of one's own if there is one; all but the first are mute.

    CPU tensors go through gloo, so that a number is exchanged without waiting for the GPU.
    """
    if size() == 1:
        return
    if rank() > 0:  # before torch, which imports tqdm, which reads this once
        sys.stdout, os.environ["TQDM_DISABLE"] = open(os.devnull, "w"), "1"
    import torch
    import torch.distributed as dist

    local = int(os.environ["LOCAL_RANK"])
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    with _or_say_who_left():
        cuda = torch.cuda.is_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=WAIT)


def stop() -> None:
    """Part from the others, after a run that went well."""
    if size() > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


def check_device(device) -> None:
    """Raise UserError unless each process can have a `device` (torch.device) of its own."""
    if size() == 1 or device.type != "cuda":
        return
    import torch

    here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if device.index is not None or here > gpus:
        what = f"DEVICE = {str(device)!r} for {here} processes on a machine with {gpus} GPUs"
        raise UserError(what, "set DEVICE=cuda and --nproc_per_node to the number of GPUs at most")


def add_up(*tensors) -> None:
    """Sum each tensor over the processes, in place.

    On CPUs in the order of the processes, which is that in which one process would have added; on
    GPUs in NCCL's.
    """
    if size() == 1:
        return
    import torch.distributed as dist

    for t in tensors:
        if t.is_cuda:
            with _or_say_who_left():
                dist.all_reduce(t)
        else:
            first, *others = _all(t)
            t.copy_(functools.reduce(lambda total, part: total.add_(part), others, first))


def total(n: int) -> int:
    """The sum of n over the processes."""
    if size() == 1:
        return n
    import torch

    add_up(n := torch.tensor(n))
    return int(n)


def largest(*numbers: int) -> tuple[int, ...]:
    """The largest of each over the processes: whether any of them wants something."""
    if size() == 1:
        return numbers
    import torch

    return tuple(max(column) for column in zip(*(t.tolist() for t in _all(torch.tensor(numbers)))))


def gathered(t):
    """t of shape (M, ...), equal in all processes -> (processes x M, ...), in their order."""
    if size() == 1:
        return t
    import torch

    return torch.cat(_all(t))


def each_its_share(parts, work, room) -> list:
    """[work(part) for part in parts], the work shared out, the results in all processes.

    room: part -> a tensor of the shape, type and device of work(part).
    """
    found = {i: work(part) for i, part in enumerate(parts) if i % size() == rank()}
    if size() == 1:
        return list(found.values())
    import torch
    import torch.distributed as dist

    results = [found[i] if i in found else room(part) for i, part in enumerate(parts)]
    with _or_say_who_left():
        for i, t in enumerate(results):
            dist.broadcast(t.view(torch.uint8), i % size())  # gloo does not know every type
    return results


def copy_from_first(tensors) -> None:
    """Every process's tensors become those of the first."""
    if size() == 1:
        return
    import torch.distributed as dist

    with _or_say_who_left():
        for t in tensors:
            dist.broadcast(t, 0)


def alone(f):
    """f is run by the first process alone; its result, or its end, is that of all."""

    @functools.wraps(f)
    def wrapped(*args, **options):
        return _of_first(lambda: f(*args, **options))

    return wrapped


def in_turn(f):
    """f is run by the first process, then by the others: one download, one message if it fails."""

    @functools.wraps(f)
    def wrapped(*args, **options):
        mine = []
        _of_first(lambda: mine.append(f(*args, **options)))
        return mine[0] if mine else f(*args, **options)

    return wrapped


def _of_first(make):
    global _in_first
    if size() == 1 or _in_first:
        return make()
    import torch.distributed as dist

    result = error = None
    if rank() == 0:
        _in_first = True
        try:
            result = make()
        except (UserError, Stopped) as e:
            error = e
        finally:
            _in_first = False
    box = [result, error and error.code]
    with _or_say_who_left():
        dist.broadcast_object_list(box, 0)
    if error is not None:
        raise error
    if box[1] is not None:
        sys.exit(box[1])
    return box[0]


def _all(t) -> list:
    """t of every process, in their order."""
    import torch
    import torch.distributed as dist

    parts = [torch.empty_like(t) for _ in range(size())]
    with _or_say_who_left():
        dist.all_gather(parts, t)
    return parts


@contextmanager
def _or_say_who_left():
    try:
        yield
    except RuntimeError as e:
        what = f"another process of this run is gone ({first_line(e, 120)})"
        raise UserError(what, "its own message says why; run the same command again", code=1) from e
