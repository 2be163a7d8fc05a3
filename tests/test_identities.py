"""What is kept is used again only where everything that it depends on is the same.

The evaluations and the tokens in CACHE, and a run's checkpoints.
"""

import json
import os
import shutil

import numpy as np
import pytest
import seams
import torch
from safetensors.torch import load_file, save_file
from seams import ALWAYS, QUICK, main, patch, read

box, no_figures = seams.box, seams.no_figures
pytestmark = pytest.mark.usefixtures("no_figures")
MEASURED = {"TOKENS": 0, "EVAL_EVERY": 10**9}  # the SAE as it is


# ---- what is in CACHE ------------------------------------------------------------------------


def evaluation(folder):
    return read(folder, "before.json"), seams.arrays(folder / "before.npz")


def same(a, b) -> bool:
    return a[0] == b[0] and seams.same_arrays(a[1], b[1])


def kept(cache) -> set[str]:
    """tokens-..., zero-... (the pass with the residual at zero) and eval-..."""
    return {name for name in os.listdir(cache) if name != "lock"} if cache.exists() else set()


@pytest.fixture(scope="module")
def own(box, tmp_path_factory):
    """Copies of the LM, the SAE and the text, and a cache with what was measured of them."""
    folder = tmp_path_factory.mktemp("own")
    given = MEASURED | given_in(box, folder) | {"CACHE": folder / "cache", "KEEP": "first"}
    with pytest.MonkeyPatch.context() as m:
        patch(m, "figures", lambda *args: None, least=0)
        assert main(box, folder, RUN_NAME="base", **given) == 0
    return folder, given


def given_in(box, folder) -> dict:
    """The LM, the SAE and the text as files of the test's own."""
    shutil.copytree(box.model, folder / "gem")
    shutil.copytree(box.sae, folder / "sae")
    rows = [{"text": one, "other": other} for one, other in zip(box.texts, box.texts[::-1])]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"MODEL": folder / "gem", "SAE": folder / "sae", "DATASET": folder / "text.jsonl"}


def other_text(folder):
    """The same documents in another order, of as many bytes."""
    first, *rest = (folder / "text.jsonl").read_text().splitlines(keepends=True)
    (folder / "text.jsonl").write_text("".join([*rest, first]))


def other_lm(folder):
    """In place: the file's size and dates stay."""
    path = folder / "gem" / "model.safetensors"
    old, weights = path.stat(), load_file(path)
    weights["model.layers.2.mlp.up_proj.weight"].neg_()  # the norm after it would undo a factor
    save_file(weights, path, metadata={"format": "pt"})
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))


def other_sae(name, factor=1.01):
    def change(folder):
        path = folder / "sae" / "ae.pt"
        weights = torch.load(path, weights_only=True)
        weights[name] *= factor
        torch.save(weights, path)

    return change


def moved(folder):
    """Another copy: neither names nor dates are what tells one."""
    os.utime(folder / "gem" / "model.safetensors")


def changed(folder, copy, change) -> dict:
    """A copy of the LM, the SAE and the text after that change -> the constants that name them."""
    for name in ("gem", "sae"):
        shutil.copytree(folder / name, copy / name)
    shutil.copy(folder / "text.jsonl", copy)
    change(copy)
    return {"MODEL": copy / "gem", "SAE": copy / "sae", "DATASET": copy / "text.jsonl"}


ALL = {"tokens", "zero", "eval"}
CHANGES = {  # constants, or a function of the folder with LM, SAE and text -> what is made anew
    "LAYER": ({"LAYER": 0}, {"zero", "eval"}),
    "KEEP": ({"KEEP": "special"}, {"zero", "eval"}),
    "DTYPE": ({"DTYPE": "bfloat16"}, {"zero", "eval"}),
    "VAL_TOKENS": ({"VAL_TOKENS": 128}, ALL),
    "BOS": ({"BOS": "never"}, ALL),
    "TEXT_KEY": ({"TEXT_KEY": "other"}, ALL),
    "text": (other_text, ALL),
    "LM": (other_lm, {"zero", "eval"}),
    "decoder": (other_sae("b_dec"), {"eval"}),
    "encoder": (other_sae("encoder.bias"), {"eval"}),
    "architecture": (QUICK | {"ARCHITECTURE": "batchtopk"}, {"eval"}),
    "moved": (moved, set()),
    "others": ({"SEED": 1, "BATCH": 4, "PASSES": 2, "SKIP_TOKENS": 64, "LR": 1.0}, set()),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_is_kept_is_taken_for_the_same_and_nothing_else(box, own, tmp_path, case):
    """What is made anew is what a run with an empty cache finds, and differs from the old."""
    folder, given = own
    change, anew = CHANGES[case]
    if callable(change):
        change = changed(folder, tmp_path, change)
    before = kept(given["CACHE"])
    assert main(box, tmp_path, RUN_NAME="shared", **given | change) == 0
    assert {name.split("-")[0] for name in kept(given["CACHE"]) - before} == anew
    alone = given | change | {"CACHE": tmp_path / "cache"}
    assert main(box, tmp_path, RUN_NAME="alone", **alone) == 0
    found, wanted = (evaluation(tmp_path / name) for name in ("shared", "alone"))
    assert same(found, wanted) and same(found, evaluation(folder / "base")) == (not anew)


def test_the_number_of_held_out_sequences_of_an_array_decides(box, tmp_path):
    """A .npy is the same file for any VAL_TOKENS."""
    tokens_SL = np.random.default_rng(0).integers(4, 300, (40, 32), dtype=np.uint16)
    np.save(tmp_path / "tokens.npy", tokens_SL)
    given = MEASURED | {"DATASET": tmp_path / "tokens.npy", "CACHE": tmp_path / "cache"}
    for val in (256, 128, 512):
        assert main(box, tmp_path, RUN_NAME=f"{val}", VAL_TOKENS=val, **given) == 0
        arrays = seams.arrays(tmp_path / f"{val}" / "before.npz")
        assert {a.shape for a in arrays.values()} == {(val // 32, 32), (64,)}


def test_a_kept_evaluation_is_not_made_again_and_is_the_saes_alone(box, tmp_path, monkeypatch):
    """Not even after an adapter or LoRA around the same SAE was measured."""
    measure, made = seams.original("evaluate"), []
    given = QUICK | {"CACHE": tmp_path / "cache", "LR": 0.1, "RANK": 4}
    patch(monkeypatch, "evaluate", lambda *a, **o: made.extend(a[1]) or measure(*a, **o))
    assert main(box, tmp_path, RUN_NAME="a", **given) == 0
    for train, loss in (("adapter", "kl+mse"), ("lm_lora", "kl")):
        assert main(box, tmp_path, RUN_NAME=train, TRAIN=train, LOSS=loss, **given) == 0
    n = len(made)
    assert main(box, tmp_path, RUN_NAME="b", **given) == 0
    assert n and len(made) == n and seams.differences(tmp_path / "a", tmp_path / "b") == []
    for name in ("adapter", "lm_lora"):
        assert same(evaluation(tmp_path / name), evaluation(tmp_path / "a"))


# ---- checkpoints -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unfinished(box, tmp_path_factory):
    """A run killed in its seventh step, with the checkpoints of steps 5 and 6; its constants."""
    folder = tmp_path_factory.mktemp("unfinished")
    given = ALWAYS | given_in(box, folder)
    seams.killed(box, folder / "runs", step=6, **given)
    assert seams.saved(folder / "runs" / "x") == ["step-000000005", "step-000000006"]
    return folder, given


def test_a_checkpoint_is_not_taken_for_that_of_other_constants(box, unfinished, tmp_path):
    """Where run.json was put right by hand, the checkpoints still know whose they are."""
    folder, given = unfinished
    shutil.copytree(folder / "runs", tmp_path / "runs")
    path = tmp_path / "runs" / "x" / "run.json"
    about = json.loads(path.read_text())
    about["constants"]["CLIP"] = 0.5
    path.write_text(json.dumps(about))
    assert main(box, tmp_path / "runs", **given | {"CLIP": 0.5}) == 1


@pytest.mark.parametrize("change", [other_text, other_lm, other_sae("b_dec")])
def test_a_stopped_run_does_not_go_on_with_another_text_lm_or_sae(
    box, unfinished, tmp_path, capsys, change
):
    folder, given = unfinished
    shutil.copytree(folder / "runs", tmp_path / "runs")
    names = changed(folder, tmp_path, change)
    path = tmp_path / "runs" / "x" / "run.json"
    path.write_text(path.read_text().replace(str(folder), str(tmp_path)))
    before = seams.stamps(tmp_path / "runs")
    assert main(box, tmp_path / "runs", **given | names) == 2
    assert "is not what" in capsys.readouterr().err
    assert seams.stamps(tmp_path / "runs") == before
