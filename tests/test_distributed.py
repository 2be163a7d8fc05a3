"""Several processes are one: the same SAE, one folder, one stop, one message.

`processes` starts them as torchrun does, on gloo; each works through CASES and then FAULTS.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import conftest  # noqa: F401  first: it puts the program on the path
import pytest
import seams
import torch

import finetune
import run
from klsplice import distributed
from klsplice.errors import UserError
from klsplice.tracking import checkpoint

ONE_EACH = {"BATCH": 2, "MICRO_BATCH": 1, "TOKENS": 640}  # two processes: a micro-batch each
FOUR = {"BATCH": 4, "MICRO_BATCH": 1}
LORA = {"RANK": 4, "LORA_DROPOUT": 0.2}
FRESH = {"SAE": "fresh", "D_SAE": 64, "K": 8, "LOSS": "mse", "LR": 1e-3}
POOL = "shuffled, other numbers of tokens"
# Equal bit for bit to one process with the same micro-batches, and with how many processes; four
# are in chaos.py.
CASES = {
    "kl+mse": (2, {}),
    "clipped": (2, {"CLIP": 1e-3, "LR": 1e-3}),
    "other numbers of tokens": (2, {"KEEP": "special"}),
    "less than a micro-batch each": (2, {"MICRO_BATCH": 2}),
    "relu": (2, FRESH | {"ARCHITECTURE": "relu"}),
    "an MLP's output": (2, FRESH | {"SITE": "hook_mlp_out", "LOSS": "kl+mse"}),
    "dead latents": (2, FRESH | {"AUXK": 0.1, "DEAD_AFTER": 128}),
    POOL: (2, FRESH | {"SHUFFLE": 8, "PASSES": 2, "EVAL_BATCH": 3, "KEEP": "special"}),
    "LoRA on the SAE": (2, {"TRAIN": "sae_lora", **LORA}),
    "LoRA on the LM": (2, {"TRAIN": "lm_lora", "LOSS": "kl", **LORA}),
    "four processes, batchtopk": (4, FRESH | {"ARCHITECTURE": "batchtopk"} | FOUR),
}
AS_ONE = {"less than a micro-batch each": {"MICRO_BATCH": 1}}  # what one process has instead
GPUS = "one GPU each"


def settings(case) -> dict:
    return ONE_EACH | CASES[case][1]


def child(root, out, bug):
    """In one of the processes: every case of their number, then what goes wrong in one of them."""
    box = seams.box_at(root)
    codes, rank = {}, distributed.rank()
    distributed.start()
    distributed.start = distributed.stop = lambda: None  # once for all runs
    seams.original("figures")  # imported, and then replaced
    sys.modules["report.figures"].run_figures = lambda folder, results: None
    if bug == GPUS:
        codes["run"] = seams.main(box, out, **ONE_EACH | {"DEVICE": "cuda"})
    for case in [n for n, (size, _) in CASES.items() if size == distributed.size()]:
        if bug == GPUS:
            break
        with pytest.MonkeyPatch.context() as m:
            BUGS.get(bug, lambda m: None)(m)
            codes[case] = seams.main(box, out / case, **settings(case))
        if bug:
            break

    def fails(name, act, *, of=1, **changes):
        with pytest.MonkeyPatch.context() as m:
            if rank == of:
                act(m)
            try:
                codes[name] = seams.main(box, out / name, **ONE_EACH | changes)
            except SystemExit as end:
                codes[name] = end.code

    def on(name, number, act):
        return lambda m: seams.on_call(m, name, number, act)

    def full():
        raise OSError(28, "No space left on device")

    def stop():
        os.kill(os.getpid(), signal.SIGTERM)

    if distributed.size() == 2 and not bug:
        fails("stopped", on("step", 6, stop))
        codes["saved"] = seams.saved(out / "stopped" / "x")
        fails("stopped", lambda m: None)
        half_way = on("poll", 1, stop)  # the second batch of the evaluation at step 5
        middle = {"EVAL_EVERY": 320}
        fails("stopped in an evaluation", half_way, of=0, **middle)
        codes["saved in an evaluation"] = seams.saved(out / "stopped in an evaluation" / "x")
        fails("stopped in an evaluation", lambda m: None, **middle)
        # The gradient before the sum, that is: both have to refuse the step.
        total = distributed.all_reduce

        def all_reduce(*tensors):
            if tensors[0].dim() == 2:  # gradients
                tensors[0][0, 0] = float("nan")
            total(*tensors)

        always = {**seams.ALWAYS, "LOG_EVERY": 10}
        nan = lambda m: m.setattr(distributed, "all_reduce", all_reduce)  # noqa: E731
        fails("not finite", nan, of=1, **always)
        codes["kept"] = seams.saved(out / "not finite" / "x")
        no_room = lambda m: m.setattr(checkpoint, "save_file", lambda *a: full())  # noqa: E731
        fails("full", no_room, of=0)
        fails("full", lambda m: None)
        fails("wrong", lambda m: None, LR=0, LAYRE=1)
        fails("no SAE", lambda m: None, SAE=root / "no", RUN_NAME="")
        fails("sweep", lambda m: None, LR="[1e-3,1e-2]")
        lists = {"LR": "[1e-3,1e-2]", "SAE": f"[{box.sae},{root}/no]"}
        fails("sweep that fails in part", lambda m: None, **lists)
    (out / f"{rank}.json").write_text(json.dumps(codes))
    if distributed.size() == 2 and not bug:  # last: there is no more talking after it
        fails("gone", on("step", 6, lambda: os._exit(9)))
        (out / f"{rank}.json").write_text(json.dumps(codes))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def processes(box, out, size, bug=""):
    """Start that many, as srun does, wait for all -> [code, stdout, stderr, codes: <rank>.json]."""
    out.mkdir(exist_ok=True)
    env = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    env |= {} if bug == GPUS else {"CUDA_VISIBLE_DEVICES": ""}
    env |= {"MASTER_PORT": str(free_port())}
    started = []
    for rank in range(size):
        mine = {"WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, __file__, str(box.root), str(out), bug]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=env | mine, **pipes))
    try:
        said = [p.communicate(timeout=300) for p in started]
    finally:
        for p in started:
            p.kill()
    found = []
    for rank, (p, (stdout, stderr)) in enumerate(zip(started, said)):
        file = out / f"{rank}.json"
        codes = json.loads(file.read_text()) if file.exists() else {}
        more = {"stdout": stdout, "stderr": stderr, "codes": codes}
        found.append(SimpleNamespace(code=p.returncode, out=out, **more))
    return found


box, no_figures = seams.box, seams.no_figures


@pytest.fixture(scope="module")
def two(box):
    return processes(box, box.root / "two", 2)


def alone(box, case, **changes):
    folder = box.root / "alone" / "".join([case, *changes])
    if not (folder / "x").exists():
        assert seams.main(box, folder, **settings(case) | AS_ONE.get(case, {}) | changes) == 0
    return folder / "x"


def same_files(one, many) -> bool:
    """All but what says how many processes there were, their micro-batches, and a set of names."""
    told = {"run.json", "results.json", "sae/README.md", "lora/adapter_config.json"}
    return not {*seams.differences(one, many)} - told


def same_bits(box, found, case):
    assert [p.codes.get(case) for p in found] == [0] * len(found), found[0].stderr[-2000:]
    assert same_files(alone(box, case), found[0].out / case / "x")


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("case", [n for n, (size, _) in CASES.items() if size == 2 and n != POOL])
def test_two_processes_equal_one_bit_for_bit(box, two, case):
    same_bits(box, two, case)


@pytest.mark.usefixtures("no_figures")
def test_a_shuffled_pool_is_the_same_on_two(box, two):
    """But for the order of additions: of several processes each has a part of a micro-batch."""
    folders = alone(box, POOL), two[0].out / POOL / "x"
    one, many = (torch.load(f / "sae/ae.pt", weights_only=True) for f in folders)
    assert all(torch.allclose(one[n], many[n], rtol=0, atol=1e-6) for n in one)


@pytest.mark.usefixtures("no_figures")
def test_a_sweep_on_two_processes_is_its_runs_on_one(box, two):
    """A failure of one of its runs ends the command."""
    assert [p.codes["sweep"] for p in two] == [0, 0]
    assert [p.codes["sweep that fails in part"] for p in two] == [2, 2]
    for lr in (1e-3, 1e-2):
        changes, name = ONE_EACH | {"LR": lr}, f"x_LR{lr}"
        assert seams.main(box, box.root / "of a sweep", **changes, RUN_NAME=name) == 0
        assert same_files(box.root / "of a sweep" / name, two[0].out / "sweep" / name)


@pytest.mark.usefixtures("no_figures")
def test_a_signal_to_one_process_stops_both_after_the_same_step(box, two):
    for p in two:
        assert p.codes["saved"] == ["step-000000007"]
        assert p.codes["saved in an evaluation"] == ["step-000000005"]
    for name, changes in (("stopped", {}), ("stopped in an evaluation", {"EVAL_EVERY": 320})):
        assert [p.codes[name] for p in two] == [0, 0]  # went on
        assert same_files(alone(box, "kl+mse", **changes), two[0].out / name / "x")


def test_a_gradient_that_is_not_finite_in_one_process_is_refused_by_both(two):
    assert [p.codes["not finite"] for p in two] == [1, 1]
    assert two[0].codes["kept"] == []


@pytest.mark.usefixtures("no_figures")
def test_a_full_disk_ends_both_and_both_go_on(box, two):
    assert [p.codes["full"] for p in two] == [0, 0]
    assert same_files(alone(box, "kl+mse"), two[0].out / "full" / "x")


@pytest.mark.parametrize(("name", "words"), [("wrong", "LAYRE"), ("no SAE", "/no")])
def test_a_mistake_is_said_once(two, name, words):
    assert [p.codes[name] for p in two] == [2, 2]
    assert words in two[0].stderr and words not in two[1].stderr


def test_the_first_process_alone_speaks_and_a_lost_one_is_one_line(two):
    assert "run:" in two[0].stdout and two[1].stdout == ""
    assert two[0].codes["gone"] == 1 and two[1].code == 9
    assert "Traceback" not in two[0].stderr + two[1].stderr


@pytest.mark.usefixtures("no_figures")
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_processes_with_a_gpu_each_end_where_one_does(box):
    """NCCL adds the gradients, in an order of its own."""
    found = processes(box, box.root / "gpus", 2, GPUS)
    assert [p.codes for p in found] == [{"run": 0}] * 2
    assert seams.main(box, box.root / "one gpu", **ONE_EACH | {"DEVICE": "cuda"}) == 0
    both = [seams.read(box.root / name / "x", "results.json") for name in ("gpus", "one gpu")]
    assert both[0]["ce_after"] == pytest.approx(both[1]["ce_after"], abs=1e-4)


TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
TORCHRUN |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
LAUNCHES = [  # what is in the environment
    *({"WORLD_SIZE": value} for value in ("2", "two", "")),
    TORCHRUN | {"RANK": "first"},
]


@pytest.mark.parametrize("there", LAUNCHES, ids=str)
def test_processes_that_torchrun_did_not_start_are_refused(monkeypatch, capsys, there):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    assert run.main(["--help"]) == 0
    assert run.main(["DEVICE=cpu"]) == 2
    assert "WORLD_SIZE" in capsys.readouterr().err


# One function each, in every process: the comparison with one process has to notice (chaos.py).
def _half(m):
    total = distributed.all_reduce

    def all_reduce(*tensors):
        total(*tensors)
        for t in tensors:
            if tensors[0].dim() == 2:
                t.div_(2)

    m.setattr(distributed, "all_reduce", all_reduce)


BUGS = {
    "gradients are not added": lambda m: m.setattr(
        distributed, "all_reduce", lambda *t, f=distributed.all_reduce: t[0].dim() == 2 or f(*t)
    ),
    "gradients are averaged": _half,
    "losses are not added": lambda m: m.setattr(finetune.Sums, "all_reduce", lambda self: None),
    "the same sequences in both": lambda m: m.setattr(
        "data.Tokens.first", lambda self, step: step * self.cfg.BATCH
    ),
}


def test_a_port_that_is_taken_is_named(monkeypatch):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = str(s.getsockname()[1])
        for name, value in (TORCHRUN | {"MASTER_PORT": port}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"MASTER_PORT = {port}"):
            distributed.start()


if __name__ == "__main__":
    child(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
