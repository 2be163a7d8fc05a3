"""A day with it, in whole runs: an SAE measured, a run cut off, results as data, one's own text."""

# ruff: noqa: F811  a fixture is imported, and is an argument

import json

import numpy as np
import pytest
from test_run import (  # noqa: F401
    ALWAYS,
    RUN_FIGURES,
    Killed,
    box,
    kill,
    main,
    on_call,
    results,
    sends,
    stopped,
    without_figures,
)

import finetune
from klsplice import metrics
from report import card, changes, figures, runs


def test_no_tokens_measure_an_sae(box, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "training_step", None)
    assert main(box, tmp_path, TOKENS=0) == 0
    found, trained = results(tmp_path / "x"), results(box.whole)
    for name in ("ce_clean", "ce_zero", "ce_before", "kl_before", "fvu_before", "l0_before"):
        assert found[name] == trained[name]
    assert found["ce_after"] == found["ce_before"]
    assert found["gap_closed"] is None and found["kl_removed"] is None
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == [
        *("before.json", "before.npz", "lock", "metrics.jsonl", "results.json", "run.json")
    ]
    for wrong in ({"SAE": "fresh"}, {"ARCHITECTURE": "batchtopk"}):
        assert main(box, tmp_path, **{"TOKENS": 0, "RUN_NAME": "y"} | wrong) == 2


def test_results_say_how_much_kl_was_removed(box):
    found = results(box.whole)
    wanted = (found["kl_before"] - found["kl_after"]) / found["kl_before"]
    assert found["kl_removed"] == pytest.approx(wanted)
    assert f"removed {wanted:.1%} of the KL" in (box.whole / "sae/README.md").read_text()


def test_a_card_that_fails_costs_no_results(box, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as m:
        m.setattr(card, "text", lambda *args: 1 / 0)
        assert main(box, tmp_path) == 0
    assert "note: no card" in capsys.readouterr().out
    assert results(tmp_path / "x")["kl_after"] == results(box.whole)["kl_after"]
    assert main(box, tmp_path) == 0 and (tmp_path / "x/sae/README.md").exists()


def test_killed_while_it_draws_a_run_is_finished(box, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        on_call(m, figures, "run_figures", 0, kill)
        with pytest.raises(Killed):
            main(box, tmp_path)
    assert (tmp_path / "x/results.json").exists() and not (tmp_path / "x/figures").exists()
    monkeypatch.setattr(figures, "run_figures", RUN_FIGURES)
    assert main(box, tmp_path) == 0 and (tmp_path / "x/sae/README.md").exists()
    drawn = {p.stem for p in (tmp_path / "x/figures").iterdir()}
    assert drawn == {"ce", "cosine", "curves", "gained"}


def test_an_unfinished_run_has_the_names_of_a_finished_one(box, tmp_path):
    for name, step in (("early", 6), ("late", 14)):  # an evaluation comes after step 10
        with pytest.MonkeyPatch.context() as m:
            cut = {"act": kill, "raises": BaseException, "RUN_NAME": name}
            stopped(box, tmp_path, m, step=step, **cut, **ALWAYS)
    folders = [str(tmp_path / "early"), str(tmp_path / "late"), str(box.whole)]
    table = runs.as_data(runs.of_folders(folders))
    assert {*table} == {*runs.as_data(runs.of_folders(folders[2:]))}
    assert [*table["state"]] == ["stopped", "stopped", "finished"] and {*table["k"]} == {4}
    line = [x for x in metrics.evaluations(folders[1]) if x["step"]][-1]
    for name in ("gap_closed", "kl_removed", "ce_after", "kl_after_no_special"):
        assert np.isnan(table[name][0]) and not np.isnan(table[name][1])
    assert table["gap_closed"][1] == line["val/gap_closed"]
    assert table["ce_before_no_special"][0] == results(box.whole)["ce_before_no_special"]
    assert 0 < table["tokens"][1] < table["tokens"][2] and table["seconds"].isna().sum() == 2


def test_which_latents_changed(box):
    table = changes.latents(runs.of_folders([str(box.whole)]))
    assert sorted(table["latent"]) == list(range(64)) and {*table["name"]} == {"x"}
    assert table["cosine_decoder"].is_monotonic_increasing
    np.testing.assert_allclose(table["turned_decoder"], 1 - table["cosine_decoder"])
    before = np.load(box.whole / "before.npz")
    np.testing.assert_allclose(table["rate_before"], before["fires"][table["latent"]])
    assert before["fires"].sum() == pytest.approx(results(box.whole)["l0_before"], rel=1e-5)
    assert (table["mean_after"][table["rate_after"] > 0] > 0).all()


def test_a_rate_at_which_the_loss_explodes_stops_the_run(box, tmp_path, monkeypatch):
    """CE over that with the residual at zero, which a random LM has by nature: so it is set."""
    import eval as evaluation

    measure, calls = evaluation.Evaluation.measure, []

    def worse(self, learner, n, poll=lambda: None):
        found = measure(self, learner, n, poll)
        calls.append(n)  # of the check, before, and then after some training
        found.numbers["ce_zero"] = found.numbers["ce_clean"] + 1
        found.numbers["ce_spliced"] = found.numbers["ce_clean"] + (0.5 if len(calls) < 3 else 2)
        return found

    monkeypatch.setattr(evaluation.Evaluation, "measure", worse)
    assert main(box, tmp_path, CACHE=tmp_path / "cache") == 1
    assert not (tmp_path / "x" / "results.json").exists()
    assert runs.read(str(tmp_path / "x"))["state"] == "failed"


def test_a_run_that_began_is_not_doubted_when_it_goes_on(box, tmp_path, monkeypatch):
    """CACHE may be gone, with the whole evaluation that the check took."""
    import eval as evaluation

    assert stopped(box, tmp_path, monkeypatch, step=3, act=sends(15)) == 143
    monkeypatch.setattr(evaluation, "check_sae", None)
    assert main(box, tmp_path) == 0


# ---- one's own text ----------------------------------------------------------------------------


def test_one_long_text_is_cut_in_two_with_a_gap(box, tmp_path):
    rows = [json.loads(line)["text"] for line in box.text.read_text().splitlines()]
    (tmp_path / "long.txt").write_text(" ".join(rows))
    cache = {"CACHE": tmp_path / "cache"}
    assert main(box, tmp_path / "runs", DATASET=tmp_path / "long.txt", TOKENS=256, **cache) == 0
    (folder,) = (tmp_path / "cache").glob("tokens-*")
    held_out, train = (np.fromfile(folder / f"{n}.bin", np.uint32) for n in ("val", "train"))
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(box.model))
    ids = tokenizer((tmp_path / "long.txt").read_text(), add_special_tokens=False)["input_ids"]
    body = 31 if held_out[0] == tokenizer.bos_token_id else 32
    held_out, train = (t.reshape(-1, 32)[:, 32 - body :].flatten() for t in (held_out, train))
    assert held_out.tolist() == ids[: len(held_out)]
    start = len(held_out) + body
    assert train[: 4 * body].tolist() == ids[start : start + 4 * body]
