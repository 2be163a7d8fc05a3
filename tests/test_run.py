"""A run is its folder: what it leaves, how it goes on after any stop, and what it refuses.

In process through run.main, on a random Gemma-2 with 3 blocks and a text of a few kilobytes.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import hub
import naive
import numpy as np
import pytest
import tiny
import torch
import transformers
from conftest import constants
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import data
import eval as evaluation
import finetune
import run
from klsplice import metrics as metrics_file
from klsplice import naming, settings, storage, turns
from klsplice.errors import UserError
from klsplice.formats import write as writer
from klsplice.text import documents as text_files
from klsplice.tracking import checkpoint, dashboard, loop, run_folder
from learners import start
from learners.base import SAELearner
from report import figures

ROOT = os.path.dirname(os.path.abspath(run.__file__))
STEPS = 20
SMALL = {
    "DEVICE": "cpu",
    "DTYPE": "float32",
    "CONTEXT": 32,
    "BATCH": 2,
    "MICRO_BATCH": 2,
    "EVAL_BATCH": 2,
    "TOKENS": 1280,  # 20 steps
    "VAL_TOKENS": 256,
    "LAYER": 1,
    "CHECK_SAE": False,
    "WANDB_PROJECT": "",
    "EVAL_EVERY": 640,
    "LOG_EVERY": 2,
    "RUN_NAME": "x",
}
ALWAYS = {"SAVE_EVERY": 1e-9}  # a checkpoint after every step
RESULTS = """ce_clean ce_zero ce_before ce_after ce_recovered_before ce_recovered_after gap_closed
    kl_before kl_after fvu_before fvu_after l0_before l0_after dead_fraction_after tokens seconds
    tokens_per_second peak_memory_gb device commit ce_clean_no_special ce_zero_no_special
    ce_before_no_special ce_after_no_special"""


RUN_FIGURES = figures.run_figures


class Killed(BaseException):
    """Stands for kill -9: nothing in the program may catch it."""


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    """A model, a text, an SAE, and a finished run with all of them."""
    root = tmp_path_factory.mktemp("box")
    hub.make_gemma(root / "gem", seed=0)
    sae = {"d_in": 32, "d_sae": 64, "k": 4, "layer": 1, "lm_name": "gem", "seed": 0}
    hub.make_sae(root / "sae", **sae)
    texts = hub.make_pile(root / "pile", documents=120, seed=0)
    with open(root / "text.jsonl", "w") as f:
        f.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    box = SimpleNamespace(root=root, model=root / "gem", sae=root / "sae", text=root / "text.jsonl")
    assert main(box, root / "runs") == 0
    box.whole = root / "runs" / "x"
    return box


@pytest.fixture(autouse=True)
def without_figures(box, monkeypatch):
    """Drawing takes longer than a whole run here; the box's run has figures."""
    monkeypatch.setattr(figures, "run_figures", lambda folder, results: None)


def main(box, runs, *words, **changes) -> int:
    """run.main with small constants. runs: the folder of run folders."""
    return run.main([*words, *settings_of(box, runs, **changes)])


def settings_of(box, runs, **changes) -> list[str]:
    paths = {"MODEL": box.model, "SAE": box.sae, "DATASET": box.text, "CACHE": box.root / "cache"}
    settings = SMALL | paths | {"RUNS": runs} | changes
    return [f"{name}={value}" for name, value in settings.items()]


def on_call(monkeypatch, owner, name, number, act):
    """Do `act` in place of the call `number` (from 0) of owner.name, if it returns before it."""
    original, calls = getattr(owner, name), itertools.count()

    def wrapped(*args, **options):
        if next(calls) == number:
            act()
        return original(*args, **options)

    monkeypatch.setattr(owner, name, wrapped)


def kill():
    raise Killed


def sends(number):
    return lambda: os.kill(os.getpid(), number)


def stopped(box, runs, monkeypatch, *, step, act, raises=None, **changes):
    """A run in which `act` happens within step `step` -> exit code, or None where it raised."""
    with monkeypatch.context() as m:
        on_call(m, finetune.Optimizer, "step", step, act)  # its gradients are there, no update yet
        if raises is None:
            return main(box, runs, **changes)
        with pytest.raises(raises):
            main(box, runs, **changes)


def tensors(folder) -> dict:
    return torch.load(folder / "sae" / "ae.pt", weights_only=True)


def same_sae(a, b) -> bool:
    """Whether two runs' SAEs are equal bit for bit."""
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def metrics(folder) -> list[dict]:
    with open(folder / "metrics.jsonl") as f:
        return [json.loads(line) for line in f]


def curve(folder) -> list[tuple]:
    """metrics.jsonl without what depends on the clock."""
    timed = {"seconds", "train/tokens_per_second"}
    return [tuple((n, v) for n, v in line.items() if n not in timed) for line in metrics(folder)]


def same_run(a, b) -> bool:
    return same_sae(a, b) and curve(a) == curve(b)


def results(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def stamps(folder) -> dict:
    return {p: p.stat().st_mtime_ns for p in [folder, *folder.rglob("*")]}


def saved(folder) -> list[str]:
    where = folder / "checkpoints"
    return sorted(p.name for p in where.iterdir()) if where.is_dir() else []


# ---- what a run leaves -----------------------------------------------------------------------


def test_a_run_leaves_its_folder_and_no_more(box):
    kept = {"lock", "before.json", "before.npz", "after.json", "after.npz"}
    promised = {"run.json", "metrics.jsonl", "results.json", "figures", "sae"}
    assert {p.name for p in box.whole.iterdir()} == promised | kept
    files = {p.name for p in (box.whole / "sae").iterdir()} - {"README.md"}
    assert files == {"ae.pt", "config.json", "cfg.json", "sae_weights.safetensors"}
    figures = {p.name: p.read_bytes() for p in (box.whole / "figures").iterdir()}
    assert figures.keys() == {
        *(f"{n}.png" for n in ("ce", "mse", "cosine", "gained", "curves")),
        "gained.md",
    }
    assert figures.pop("gained.md").startswith(b"| context")
    assert all(body.startswith(b"\x89PNG") for body in figures.values())


def test_results_hold_every_promised_number(box):
    found = results(box.whole)
    assert set(RESULTS.split()) <= found.keys()
    numbers = [v for n, v in found.items() if n not in ("device", "commit")]
    assert all(isinstance(v, (int, float)) and math.isfinite(v) for v in numbers)
    closed = (found["ce_before"] - found["ce_after"]) / (found["ce_before"] - found["ce_clean"])
    assert found["gap_closed"] == pytest.approx(closed)
    scale = found["ce_zero"] - found["ce_clean"]
    recovered = (found["ce_zero"] - found["ce_after"]) / scale
    assert found["ce_recovered_after"] == pytest.approx(recovered)
    assert found["tokens"] / found["seconds"] == pytest.approx(found["tokens_per_second"])


def test_run_json_says_what_was_run(box):
    about = json.loads((box.whole / "run.json").read_text())
    given = {name: about["constants"][name] for name in SMALL}
    assert given == SMALL
    assert about["constants"].keys() == {name for name in vars(run) if name.isupper()}
    assert about["versions"]["torch"] == torch.__version__
    assert about["commit"] is None or re.fullmatch(r"[0-9a-f]{12}\+?", about["commit"])


def test_metrics_have_a_line_a_log_step_and_one_an_evaluation(box):
    lines = metrics(box.whole)
    assert [x["step"] for x in lines if "train/kl" in x] == list(range(2, STEPS + 1, 2))
    assert [x["step"] for x in lines if "val/kl" in x] == [0, 10, STEPS]
    assert all(x["tokens"] == 64 * x["step"] for x in lines)
    assert lines[1]["train/lr"] == pytest.approx(run.LR * (1 - 1 / STEPS))


def test_the_clock_leaves_evaluations_out(box, tmp_path, monkeypatch):
    late, now = [0.0], time.monotonic
    with monkeypatch.context() as m:
        m.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now() + late[0]))
        on_call(m, evaluation.Evaluation, "midway", 0, lambda: late.__setitem__(0, 1e6))
        assert main(box, tmp_path, LOG_EVERY=1) == 0
    seconds = [line["seconds"] for line in metrics(tmp_path / "x")]
    assert late[0] and seconds == sorted(seconds) and seconds[0] == 0 and seconds[-1] < 1e6


def test_every_file_of_the_sae_may_be_read_by_the_same_people(box):
    modes = {f.name: f.stat().st_mode for f in (box.whole / "sae").iterdir()}
    assert "sae_weights.safetensors" in modes and len(set(modes.values())) == 1, modes


def test_training_changed_the_sae(box):
    old = torch.load(box.sae / "ae.pt", weights_only=True)
    new = tensors(box.whole)
    assert all(not torch.equal(old[n], new[n]) for n in old if n != "k")
    assert new["decoder.weight"].norm(dim=0).sub(1).abs().max() < 1e-5


@pytest.mark.parametrize("keep", ["none", "first", "special"])
def test_the_evaluation_equals_two_whole_passes(box, tmp_path, keep):
    assert main(box, tmp_path, KEEP=keep, TOKENS=320, LR=1e-3) == 0
    found = results(tmp_path / "x")
    fingerprint = json.loads((tmp_path / "x" / "run.json").read_text())["resolved"]["tokens"]
    held_out = np.fromfile(box.root / "cache" / f"tokens-{fingerprint}" / "val.bin", np.uint32)
    tokens_BL = torch.from_numpy(held_out.astype(np.int64)).view(8, 32)
    assert (tokens_BL[:, 0] == 2).all()  # BOS
    kept_BL = torch.zeros_like(tokens_BL, dtype=torch.bool)
    kept_BL[:, 0] = keep == "first"
    if keep == "special":
        kept_BL = tokens_BL <= 2
        assert kept_BL.sum() > len(tokens_BL)  # an EOS within a context too
    lm = transformers.AutoModelForCausalLM.from_pretrained(box.model, attn_implementation="eager")
    for when, folder in (("before", box.sae), ("after", tmp_path / "x" / "sae")):
        t = torch.load(folder / "ae.pt", weights_only=True)
        ours = {"W_enc": t["encoder.weight"], "b_enc": t["encoder.bias"], "b_dec": t["b_dec"]}
        sae = naive.TopK(ours | {"W_dec": t["decoder.weight"].T}, 4)
        wanted = naive.evaluate(lm, sae, tokens_BL, 1, kept_BL)
        for name in ("ce_clean", "ce_zero"):
            assert found[name] == pytest.approx(wanted[name], abs=1e-4)
        for name in ("kl", "fvu", "l0"):
            assert found[f"{name}_{when}"] == pytest.approx(wanted[name], abs=1e-4)
        assert found[f"ce_{when}"] == pytest.approx(wanted["ce_spliced"], abs=1e-4)


def test_tokens_are_rounded_down_to_whole_steps_and_contexts(box, tmp_path, capsys):
    assert main(box, tmp_path, TOKENS=383, VAL_TOKENS=95) == 0
    assert results(tmp_path / "x")["tokens"] == 320
    with np.load(tmp_path / "x" / "after.npz") as per_token:
        names = dict.fromkeys(("ce_clean", "ce", "kl", "tokens"), (2, 32))
        names |= dict.fromkeys(("fires", "mean"), (64,))
        assert {n: per_token[n].shape for n in per_token} == names
    assert "320 to train on (5 steps), 64 held out" in capsys.readouterr().out


def test_an_earlier_runs_folder_is_an_sae(box, tmp_path):
    assert main(box, tmp_path, SAE=box.whole, LOSS="kl") == 0
    first, second = results(box.whole), results(tmp_path / "x")
    for name in ("ce", "kl", "fvu", "l0"):
        assert second[f"{name}_before"] == pytest.approx(first[f"{name}_after"], abs=1e-6)


def test_the_cards_command_goes_on_from_its_sae(box, tmp_path):
    text = (box.whole / "sae" / "README.md").read_text()
    (word,) = re.findall(r"^python run.py MODEL=path/to/gem LAYER=1 (SAE=\S+)  #", text, re.M)
    given = {"SAE": word.removeprefix("SAE=").replace("path/to/this/folder", f"{box.whole}/sae")}
    assert main(box, tmp_path, **given, TOKENS=64) == 0
    ce = results(tmp_path / "x")["ce_before"]
    assert ce == pytest.approx(results(box.whole)["ce_after"], abs=1e-6)
    assert str(box.root) not in text


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "relu"])
def test_a_fresh_sae_learns_on_mse(box, tmp_path, architecture):
    fresh = {"SAE": "fresh", "ARCHITECTURE": architecture, "D_SAE": 64, "K": 8}
    assert main(box, tmp_path, **fresh, LOSS="mse", LR=1e-2, PASSES=2) == 0
    found = results(tmp_path / "x")
    assert found["fvu_after"] < 0.9 * found["fvu_before"] and found["tokens"] == 2 * 1280
    assert main(box, tmp_path, SAE=tmp_path / "x", RUN_NAME="y") == 0


NAMES = {  # settings -> the name of the run
    "gemma-2-2b_l12_topk_k80_65k_kl-mse_s0": {"D_SAE": 65_536},
    "gemma-2-2b_l12_jumprelu_16k_kl_s2": {"ARCHITECTURE": "jumprelu", "LOSS": "kl", "SEED": 2},
    "gemma-2-2b_l12_topk_k80_16k_kl_lora_all_r64_s0": {
        "RECIPES": ["lora_all"],
        "TRAIN": "lm_lora",
        "LOSS": "kl",
        "RANK": 64,
    },
    "gemma-2-2b_l12_topk_k80_16k_kl-mse_adapter_r16_s0": {"TRAIN": "adapter"},
    "gemma-2-2b_l12_topk_k80_16k_kl-mse_tail_s0": {"RECIPES": ["small", "tail"]},
    "gemma-2-2b_l12_topk_k32_16k_mse_fresh_s0": {"SAE": "fresh", "K": 32, "LOSS": "mse"},
    "gemma-2-2b_l12_relu_500_mse_fresh_s0": {
        "SAE": "fresh",
        "ARCHITECTURE": "relu",
        "D_SAE": 500,
        "LOSS": "mse",
    },
    "gemma-2-2b_l12_topk_k80_16k_kl-mse_COMPILEFalse_LR0.0005_s0": {
        "LR": 5e-4,
        "COMPILE": False,
        "LOG_EVERY": 3,
        "SAID": ["MODEL", "LAYER", "LR", "COMPILE", "SEED", "LOSS", "LOG_EVERY", "RUNS", "TRAIN"],
    },
    "gemma-2-2b_l12_topk_k80_16k_kl-mse_DATASETa-b-c.txt_RANK4_SAEtop_s0": {
        "DATASET": "a b/c.txt",
        "RANK": 4,
        "SAID": ["RANK", "DATASET", "SAE"],
    },
    "gemma-2-2b_l12_topk_k8_4100_mse_fresh_CLIP1e-05_s1": {
        "SAE": "fresh",
        "D_SAE": 4100,
        "K": 8,
        "LOSS": "mse",
        "SEED": 1,
        "CLIP": 1e-5,
        "SAID": ["SAE", "D_SAE", "K", "CLIP"],
    },
    "gemma-2-2b_l12_topk_k8_4k_mse_tail_SAEfresh_TRAINsae_s0": {
        "SAE": "fresh",
        "D_SAE": 4096,
        "K": 8,
        "LOSS": "mse",
        "RECIPES": ["tail"],
        "SAID": ["SAE", "D_SAE", "TRAIN"],
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_the_name_says_what_was_run_and_no_time(tmp_path, name):
    tmp_path = tmp_path / "top"
    tmp_path.mkdir()
    changes = {"D_SAE": 16_384} | NAMES[name]
    trainer = {"dict_class": "AutoEncoderTopK", "activation_dim": 8, "dict_size": 4, "k": 80}
    trainer["dict_size"] = changes["D_SAE"]
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    (tmp_path / "ae.pt").write_bytes(b"not read yet")
    if changes.get("ARCHITECTURE") == "jumprelu":  # as the source has it, not as a conversion
        trainer["dict_class"] = "JumpReluAutoEncoder"
        (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
        changes["ARCHITECTURE"] = ""
    recipes, said = changes.pop("RECIPES", []), changes.pop("SAID", [])
    c = constants(**{"SAE": str(tmp_path), "MODEL": "google/gemma-2-2b"} | changes)
    c.RECIPES, c.SAID = recipes, said
    assert naming.run_name(c, lambda: start.find_source(c)) == name


def test_the_order_of_words_changes_no_name_and_no_two_commands_share_a_shortened_one():
    words = ["SAE=fresh", "LR=1e-3", "CLIP=0.5", "WARMUP=3", "--SEED=2"]
    names = {naming.run_name(*settings.read(found), None) for found in (words, words[::-1])}
    assert names == {"gemma-2-2b_l12_topk_k80_65k_kl-mse_fresh_CLIP0.5_LR0.001_WARMUP3_s2"}
    long = ["SAE=fresh", "SEED=7", f"DATASET={'é' * 300}"]
    found = [
        naming.run_name(*settings.read([*long, f"TOKENS={n}000000"]), None) for n in range(1, 9)
    ]
    assert len(set(found)) == 8
    for name in found:
        assert 150 < len(name.encode()) <= 200 and naming.without_seed(name) + "_s7" == name
    assert naming.run_name(*settings.read([*words, "RUN_NAME=own"]), None) == "own"


def test_an_sae_that_leaves_no_gap_is_finetuned_and_its_gap_closed_is_a_dash(box, tmp_path, capsys):
    eye = torch.cat([torch.eye(32), -torch.eye(32)])
    zeros = {"b_enc": torch.zeros(64), "b_dec": torch.zeros(32)}
    tiny.write_sae(tmp_path / "same", "relu", {"W_enc": eye, "W_dec": eye, **zeros})
    runs = tmp_path / "runs"
    assert main(box, runs, SAE=tmp_path / "same", CHECK_SAE=True, LOSS="kl+mse") == 0
    out = capsys.readouterr().out
    assert out.count("note: this SAE leaves no gap to close (CE ") == 1
    (heading, row) = re.findall(r"^(?:run|x) .*", out, re.M)
    assert re.split("  +", row.strip())[re.split("  +", heading).index("gap closed")] == "-"
    assert results(runs / "x")["gap_closed"] is None
    for name in ("results.json", "before.json", "after.json", "metrics.jsonl"):
        assert not re.search("NaN|Infinity", (runs / "x" / name).read_text())
    assert "there was none to close" in (runs / "x" / "sae" / "README.md").read_text()


def test_a_gap_is_measured_where_it_is_more_than_rounding():
    assert metrics_file.gap_closed(3.0, 3.5, 3.125) == 0.75
    assert metrics_file.gap_closed(3.0, 3.0 + 2e-5, 3.0) == pytest.approx(1)
    assert metrics_file.gap_closed(3.0, 2.75, 3.0) == 1  # spliced, it is the better one
    for noise in (0.0, 1.2e-6, -1.2e-6):
        assert math.isnan(metrics_file.gap_closed(3.0, 3.0 + noise, 3.5))
        assert math.isnan(evaluation.recovered(3.0, 3.5, 3.0 + noise))
    assert evaluation.recovered(3.0, 3.25, 4.0) == 0.75


def test_each_trial_of_a_sweep_is_a_run_of_its_own(box, tmp_path):
    for rate in ("--LR=0.001", "--LR=0.0001"):
        for _ in range(2):  # the second finds the first
            assert main(box, tmp_path, rate, RUN_NAME="", TOKENS=64) == 0
    assert len(os.listdir(tmp_path)) == 2


def test_without_a_name_a_run_gets_that_one(box, tmp_path):
    assert main(box, tmp_path, RUN_NAME="", TOKENS=64, SEED=3) == 0
    (name,) = os.listdir(tmp_path)
    assert name.startswith("gem_l1_topk_k4_64_kl-mse_BATCH2_") and name.endswith("_s3")
    assert "RUN_NAME" not in name and len(name) <= 200


# ---- the same command again ------------------------------------------------------------------


def test_a_finished_run_is_shown_again_and_untouched(box, capsys):
    before = stamps(box.whole)
    assert main(box, box.root / "runs") == 0
    out = capsys.readouterr().out
    assert "is finished; nothing was changed" in out and "gap closed" in out
    assert stamps(box.whole) == before


def test_other_constants_are_refused_by_name(box, capsys):
    before = stamps(box.whole)
    assert main(box, box.root / "runs", LR=1e-3, WARMUP=3) == 2
    error = capsys.readouterr().err
    assert error.startswith("error:") and "WARMUP 0 -> 3" in error and "LR 5e-05 -> 0.001" in error
    assert "LAYER" not in error and "RUN_NAME" in error
    assert stamps(box.whole) == before


def test_constants_that_change_no_result_may_differ(box, monkeypatch):
    monkeypatch.chdir(box.root)
    before = stamps(box.whole)
    free = {"LOG_EVERY": 7, "SAVE_EVERY": 1.5, "CACHE": "elsewhere", "WANDB_MODE": "offline"}
    assert main(box, "runs", **free) == 0
    assert stamps(box.whole) == before


def test_the_same_seed_gives_the_same_sae(box, tmp_path):
    assert main(box, tmp_path, RUN_NAME="again") == 0
    assert same_run(tmp_path / "again", box.whole)
    assert main(box, tmp_path, SEED=1) == 0
    assert not same_sae(tmp_path / "x", box.whole)
    assert results(tmp_path / "x")["ce_before"] == results(box.whole)["ce_before"]


# ---- stopped and started again ---------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_the_same_command_goes_on(box, tmp_path, monkeypatch, capsys, number):
    old = signal.getsignal(number)
    code = stopped(box, tmp_path, monkeypatch, step=6, act=sends(number))
    assert code == 128 + number and signal.getsignal(number) == old
    assert saved(tmp_path / "x") == ["step-000000007"]
    assert "stopped after step 7 of 20" in capsys.readouterr().out
    assert main(box, tmp_path) == 0
    assert "resuming after step 7" in capsys.readouterr().out
    assert same_run(tmp_path / "x", box.whole)
    assert not saved(tmp_path / "x")


def test_one_signal_that_comes_twice_at_once_is_one(box, tmp_path, monkeypatch):
    """`timeout` sends it to the process and to its group."""

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    assert stopped(box, tmp_path, monkeypatch, step=6, act=twice) == 128 + signal.SIGINT
    assert saved(tmp_path / "x") == ["step-000000007"]


def test_the_same_signal_again_stops_at_once(box, tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(turns, "AT_ONCE", 0.0)
    assert stopped(box, tmp_path, monkeypatch, step=6, act=twice) == 128 + signal.SIGINT
    assert not saved(tmp_path / "x")


def test_a_second_signal_stops_at_once(box, tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    assert stopped(box, tmp_path, monkeypatch, step=6, act=twice) == 128 + signal.SIGINT
    assert not saved(tmp_path / "x")
    assert main(box, tmp_path) == 0
    assert same_run(tmp_path / "x", box.whole)


def test_a_signal_in_the_last_step_loses_nothing(box, tmp_path, monkeypatch):
    code = stopped(box, tmp_path, monkeypatch, step=STEPS - 1, act=sends(signal.SIGTERM))
    assert code == 143 and saved(tmp_path / "x") == [f"step-{STEPS:09d}"]
    with monkeypatch.context() as m:
        on_call(m, finetune.Optimizer, "step", 0, kill)  # no step is made again
        assert main(box, tmp_path) == 0
    assert same_run(tmp_path / "x", box.whole)


def test_a_signal_during_an_evaluation_saves(box, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as m:
        # a batch of the check and 4 of the first evaluation come before; this is the second of
        # that at step 10
        on_call(m, SAELearner, "spliced", 6, sends(signal.SIGTERM))
        assert main(box, tmp_path, CACHE=tmp_path / "cache") == 143  # nothing measured before
    assert saved(tmp_path / "x") == ["step-000000010"]
    assert [line["step"] for line in metrics(tmp_path / "x") if "val/kl" in line] == [0]
    assert main(box, tmp_path) == 0
    assert same_run(tmp_path / "x", box.whole)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_in_the_first_or_last_evaluation_stops_at_once(box, tmp_path, monkeypatch, when):
    call = {"before": 0, "after": 1}[when]
    with monkeypatch.context() as m:
        on_call(m, evaluation.Evaluation, "__call__", call, sends(signal.SIGTERM))
        assert main(box, tmp_path) == 143
    assert saved(tmp_path / "x") == {"before": [], "after": [f"step-{STEPS:09d}"]}[when]
    assert main(box, tmp_path) == 0
    assert same_run(tmp_path / "x", box.whole)


def test_killed_in_every_step_a_run_ends_the_same(box, tmp_path, monkeypatch):
    for step in range(STEPS):
        stopped(box, tmp_path, monkeypatch, step=min(step, 1), act=kill, raises=Killed, **ALWAYS)
        assert saved(tmp_path / "x")[-1:] == ([f"step-{step:09d}"] if step else [])
        assert len(saved(tmp_path / "x")) <= checkpoint.KEPT
    assert main(box, tmp_path) == 0
    assert same_run(tmp_path / "x", box.whole)


@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [
        (run_folder.np, "savez_compressed", 0),  # after the line of the first evaluation
        (run_folder, "write_json", 1),  # before.json
        (checkpoint, "save_file", 3),
        (checkpoint, "write_json", 3),
        (checkpoint.os, "rename", 3),
        (checkpoint.shutil, "rmtree", 3),
        (metrics_file, "append", 3),  # the line of a log step
        (run_folder.np, "savez_compressed", 1),
        (torch, "save", 0),
        (writer, "save_tensors", 0),  # half of sae/ is written
        (figures, "run_figures", 0),
        (run_folder, "write_json", 3),  # results.json
    ],
)
def test_killed_anywhere_else_a_run_ends_the_same(box, tmp_path, monkeypatch, owner, name, number):
    with monkeypatch.context() as m:
        on_call(m, owner, name, number, kill)
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
    "adapter": {"TRAIN": "adapter"},
    "MLP adapter": {"TRAIN": "adapter", "ADAPTER": "mlp"},
    "LoRA on the SAE": {"TRAIN": "sae_lora"},
    "LoRA on the LM": {"TRAIN": "lm_lora", "LOSS": "kl"},
    "LoRA around a batchtopk": {"TRAIN": "lm_lora", "LOSS": "kl", "ARCHITECTURE": "batchtopk"},
    "bfloat16": {"DTYPE": "bfloat16"},
}


@pytest.mark.parametrize("case", LEARNERS)
def test_whatever_learns_goes_on_the_same(box, tmp_path, monkeypatch, case):
    if "LoRA" in case:
        pytest.importorskip("peft")
    changes = LEARNERS[case] | {"RANK": 4}
    assert main(box, tmp_path / "whole", **changes) == 0
    again = tmp_path / "again"
    stopped(box, again, monkeypatch, step=7, act=kill, raises=Killed, **changes, **ALWAYS)
    assert main(box, again, **changes) == 0
    a, b = tmp_path / "whole" / "x", again / "x"
    assert same_run(a, b)
    files = sorted(p.relative_to(a) for p in a.rglob("*.safetensors"))
    assert files and all((a / f).read_bytes() == (b / f).read_bytes() for f in files)


def test_killed_while_the_folder_was_made_a_run_starts_again(box, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        on_call(m, checkpoint.os, "replace", 0, kill)  # run.json is written, not yet in place
        with pytest.raises(Killed):
            main(box, tmp_path)
    assert sorted(os.listdir(tmp_path / "x")) == ["lock", "run.json.tmp"]
    assert main(box, tmp_path) == 0
    assert same_run(tmp_path / "x", box.whole)


def test_a_half_written_line_is_cut(box, tmp_path, monkeypatch):
    stopped(box, tmp_path, monkeypatch, step=5, act=kill, raises=Killed, **ALWAYS)
    with open(tmp_path / "x" / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "tokens"')
    assert main(box, tmp_path) == 0
    assert same_run(tmp_path / "x", box.whole)


def test_a_half_written_first_line_is_cut(box, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        on_call(m, run_folder.np, "savez_compressed", 0, kill)
        with pytest.raises(Killed):
            main(box, tmp_path)
    with open(tmp_path / "x" / "metrics.jsonl", "r+") as f:
        f.truncate(30)
    assert main(box, tmp_path) == 0
    assert same_run(tmp_path / "x", box.whole)


def test_evaluations_on_the_way_are_not_kept(box, tmp_path):
    often = {"CACHE": tmp_path / "cache", "TOKENS": 256, "EVAL_EVERY": 64}
    assert main(box, tmp_path, **often) == 0
    lines = metrics_file.read_metrics(tmp_path / "x")
    assert [x["tokens"] for x in lines if "val/kl" in x] == [0, 64, 128, 192, 256]
    kept = sorted(file.name[:4] for file in (tmp_path / "cache").glob("*.npz"))
    assert kept == ["eval", "eval", "zero"]


def test_a_half_written_cache_is_made_again(box, tmp_path):
    assert main(box, tmp_path, CACHE=tmp_path / "cache", TOKENS=64) == 0
    files = {file: file.read_bytes() for file in (tmp_path / "cache").glob("*.npz")}
    assert sorted(file.name[:4] for file in files) == ["eval", "eval", "zero"]
    for part in (2, 10**9):
        for file, body in files.items():
            file.write_bytes(body[: len(body) // part])
        code = main(box, tmp_path, CACHE=tmp_path / "cache", TOKENS=64, RUN_NAME=f"cut{part}")
        assert code == 0 and all(file.read_bytes() == body for file, body in files.items())


def test_an_sae_measured_after_one_run_is_not_measured_again_before_the_next(
    box, tmp_path, monkeypatch
):
    once = {"CACHE": tmp_path / "cache", "TOKENS": 64, "EVAL_EVERY": 10**9}
    assert main(box, tmp_path, **once) == 0
    scored, score = [], evaluation.score_head
    monkeypatch.setattr(
        evaluation, "score_head", lambda *a, **o: scored.append(len(a[0])) or score(*a, **o)
    )
    first = tmp_path / "x"
    assert main(box, tmp_path, **once, SAE=first, RUN_NAME="y") == 0
    assert sum(scored) == SMALL["VAL_TOKENS"]  # after training alone
    before = json.loads((tmp_path / "y" / "before.json").read_text())
    assert before == json.loads((first / "after.json").read_text())


@pytest.mark.parametrize(
    ("found", "doubt", "architecture"),
    [
        ({}, "", "topk"),
        ({"l0": 71.0}, "L0 = 71.0", "topk"),
        ({"l0": 71.0}, "", "batchtopk"),  # whose threshold lets L0 drift
        ({"l0": 39.0}, "L0 = 39.0", "batchtopk"),
        ({"l0": 121.0}, "L0 = 121.0", "topk"),
        ({"fvu": 0.95}, "FVU = 0.95", "topk"),
        ({"fvu": math.nan}, "FVU = nan", "topk"),
        ({"ce_recovered": 0.4}, "ce_recovered = 0.4", "topk"),
        ({"ce_recovered": math.nan, "ce_zero": 3.0, "ce_clean": 3.0}, "", "topk"),
        ({"ce_recovered": math.nan, "ce_zero": math.nan, "ce_clean": 3.0}, "ce_recovered", "topk"),
    ],
)
def test_an_sae_is_doubted_for_each_number_alone(found, doubt, architecture, capsys):
    good = {"l0": 80.0, "fvu": 0.2, "ce_recovered": 0.98}
    tokens = SimpleNamespace(val_SL=range(8))
    known = evaluation.Found(good | found, {}, {})
    measure = SimpleNamespace(known=lambda learner: known, batch=2, tokens=tokens)
    source = SimpleNamespace(fresh=False, k=80, architecture=architecture)
    learner = SimpleNamespace(model=SimpleNamespace(architecture=architecture))
    with pytest.raises(UserError) if doubt else contextlib.nullcontext() as refused:
        evaluation.check_sae(measure, learner, source, strict=True)
    evaluation.check_sae(measure, learner, source, strict=False)
    said = capsys.readouterr().out
    assert said.startswith("warning: ") and said.count("wrong LAYER") == 1 if doubt else said == ""
    assert not doubt or doubt in refused.value.what and doubt in said


# ---- damaged checkpoints ---------------------------------------------------------------------


def flip(path):
    body = bytearray(path.read_bytes())
    body[len(body) * 3 // 4] ^= 4
    path.write_bytes(body)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def renumber(path):
    path.write_text(path.read_text().replace('"step": 6', '"step": 4'))


def foreign(path):
    """A sound file with other tensors, and its sum beside it."""
    checkpoint.save_file({"model.W_enc_FD": torch.ones(2, 2)}, path)
    about = json.loads((path.parent / "state.json").read_text())
    about["sha256"] = storage.digest(path)
    (path.parent / "state.json").write_text(json.dumps(about))


DAMAGE = {
    "flipped": ("state.safetensors", flip),
    "truncated": ("state.safetensors", cut),
    "deleted": ("state.safetensors", Path.unlink),
    "foreign": ("state.safetensors", foreign),
    "no state.json": ("state.json", Path.unlink),
    "state.json cut": ("state.json", cut),
    "state.json empty": ("state.json", lambda path: path.write_text("")),
    "state.json a list": ("state.json", lambda path: path.write_text("[]")),
    "state.json of another step": ("state.json", renumber),
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
    capsys.readouterr()
    assert main(box, tmp_path) == 0
    out = capsys.readouterr().out
    assert re.search(r"warning: checkpoint \S+step-000000006 is damaged", out)
    assert "resuming after step 5" in out
    assert same_run(tmp_path / "x", box.whole)


def test_without_a_good_checkpoint_nothing_starts_from_zero(box, unfinished, tmp_path, capsys):
    shutil.copytree(unfinished, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "x").glob("checkpoints/*/state.safetensors"):
        cut(path)
    before = stamps(tmp_path / "x" / "checkpoints")
    assert main(box, tmp_path) == 1
    assert "error: no checkpoint in" in capsys.readouterr().err
    assert stamps(tmp_path / "x" / "checkpoints") == before


def test_a_full_disk_keeps_the_last_checkpoint(box, tmp_path, monkeypatch, capsys):
    def full():
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        on_call(m, checkpoint, "save_file", 4, full)
        assert main(box, tmp_path, **ALWAYS) == 1
    error = capsys.readouterr().err.splitlines()
    assert any(line.startswith("error:") and "No space left" in line for line in error)
    assert main(box, tmp_path) == 0
    assert "resuming after step 4" in capsys.readouterr().out
    assert same_run(tmp_path / "x", box.whole)


def test_a_gradient_that_is_not_finite_is_never_saved(box, tmp_path, monkeypatch, capsys):
    step, calls = finetune.Optimizer.step, itertools.count()

    def poisoned(optimizer, lr):
        if next(calls) == 6:  # not a log step: the save has to find it
            optimizer.learner.parameters()[0].grad[0, 0] = float("nan")
        return step(optimizer, lr)

    monkeypatch.setattr(finetune.Optimizer, "step", poisoned)
    assert main(box, tmp_path, **ALWAYS) == 1
    error = capsys.readouterr().err
    assert "error: the gradient was not finite" in error and "Traceback" not in error
    assert saved(tmp_path / "x") == ["step-000000005", "step-000000006"]
    monkeypatch.undo()
    assert main(box, tmp_path) == 0
    assert same_run(tmp_path / "x", box.whole)


# ---- two at a time ---------------------------------------------------------------------------


def test_a_folder_in_use_is_refused(box, tmp_path, monkeypatch, capsys):
    codes = []
    code = stopped(
        box, tmp_path, monkeypatch, step=3, act=lambda: codes.append(main(box, tmp_path))
    )
    assert (codes, code) == ([2], 0)
    assert "in use by another process" in capsys.readouterr().err
    assert same_run(tmp_path / "x", box.whole)


@pytest.mark.parametrize("number", ["ENOLCK", "ENOSYS", "EOPNOTSUPP", "ENOTSUP"])
def test_on_a_file_system_without_locks_a_run_goes_on_with_a_warning(
    box, tmp_path, monkeypatch, capsys, number
):
    def flock(file, how):
        raise OSError(getattr(errno, number), "not here")

    locks = {n: getattr(fcntl, n) for n in ("LOCK_EX", "LOCK_SH", "LOCK_NB")}
    monkeypatch.setattr(storage, "fcntl", SimpleNamespace(flock=flock, **locks))
    assert main(box, tmp_path, CACHE=tmp_path / "cache") == 0
    said = capsys.readouterr().out
    for name, folder in (("RUNS", tmp_path), ("CACHE", tmp_path / "cache")):
        assert said.count(f"warning: {name} = '{folder}' is on a file system without locks") == 1
    assert same_run(tmp_path / "x", box.whole)


@pytest.mark.parametrize(
    ("number", "words"),
    [("EAGAIN", "in use by another process"), ("EIO", "x/lock cannot be locked: not here")],
)
def test_a_lock_that_is_held_and_one_that_fails_are_told_apart(
    box, tmp_path, monkeypatch, capsys, number, words
):
    def flock(file, how):
        if "cache" not in file.name:
            raise OSError(getattr(errno, number), "not here")

    locks = {n: getattr(fcntl, n) for n in ("LOCK_EX", "LOCK_SH", "LOCK_NB")}
    monkeypatch.setattr(storage, "fcntl", SimpleNamespace(flock=flock, **locks))
    assert main(box, tmp_path) == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("other", ["runs", "has finished"])
def test_of_two_that_start_together_one_wins(box, tmp_path, monkeypatch, capsys, other):
    """The other one makes the folder while this one tokenises."""

    def act():
        if other == "has finished":
            assert main(box, tmp_path) == 0
        else:
            (tmp_path / "x").mkdir()
            held.append(open(tmp_path / "x" / "lock", "w"))
            fcntl.flock(held[0], fcntl.LOCK_EX)

    held = []
    with monkeypatch.context() as m:
        on_call(m, data, "prepare", 0, act)
        assert main(box, tmp_path) == 2
    assert "error:" in capsys.readouterr().err
    if other == "has finished":
        assert same_run(tmp_path / "x", box.whole)
    else:
        held[0].close()
        assert os.listdir(tmp_path / "x") == ["lock"]


# ---- wandb -----------------------------------------------------------------------------------


class FakeWandb:
    """wandb that fails where it is told to, and otherwise keeps what it is given."""

    def __init__(self, fails):
        self.fails, self.lines, self.options, self.exit_code = fails, [], {}, None
        self.summary, self.offline, self.dir = {}, False, "wandb/run-1/files"
        self.run, self.Settings, self.UsageError = self, dict, RuntimeError
        self.metrics, self.artifacts = {}, {}

    def _maybe(self, where):
        if where == self.fails:
            raise RuntimeError(f"{where} failed")

    def login(self, **options):
        self._maybe("login")
        return True

    def init(self, mode=None, settings=None, **options):
        self._maybe("init")
        if self.fails == "reach" and mode != "offline":
            raise TimeoutError("timed out")
        self.options = options | {"mode": mode}
        return self

    def define_metric(self, *args, **options):
        self._maybe("define_metric")
        self.metrics |= {args[0]: options.get("step_metric")}

    def Artifact(self, name, type):
        assert re.fullmatch(r"[\w.-]{1,128}", name)
        files = self.artifacts.setdefault(type, {"name": name})
        return SimpleNamespace(add_dir=lambda path, **o: files.update(path=path, **o))

    def log_artifact(self, artifact):
        self._maybe("log_artifact")

    def log(self, line, **options):
        self._maybe("log")
        self.lines.append(line)

    def finish(self, exit_code=0):
        self._maybe("finish")
        self.exit_code = exit_code


@pytest.mark.parametrize(
    "fails", ["login", "init", "reach", "define_metric", "log", "log_artifact", "finish"]
)
def test_wandb_cannot_stop_or_change_a_run(box, tmp_path, monkeypatch, capsys, fails):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fails))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert main(box, tmp_path, WANDB_PROJECT="p") == 0
    assert "wandb" in capsys.readouterr().out
    assert same_run(tmp_path / "x", box.whole)


CHARTS = """train/kl train/mse train/alpha train/lr train/grad_norm train/tokens_per_second
    val/ce_clean val/ce_spliced val/ce_recovered val/gap_closed val/kl val/fvu val/l0
    val/dead_fraction"""


def test_wandb_gets_the_charts_every_constant_the_results_and_the_files(box, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb(""))
    assert main(box, tmp_path, WANDB_PROJECT="p", RUN_NAME="a_kl-mse_s3", SEED=3) == 0
    folder = tmp_path / "a_kl-mse_s3"
    wanted = {"tokens", *CHARTS.split()}
    assert fake.lines == [{n: x[n] for n in x if n in wanted} for x in metrics(folder)]
    assert set().union(*fake.lines) == wanted and fake.exit_code == 0
    assert fake.metrics == {"tokens": None, "train/*": "tokens", "val/*": "tokens"}
    assert {name for name in vars(run) if name.isupper()} <= fake.options["config"].keys()
    assert (fake.options["group"], fake.options["job_type"]) == ("a_kl-mse", "defaults")
    assert fake.summary == results(folder)
    assert {n: a["path"] for n, a in fake.artifacts.items()} == {
        n: str(folder / n) for n in ("figures", "sae")
    }


def test_an_offline_wandb_asks_for_no_key_and_the_run_ends_with_its_dashboards(
    box, tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb("login"))
    fake.offline = True
    assert main(box, tmp_path, WANDB_PROJECT="p", WANDB_MODE="offline") == 0
    assert fake.options["mode"] == "offline" and fake.summary == results(tmp_path / "x")
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "dashboard in this terminal: wandb leet wandb/run-1",
        "dashboard in a browser: wandb login && wandb sync wandb/run-1",
    ]


def test_the_folders_of_a_run_resumed_within_a_second_are_all_named(
    box, tmp_path, monkeypatch, capsys
):
    """wandb numbers such a folder; both have to be sent."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb(""))
    start, folders = fake.init, []

    def init(**options):
        stem = f"wandb/offline-run-20260101_000000-{options['id']}"
        folders.extend([stem, f"{stem}-1"])
        for folder in folders:
            (tmp_path / folder).mkdir(parents=True)
        fake.offline, fake.dir = True, f"{folders[1]}/files"
        return start(**options)

    monkeypatch.setattr(fake, "init", init)
    assert main(box, tmp_path, WANDB_PROJECT="p") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1].endswith(f"wandb sync {' '.join(folders)}")
    assert "the run was resumed: wandb has it in 2 folders" in said


def test_a_wandb_that_hangs_does_not_slow_a_run(box, tmp_path, monkeypatch, capsys):
    fake, hang = FakeWandb(""), threading.Event()
    monkeypatch.setattr(fake, "log", lambda line, step: hang.wait(100))
    monkeypatch.setattr(dashboard, "PATIENCE", 0.2)
    leaving = []
    monkeypatch.setattr(dashboard.atexit, "register", lambda *call: leaving.append(call))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    started = time.monotonic()
    assert main(box, tmp_path, WANDB_PROJECT="p") == 0
    assert time.monotonic() - started < 30 and fake.exit_code is None
    assert "wandb does not answer" in capsys.readouterr().out
    assert leaving == [(dashboard._leave, 0)]  # wandb's own exit would hang, too
    hang.set()
    assert same_run(tmp_path / "x", box.whole)


def test_metrics_have_the_share_of_the_gap_that_is_closed_so_far(box):
    lines = [x for x in metrics(box.whole) if "val/kl" in x]
    before, *_, after = (x["val/ce_spliced"] - x["val/ce_clean"] for x in lines)
    assert [lines[0]["val/gap_closed"], lines[-1]["val/gap_closed"]] == pytest.approx(
        [0, 1 - after / before]
    )
    assert lines[-1]["val/gap_closed"] == pytest.approx(results(box.whole)["gap_closed"])


def test_wandb_gets_names_of_128_characters_at_most_that_stay_apart(box, tmp_path, monkeypatch):
    found = set()
    for name in [f"{'a' * 150}{end}_s0" for end in "xy"]:
        fake = FakeWandb("")
        monkeypatch.setitem(sys.modules, "wandb", fake)
        assert main(box, tmp_path, WANDB_PROJECT="p", RUN_NAME=name) == 0
        found |= {fake.options["name"], fake.options["group"], fake.artifacts["sae"]["name"]}
    assert len(found) == 6 and max(map(len, found)) <= 128


def test_a_tokeniser_class_that_does_not_do_as_its_file_says_is_not_used(box, monkeypatch, capsys):
    """Some classes put pre-tokenisers of their own in the place of tokenizer.json's."""
    from tokenizers import normalizers

    from klsplice.lm import load

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
    assert "does not tokenise as tokenizer.json says" in capsys.readouterr().out


def test_no_wandb_at_all_is_a_warning(box, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises
    assert main(box, tmp_path, WANDB_PROJECT="p") == 0
    assert "warning: wandb is off" in capsys.readouterr().out
    assert same_sae(tmp_path / "x", box.whole)


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
def test_the_real_wandb_killed_or_stopped_does_not_stop_a_run(box, tmp_path, number):
    """In a process of its own, since wandb has hooks at its end."""
    settings = settings_of(box, tmp_path / "runs", WANDB_PROJECT="p")
    words = [sys.executable, "-c", ATTACK, str(int(number)), *settings]
    env = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "said", "w") as said:  # a pipe would be held open by a stopped wandb
        done = subprocess.run(words, cwd=tmp_path, env=env, stdout=said, stderr=said, timeout=100)
    said = (tmp_path / "said").read_text()
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(re.search(r"attacked (\d+)", said)[1]), signal.SIGKILL)
    assert done.returncode == 0, said
    assert "warning: wandb" in said
    assert same_run(tmp_path / "runs" / "x", box.whole)


def test_a_run_folder_holds_no_token(box, at, monkeypatch, capfd):
    secrets = {
        "HF_TOKEN": "hf_canaryOfTheHub",
        "WANDB_API_KEY": "0123456789abcdef" * 2 + "canary00",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(figures, "run_figures", RUN_FIGURES)
    assert main(box, at / "runs", WANDB_PROJECT="p") == 0
    said = "".join(capfd.readouterr())
    files = [p for p in at.rglob("*") if p.is_file()]
    assert len([p for p in files if (at / "runs" / "x") in p.parents]) > 14
    assert any(p.suffix == ".wandb" for p in files)
    for value in secrets.values():
        assert value not in said
        assert not [p for p in files if value.encode() in p.read_bytes()]


def test_a_signal_while_wandb_starts_stops_the_run(box, tmp_path, monkeypatch):
    fake = FakeWandb("")
    on_call(monkeypatch, fake, "init", 0, sends(signal.SIGTERM))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert main(box, tmp_path, WANDB_PROJECT="p") == 143


def test_a_signal_while_the_text_is_read_stops_the_run(box, tmp_path, monkeypatch):
    on_call(monkeypatch, text_files.Documents, "_text", 40, sends(signal.SIGTERM))
    assert main(box, tmp_path, CACHE=tmp_path / "cache") == 143


# ---- what is refused -------------------------------------------------------------------------


def spoilt(box, tmp_path, change, **options) -> dict:
    """A copy of the SAE after change(tensors, trainer's config); what they return is ignored."""
    folder = tmp_path / "spoilt"
    shutil.copytree(box.sae, folder)
    weights = torch.load(folder / "ae.pt", weights_only=True)
    config = json.loads((folder / "config.json").read_text())
    change(weights, config["trainer"])
    torch.save(weights, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps(config))
    return {"SAE": folder} | options


def sae_file(name, body):
    """A copy of the SAE in which the file `name` holds `body`, or is not there."""

    def make(box, tmp_path):
        shutil.copytree(box.sae, tmp_path / "spoilt")
        path = tmp_path / "spoilt" / name
        path.unlink(missing_ok=True)
        if body is not None:
            path.write_bytes(body)
        return {"SAE": tmp_path / "spoilt"}

    return make


class Payload:
    """Unpickled carelessly, it makes the file `canary` in the working folder."""

    def __reduce__(self):
        return open, ("canary", "w")


def pickled(*, zipped):
    def make(box, tmp_path):
        found = sae_file("ae.pt", b"")(box, tmp_path)
        torch.save(
            {"encoder.weight": Payload()},
            tmp_path / "spoilt" / "ae.pt",
            _use_new_zipfile_serialization=zipped,
        )
        return found

    return make


def text_file(name, body, **options):
    def make(box, tmp_path):
        (tmp_path / name).write_bytes(body)
        return {"DATASET": tmp_path / name, **options}

    return make


def array_file(array, **options):
    def make(box, tmp_path):
        np.save(tmp_path / "tokens.npy", array, allow_pickle=True)
        return {"DATASET": tmp_path / "tokens.npy", **options}

    return make


def model_without(pattern, body=None):
    def make(box, tmp_path):
        shutil.copytree(box.model, tmp_path / "gem")
        for path in (tmp_path / "gem").glob(pattern):
            path.unlink() if body is None else path.write_bytes(body)
        return {"MODEL": tmp_path / "gem"}

    return make


def model_weights(change):
    def make(box, tmp_path):
        shutil.copytree(box.model, tmp_path / "gem")
        path = tmp_path / "gem" / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path, metadata={"format": "pt"})
        return {"MODEL": tmp_path / "gem"}

    return make


def model_quantised(box, tmp_path):
    """As bitsandbytes leaves it."""
    shutil.copytree(box.model, tmp_path / "gem")
    config = json.loads((box.model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "gem" / "config.json").write_text(json.dumps(config))
    return {"MODEL": tmp_path / "gem"}


def model_with_a_python_tokeniser(box, tmp_path):
    shutil.copytree(box.model, tmp_path / "gem")
    (tmp_path / "gem" / "tokenizer.json").unlink()
    about = {"tokenizer_class": "ByT5Tokenizer"}
    (tmp_path / "gem" / "tokenizer_config.json").write_text(json.dumps(about))
    return {"MODEL": tmp_path / "gem"}


def model_with_an_adapter(box, tmp_path):
    """transformers would load it with the LM."""
    from peft import LoraConfig, get_peft_model

    shutil.copytree(box.model, tmp_path / "gem")
    lm = transformers.AutoModelForCausalLM.from_pretrained(box.model)
    get_peft_model(lm, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "gem")
    return {"MODEL": tmp_path / "gem"}


def model_with_code(box, tmp_path):
    """A model of an unknown kind that brings its own class."""
    shutil.copytree(box.model, tmp_path / "gem")
    (tmp_path / "gem" / "code.py").write_text("open('canary', 'w')\n")
    classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config = {"model_type": "mine", "auto_map": classes}
    (tmp_path / "gem" / "config.json").write_text(json.dumps(config))
    return {"MODEL": tmp_path / "gem"}


def nan(weights, trainer):
    weights["decoder.weight"][0, 0] = float("nan")


def earlier_run_without_sae(box, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text("{}")
    return {"SAE": tmp_path / "old"}


LINES = b'{"text": "one"}\n' * 40
STRICT = {"CHECK_SAE": True}
# What is wrong: constants, or a function of (box, tmp_path) that makes them; words of the message.
BAD = {
    "unknown constant": ({"LAYRE": 1}, "unknown constant LAYRE", "did you mean LAYER?"),
    "lower case": ({"lr": 1}, "unknown constant lr", "did you mean LR?"),
    "text for a number": ({"TOKENS": "many"}, "TOKENS wants a whole number"),
    "fraction for a whole number": ({"BATCH": 1.5}, "BATCH wants a whole number"),
    "number for a choice": ({"CHECK_SAE": 1}, "CHECK_SAE wants True or False"),
    "code for a number": ({"LR": "__import__('os')"}, "LR wants a float"),
    "LR nan": ({"LR": "nan"}, "LR wants a float"),
    "LR infinite": ({"LR": "1e999"}, "LR = inf"),
    "LR negative": ({"LR": -1e-3}, "LR = -0.001"),
    "TOKENS beyond reason": ({"TOKENS": 10**40}, "TOKENS", "too large"),
    "digits without end": ({"SEED": "9" * 5000}, "SEED wants a whole number"),
    "unknown choice": ({"LOSS": "mse+kl"}, "LOSS = 'mse+kl': choose from kl+mse, mse, kl"),
    "several": ({"LR": 0, "LOSS": "x", "MODLE": 1}, "LR = 0", "LOSS = 'x'", "MODLE"),
    "K over D_SAE": ({"SAE": "fresh", "D_SAE": 16, "K": 17}, "K = 17", "D_SAE = 16"),
    "TOKENS under a step": ({"TOKENS": 63}, "TOKENS = 63", "64"),
    "VAL_TOKENS under a context": ({"VAL_TOKENS": 31}, "VAL_TOKENS = 31"),
    "micro-batches that do not fit": ({"BATCH": 3}, "BATCH = 3", "MICRO_BATCH = 2"),
    "no model": ({"MODEL": ""}, "MODEL is empty"),
    "no SAE": ({"SAE": ""}, "SAE is empty"),
    "no dataset": ({"DATASET": ""}, "DATASET is empty"),
    "NUL": ({"RUN_NAME": "a\0b"}, "has a control character"),
    "SAE with other norms": (
        lambda b, t: spoilt(b, t, lambda w, c: w["decoder.weight"].mul_(0.5)),
        "not of unit norm",
    ),
    "SAE with an adapter": (sae_file("adapter.safetensors", b"x"), "with an adapter, which no SAE"),
    "RANK over the width": ({"TRAIN": "adapter", "RANK": 33}, "RANK = 33"),
    "a conversion there is not": ({"ARCHITECTURE": "relu"}, "ARCHITECTURE = relu, the SAE is a"),
    "fresh jumprelu": ({"SAE": "fresh", "ARCHITECTURE": "jumprelu"}, "no fresh one is trained"),
    "no block for LoRA": (
        {"TRAIN": "lm_lora", "LOSS": "kl", "LORA_BLOCKS": "after", "LAYER": 2},
        "there is no block after LAYER = 2",
    ),
    "MORE_SAES malformed": (
        {"TRAIN": "lm_lora", "LOSS": "kl", "MORE_SAES": "2"},
        "MORE_SAES: '2'",
    ),
    "CLEAN_BATCH that does not fit": ({"BATCH": 4, "CLEAN_BATCH": 3}, "CLEAN_BATCH = 3"),
    "name that climbs": ({"RUN_NAME": "../../x"}, "RUN_NAME = '../../x'"),
    "name of the folder above": ({"RUN_NAME": ".."}, "RUN_NAME = '..'"),
    "name too long": ({"RUN_NAME": "x" * 300}, "RUN_NAME"),
    "name with too many bytes": ({"RUN_NAME": "é" * 200}, "RUN_NAME"),
    "RUNS below a file": (lambda b, t: {"RUNS": b.text / "runs"}, "RUNS = ", "cannot be"),
    "CACHE below a file": (lambda b, t: {"CACHE": b.text / "cache"}, "CACHE = ", "cannot be"),
    "unknown device": ({"DEVICE": "quantum"}, "DEVICE = 'quantum'"),
    "device that computes nothing": ({"DEVICE": "meta"}, "DEVICE = 'meta'"),
    "MODEL not there": ({"MODEL": "/no/model"}, "MODEL = '/no/model'"),
    "MODEL an empty folder": (lambda b, t: {"MODEL": t}, "MODEL = "),
    "MODEL without weights": (model_without("*.safetensors"), "MODEL = "),
    "MODEL without tokeniser": (model_without("token*"), "no tokeniser"),
    "MODEL cut short": (model_without("*.safetensors", b"\x10" + bytes(9)), "MODEL = "),
    "MODEL with a tensor missing": (
        model_weights(lambda w: w.pop("model.layers.2.mlp.up_proj.weight")),
        "lacks model.layers.2.mlp.up_proj.weight",
    ),
    "MODEL with a tensor of another shape": (
        model_weights(lambda w: w.update({"model.norm.weight": torch.ones(31)})),
        "MODEL = ",
    ),
    "MODEL with NaN": (
        model_weights(lambda w: w["model.layers.2.mlp.up_proj.weight"].fill_(math.nan)),
        "layers.2.mlp.up_proj.weight",
        "not finite",
    ),
    "MODEL with code": (model_with_code, "MODEL = ", "code of its own, which is never run"),
    "MODEL with an adapter": (model_with_an_adapter, "has an adapter of peft", "merge it first"),
    "MODEL quantised": (model_quantised, "is quantised (bitsandbytes)", "the checkpoint that"),
    "MODEL with a Python tokeniser": (model_with_a_python_tokeniser, "in Python alone", "fast"),
    "MODEL not JSON": (model_without("config.json", b"{"), "MODEL = "),
    "LAYER beyond the model": ({"LAYER": 99}, "LAYER = 99", "blocks 0 to 2"),
    "LAYER not the SAE's": (STRICT | {"LAYER": 0}, "LAYER = 0", "of layer 1", "LAYER=1"),
    "CONTEXT beyond the model": ({"CONTEXT": 33, "TOKENS": 66}, "CONTEXT = 33", "32"),
    "SAE not there": ({"SAE": "./no/sae"}, "SAE = './no/sae'"),
    "SAE a text": (
        lambda b, t: {"SAE": b.text},
        "holds no SAE that is read here; found text.jsonl",
    ),
    "SAE nearly there": (
        lambda b, t: {"SAE": f"{b.sae}e"},
        "no such folder; did you mean",
        "/sae?",
    ),
    "DATASET nearly there": (
        lambda b, t: {"DATASET": b.text.with_name("texts.jsonl")},
        "no such file or folder; did you mean",
    ),
    "SAE an empty folder": (lambda b, t: {"SAE": t}, "holds no SAE", "ae.pt"),
    "SAE without config": (sae_file("config.json", None), "holds no SAE", "ae.pt"),
    "SAE of an unfinished run": (earlier_run_without_sae, "without sae/"),
    "SAE config not JSON": (sae_file("config.json", b"{oops"), "config.json is not JSON"),
    "SAE config a list": (sae_file("config.json", b"[]"), "config.json holds a list"),
    "SAE config nested": (sae_file("config.json", b"[" * 10**5), "config.json is not JSON"),
    "SAE a web page": (sae_file("ae.pt", b"<!DOCTYPE html><html>"), "ae.pt cannot be read"),
    "SAE an LFS pointer": (sae_file("ae.pt", b"version https://git-lfs"), "ae.pt cannot be read"),
    "SAE an empty file": (sae_file("ae.pt", b""), "ae.pt cannot be read"),
    "SAE a bare pickle": (sae_file("ae.pt", pickle.dumps({"k": Payload()})), "cannot be read"),
    "SAE with code": (pickled(zipped=True), "ae.pt cannot be read safely"),
    "SAE with code, old format": (pickled(zipped=False), "ae.pt cannot be read safely"),
    "SAE of another width": (
        lambda b, t: spoilt(b, t, lambda w, c: c.update(activation_dim=33)),
        "width 33",
    ),
    "SAE of another model": (
        lambda b, t: spoilt(b, t, lambda w, c: c.update(lm_name="a/llama"), **STRICT),
        "of a/llama",
    ),
    "SAE with a tensor missing": (
        lambda b, t: spoilt(b, t, lambda w, c: w.pop("b_dec")),
        "lacks b_dec",
    ),
    "SAE with a tensor more": (
        lambda b, t: spoilt(b, t, lambda w, c: w.update(extra=torch.ones(1))),
        "has also extra",
    ),
    "SAE transposed": (
        lambda b, t: spoilt(
            b, t, lambda w, c: w.update({"encoder.weight": w["encoder.weight"].T.contiguous()})
        ),
        "transposed",
    ),
    "SAE with NaN": (lambda b, t: spoilt(b, t, nan), "1 values that are not finite"),
    "SAE with another k": (lambda b, t: spoilt(b, t, lambda w, c: c.update(k=5)), "k is 4"),
    "SAE with k over its latents": (
        lambda b, t: spoilt(b, t, lambda w, c: (c.update(k=65), w.update(k=torch.tensor(65)))),
        "k = 65",
    ),
    "SAE that reconstructs nothing": (
        lambda b, t: spoilt(b, t, lambda w, c: w["b_dec"].add_(50), **STRICT),
        "does not reconstruct this model",
        "CHECK_SAE=False",
    ),
    "DATASET not there": ({"DATASET": "./no.jsonl"}, "DATASET = './no.jsonl'"),
    "DATASET of another kind": (text_file("a.csv", b"a,b\n"), "a.csv", "not read here"),
    "DATASET empty": (text_file("a.jsonl", b""), "DATASET = "),
    "DATASET not JSON": (text_file("a.jsonl", b"<html>\n" * 9), "DATASET = "),
    "DATASET too short": (text_file("a.jsonl", LINES), "wanted 1,536", "a longer text"),
    "DATASET too short to train on": (
        text_file("a.jsonl", LINES, VAL_TOKENS=32),
        "wanted 1,312",
        "lower TOKENS",
    ),
    "RUN_NAME with a line break": ({"RUN_NAME": "a\nb"}, "has a control character"),
    "RUN_NAME with a plus": ({"RUN_NAME": "a+b"}, "without / and +"),
    "DATASET without the key": (
        text_file("a.jsonl", LINES, TEXT_KEY="content"),
        "no 'content'; they have text",
    ),
    "DATASET with a number": (text_file("a.jsonl", b'{"text": 3}\n'), "document 0", "int"),
    "tokens of another length": (array_file(np.ones((99, 16), np.int32)), "(99, 16)"),
    "tokens that are objects": (array_file(np.array([Payload()])), "not a readable .npy"),
    "tokens beyond the vocabulary": (
        array_file(np.full((99, 32), 300, np.int32)),
        "token 300",
        "only 300",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_refused_before_anything_is_written(box, at, capsys, case):
    changes, *said = BAD[case]
    changes = changes(box, at) if callable(changes) else changes
    code = main(box, at / "runs", **changes)
    error = capsys.readouterr().err
    lines = [line.rsplit("\r", 1)[-1] for line in error.split("\n")]  # progress bars wiped
    lines = [line for line in lines if line.strip()]
    assert code == 2, error
    assert lines[0].startswith("error: ") and len(lines) <= 6 and len(error) < 2000, error
    assert all(words in error for words in said), error
    assert "Traceback" not in error and "weights_only" not in error
    assert not (at / "runs").exists() or not os.listdir(at / "runs")
    assert not (at / "canary").exists()


def test_the_payloads_would_run_if_they_were_let(at):
    pickle.loads(pickle.dumps(Payload()))
    assert (at / "canary").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_demo_is_named(box, tmp_path, capsys):
    assert main(box, tmp_path, DEVICE="cuda") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: DEVICE = 'cuda' is not there") and "`make demo`" in error


def test_a_device_that_cannot_do_it_is_refused_in_one_line(box, tmp_path, monkeypatch, capsys):
    """Apple's MPS, and GPUs without bfloat16."""
    assert main(box, tmp_path, DEVICE="mps") == 2
    assert "DEVICE = 'mps' is not supported" in capsys.readouterr().err
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, device=None, **o: zeros(*a, **o))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert main(box, tmp_path, DEVICE="cuda", DTYPE="bfloat16") == 2
    assert "Tesla T4 has no bfloat16\n  set DTYPE=float32" in capsys.readouterr().err


def test_a_recipe_that_is_not_there_is_refused_with_a_near_name(box, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(box, tmp_path, "recipes/smal.py", "hello") == 2
    error = capsys.readouterr().err
    assert "did you mean recipes/small.py?" in error and "'hello' is neither" in error


def test_recipes_and_words_are_laid_over_each_other_in_order(box, tmp_path):
    monkeypatched = tmp_path / "r.py"
    monkeypatched.write_text('"""A recipe."""\nLOSS = "kl"\nTOKENS = 64\n')
    assert main(box, tmp_path, str(monkeypatched), TOKENS=128) == 0
    about = json.loads((tmp_path / "x" / "run.json").read_text())
    assert about["recipes"] == ["r"] and about["constants"]["LOSS"] == "kl"
    assert about["constants"]["TOKENS"] == 128


def test_a_folder_that_holds_something_else_is_left_alone(box, tmp_path, capsys):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.txt").write_text("mine")
    assert main(box, tmp_path) == 2
    assert "exists and holds no run" in capsys.readouterr().err
    assert os.listdir(tmp_path / "x") == ["thesis.txt"]


def test_a_damaged_run_json_is_refused(box, tmp_path, capsys):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "run.json").write_text("{")
    assert main(box, tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "run.json" in error


def test_the_smaller_last_batch_of_the_check_is_not_taken_for_a_whole_one(box, tmp_path):
    found = []
    for size in (4, 5):  # of 20 sequences the check reads 5
        here = {"CACHE": tmp_path / f"cache{size}", "RUN_NAME": f"x{size}", "EVAL_BATCH": size}
        assert main(box, tmp_path, VAL_TOKENS=640, TOKENS=64, **here) == 0
        found.append(json.loads((tmp_path / f"x{size}" / "before.json").read_text()))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
