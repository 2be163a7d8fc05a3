"""A run is its folder: what it leaves, how it goes on after any stop, and what it refuses.

In process through run.main, on a random Gemma-2 with 3 blocks and a text of a few kilobytes.
"""

import itertools
import math
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import seams
import torch
import transformers
from safetensors.torch import load_file, save_file
from seams import ALWAYS, Killed, kill, read, saved, stamps
from tokenizers import Tokenizer, normalizers

import eval as evaluation
import finetune
import run
from klsplice import metrics as metrics_file
from klsplice import naming, settings
from klsplice.formats import write as writer
from klsplice.lm import load
from klsplice.tracking import checkpoint
from learners.base import SAELearner
from report import figures

STEPS = 8
SMALL = seams.SMALL | {"TOKENS": 64 * STEPS, "EVAL_EVERY": 32 * STEPS}
RUN_FIGURES = figures.run_figures


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    """A model, a text, an SAE, and a finished run with all of them, without figures."""
    box = seams.make_box(tmp_path_factory.mktemp("box"))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(figures, "run_figures", lambda folder, results: None)
        assert main(box, box.root / "runs") == 0
    box.whole = box.root / "runs" / "x"
    return box


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    """Drawing takes longer than a whole run here."""
    monkeypatch.setattr(figures, "run_figures", lambda folder, results: None)


def main(box, runs, *words, **changes) -> int:
    """run.main with small constants. runs: the folder of run folders."""
    return seams.main(box, runs, *words, **SMALL | changes)


def on_call(monkeypatch, owner, name, number, act):
    """Do `act` before the call `number` (from 0) of owner.name."""
    original, calls = getattr(owner, name), itertools.count()

    def wrapped(*args, **options):
        if next(calls) == number:
            act()
        return original(*args, **options)

    monkeypatch.setattr(owner, name, wrapped)


def sends(*numbers):
    return lambda: [os.kill(os.getpid(), number) for number in numbers]


def stopped(box, runs, monkeypatch, *, step, act, raises=None, **changes):
    """A run in which `act` happens within step `step` -> exit code, or None where it raised."""
    with monkeypatch.context() as m:
        on_call(m, finetune.Optimizer, "step", step, act)  # its gradients are there, no update yet
        if raises is None:
            return main(box, runs, **changes)
        with pytest.raises(raises):
            main(box, runs, **changes)


def same_run(a, b) -> bool:
    """Whether two runs left the same, bit for bit and in every file."""
    return seams.differences(a, b) == []


def results(folder) -> dict:
    return read(folder, "results.json")


# ---- what a run leaves -----------------------------------------------------------------------


def test_a_run_leaves_its_folder_and_no_more(box, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "run_figures", RUN_FIGURES)
    assert main(box, tmp_path) == 0
    kept = {"lock", "before.json", "before.npz", "after.json", "after.npz"}
    promised = {"run.json", "metrics.jsonl", "results.json", "figures", "sae"}
    assert {p.name for p in (tmp_path / "x").iterdir()} == promised | kept
    modes = {p.name: p.stat().st_mode for p in (tmp_path / "x" / "sae").iterdir()}
    files = {"README.md", "ae.pt", "config.json", "cfg.json", "sae_weights.safetensors"}
    assert modes.keys() == files and len(set(modes.values())) == 1
    drawn = {p.name: p.read_bytes() for p in (tmp_path / "x" / "figures").iterdir()}
    assert drawn.keys() == {f"{n}.png" for n in ("ce", "curves")}
    assert all(body.startswith(b"\x89PNG") for body in drawn.values())


def test_run_json_says_what_was_run(box):
    about = read(box.whole, "run.json")
    assert {name: about["constants"][name] for name in SMALL} == SMALL
    assert about["constants"].keys() == {name for name in vars(run) if name.isupper()}
    assert about["versions"]["torch"] == torch.__version__
    assert about["commit"] is None or re.fullmatch(r"[0-9a-f]{12}\+?", about["commit"])


def test_the_cards_command_goes_on_from_its_sae(box, tmp_path):
    text = (box.whole / "sae" / "README.md").read_text()
    (word,) = re.findall(r"^python run.py MODEL=path/to/gem LAYER=1 SAE=(\S+)  #", text, re.M)
    sae = word.replace("path/to/this/folder", f"{box.whole}/sae")
    assert main(box, tmp_path, SAE=sae, TOKENS=64) == 0
    ce = results(tmp_path / "x")["ce_before"]
    assert ce == pytest.approx(results(box.whole)["ce_after"], abs=1e-6)
    assert str(box.root) not in text


def test_the_name_says_what_was_run_in_any_order(tmp_path):
    """And long ones, cut short, stay apart."""
    recipe, source = tmp_path / "small.py", SimpleNamespace(architecture="topk", k=4, d_sae=64)
    recipe.write_text('"""In no name."""\nMODEL = "a/gem"\nLAYER = 1\nSAE = "a/sae"\n')

    def name_of(*words):
        return naming.run_name(settings.read([str(recipe), *words])[0], lambda: source)

    words = ["SEED=2", "TOKENS=4096", "CLIP=0.5", "TRAIN=adapter", "RANK=4", "LOSS=kl"]
    for some in (words, words[::-1]):
        assert name_of(*some) == "gem_l1_topk_k4_64_kl_adapter_r4_CLIP0.5_TOKENS4096_s2"
    long = {name_of(f"TOKENS={n}", f"DATASET={'é' * 110}/text.jsonl") for n in (4096, 8192)}
    assert len(long) == 2 and all(len(n.encode()) <= 200 and n.endswith("_s0") for n in long)


def test_a_gap_is_measured_where_it_is_no_rounding():
    assert metrics_file.gap_closed(3.0, 3.5, 3.125) == 0.75
    assert metrics_file.gap_closed(3.0, 3.0 + 2e-5, 3.0) == pytest.approx(1)
    assert metrics_file.gap_closed(3.0, 2.75, 3.0) == 1  # spliced, it is the better one
    for noise in (1.2e-6, -1.2e-6):
        assert math.isnan(metrics_file.gap_closed(3.0, 3.0 + noise, 3.5))
        assert math.isnan(evaluation.recovered(3.0, 3.5, 3.0 + noise))
    assert evaluation.recovered(3.0, 3.25, 4.0) == 0.75


# ---- the same command again ------------------------------------------------------------------


def test_a_finished_run_is_shown_again_and_untouched(box, monkeypatch, capsys):
    monkeypatch.chdir(box.root)
    before = stamps(box.whole)
    free = {"LOG_EVERY": 7, "SAVE_EVERY": 1.5, "CACHE": "elsewhere", "WANDB_MODE": "offline"}
    for changes in ({}, free):  # constants that change no result may differ
        assert main(box, "runs", **changes) == 0
        assert "gap closed" in capsys.readouterr().out
        assert stamps(box.whole) == before


def test_other_constants_are_refused_by_name(box, capsys):
    before = stamps(box.whole)
    assert main(box, box.root / "runs", LR=1e-3, WARMUP=3) == 2
    error = capsys.readouterr().err
    assert error.startswith("error:") and "WARMUP 0 -> 3" in error and "LR 5e-05 -> 0.001" in error
    assert "LAYER" not in error and stamps(box.whole) == before


def test_the_same_seed_gives_the_same_sae(box, tmp_path):
    assert main(box, tmp_path) == 0
    assert same_run(tmp_path / "x", box.whole)
    assert main(box, tmp_path, SEED=1, RUN_NAME="other") == 0
    assert "sae/ae.pt" in seams.differences(tmp_path / "other", box.whole)
    assert results(tmp_path / "other")["ce_before"] == results(box.whole)["ce_before"]


# ---- stopped and started again ---------------------------------------------------------------


STEP, MEASURE = (finetune.Optimizer, "step"), seams.find("evaluate")[:2]
SPLICED = (SAELearner, "spliced")
STOPS = {  # before which call of what, the signals, the checkpoint then
    # `timeout` sends it to the process and to its group
    "the same twice": (STEP, 5, (signal.SIGINT, signal.SIGINT), 6),
    "two, which stop at once": (STEP, 5, (signal.SIGTERM, signal.SIGINT), None),
    "in the last step": (STEP, STEPS - 1, (signal.SIGTERM,), STEPS),
    # a batch of the check and 4 of the first evaluation come before
    "in an evaluation": (SPLICED, 6, (signal.SIGTERM,), 4),
    "in the first evaluation": (MEASURE, 1, (signal.SIGTERM,), None),
    "in the last evaluation": (MEASURE, 3, (signal.SIGTERM,), STEPS),
}


@pytest.mark.parametrize("stop", STOPS)
def test_a_signal_stops_a_run_and_it_goes_on(box, tmp_path, monkeypatch, capsys, stop):
    place, call, numbers, step = STOPS[stop]
    old, own = signal.getsignal(numbers[0]), {"CACHE": tmp_path / "cache"}  # nothing measured yet
    with monkeypatch.context() as m:
        on_call(m, *place, call, sends(*numbers))
        assert main(box, tmp_path, **own) == 128 + numbers[-1]
    assert signal.getsignal(numbers[0]) == old
    assert saved(tmp_path / "x") == ([f"step-{step:09d}"] if step else [])
    assert main(box, tmp_path, **own) == 0
    assert (f"resuming after step {step}" in capsys.readouterr().out) == bool(step)
    assert same_run(tmp_path / "x", box.whole)


def test_killed_in_every_step_a_run_ends_the_same(box, tmp_path, monkeypatch):
    for step in range(STEPS):
        stopped(box, tmp_path, monkeypatch, step=min(step, 1), act=kill, raises=Killed, **ALWAYS)
        assert saved(tmp_path / "x")[-1:] == ([f"step-{step:09d}"] if step else [])
        assert len(saved(tmp_path / "x")) <= checkpoint.KEPT
    assert main(box, tmp_path) == 0
    assert same_run(tmp_path / "x", box.whole)


PLACES = {  # what is not there yet: what is called then, how often it was before
    "run.json": (os, "replace", 0),
    "before.json": (*seams.find("write a file of the run")[:2], 1),
    "the third line": (*seams.find("write a line")[:2], 2),
    "a checkpoint's state.json": (os, "replace", 4),
    "a checkpoint in its place": (os, "rename", 3),
    "after.npz": (np, "savez_compressed", 1),
    "ae.pt": (torch, "save", 0),
    "the SAELens weights": (writer, "save_tensors", 0),
    "results.json": (*seams.find("write a file of the run")[:2], 3),
}


@pytest.mark.parametrize("place", PLACES)
def test_killed_anywhere_a_run_ends_the_same(box, tmp_path, monkeypatch, place):
    with monkeypatch.context() as m:
        on_call(m, *PLACES[place], kill)
        with pytest.raises(Killed):
            main(box, tmp_path, **ALWAYS)
    assert not (tmp_path / "x" / "results.json").exists()
    assert main(box, tmp_path) == 0
    assert same_run(tmp_path / "x", box.whole)


FRESH = {"SAE": "fresh", "D_SAE": 64, "K": 8, "LOSS": "mse", "LR": 1e-3}
LEARNERS = {
    "relu": FRESH | {"ARCHITECTURE": "relu"},
    "batchtopk": FRESH | {"ARCHITECTURE": "batchtopk"},
    "dead latents": FRESH | {"ARCHITECTURE": "topk", "AUXK": 0.1, "DEAD_AFTER": 128},
    "shuffled": FRESH | {"ARCHITECTURE": "topk", "SHUFFLE": 8, "PASSES": 2},
}


@pytest.mark.parametrize("case", LEARNERS)
def test_whatever_learns_goes_on_the_same(box, tmp_path, monkeypatch, case):
    """Those around an SAE: test_bookkeeping.py."""
    changes, again = LEARNERS[case], tmp_path / "again"
    assert main(box, tmp_path / "whole", **changes) == 0
    stopped(box, again, monkeypatch, step=5, act=kill, raises=Killed, **changes, **ALWAYS)
    assert main(box, again, **changes) == 0
    assert same_run(tmp_path / "whole" / "x", again / "x")


def test_a_half_written_line_is_cut(box, tmp_path, monkeypatch):
    stopped(box, tmp_path, monkeypatch, step=5, act=kill, raises=Killed, **ALWAYS)
    with open(tmp_path / "x" / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "tokens"')
    assert main(box, tmp_path) == 0
    assert same_run(tmp_path / "x", box.whole)


# ---- damaged checkpoints ---------------------------------------------------------------------


def flip(path):
    body = bytearray(path.read_bytes())
    body[len(body) * 3 // 4] ^= 4
    path.write_bytes(body)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = {
    "flipped": ("state.safetensors", flip),
    "truncated": ("state.safetensors", cut),
    "state.json a list": ("state.json", lambda path: path.write_text("[]")),
}


@pytest.fixture(scope="module")
def unfinished(box):
    """A run killed in its seventh step, with the checkpoints of steps 5 and 6."""
    with pytest.MonkeyPatch.context() as m:
        stopped(box, box.root / "unfinished", m, step=6, act=kill, raises=Killed, **ALWAYS)
    return box.root / "unfinished"


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_checkpoint_before_a_damaged_one_is_used(box, unfinished, tmp_path, capsys, damage):
    shutil.copytree(unfinished, tmp_path, dirs_exist_ok=True)
    assert saved(tmp_path / "x") == ["step-000000005", "step-000000006"]
    name, spoil = DAMAGE[damage]
    spoil(tmp_path / "x" / "checkpoints" / "step-000000006" / name)
    assert main(box, tmp_path) == 0
    assert "resuming after step 5" in capsys.readouterr().out
    assert same_run(tmp_path / "x", box.whole)


def test_without_a_good_checkpoint_nothing_starts_anew(box, unfinished, tmp_path):
    shutil.copytree(unfinished, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "x").glob("checkpoints/*/state.safetensors"):
        cut(path)
    before = stamps(tmp_path / "x" / "checkpoints")
    assert main(box, tmp_path) == 1
    assert stamps(tmp_path / "x" / "checkpoints") == before


def test_a_gradient_that_is_not_finite_is_never_saved(box, tmp_path, monkeypatch, capsys):
    step, calls = finetune.Optimizer.step, itertools.count()

    def poisoned(optimizer, lr):
        if next(calls) == 4:  # not a log step: the save has to find it
            optimizer.learner.parameters()[0].grad[0, 0] = float("nan")
        return step(optimizer, lr)

    with monkeypatch.context() as m:
        m.setattr(finetune.Optimizer, "step", poisoned)
        assert main(box, tmp_path, **ALWAYS) == 1
    error = capsys.readouterr().err
    assert "error: the gradient was not finite" in error and "Traceback" not in error
    assert saved(tmp_path / "x") == ["step-000000003", "step-000000004"]
    assert main(box, tmp_path) == 0
    assert same_run(tmp_path / "x", box.whole)


# ---- two at a time ---------------------------------------------------------------------------


def test_a_folder_in_use_is_refused(box, tmp_path, monkeypatch):
    codes = []
    act = lambda: codes.append(main(box, tmp_path))  # noqa: E731
    assert stopped(box, tmp_path, monkeypatch, step=3, act=act) == 0
    assert codes == [2] and same_run(tmp_path / "x", box.whole)


# ---- what is refused -------------------------------------------------------------------------


def copied(source, tmp_path, change) -> Path:
    """A copy of a folder after change(it)."""
    folder = tmp_path / source.name
    shutil.copytree(source, folder)
    change(folder)
    return folder


def spoilt_sae(change, **options):
    """change: of the tensors."""

    def in_folder(folder):
        weights = torch.load(folder / "ae.pt", weights_only=True)
        change(weights)
        torch.save(weights, folder / "ae.pt")

    return lambda box, tmp_path: {"SAE": copied(box.sae, tmp_path, in_folder)} | options


def model_weights(change):
    """change: of the tensors."""

    def in_folder(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return lambda box, tmp_path: {"MODEL": copied(box.model, tmp_path, in_folder)}


class Payload:
    """Unpickled carelessly, it makes the file `canary` in the working folder."""

    def __reduce__(self):
        return open, ("canary", "w")


STRICT = {"CHECK_SAE": True}
LAST_MLP = "model.layers.2.mlp.up_proj.weight"
# What is wrong: constants, or a function of (box, tmp_path) that makes them; what is named.
BAD = {
    "several": ({"LR": 0, "LOSS": "x", "MODLE": 1}, "LR", "LOSS", "MODLE"),
    "name that climbs": ({"RUN_NAME": "../../x"}, "RUN_NAME"),
    "RUNS below a file": (lambda b, t: {"RUNS": b.text / "runs"}, "RUNS"),
    "unknown device": ({"DEVICE": "quantum"}, "DEVICE"),
    "MODEL not there": ({"MODEL": "/no/model"}, "MODEL"),
    "MODEL with a tensor missing": (model_weights(lambda w: w.pop(LAST_MLP)), LAST_MLP),
    "MODEL with NaN": (model_weights(lambda w: w[LAST_MLP].fill_(math.nan)), LAST_MLP),
    "LAYER beyond the model": ({"LAYER": 99}, "LAYER"),
    "LAYER not the SAE's": (STRICT | {"LAYER": 0}, "LAYER"),
    "CONTEXT beyond the model": ({"CONTEXT": 33, "TOKENS": 66}, "CONTEXT"),
    "SAE with code": (spoilt_sae(lambda w: w.update(k=Payload())), "ae.pt"),
    "SAE that fits nothing": (spoilt_sae(lambda w: w["b_dec"].add_(50), **STRICT), "CHECK_SAE"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_bad_is_refused_before_anything_is_written(box, at, capsys, case):
    changes, *names = BAD[case]
    changes = changes(box, at) if callable(changes) else changes
    code = main(box, at / "runs", **changes)
    error = capsys.readouterr().err
    assert code == 2 and "error: " in error and "Traceback" not in error, error
    assert len(error) < 2000 and all(name in error for name in names), error
    assert not (at / "runs").exists() or not os.listdir(at / "runs")
    assert not (at / "canary").exists()


@pytest.mark.parametrize("name", ["thesis.txt", "run.json"])
def test_a_folder_that_holds_something_else_is_left_alone(box, tmp_path, name):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / name).write_text("{")
    assert main(box, tmp_path) == 2
    assert (tmp_path / "x" / name).read_text() == "{"
    assert {*os.listdir(tmp_path / "x")} <= {name, "lock"}


def test_a_tokeniser_class_unlike_its_file_is_not_used(box, monkeypatch):
    """Some classes put pre-tokenisers of their own in the place of tokenizer.json's."""
    original = transformers.AutoTokenizer.from_pretrained

    def from_pretrained(name, **options):
        tokenizer = original(name, **options)
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        return tokenizer

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    opened = load.open_lm(str(box.model), "", device="cpu", layer=1, context=16)
    raw = Tokenizer.from_file(str(box.model / "tokenizer.json"))
    ids = opened.tokenizer("BO fun 12", add_special_tokens=False)["input_ids"]
    assert ids == raw.encode("BO fun 12", add_special_tokens=False).ids
    assert opened.tokenizer("a")["input_ids"][0] == opened.tokenizer.bos_token_id


def test_what_decides_no_number_may_differ_when_a_run_goes_on(box, tmp_path):
    assert main(box, tmp_path) == 0
    assert main(box, tmp_path, LOG_EVERY=3, SAVE_EVERY=1.0, TOGETHER=2, WANDB_MODE="offline") == 0
    assert main(box, tmp_path, LR=1e-9) == 2


def test_a_term_that_is_a_mean_is_a_line(box, tmp_path, monkeypatch, capsys):
    def mean(part, spliced, splice, dtype):
        return spliced.h_BLD.mean()

    monkeypatch.setitem(finetune.LOSSES, "kl", finetune.Loss(finetune.balanced, (mean,)))
    assert main(box, tmp_path, LOSS="kl") == 1
    assert "wanted a value for each of the" in capsys.readouterr().err
