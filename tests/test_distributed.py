"""Several processes are one: the same SAE, one folder, one stop, one message.

`processes` starts them as torchrun does, on gloo; each works through CASES and then FAULTS.
"""

import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import conftest  # noqa: F401  first: it puts the program on the path
import pytest
import test_run
import torch

import finetune
import run
from klsplice import distributed
from klsplice.formats import write
from klsplice.lm import activations
from learners import start
from learners.base import SAELearner

ONE_EACH = {"BATCH": 2, "MICRO_BATCH": 1}  # two processes: a micro-batch each
FOUR = {"BATCH": 4, "MICRO_BATCH": 1, "TOKENS": 640}
LORA = {"RANK": 4, "LORA_DROPOUT": 0.2}
# Equal bit for bit to one process with the same micro-batches, and with how many processes.
CASES = {
    "kl+mse": (2, {}),
    "clipped": (2, {"CLIP": 1e-3, "LR": 1e-3}),
    "other numbers of tokens": (2, {"KEEP": "special"}),
    "less than a micro-batch each": (2, {"BATCH": 2, "MICRO_BATCH": 2}),
    "relu": (2, test_run.LEARNERS["relu"]),
    "batchtopk": (2, test_run.LEARNERS["batchtopk"]),
    "dead latents": (2, test_run.LEARNERS["dead latents"]),
    "adapter": (2, {"TRAIN": "adapter", "RANK": 4}),
    "LoRA on the SAE": (2, {"TRAIN": "sae_lora", **LORA}),
    "LoRA on the LM": (2, {"TRAIN": "lm_lora", "LOSS": "kl", **LORA}),
    "four processes": (4, FOUR),
    "four processes, batchtopk": (4, test_run.LEARNERS["batchtopk"] | FOUR),
}
# Equal but for the order in which they add: several micro-batches each, or pooled residuals.
NEARLY = {
    "two micro-batches each": (2, FOUR),
    "shuffled": (2, test_run.LEARNERS["shuffled"]),
    "shuffled, other numbers of tokens": (
        2,
        test_run.LEARNERS["shuffled"] | {"KEEP": "special", "EVAL_BATCH": 3},
    ),
    "two micro-batches each of eight": (4, {"BATCH": 8, "MICRO_BATCH": 1}),
}
AS_ONE = {"less than a micro-batch each": {"MICRO_BATCH": 1}}  # what one process has instead


FAILS, TWO = "a run failed in one process alone", "two runs failed, each in one process"
SIGNAL = "a signal reaches one process while a run is set up"
GPUS = "one GPU each"


def settings(case) -> dict:
    changes = (CASES | NEARLY)[case][1]
    return ONE_EACH | changes if "BATCH" not in changes else changes


def box_at(root):
    names = {"model": "gem", "sae": "sae", "text": "text.jsonl"}
    return SimpleNamespace(root=root, **{name: root / file for name, file in names.items()})


def child(root, out, bug):
    """In one of the processes: every case of their number, then what goes wrong in one of them."""
    box, codes, rank = box_at(root), {}, distributed.rank()
    distributed.MEET /= 10
    distributed.start()
    distributed.start = distributed.stop = lambda: None  # once for all runs
    test_run.figures.run_figures = lambda folder, results: None
    if bug in (FAILS, TWO, SIGNAL, "again"):
        with pytest.MonkeyPatch.context() as m:
            # in the third step of the second run; in its last one, while the first run is saved
            call = {FAILS: 5, TWO: 2 * test_run.STEPS - 1}.get(bug, 10**6)
            if rank == 1:
                test_run.on_call(m, finetune.Optimizer, "step", call, lambda: 1 / 0)
            if rank == 0 and bug == TWO:
                test_run.on_call(m, write, "save", 0, lambda: 1 / 0)
            if rank == 0 and bug == SIGNAL:
                test_run.on_call(m, start, "open_learner", 0, test_run.sends(signal.SIGTERM))
            always = {**test_run.ALWAYS, "LR": "[1e-3,1e-2]"}
            codes["sweep"] = test_run.main(box, out, **ONE_EACH | always)
    if bug == GPUS:
        codes["run"] = test_run.main(box, out, **ONE_EACH | {"DEVICE": "cuda"})
    for case in [n for n, (size, _) in (CASES | NEARLY).items() if size == distributed.size()]:
        if bug in (FAILS, TWO, SIGNAL, "again", GPUS):
            break
        with pytest.MonkeyPatch.context() as m:
            BUGS.get(bug, lambda m: None)(m)
            passes = counted(m, activations, "residual")
            codes[case] = test_run.main(box, out / case, **settings(case))
            codes[f"{case}: passes for residuals"] = len(passes)
        if bug:
            break

    def fails(name, act, *, of=1, **changes):
        with pytest.MonkeyPatch.context() as m:
            if rank == of:
                act(m)
            try:
                codes[name] = test_run.main(box, out / name, **ONE_EACH | changes)
            except SystemExit as end:
                codes[name] = end.code

    def on(owner, name, number, act):
        return lambda m: test_run.on_call(m, owner, name, number, act)

    def full():
        raise OSError(28, "No space left on device")

    if distributed.size() == 2 and not bug:
        half = lambda *size: torch.full(size, rank, dtype=torch.bfloat16)  # noqa: E731
        shared = distributed.share_work([3, 1, 2], lambda n: half(n, 2), lambda n: half(n, 2))
        codes["whose"] = [t[:, 1].tolist() for t in shared]
        sends = test_run.sends(signal.SIGTERM)
        fails("stopped", on(finetune.Optimizer, "step", 6, sends))
        codes["saved"] = test_run.saved(out / "stopped" / "x")
        fails("stopped", lambda m: None)
        second = on(SAELearner, "spliced", 6, sends)  # batch at step 4; see test_run
        fails("stopped in an evaluation", second, of=0, CACHE=out / "cache")
        fails("stopped in an evaluation", lambda m: None)
        # The gradient before the sum, that is: both have to refuse the step.
        total = distributed.all_reduce

        def all_reduce(*tensors):
            if tensors[0].dim() == 2:  # gradients
                tensors[0][0, 0] = float("nan")
            total(*tensors)

        always = {**test_run.ALWAYS, "LOG_EVERY": 10}
        nan = lambda m: m.setattr(distributed, "all_reduce", all_reduce)  # noqa: E731
        fails("not finite", nan, of=1, **always)
        codes["kept"] = test_run.saved(out / "not finite" / "x")
        fails("full", on(test_run.checkpoint, "save_file", 4, full), of=0, **test_run.ALWAYS)
        fails("full", lambda m: None)
        fails("wrong", lambda m: None, LR=0, LAYRE=1)
        fails("uneven", lambda m: None, BATCH=3, MICRO_BATCH=3)
        fails("no SAE", lambda m: None, SAE=root / "no", RUN_NAME="")
        fails("NaN", lambda m: None, MODEL=root / "nan" / "gem")
        fails("sweep", lambda m: None, LR="[1e-3,1e-2]")
        lists = {"LR": "[1e-3,1e-2]", "SAE": f"[{box.sae},{root}/no]"}
        fails("sweep that fails in part", lambda m: None, **lists)
    (out / f"{rank}.json").write_text(json.dumps(codes))
    if distributed.size() == 2 and not bug:  # last: there is no more talking after it
        fails("gone", on(finetune.Optimizer, "step", 6, lambda: os._exit(9)))
        (out / f"{rank}.json").write_text(json.dumps(codes))


def counted(m, owner, name) -> list:
    """-> a list that grows by one with each call."""
    calls, f = [], getattr(owner, name)
    m.setattr(owner, name, lambda *a, **options: calls.append(1) or f(*a, **options))
    return calls


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def processes(box, out, size, bug=""):
    """Start that many, wait for all -> [(exit code, stderr, what it wrote to <rank>.json)]."""
    out.mkdir(exist_ok=True)
    env = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    env |= {} if bug == GPUS else {"CUDA_VISIBLE_DEVICES": ""}
    env |= {"MASTER_PORT": str(free_port()), "LOCAL_WORLD_SIZE": str(size)}
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
        found.append(
            SimpleNamespace(code=p.returncode, stdout=stdout, stderr=stderr, codes=codes, out=out)
        )
    return found


box = test_run.box
without_figures = test_run.without_figures


@pytest.fixture(scope="module")
def two(box):
    (box.root / "nan").mkdir()
    spoil = test_run.model_weights(lambda w: w["model.norm.weight"].fill_(math.nan))
    spoil(box, box.root / "nan")
    return processes(box, box.root / "two", 2)


def alone(box, case):
    folder = box.root / "alone" / case
    if not (folder / "x").exists():
        assert test_run.main(box, folder, **settings(case) | AS_ONE.get(case, {})) == 0
    return folder / "x"


def same_bits(box, found, case):
    assert [p.codes.get(case) for p in found] == [0] * len(found), found[0].stderr[-2000:]
    one, many = alone(box, case), found[0].out / case / "x"
    assert test_run.same_run(one, many)
    for file in one.rglob("*.safetensors"):
        assert file.read_bytes() == (many / file.relative_to(one)).read_bytes()


def nearly(box, found, case):
    assert [p.codes.get(case) for p in found] == [0] * len(found)
    one, many = (test_run.tensors(f) for f in (alone(box, case), found[0].out / case / "x"))
    assert all(torch.allclose(one[n], many[n], rtol=0, atol=1e-6) for n in one)
    start = torch.load(box.sae / "ae.pt", weights_only=True)["encoder.weight"]
    assert one["encoder.weight"].shape != start.shape or not torch.allclose(
        one["encoder.weight"], start, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("case", [n for n, (size, _) in CASES.items() if size == 2])
def test_two_processes_equal_one_bit_for_bit(box, two, case):
    same_bits(box, two, case)


def test_a_sweep_on_two_processes_is_its_runs_on_one(box, two):
    assert [p.codes["sweep"] for p in two] == [0, 0]
    assert [p.codes["sweep that fails in part"] for p in two] == [1, 1]
    for lr in (1e-3, 1e-2):
        changes, name = ONE_EACH | {"LR": lr}, f"x_LR{lr}"
        assert test_run.main(box, box.root / "one of a sweep", **changes, RUN_NAME=name) == 0
        one = box.root / "one of a sweep" / name
        assert test_run.same_run(one, two[0].out / "sweep" / name)
        part = two[0].out / "sweep that fails in part" / f"x_SAEsae_LR{lr}"
        assert test_run.same_sae(one, part)


@pytest.mark.parametrize("case", [n for n, (size, _) in NEARLY.items() if size == 2])
def test_two_processes_that_add_in_another_order_equal_one_nearly(box, two, case):
    nearly(box, two, case)


def test_the_lm_runs_over_a_shuffled_pool_once_not_once_in_every_process(two):
    pools, parts = (
        2 * test_run.STEPS // 4,
        4,
    )  # passes x steps / steps a pool; of EVAL_BATCH sequences
    name = "shuffled: passes for residuals"
    assert [p.codes[name] for p in two] == [pools * parts // 2] * 2


def test_each_works_on_its_share_and_all_have_all_results(two):
    assert [p.codes["whose"] for p in two] == [[[0, 0, 0], [1], [0, 0]]] * 2


def test_a_signal_to_one_process_stops_both_after_the_same_step(box, two):
    for p in two:
        assert p.codes["saved"] == ["step-000000007"]
    for name in ("stopped", "stopped in an evaluation"):  # and went on
        assert [p.codes[name] for p in two] == [0, 0]
        assert test_run.same_run(alone(box, "kl+mse"), two[0].out / name / "x")


def test_a_gradient_that_is_not_finite_in_one_process_is_refused_by_both(two):
    assert [p.codes["not finite"] for p in two] == [1, 1]
    assert two[0].codes["kept"] == []


def test_a_full_disk_ends_both_and_both_go_on(box, two):
    assert [p.codes["full"] for p in two] == [0, 0]
    assert test_run.same_run(alone(box, "kl+mse"), two[0].out / "full" / "x")


MISTAKES = {
    "wrong": "did you mean LAYER?",
    "uneven": "BATCH = 3",
    "no SAE": "no': no such folder",
    "NaN": "model.norm.weight that are not finite",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_said_once(two, name):
    words = MISTAKES[name]
    assert [p.codes[name] for p in two] == [2, 2]
    assert words in two[0].stderr and words not in two[1].stderr


@pytest.mark.parametrize("bug", [FAILS, TWO, SIGNAL])
def test_what_happens_to_one_process_alone_mixes_no_two_runs(box, bug):
    """Else the next run's gradients would be added to this one's."""
    out, size = box.root / bug.replace(" ", "-"), 2
    found = processes(box, out, size, bug)
    if bug == SIGNAL:
        assert [p.codes["sweep"] for p in found] == [128 + signal.SIGTERM] * 2
    else:
        assert [p.code for p in found] == [1, 1] and found[1].stderr.count(FAILS) == 1
    assert [p.codes for p in processes(box, out, size, "again")] == [{"sweep": 0}] * 2
    for lr in ("0.001", "0.01"):
        name = f"x_LR{lr}"
        changes = {**ONE_EACH, **test_run.ALWAYS, "LR": lr, "RUN_NAME": name}
        alone = out.with_name(f"{out.name}, alone")
        assert test_run.main(box, alone, **changes) == 0
        assert test_run.same_run(alone / name, out / name)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_processes_with_a_gpu_each_end_where_one_does(box):
    """NCCL adds the gradients, in an order of its own."""
    found = processes(box, box.root / "gpus", 2, GPUS)
    assert [p.codes for p in found] == [{"run": 0}] * 2
    assert test_run.main(box, box.root / "one gpu", **ONE_EACH | {"DEVICE": "cuda"}) == 0
    both = [test_run.results(box.root / name / "x") for name in ("gpus", "one gpu")]
    assert both[0]["ce_after"] == pytest.approx(both[1]["ce_after"], abs=1e-4)


def test_the_first_process_alone_speaks_and_a_lost_one_is_said_in_one_line(two):
    assert "run:" in two[0].stdout and two[1].stdout == ""
    assert two[0].codes["gone"] == 1 and two[1].code == 9
    assert "error: another process of this run is gone" in two[0].stderr
    assert "Traceback" not in two[0].stderr + two[1].stderr


TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
TORCHRUN |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
LAUNCHES = {  # what is in the environment -> the words about it
    "WORLD_SIZE alone": ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but no RANK, LOCAL_RANK, MASTER_PORT"),
    "no number": ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two, but no RANK"),
    "empty": ({"WORLD_SIZE": ""}, "WORLD_SIZE=, but no RANK"),
    **{f"no {n}": ({m: v for m, v in TORCHRUN.items() if m != n}, f"no {n}") for n in TORCHRUN},
    "rank is no number": (TORCHRUN | {"RANK": "first"}, "RANK=first"),
    "no processes": (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
}
del LAUNCHES["no WORLD_SIZE"]  # that is one process


@pytest.mark.parametrize("case", LAUNCHES)
def test_processes_that_torchrun_did_not_start_are_refused_in_one_line(monkeypatch, capsys, case):
    found, words = LAUNCHES[case]
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    assert run.main(["--help"]) == 0
    assert run.main(["DEVICE=cpu"]) == 2
    said, hint = capsys.readouterr().err.splitlines()
    assert said.startswith("error: the environment has ") and words in said
    assert hint == "  start with torchrun, or unset WORLD_SIZE"


def test_a_world_of_one_needs_no_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("RANK", raising=False)
    assert (distributed.size(), distributed.rank()) == (1, 0)


def test_one_process_never_imports_torch_distributed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.distributed", None)  # importing it raises
    t = torch.ones(3)
    distributed.start()
    distributed.all_reduce(t)
    assert distributed.sum_of(5) == 5 and distributed.largest(2, 3) == (2, 3)
    assert distributed.all_gather(t) is t and t.tolist() == [1, 1, 1]
    assert distributed.share_work([1, 2], lambda n: -n, None) == [-1, -2]
    assert distributed.main_process_only(lambda: 7)() == 7
    assert distributed.main_process_first(lambda: 7)() == 7
    distributed.broadcast([t])
    distributed.stop()


# One function each, in every process: the comparison with one process has to notice.
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
        test_run.data.Tokens, "first", lambda self, step: step * self.batch_size
    ),
}


if __name__ == "__main__":
    child(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
