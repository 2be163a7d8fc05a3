"""Too little memory or disk, somebody else's checkpoint, a signal too early: one line, no loss."""

import contextlib
import os
import resource
import shutil
import sys
from unittest.mock import MagicMock

import pytest
import seams
import test_run
import torch
from seams import ALWAYS, Killed, kill, saved
from test_run import main, on_call, same_run, stopped

import finetune

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
    "CPU": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
}


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_out_of_memory_names_constants_and_loses_nothing(box, tmp_path, monkeypatch, capsys, kind):
    act = raises(OUT_OF_MEMORY[kind])
    assert stopped(box, tmp_path, monkeypatch, step=5, act=act, **ALWAYS) == 1
    error = message(capsys)
    assert all(name in error for name in ("MICRO_BATCH", "HEAD_CHUNK", "EVAL_BATCH"))
    assert saved(tmp_path / "x")[-1] == "step-000000005"


def test_the_dry_step_fails_before_anything_is_written(box, tmp_path, monkeypatch, capsys):
    on_call(monkeypatch, finetune, "kl_head", 0, raises(OUT_OF_MEMORY["CUDA"]))
    assert main(box, tmp_path, DEVICE="cpu:0") == 2
    assert "MICRO_BATCH" in message(capsys) and os.listdir(tmp_path) == []


@pytest.mark.parametrize("case", ["batchtopk", "dead latents", "LoRA on the LM"])
def test_the_dry_step_changes_nothing(box, tmp_path, monkeypatch, case):
    lora = {"TRAIN": "lm_lora", "LOSS": "kl", "RANK": 4}
    changes = test_run.LEARNERS.get(case, lora) | {"TOKENS": 256}
    made, gradients = [], finetune.gradients
    monkeypatch.setattr(finetune, "gradients", lambda *a: made.append(0) or gradients(*a))
    assert main(box, tmp_path, RUN_NAME="plain", **changes) == 0
    assert main(box, tmp_path, DEVICE="cpu:0", **changes) == 0
    assert len(made) == 4 + 1 + 4  # of 4 steps, and the dry one that a CPU does not make
    apart = seams.differences(tmp_path / "x", tmp_path / "plain")
    assert {*apart} <= {"run.json", "sae/README.md"}


# ---- disk ------------------------------------------------------------------------------------


@contextlib.contextmanager
def restored():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FULL = {  # where the disk is full from: a seam, number of the call, bytes that a file gets
    "a checkpoint": ("save a checkpoint", 4, 9_000),
    "a line of metrics": ("write a line", 4, 1_000),
    "an export": ("export", 0, 6_000),
    "the last json": ("write a file of the run", 3, 30),
}


@pytest.mark.parametrize("what", FULL)
def test_a_full_disk_is_one_line_and_loses_nothing(box, tmp_path, monkeypatch, capsys, what):
    seam, number, size = FULL[what]
    with monkeypatch.context() as m, restored() as limit:
        on_call(m, *seams.find(seam)[:2], number, lambda: limit(size))
        assert main(box, tmp_path, **ALWAYS) == 1
    assert message(capsys)
    steps = [int(name[5:]) for name in saved(tmp_path / "x") if name[5:].isdigit()]
    assert steps  # the last one is kept
    assert main(box, tmp_path) == 0
    assert f"resuming after step {max(steps)}" in capsys.readouterr().out
    assert same_run(tmp_path / "x", box.whole)


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


# ---- what a stranger may see -----------------------------------------------------------------


def test_no_secret_is_in_any_file_or_line(box, tmp_path, monkeypatch, capsys):
    canaries = {"HF_TOKEN": "hf_canaryOfTheHub", "WANDB_API_KEY": "canaryOfWandb" * 3}
    for name, value in canaries.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "wandb", wandb := MagicMock(offline=False))
    assert main(box, tmp_path, TOKENS=64, WANDB_PROJECT="p", CACHE=tmp_path / "cache") == 0
    said = capsys.readouterr()
    texts = [said.out, said.err, repr(wandb.mock_calls)]
    texts += [p.read_bytes().decode("latin-1") for p in tmp_path.rglob("*") if p.is_file()]
    assert len(texts) > 15 and wandb.init.called
    assert not [t for t in texts for canary in canaries.values() if canary in t]
