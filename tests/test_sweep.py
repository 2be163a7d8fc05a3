"""A list is a sweep: each of its runs is the run made alone, and what they share is made once."""

import os
import signal
from collections import Counter

import pytest
import seams
from seams import QUICK, differences, main, on_call, read

import finetune
import run
from klsplice import settings
from klsplice.lm.splice import Splice
from klsplice.tracking import checkpoint
from learners import start

box, no_figures = seams.box, seams.no_figures
pytestmark = pytest.mark.usefixtures("no_figures")
RATES = "LR=[1e-3,1e-2,3e-3]"
FRESH = {"SAE": "fresh", "D_SAE": 64, "K": 8, "LOSS": "mse", "LR": "[1e-3,1e-2]"}
NO_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB"


def folders(runs) -> dict:
    return {p.name: p for p in sorted(runs.iterdir()) if (p / "run.json").exists()}


def finished(runs) -> list[str]:
    return [name for name, folder in folders(runs).items() if (folder / "results.json").exists()]


def same_as_alone(box, sweep, runs, **changes) -> list[str]:
    """What of the sweep's runs is not as each by itself leaves it, beside what tells that."""
    wrong = []
    for name, folder in folders(sweep).items():
        c = read(folder, "run.json")["constants"]
        varied = {n: c[n] for n in ("LR", "LOSS", "SAE", "TRAIN", "SEED", "ARCHITECTURE")}
        assert main(box, runs, **changes | varied | {"RUN_NAME": name}) == 0
        told = {"run.json", "results.json", "sae/README.md"}  # that there were others beside it
        wrong += sorted({*differences(folder, runs / name)} - told)
        for file, names in (("results.json", seams.OF_THE_RUN), ("run.json", set())):
            one, other = (read(where / name, file) for where in (sweep, runs))
            if file == "run.json":
                one, other = one["resolved"], other["resolved"]
            wrong += [n for n in one if n not in names and one[n] != other[n]]
    return wrong


# ---- what is asked for -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["RUN_NAME=y", "LR=1e-3"], ["RUN_NAME=", "ARCHITECTURE=[,topk]"]]
)
def test_two_runs_of_one_name_are_refused(box, tmp_path, words):
    given = seams.words_of(box, tmp_path / "runs", RUN_NAME="y")
    assert run.main([*given, "--", *given, *words, "--", *given, *words]) == 2
    assert not (tmp_path / "runs").exists()


def test_only_the_same_tokens_and_lm_are_shared():
    lora, adapter = ["TRAIN=lm_lora", "LOSS=kl"], ["TRAIN=adapter", "KEEP=first"]
    groups = start.worlds(
        settings.read(["LR=[1e-4,1e-3]", "SEED=[0,1]", "--", *lora, "--", *adapter])
    )
    told = [[(c.TRAIN, c.SEED, c.KEEP) for c in group] for group in groups]
    assert told == [
        [("sae", 0, "none")] * 2,
        [("sae", 1, "none")] * 2,
        [("lm_lora", 0, "none")],
        [("adapter", 0, "first")],
    ]


# ---- each run is the run made alone ----------------------------------------------------------

CASES = {
    "losses and SAEs": {"LOSS": "[kl+mse,mse]", "EVAL_EVERY": 320},
    "learners": {"TRAIN": "[sae,adapter,sae_lora]", "LOSS": "kl", "RANK": 4, "LORA_DROPOUT": 0.2},
    "LoRA on the LM": {"TRAIN": "lm_lora", "LOSS": "kl", "RANK": 4, "LR": "[1e-3,1e-2]"},
    "architectures": FRESH | {"ARCHITECTURE": "[relu,batchtopk]", "LR": 1e-2},
    "shuffled, dead latents": FRESH | {"SHUFFLE": 8, "PASSES": 2, "AUXK": 0.1, "DEAD_AFTER": 128},
    "micro-batches": {"MICRO_BATCH": 1, "BATCH": 4, "CLEAN_BATCH": 2, "LR": "[1e-3,1e-2]"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_sweeps_run_is_the_run_alone(box, tmp_path, case):
    changes = {"TOKENS": 512} | CASES[case]
    if case == "losses and SAEs":
        assert main(box, tmp_path, **QUICK, RUN_NAME="first") == 0
        changes["SAE"] = f"[{box.sae},{tmp_path / 'first'}]"
    assert main(box, tmp_path / "a", **changes) == 0
    assert len(finished(tmp_path / "a")) > 1
    assert same_as_alone(box, tmp_path / "a", tmp_path / "b", **changes) == []


def test_clean_passes_are_made_once(box, tmp_path, monkeypatch):
    seen = Counter()

    def counted(owner, name):
        f = getattr(owner, name)

        def wrapped(*args, **options):
            seen[name] += options.get("to_end", True)  # whole passes
            return f(*args, **options)

        monkeypatch.setattr(owner, name, wrapped)

    counted(Splice, "clean")
    counted(Splice, "zero_ablated")
    counted(finetune, "training_step")
    assert main(box, tmp_path, CACHE=tmp_path / "cache") == 0
    one = Counter(seen)
    seen.clear()
    assert main(box, tmp_path, RATES, RUN_NAME="y", CACHE=tmp_path / "other cache") == 0
    assert seen == one | {"training_step": 3 * one["training_step"]}


# ---- stopped, killed, failed -----------------------------------------------------------------


def stops(number=signal.SIGTERM):
    return lambda: os.kill(os.getpid(), number)


def test_runs_stopped_at_different_steps_go_on(box, tmp_path):
    for step, lr in ((3, 1e-3), (9, 1e-2)):  # the third has not begun
        with pytest.MonkeyPatch.context() as m:
            on_call(m, "learning rate", step, stops())
            assert main(box, tmp_path / "a", RUN_NAME=f"x_LR{lr}", LR=lr) == 143
    assert main(box, tmp_path / "a", RATES) == 0
    assert same_as_alone(box, tmp_path / "a", tmp_path / "b") == []


SIGNALS = {  # the call of a seam in which it comes: the step that all have made then
    "a step": ("learning rate", 10, 4),
    "an evaluation": ("score", 6, 10),  # of 24 that come before training, from CACHE
    "the set-up": ("set up", 1, None),
}


@pytest.mark.parametrize("where", SIGNALS)
def test_a_signal_stops_all_runs_and_they_go_on(box, tmp_path, where):
    name, call, step = SIGNALS[where]
    assert main(box, tmp_path / "b", **QUICK) == 0  # its first evaluation is in CACHE
    with pytest.MonkeyPatch.context() as m:
        if where == "an evaluation":
            on_call(m, "evaluate", 0, lambda: on_call(m, "score", call, stops()))
        else:
            on_call(m, name, call, stops())
        assert main(box, tmp_path / "a", RATES) == 143
    assert finished(tmp_path / "a") == []
    kept = [seams.saved(folder) for folder in folders(tmp_path / "a").values()]
    assert kept == ([[f"step-{step:09d}"]] * 3 if step else [])
    assert main(box, tmp_path / "a", RATES) == 0
    assert same_as_alone(box, tmp_path / "a", tmp_path / "c") == []


def test_one_run_that_fails_leaves_the_others(box, tmp_path, monkeypatch, capsys):
    """In its set-up, and while it saves; the code says so, and the rest is whole."""
    save = checkpoint.save

    def full(folder, *args, **about):
        if "LR0.01" in folder:
            raise OSError(28, "No space left on device")
        return save(folder, *args, **about)

    monkeypatch.setattr(checkpoint, "save", full)
    words = [*seams.words_of(box, tmp_path / "a"), "LR=[1e-3,1e-2]", "--"]
    assert main(box, tmp_path / "a", *words, SAE=tmp_path / "none", RUN_NAME="z") == 1
    said = capsys.readouterr().err
    assert "x_LR0.01: error:" in said and "z: error:" in said
    monkeypatch.undo()
    assert finished(tmp_path / "a") == ["x_LR0.001"]
    assert main(box, tmp_path / "a", "LR=[1e-3,1e-2]") == 0
    assert same_as_alone(box, tmp_path / "a", tmp_path / "b") == []


@pytest.mark.parametrize("fits", [1, 0])
def test_what_no_memory_is_left_for_comes_afterwards(box, tmp_path, monkeypatch, fits):
    dry, tried = finetune.dry_step, []

    def dry_step(cfg, learner, batches):
        tried.append(cfg.LR)
        if not fits or len(tried) == 2:
            raise RuntimeError(NO_MEMORY)
        return dry(cfg, learner, batches)

    monkeypatch.setattr(finetune, "dry_step", dry_step)
    assert main(box, tmp_path, RATES) == (0 if fits else 2)
    assert tried == ([1e-3, 1e-2, 1e-2, 3e-3] if fits else [1e-3, 1e-2, 3e-3])
    assert len(folders(tmp_path)) == len(finished(tmp_path)) == (3 if fits else 0)


def test_a_finished_sweep_is_left_as_it_is(box, tmp_path, capsys):
    assert main(box, tmp_path, RATES, **QUICK) == 0
    assert {read(f, "results.json")["together"] for f in folders(tmp_path).values()} == {3}
    made = capsys.readouterr().out
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.json*")}
    assert main(box, tmp_path, RATES, **QUICK) == 0
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.json*")} == before
    for said in (made, capsys.readouterr().out):  # one table, in the order of what varies
        at = [said.rindex(f"x_LR{lr}  ") for lr in (1e-3, 3e-3, 1e-2)]
        assert at == sorted(at) and said.count("gap closed") == 1
    (figure,) = (tmp_path / "figures").glob("sweep-LR-*.png")
    assert str(figure) in made
