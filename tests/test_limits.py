"""Too little memory or disk, somebody else's checkpoint, a signal too early: one line, no loss."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import test_run
import torch
from test_run import ALWAYS, Killed, kill, main, on_call, same_run, saved, stopped

import finetune
import sae as saes
from klsplice import hub, machine, metrics, settings
from klsplice.errors import UserError
from klsplice.formats import read
from klsplice.formats import write as writer
from klsplice.tracking import checkpoint, run_folder

box = test_run.box
without_figures = test_run.without_figures


def message(capsys) -> str:
    """The error on stderr: one line and one hint."""
    lines = [line.rsplit("\r", 1)[-1] for line in capsys.readouterr().err.split("\n")]
    lines = [line for line in lines if line.strip()]
    found = lines[[line.startswith("error: ") for line in lines].index(True) :]
    assert len(found) == 2 and found[1].startswith("  "), found
    return "\n".join(found)


def raises(error):
    def act():
        raise error

    return act


# ---- memory ----------------------------------------------------------------------------------

OUT_OF_MEMORY = {
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    "CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory"
    ),
    "Python": MemoryError(),
}


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_out_of_memory_names_the_constants_and_the_same_command_goes_on(
    box, tmp_path, monkeypatch, capsys, kind
):
    act = raises(OUT_OF_MEMORY[kind])
    assert stopped(box, tmp_path, monkeypatch, step=5, act=act, **ALWAYS) == 1
    error = message(capsys)
    assert error.startswith("error: out of memory") and "MICRO_BATCH (it is 2)" in error
    assert "HEAD_CHUNK" in error and "EVAL_BATCH" in error
    assert saved(tmp_path / "x")[-1] == "step-000000005"
    assert main(box, tmp_path) == 0
    assert same_run(tmp_path / "x", box.whole)


def test_the_dry_step_runs_out_of_memory_before_anything_is_written(
    box, tmp_path, monkeypatch, capsys
):
    on_call(monkeypatch, finetune, "kl_head", 0, raises(OUT_OF_MEMORY["CUDA"]))
    assert main(box, tmp_path, DEVICE="cpu:0") == 2
    assert "MICRO_BATCH" in message(capsys) and os.listdir(tmp_path) == []


@pytest.mark.parametrize("case", ["kl+mse", *test_run.LEARNERS])
def test_the_dry_step_changes_nothing(box, tmp_path, monkeypatch, case):
    changes = test_run.LEARNERS.get(case, {}) | {"RANK": 4, "TOKENS": 256}
    steps, step = [], finetune.Optimizer.step
    monkeypatch.setattr(finetune.Optimizer, "step", lambda *args: steps.append(0) or step(*args))
    fed, batches_of = [], finetune.batches_of

    def counted(*args):
        batches = batches_of(*args)
        return lambda step: fed.append(step) or batches(step)

    monkeypatch.setattr(finetune, "batches_of", counted)
    assert main(box, tmp_path, RUN_NAME="plain", **changes) == 0
    n = len(steps)
    assert len(fed) == n
    assert main(box, tmp_path, DEVICE="cpu:0", **changes) == 0
    assert len(steps) == 2 * n and len(fed) == 2 * n + 1
    assert same_run(tmp_path / "x", tmp_path / "plain")


# ---- disk ------------------------------------------------------------------------------------


@contextlib.contextmanager
def restored():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FULL = {  # where the disk is full from: owner, function, number of the call, bytes that a file gets
    "a checkpoint": (checkpoint, "save_file", 4, 9_000),
    "its json": (checkpoint, "write_json", 4, 40),
    "a line of metrics": (metrics, "append", 5, 1_500),
    "ae.pt": (writer, "save", 0, 6_000),
    "the SAELens weights": (writer, "save_tensors", 0, 6_000),
    "the last json": (run_folder, "write_json", 3, 30),
}


@pytest.mark.parametrize("what", FULL)
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    box, tmp_path, monkeypatch, capsys, what
):
    owner, name, number, size = FULL[what]
    with monkeypatch.context() as m, restored() as limit:
        on_call(m, owner, name, number, lambda: limit(size))
        code = main(box, tmp_path, **ALWAYS)
    assert code == 1
    assert re.search("the disk is full|could not be written", message(capsys))
    kept = saved(tmp_path / "x")
    assert kept and not [name for name in kept if name.endswith("21")]
    assert main(box, tmp_path) == 0
    assert f"resuming after step {int(kept[-1].removesuffix('.tmp')[5:]) - ('.' in kept[-1])}" in (
        capsys.readouterr().out
    )
    assert same_run(tmp_path / "x", box.whole)


def test_too_little_disk_is_said_before_the_folder_is_made(box, tmp_path, monkeypatch, capsys):
    usage = SimpleNamespace(free=100_000)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
    assert main(box, tmp_path) == 2
    error = message(capsys)
    assert "0.00 GB free" in error and "RUNS" in error and os.listdir(tmp_path) == []
    assert main(box, tmp_path, CACHE=tmp_path / "cache", TOKENS=10**6) == 2
    error = message(capsys)
    assert "up to 0.00 GB" in error and "CACHE" in error
    assert not list(tmp_path.rglob("*.bin"))
    usage.free = 10**6
    assert main(box, tmp_path, TOKENS=64) == 0


def test_the_disk_asked_for_is_what_is_written(box, tmp_path, monkeypatch):
    """A little less than the largest that the folder ever is, without what is a few kilobytes."""
    asked, largest = [], [0]

    class Free(int):
        def __lt__(self, needed):
            asked.append(needed)
            return False

    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=Free()))
    sync = checkpoint.sync

    def measured(path):
        files = [p for p in (tmp_path / "x").rglob("*.safetensors")]
        largest[0] = max(largest[0], sum(p.stat().st_size for p in files))
        sync(path)

    monkeypatch.setattr(checkpoint, "sync", measured)
    assert main(box, tmp_path, **ALWAYS) == 0
    sae = sum(p.stat().st_size for p in (tmp_path / "x" / "sae").iterdir())
    assert 0.8 < asked[0] / (largest[0] + sae) < 1.1


# ---- somebody else's state -------------------------------------------------------------------


def test_a_checkpoint_of_another_run_is_refused(box, tmp_path, monkeypatch, capsys):
    for name, lr in (("x", 5e-5), ("y", 1e-3)):
        changes = {"RUN_NAME": name, "LR": lr} | ALWAYS
        stopped(box, tmp_path, monkeypatch, step=6, act=kill, raises=Killed, **changes)
    mine, theirs = tmp_path / "x" / "checkpoints", tmp_path / "y" / "checkpoints"
    shutil.rmtree(mine / "step-000000006")
    shutil.copytree(theirs / "step-000000006", mine / "step-000000006")
    capsys.readouterr()
    assert main(box, tmp_path, LOG_EVERY=2) == 0
    out = capsys.readouterr().out
    assert "step-000000006 is damaged" in out
    assert "resuming after step 5" in out
    assert same_run(tmp_path / "x", box.whole)


def test_a_penalty_that_runs_away_stops_the_run_with_its_state(box, tmp_path, monkeypatch, capsys):
    def after_step(self, l0, fired_F, tokens):
        self.penalty *= 4

    monkeypatch.setattr(saes.ReLU, "after_step", after_step)
    assert main(box, tmp_path, **test_run.LEARNERS["relu"]) == 1  # 4^5 > 1000, logged at 6
    error = message(capsys)
    assert "the L1 penalty went from 0.01 to 41" in error and "(step 6)" in error
    assert "lower LR or change L1" in error
    assert saved(tmp_path / "x") == ["step-000000006"]
    assert not (tmp_path / "x" / "results.json").exists()


# ---- what a stranger may see -----------------------------------------------------------------


def test_no_secret_is_in_any_file_or_line(box, tmp_path, monkeypatch, capsys):
    canaries = {"HF_TOKEN": "hf_canaryOfTheHub", "WANDB_API_KEY": "canaryOfWandb" * 3}
    for name, value in canaries.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "wandb", fake := test_run.FakeWandb(""))
    assert main(box, tmp_path, TOKENS=64, WANDB_PROJECT="p", CACHE=tmp_path / "cache") == 0
    said = capsys.readouterr()
    texts = [said.out, said.err, repr(fake.options), json.dumps(fake.lines)]
    texts += [p.read_bytes().decode("latin-1") for p in tmp_path.rglob("*") if p.is_file()]
    assert len(texts) > 15
    assert not [t for t in texts for canary in canaries.values() if canary in t]


def test_an_interrupt_while_it_imports_shows_no_traceback(tmp_path):
    stub = "import time\nopen('reached', 'w').close()\ntime.sleep(60)\n"
    (tmp_path / "torch.py").write_text(stub)
    command = [sys.executable, os.path.join(test_run.ROOT, "run.py"), "DEVICE=cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    started = subprocess.Popen(command, cwd=tmp_path, env=env, **pipes)
    while not (tmp_path / "reached").exists():
        assert started.poll() is None
        time.sleep(0.01)
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert started.returncode == -signal.SIGINT and out + err == ""


# ---- what is asked once, or not at all --------------------------------------------------------


def test_a_run_that_is_not_there_asks_no_hub(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "_ask_once", asked.append)
    hub.prefer_cache_if_unreachable(str(tmp_path), "runs/none", "fresh")
    assert asked == []
    hub.prefer_cache_if_unreachable(str(tmp_path), "owner/repo")
    assert len(asked) == 1


def test_the_commit_is_that_of_the_start_whatever_is_edited_meanwhile(monkeypatch):
    at_the_start = machine.git_commit()

    def run(*words, **options):
        raise OSError("git was asked again")

    monkeypatch.setattr(machine.subprocess, "run", run)
    assert machine.git_commit() == at_the_start
    assert machine.git_commit.__wrapped__() is None  # what it would have said now


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("saes/*", "patterns are not filled in here\n  wanted one, or a list: SAE=.saes/a,saes/b."),
        ("runs/a,runs/b", "a list needs brackets: SAE="),
        ("saes/cc.pt", "no such file; did you mean saes/c.pt"),
    ],
)
def test_an_sae_that_is_not_there_says_what_may_have_been_meant(tmp_path, monkeypatch, where, said):
    for name in ("saes/a", "saes/b"):
        (tmp_path / name).mkdir(parents=True)
    if where.endswith(".pt"):
        (tmp_path / "saes/c.pt").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        read.open_sae(where, "")
    assert re.search(said, str(error.value))


def test_a_run_that_much_tells_from_others_is_told_by_its_words():
    among = {name: [1, 2] for name in ("K", "LR", "BATCH", "CONTEXT", "TOKENS", "WARMUP")}
    known = settings.defaults() | {"LR": 1e-4}
    cfg = settings.Config(**known, RECIPES=["small"], SAID={"LR"}, AMONG=among)
    assert cfg.told() == "small LR=0.0001"
    cfg.AMONG = {"LR": [1, 2]}
    assert cfg.told() == "LR=0.0001"
