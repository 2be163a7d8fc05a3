"""Data parallelism: processes that torchrun started, on several GPUs or several machines.

Each process holds the whole model and works on its part of a step's sequences. The sums of a step
are reduced over all processes, so that all of them take the same step; only the main process (rank
0) writes files. In a single process every function here does nothing, and torch.distributed is not
imported.
"""

import functools
import os
import sys
from contextlib import contextmanager
from datetime import timedelta

from klsplice.errors import Stopped, UserError, first_line

WAIT = timedelta(hours=12)  # the others wait while the main process tokenises
MEET = timedelta(seconds=20)  # for the others to fail as this one did
_in_main = False  # inside a function that only the main process runs
_failed = None  # the group in which processes meet whose run failed


def size() -> int:
    """How many processes there are. Raises UserError where torchrun did not start them."""
    said = os.environ.get("WORLD_SIZE", "1")
    if said != "1":
        _check_launch(said)
    return int(said)


def _check_launch(said: str) -> None:
    """WORLD_SIZE alone, which a cluster or a notebook may leave, makes no processes."""
    numbers = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "MASTER_PORT")}
    found = {"WORLD_SIZE": said, **numbers, "MASTER_ADDR": os.environ.get("MASTER_ADDR")}
    plain = all((found[name] or "").isdecimal() for name in ("WORLD_SIZE", *numbers))
    if plain and int(said) > 0 and found["MASTER_ADDR"]:
        return
    there = ", ".join(f"{name}={value}" for name, value in found.items() if value is not None)
    missing = [name for name, value in found.items() if value is None]
    rest = f"but no {', '.join(missing)}" if missing else "which are not all numbers or names"
    what = f"the environment has {there}, {rest}"
    raise UserError(what, "start with torchrun, or unset WORLD_SIZE")


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

    use_device()
    with _naming_lost_processes():
        cuda = torch.cuda.is_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=WAIT)
    global _failed
    _failed = dist.new_group(backend="gloo", timeout=MEET)


def use_device() -> None:
    """Make this process's GPU the one that DEVICE = cuda means in this thread."""
    if size() == 1:
        return
    import torch

    local = int(os.environ["LOCAL_RANK"])
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)


def fail_together(run: int) -> None:
    """After run number `run` failed: go on where all processes say so, else end this one at once.

    The others would wait for it in the middle of that run, and add to theirs what it makes of the
    next one."""
    if size() == 1:
        return
    import torch
    import torch.distributed as dist

    try:
        runs = [torch.empty(1, dtype=torch.int64) for _ in range(size())]
        dist.all_gather(runs, torch.tensor([run]), group=_failed)
        alone = len({n.item() for n in runs}) > 1
    except RuntimeError:
        alone = True
    if alone:
        print("error: a run failed in one process alone; all are ended", file=sys.stderr)
        print("  run the same command again: it goes on from the checkpoints", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)


def stop() -> None:
    """Leave the group, after a run that went well."""
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
        else:
            first, *others = _all(t)
            t.copy_(functools.reduce(lambda total, part: total.add_(part), others, first))


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


def share_work(parts, work, room) -> list:
    """[work(part) for part in parts]: each process does a share, all of them get all results.

    room: part -> a tensor of the shape, type and device of work(part).
    """
    found = {i: work(part) for i, part in enumerate(parts) if i % size() == rank()}
    if size() == 1:
        return list(found.values())
    import torch
    import torch.distributed as dist

    results = [found[i] if i in found else room(part) for i, part in enumerate(parts)]
    with _naming_lost_processes():
        for i, t in enumerate(results):
            dist.broadcast(t.view(torch.uint8), i % size())  # gloo does not know every type
    return results


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
    if error is not None:
        raise error
    if box[1] is not None:
        sys.exit(box[1])
    return box[0]


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
