"""What the screen shows while something takes time, and what it says of a bad start."""
# ruff: noqa: F811  a fixture is imported, and is an argument

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from seams import QUICK, box, main, no_figures, original  # noqa: F401

from data import Tokens
from eval import Evaluation
from klsplice import machine, progress


@pytest.fixture
def software_bfloat16(monkeypatch):
    """A CPU without bfloat16 instructions."""
    monkeypatch.setattr(machine, "cpu_has_bfloat16", lambda: False)
    machine.note_slow.cache_clear()
    yield
    machine.note_slow.cache_clear()


@pytest.mark.parametrize("dtype, times", [("bfloat16", 1), ("float32", 0)])
def test_slow_bfloat16_is_said_once_and_first(
    box, tmp_path, capsys, software_bfloat16, no_figures, dtype, times
):
    assert main(box, tmp_path, **QUICK | {"DTYPE": dtype, "SEED": [0, 1]}) == 0
    lines = capsys.readouterr().out.splitlines()
    warned = [i for i, line in enumerate(lines) if "DTYPE=float32" in line]
    loading = next(i for i, line in enumerate(lines) if line.startswith("loading"))
    assert len(warned) == times
    assert all(i < loading for i in warned)


def test_an_evaluation_has_a_bar(box, tmp_path, capsys, monkeypatch, no_figures):
    monkeypatch.setattr(progress, "SOON", 0.0)
    assert main(box, tmp_path, **QUICK | {"CACHE": tmp_path / "cache"}) == 0
    assert "measuring: " in capsys.readouterr().err


def test_residuals_have_a_bar_before_the_first_step(box, tmp_path, capsys, monkeypatch, no_figures):
    said = []

    def step(*args, **options):
        said.append(capsys.readouterr().err)
        return old(*args, **options)

    old = original("step")
    monkeypatch.setattr(progress, "SOON", 0.0)
    monkeypatch.setattr("finetune.Optimizer.step", step)
    changes = QUICK | {"SAE": "fresh", "D_SAE": 64, "K": 4, "LOSS": "mse", "SHUFFLE": 2}
    assert main(box, tmp_path, **changes) == 0
    assert "residuals to shuffle: " in said[0]


def test_tokens_0_measures_what_training_refuses(box, tmp_path, capsys, no_figures):
    t = tiny.given("topk")
    tiny.write_sae(tmp_path / "wrong", "topk", t | {"W_dec": -t["W_dec"]})
    changes = QUICK | {"CHECK_SAE": True, "SAE": tmp_path / "wrong"}
    assert main(box, tmp_path, **changes) == 2
    assert not (tmp_path / "x").exists()
    assert main(box, tmp_path, **changes | {"TOKENS": 0}) == 0
    assert "warning: this SAE" in capsys.readouterr().out
    assert (tmp_path / "x" / "results.json").exists()


OUTLIERS = [  # where they are, KEEP, and the one that would help
    ([], "none", ""),
    ([(0, 0), (1, 0)], "none", "first"),
    ([(0, 0), (1, 0)], "special", "first"),
    ([(0, 0), (1, 0)], "first", ""),
    ([(0, 2)], "none", "special"),  # a special token
    ([(0, 0), (1, 3)], "none", "outliers"),
    ([(0, 0), (1, 3)], "outliers", ""),
]


@pytest.mark.parametrize(("places", "keep", "helps"), OUTLIERS)
def test_outlying_norms_say_which_keep_helps(places, keep, helps):
    tokens_SL, x_SLD = np.ones((2, 6), np.uint32), torch.ones(2, 6, 4)
    tokens_SL[0, 2] = 7
    for place in places:
        x_SLD[place] = 100
    cfg = SimpleNamespace(KEEP=keep)
    tokens = Tokens(tokens_SL, None, None, cfg, special=[7], bos=False, fingerprint="")
    splice = SimpleNamespace(clean=lambda *_, **__: SimpleNamespace(base_BLD=x_SLD))
    splice.head = SimpleNamespace(W_VD=torch.zeros(1))
    measure = SimpleNamespace(tokens=tokens, batch=2)
    assert Evaluation.keep_that_helps(measure, splice, 2) == helps
