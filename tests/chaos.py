"""For `make test-all`: kill -9, torchrun, every recipe killed, and a planted bug for every promise.

Slow and rare; what is here holds in small in test_run, test_limits and test_distributed.
"""

import fcntl
import inspect
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import seams
import test_data
import test_distributed
import test_limits
import test_run
import torch
from seams import ALWAYS, Killed, kill, saved
from test_run import same_run

import finetune
from klsplice import settings
from klsplice.text import token_cache
from klsplice.tracking import run_folder

ROOT = seams.ROOT
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
box, unfinished = test_run.box, test_run.unfinished
without_figures = test_run.without_figures
tokenizers, tokenizer, often = test_data.tokenizers, test_data.tokenizer, test_data.often


# ---- kill -9 ---------------------------------------------------------------------------------


def start(box, root: Path, name: str) -> subprocess.Popen:
    """A run of 60 steps in a process of its own, below root / name."""
    changes = {"TOKENS": 64 * 60, "EVAL_EVERY": 16 * 60, "CACHE": root / name / "cache"}
    words = seams.words_of(box, root / name, **changes, **ALWAYS)
    with open(root / f"{name}.log", "a") as log:
        return subprocess.Popen(
            [sys.executable, "run.py", *words], cwd=ROOT, env=ENV, stdout=log, stderr=log
        )


def test_killed_at_any_step_the_weights_are_those_unbroken(box, tmp_path):
    assert start(box, tmp_path, "whole").wait() == 0
    rng, steps = random.Random(0), []
    for name in ("a", "b", "c"):
        process, after_step = start(box, tmp_path, name), rng.randrange(1, 58)
        while process.poll() is None and last_step(tmp_path / name) < after_step:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.wait()
        steps.append(last_step(tmp_path / name))
        assert start(box, tmp_path, name).wait() == 0
        assert same_run(tmp_path / name / "x", tmp_path / "whole" / "x"), after_step
    assert sum(0 < step < 60 for step in steps) >= 2, steps


def last_step(runs: Path) -> int:
    return max((int(s[5:]) for s in saved(runs / "x") if s[5:].isdigit()), default=0)


# ---- wandb killed or stopped -------------------------------------------------------------------

ATTACK = """
import os, subprocess, sys
import finetune, run
from klsplice.tracking import dashboard
number, rate, dashboard.PATIENCE = int(sys.argv[1]), finetune.learning_rate, 2
def attack(step, *args, **options):
    if step == 6:
        ps = ["ps", "--ppid", str(os.getpid()), "-o", "pid=,comm="]
        found = subprocess.run(ps, capture_output=True, text=True).stdout.splitlines()
        (core,) = [int(line.split()[0]) for line in found if "wandb-core" in line]
        os.kill(core, number)
        print(f"attacked {core}.", flush=True)
    return rate(step, *args, **options)
finetune.learning_rate = attack
sys.exit(run.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_real_wandb_killed_or_stopped_stops_no_run(box, tmp_path, number):
    """In a process of its own, since wandb has hooks at its end."""
    words = seams.words_of(box, tmp_path / "runs", **test_run.SMALL | {"WANDB_PROJECT": "p"})
    command = [sys.executable, "-c", ATTACK, str(int(number)), *words]
    env = ENV | {"WANDB_MODE": "offline"}
    with open(tmp_path / "said", "w") as said:  # a pipe would be held open by a stopped wandb
        done = subprocess.run(command, cwd=tmp_path, env=env, stdout=said, stderr=said, timeout=100)
    said = (tmp_path / "said").read_text()
    if number == signal.SIGSTOP:
        os.kill(int(re.search(r"attacked (\d+)", said)[1]), signal.SIGKILL)
    assert done.returncode == 0 and "warning: wandb" in said, said
    assert same_run(tmp_path / "runs" / "x", box.whole)


# ---- every recipe ----------------------------------------------------------------------------

OVERLAYS = ("small", "gemma3")
RECIPES = sorted(p.stem for p in (ROOT / "recipes").glob("*.py") if p.stem not in OVERLAYS)
TINY = {"RANK": 4, "TEXT_KEY": "text", "MODEL_REVISION": "", "TOKENS": 640, "EVAL_EVERY": 10**6}


@pytest.fixture(scope="module")
def relu(box):
    assert test_run.main(box, box.root / "relu", **test_run.LEARNERS["relu"]) == 0
    return box.root / "relu" / "x"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_killed_at_half_ends_as_unbroken(box, relu, tmp_path, monkeypatch, name):
    path = str(ROOT / "recipes" / f"{name}.py")
    changes = dict(TINY)
    cfg = settings.read([path])[0]
    if cfg.SAE == "fresh":
        changes |= {"SAE": "fresh", "D_SAE": 64, "K": 8, "DEAD_AFTER": 128}
    changes |= {"relu": {"SAE": relu}, "gemma_scope": {"ARCHITECTURE": "jumprelu"}}.get(name, {})
    half = 640 * cfg.PASSES // 64 // 2
    assert test_run.main(box, tmp_path / "whole", path, **changes) == 0
    with monkeypatch.context() as m:
        test_run.on_call(m, finetune.Optimizer, "step", half, kill)
        with pytest.raises(Killed):
            test_run.main(box, tmp_path / "again", path, **changes, **ALWAYS)
    assert saved(tmp_path / "again" / "x")[-1] == f"step-{half:09d}"
    assert test_run.main(box, tmp_path / "again", path, **changes) == 0
    assert same_run(tmp_path / "whole" / "x", tmp_path / "again" / "x")


# ---- several processes -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def four(box):
    return test_distributed.processes(box, box.root / "four", 4)


def test_four_processes_equal_one(box, four):
    for case, (size, _) in test_distributed.CASES.items():
        if size == 4:
            test_distributed.same_bits(box, four, case)


def test_torchrun_passes_a_signal_on_and_goes_on(box, tmp_path):
    changes = test_distributed.ONE_EACH | {"TOKENS": 6400, "EVAL_EVERY": 10**6}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launcher += ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1,SIGHUP,SIGQUIT", ROOT / "run.py"]
    words = [sys.executable, *launcher, *seams.words_of(box, tmp_path, **changes)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = subprocess.Popen(words, env=ENV, **pipes)
    lines = tmp_path / "x" / "metrics.jsonl"
    for _ in range(600):
        time.sleep(0.1)
        if lines.exists() and lines.read_text().count("train/kl") > 3:
            break
    started.send_signal(signal.SIGUSR1)
    said, _ = started.communicate(timeout=120)
    assert started.returncode != 0
    (stopped,) = re.findall(r"stopped after step (\d+);", said)
    assert saved(tmp_path / "x") == [f"step-{int(stopped):09d}"]
    assert not subprocess.run(["pgrep", "-f", f"RUNS={tmp_path}"], capture_output=True).stdout
    again = subprocess.run(words, capture_output=True, text=True, timeout=300, env=ENV)
    assert again.returncode == 0, again.stderr[-2000:]
    assert f"resuming after step {stopped}" in again.stdout
    assert test_run.main(box, tmp_path / "one", **changes) == 0
    assert same_run(tmp_path / "x", tmp_path / "one" / "x")


# ---- a planted bug for every promise ---------------------------------------------------------


def without_the_rest(cache, files, save=token_cache.TokenCache.save):
    left, cache.state["left"] = cache.state["left"], []
    save(cache, files)
    cache.state["left"] = left


def trusting(*args, load=torch.load, **options):
    return load(*args, **options | {"weights_only": False})


def nothing(*args, **options):
    pass


# Owner, name and replacement, and the test that has to turn red.
refused = test_run.test_what_is_bad_is_refused_before_anything_is_written
cache = test_data.test_an_interrupted_cache_goes_on_byte_for_byte
not_finite = test_run.test_a_gradient_that_is_not_finite_is_never_saved
others_checkpoint = test_limits.test_a_checkpoint_of_another_run_is_refused
PLANTED = [
    (*seams.find("poll")[:2], nothing, test_run.test_a_signal_stops_a_run_and_it_goes_on),
    (token_cache.TokenCache, "save", without_the_rest, cache),
    (finetune.Optimizer, "check", nothing, not_finite),
    (torch, "load", trusting, refused),
    (fcntl, "flock", nothing, test_run.test_a_folder_in_use_is_refused),
    (run_folder.Run, "_compare", nothing, test_run.test_other_constants_are_refused_by_name),
    (run_folder.Run, "digest", lambda self: "", others_checkpoint),
]
GIVEN = {"kept": 1, "point": "pack", "case": "SAE with code", "stop": "in an evaluation"}


@pytest.mark.parametrize("owner, name, replacement, test", PLANTED)
def test_a_planted_bug_turns_a_test_red(owner, name, replacement, test, request, monkeypatch):
    wanted = inspect.signature(test).parameters
    args = [GIVEN[n] if n in GIVEN else request.getfixturevalue(n) for n in wanted]
    monkeypatch.setattr(owner, name, replacement)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test(*args)


@pytest.mark.parametrize("bug", test_distributed.BUGS)
def test_a_planted_bug_makes_two_processes_differ_from_one(box, bug):
    found = test_distributed.processes(box, box.root / bug, 2, bug)
    assert [p.code for p in found] == [0, 0], found[0].stderr[-2000:]
    with pytest.raises(AssertionError):
        test_distributed.same_bits(box, found, "kl+mse")
