"""What a run writes of itself: seconds, evaluations, results, wandb; and what it gives back."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import seams
from seams import ALWAYS, QUICK, Clock, differences, killed, main, metrics, on_call, patch, read

import finetune

box, outside, no_figures = seams.box, seams.outside, seams.no_figures
pytestmark = pytest.mark.usefixtures("no_figures")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


# ---- the clock -------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """The first step takes five seconds, each a second more; an evaluation a thousand."""
    clock, lengths = Clock(), itertools.count(5)
    patch(monkeypatch, "clock", clock)
    for name, seconds in (("learning rate", lambda: next(lengths)), ("evaluate", lambda: 1000)):
        move_in(monkeypatch, clock, name, seconds)
    return clock


def move_in(monkeypatch, clock, name, seconds):
    old = seams.original(name)

    def later(*args, **options):
        clock.now += seconds()
        return old(*args, **options)

    patch(monkeypatch, name, later)


def trained(step: int) -> float:
    """Seconds that so many steps take."""
    return 5 * step + step * (step - 1) / 2


@pytest.mark.parametrize("stops", [[], [3, 7, 12]])
def test_seconds_are_those_of_training_over_resumes(box, tmp_path, clock, stops):
    done = 0
    for step in stops:  # as many steps as since the last kill
        killed(box, tmp_path, step=step - done, **ALWAYS)
        state = read(tmp_path / "x" / "checkpoints" / f"step-{step:09d}", "state.json")
        assert state["step"] == step and state["seconds"] == pytest.approx(trained(step))
        done = step
    assert main(box, tmp_path) == 0
    results = read(tmp_path / "x", "results.json")
    assert results["seconds"] == pytest.approx(290)
    assert results["tokens_per_second"] == pytest.approx(1280 / 290)
    lines = metrics(tmp_path / "x")
    found = {line["step"]: line["seconds"] for line in lines}
    assert found == {step: pytest.approx(trained(step)) for step in (0, *range(2, 21, 2))}
    for line in lines:
        if (rate := line.get("train/tokens_per_second")) is not None:
            step = line["step"]  # since the line before, or since it went on
            since = max([step - 2, *(stop for stop in stops if stop < step)])
            seconds = trained(step) - trained(since)
            assert rate == pytest.approx(64 * (step - since) / seconds)


# ---- evaluations on the way ------------------------------------------------------------------

OFTEN = {"EVAL_EVERY": 200}  # of 64 tokens a step: no multiple is ever met, all are crossed
CROSSED = [0, 4, 7, 10, 13, 16, 19, 20]  # the steps, which a resume does not change


# ---- wandb -----------------------------------------------------------------------------------


class FakeWandb:
    """wandb that keeps what each run was started with, sent, and ended with."""

    def __init__(self):
        self.runs, self.Settings, self.login = [], dict, lambda **options: True

    def init(self, **options):
        run = SimpleNamespace(options=options, lines=[], summary={}, ended=[], offline=False)
        run.define_metric = lambda *args, **options: None
        run.log = lambda line, **options: run.lines.append(line)
        run.finish = lambda exit_code=0: run.ended.append(exit_code)
        self.runs.append(run)
        return run


@pytest.fixture
def wandb(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    return fake


CHARTS = {  # of what metrics.jsonl has, these go to wandb
    *("train/kl", "train/mse", "train/alpha", "train/lr", "train/grad_norm"),
    *("train/tokens_per_second", "val/ce_clean", "val/ce_spliced", "val/ce_recovered"),
    *("val/gap_closed", "val/kl", "val/fvu", "val/l0", "val/dead_fraction", "tokens"),
}
P = {"WANDB_PROJECT": "p"}


def test_wandb_gets_what_the_folder_has(box, tmp_path, wandb, monkeypatch):
    def mine(*given):
        return finetune.kl(*given)

    loss = finetune.Loss(finetune.balanced, (finetune.kl, mine))
    monkeypatch.setitem(finetune.LOSSES, "kl+mse", loss)
    assert main(box, tmp_path, **P) == 0
    ((run,), folder) = wandb.runs, tmp_path / "x"
    charts = CHARTS | {"train/mine"}
    sent = [{n: v for n, v in line.items() if n in charts} for line in metrics(folder)]
    assert run.lines == sent and set().union(*run.lines) == charts
    assert run.summary == read(folder, "results.json") and run.ended == [0]
    about = read(folder, "run.json")
    assert run.options["config"].items() >= about["constants"].items()
    assert run.options["id"] == about["wandb_id"] and run.options["name"] == "x"
    assert main(box, tmp_path, **P) == 0 and len(wandb.runs) == 1  # it is finished


PROJECTS = [  # in the environment, as a word, (entity, project) that wandb is told
    ({}, {"WANDB_PROJECT": "team/mine"}, ("team", "mine")),
    ({"WANDB_PROJECT": "theirs"}, {}, (None, "theirs")),
    ({"WANDB_PROJECT": "theirs"}, P, (None, "p")),
    ({"WANDB_PROJECT": ""}, {}, None),
    ({"WANDB_DISABLED": "true"}, P, None),
]


@pytest.mark.parametrize(("there", "words", "told"), PROJECTS)
def test_the_environments_project_counts_unless_a_word_says_it(
    box, tmp_path, wandb, monkeypatch, there, words, told
):
    import run

    for name, value in there.items():
        monkeypatch.setenv(name, value)
    given = [w for w in seams.words_of(box, tmp_path, **QUICK) if "WANDB_PROJECT" not in w]
    assert run.main([*given, *(f"{name}={value}" for name, value in words.items())]) == 0
    found = [(run.options["entity"], run.options["project"]) for run in wandb.runs]
    assert found == ([told] if told else [])


def test_a_resumed_run_goes_on_in_the_same_wandb_run(box, tmp_path, wandb, monkeypatch):
    """Also when the folder is given by a relative path the second time."""
    killed(box, tmp_path / "runs", step=6, **P, **ALWAYS)
    monkeypatch.chdir(tmp_path)
    assert main(box, "runs", **P) == 0
    first, second = wandb.runs
    assert first.options["id"] == second.options["id"] and second.options["resume"] == "allow"
    assert first.ended == [1] and second.ended == [0]
    steps = [line["tokens"] // 64 for run in (first, second) for line in run.lines]
    assert [s for s, n in Counter(steps).items() if n == 2] == [10, 20]  # a log and an evaluation


def test_an_offline_run_is_read_back_by_what_its_last_lines_name(outside):
    """Offline: one stopped by a signal, the same gone on with, and one that failed."""
    assert outside.wandb == {"stopped": 143, "gone on": 0, "failed": 1}
    words = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json"]
    found = {}
    for folder in sorted((outside.folder / "wandb").glob("offline-run-*")):
        assert f"wandb leet wandb/{folder.name}\n" in outside.said
        done = subprocess.run([*words, folder], capture_output=True, text=True, timeout=60)
        about = json.loads(done.stdout)
        found[about["name"], about["exit_code"]] = about
    assert found.keys() == {("w_s0", 143), ("w_s0", 0), ("f_s1", 1)}
    results = read(outside.runs / "w_s0", "results.json")
    numbers = {n: v for n, v in results.items() if isinstance(v, float)}
    summary = found["w_s0", 0]["summary"]
    assert numbers == pytest.approx({n: summary[n] for n in numbers}) and summary["train/kl"]
    sync = [line.split("wandb sync ")[1] for line in outside.said.splitlines() if " sync " in line]
    assert [len(list(outside.folder.glob(pattern))) for pattern in sync] == [2, 2, 1]  # resumed


# ---- what is shared and given back -----------------------------------------------------------


def handlers() -> dict:
    return {number: signal.getsignal(number) for number in SIGNALS}


@pytest.mark.parametrize("hup", ["ignored", "not ignored"])
def test_the_signal_handlers_are_given_back(box, tmp_path, hup):
    """SIGHUP stays ignored where it was, as by nohup."""
    mine = {number: (lambda *args: None) for number in SIGNALS}
    if hup == "ignored":
        mine[signal.SIGHUP] = signal.SIG_IGN
    old = {number: signal.signal(number, handler) for number, handler in mine.items()}
    seen = []
    try:
        with pytest.MonkeyPatch.context() as m:
            on_call(m, "learning rate", 0, lambda: seen.append(handlers()))
            assert main(box, tmp_path, **QUICK) == 0
        assert handlers() == mine, "finished"
        same = {number for number in SIGNALS if seen[0][number] == mine[number]}
        assert same == ({signal.SIGHUP} if hup == "ignored" else set())
        killed(box, tmp_path, step=2, RUN_NAME="z")
        assert handlers() == mine, "killed"
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


# ---- a screen that is gone, drawings that fail, disks that cannot sync a folder ---------------


def test_the_screen_never_ends_a_run(box, tmp_path):
    """stderr is closed from the start, and who reads stdout goes away."""
    words = " ".join([sys.executable, f"{seams.ROOT}/run.py", *seams.words_of(box, tmp_path)])
    shell = ["bash", "-o", "pipefail", "-c", f"{words} 2>&- | true"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    assert subprocess.run(shell, env=env, timeout=100).returncode == 0
    assert (tmp_path / "x" / "results.json").exists()


# ---- whatever learns goes on the same ----------------------------------------------------------

LEARNERS = {
    "sae": {"MICRO_BATCH": 1},
    "adapter": {"TRAIN": "adapter", "ADAPTER": "mlp"},
    "sae_lora": {"TRAIN": "sae_lora"},
    "lm_lora": {"TRAIN": "lm_lora", "LOSS": "kl"},
}


@pytest.mark.parametrize("train", LEARNERS)
def test_killed_twice_a_run_is_the_same_in_every_file(box, tmp_path, train):
    changes = LEARNERS[train] | {"RANK": 4, "LR": 1e-3} | OFTEN
    assert main(box, tmp_path / "whole", **changes) == 0
    killed(box, tmp_path / "again", step=8, **changes, **ALWAYS)
    killed(box, tmp_path / "again", step=6, **changes, **ALWAYS)
    assert seams.saved(tmp_path / "again" / "x")[-1] == "step-000000014"
    assert main(box, tmp_path / "again", **changes) == 0
    whole, again = tmp_path / "whole" / "x", tmp_path / "again" / "x"
    assert differences(whole, again) == []
    assert [line["step"] for line in metrics(again) if "val/kl" in line] == CROSSED
    results = read(whole, "results.json")
    assert results["ce_before"] != results["ce_after"] and math.isfinite(results["ce_after"])
