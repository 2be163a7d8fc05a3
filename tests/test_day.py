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
    strip = lambda t: t.reshape(-1, 32)[:, 32 - body :].flatten().tolist()  # noqa: E731
    assert strip(held_out) == ids[: len(strip(held_out))]
    start = len(strip(held_out)) + body
    assert strip(train)[: 4 * body] == ids[start : start + 4 * body]


def test_a_commit_of_another_repository_is_left_out(tmp_path):
    (found,) = settings.read(["DATASET=who/what", "MODEL=who/lm"])
    assert (found.DATASET_REVISION, found.MODEL_REVISION) == ("", "")
    (found,) = settings.read(["DATASET=who/what", "DATASET_REVISION=abc"])
    assert found.DATASET_REVISION == "abc" and found.MODEL_REVISION != ""
    mine = settings.defaults()
    found = settings.read([f"MODEL=[who/lm,{mine['MODEL']},who/other]", "DATASET=[who/what]"])
    assert [c.MODEL_REVISION for c in found] == ["", mine["MODEL_REVISION"], ""]
    assert {c.DATASET_REVISION for c in found} == {""}
    (tmp_path / "a.py").write_text('MODEL_REVISION = "abc"\nMODEL = ["x/y", "x/z"]\n')
    found = settings.read([str(tmp_path / "a.py")])
    assert [c.MODEL_REVISION for c in found] == ["abc", "abc"]
    found = settings.read([str(tmp_path / "a.py"), "MODEL=[x/z,who/lm]"])
    assert [c.MODEL_REVISION for c in found] == ["abc", ""]


# ---- nothing passes in silence -----------------------------------------------------------------


def test_a_warm_up_longer_than_the_run_is_said(box, tmp_path, capsys):
    settings.read(settings_of(box, tmp_path, WARMUP=20))
    assert "warning: WARMUP = 20 is not over when the run ends" in capsys.readouterr().out
    settings.read(settings_of(box, tmp_path, WARMUP=19))
    assert "WARMUP" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("RANK=4", "RANK has no effect with TRAIN = sae"),
        ("LOGITS=float32", "LOGITS has no effect with DTYPE = float32"),
        ("SPLIT=train", "SPLIT has no effect with a local DATASET"),
        ("ADAPTER=mlp", "ADAPTER has no effect"),
    ],
)
def test_a_constant_without_effect_is_said(box, tmp_path, capsys, word, why):
    settings.read([*settings_of(box, tmp_path), word])
    assert f"warning: {why}" in capsys.readouterr().out
    settings.read(settings_of(box, tmp_path))
    assert "RANK" not in capsys.readouterr().out


def test_a_rate_at_which_the_loss_explodes_stops_the_run(box, tmp_path, monkeypatch, capsys):
    """CE over that with the residual at zero, which a random LM has by nature: so it is set."""
    import eval as evaluation

    measure = evaluation.Evaluation.measure

    def worse(self, learners, n, poll=lambda: None):
        if not learners:
            return []
        ((learner,), (found,)) = learners, measure(self, learners, n, poll)
        trained = learner.model.W_dec_FD.grad is not None or n_calls.append(0) or len(n_calls) > 1
        found.numbers["ce_zero"] = found.numbers["ce_clean"] + 1
        if trained:
            found.numbers["ce_spliced"] = found.numbers["ce_zero"] + 1
        else:
            found.numbers["ce_spliced"] = found.numbers["ce_clean"] + 0.5
        return [found]

    n_calls = []
    monkeypatch.setattr(evaluation.Evaluation, "measure", worse)
    monkeypatch.setattr(evaluation.Evaluation, "_known_path", lambda self, learner: None)
    monkeypatch.setattr(evaluation, "check_sae", lambda *a, **o: None)
    assert main(box, tmp_path) == 1
    assert "over that with the residual at zero" in message(capsys)
    n_calls.clear()
    assert main(box, tmp_path / "late", EVAL_EVERY=10**9) == 1  # only the last one sees it
    said = message(capsys)
    assert "over that with the residual at zero" in said and said.endswith("lower LR\n")
    assert not (tmp_path / "late" / "x" / "results.json").exists()
    for where in (tmp_path, tmp_path / "late"):  # nor does the same command go on past it
        n_calls[:] = [0, 0]
        assert main(box, where, **({"EVAL_EVERY": 10**9} if where != tmp_path else {})) == 1
    frame = as_data.runs([str(tmp_path / "x")])
    assert list(frame["state"]) == ["failed"]


def test_a_run_that_began_is_not_doubted_when_it_goes_on(box, tmp_path, monkeypatch):
    """CACHE may be gone, with the whole evaluation that the check took."""
    import eval as evaluation

    with monkeypatch.context() as m:
        on_call(m, finetune, "training_step", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main(box, tmp_path) == 143
    monkeypatch.setattr(evaluation, "check_sae", None)
    assert main(box, tmp_path) == 0


def test_what_is_not_finished_is_left_out_of_tables_and_figures_and_said(box, tmp_path, capsys):
    assert main(box, tmp_path, TOKENS=0, RUN_NAME="a") == 0
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run.json").write_text((tmp_path / "a" / "run.json").read_text())
    capsys.readouterr()
    assert report([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out
    assert "note: unfinished runs are left out: 1" in said and "a " in said


def test_a_recipe_over_an_edited_constant_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(settings, "edited", lambda known: {"LR"})
    (tmp_path / "a.py").write_text("LR = 1e-3\n")
    settings.read([str(tmp_path / "a.py")])
    said = capsys.readouterr().out
    assert "sets LR, which was edited in run.py" in said and "LR=5e-05 after the recipe" in said
    settings.read([str(tmp_path / "a.py"), "LR=1e-4"])
    assert "edited" not in capsys.readouterr().out


def test_ctrl_c_ends_a_shell_loop(box, tmp_path):
    """Saved, and dead of its signal, which is what a shell looks at."""
    words = [
        sys.executable,
        f"{ROOT}/run.py",
        *settings_of(box, tmp_path, TOKENS=10**4, PASSES=900),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with open(tmp_path / "said", "w") as said:
        started = subprocess.Popen(words, env=env, stdout=said, stderr=said)
        while "before:" not in (tmp_path / "said").read_text():
            assert started.poll() is None, (tmp_path / "said").read_text()
        import time

        time.sleep(1)
        started.send_signal(signal.SIGINT)
        assert started.wait(60) == -signal.SIGINT
    assert "the same command resumes there" in (tmp_path / "said").read_text()
