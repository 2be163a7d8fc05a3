"""A day with it: an SAE measured, results as data, figures for a paper, one's own text."""

# ruff: noqa: F811  a fixture is imported, and is an argument

import fcntl
import gzip
import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pandas
import pytest
from test_run import (  # noqa: F401
    ALWAYS,
    ROOT,
    box,
    kill,
    main,
    on_call,
    results,
    settings_of,
    stopped,
    without_figures,
)

import finetune
from klsplice import metrics, settings, storage
from klsplice.metrics import read_metrics
from report import data as as_data
from report import figures, plots
from report.__main__ import main as report


def message(capsys) -> str:
    return capsys.readouterr().err.rsplit("\r", 1)[-1]


# ---- measured, without training ---------------------------------------------------------------


def test_no_tokens_measure_an_sae(box, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finetune, "training_step", None)
    assert main(box, tmp_path, TOKENS=0) == 0
    found, trained = results(tmp_path / "x"), results(box.whole)
    for name in ("ce_clean", "ce_zero", "ce_before", "kl_before", "fvu_before", "l0_before"):
        assert found[name] == trained[name]
    assert found["ce_after"] == found["ce_before"] and found["gap_closed"] is None
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == [
        *("before.json", "before.npz", "lock", "metrics.jsonl", "results.json", "run.json")
    ]
    assert "gap closed" in capsys.readouterr().out
    assert main(box, tmp_path, TOKENS=0) == 0  # it is finished
    for wrong in ({"SAE": "fresh"}, {"ARCHITECTURE": "batchtopk"}):
        assert main(box, tmp_path, **{"TOKENS": 0, "RUN_NAME": "y"} | wrong) == 2
        assert "TOKENS = 0 measures an SAE as it is" in capsys.readouterr().err


def test_several_saes_are_measured_on_one_clean_pass(box, tmp_path):
    assert main(box, tmp_path, TOKENS=0, SAE=f"[{box.sae},{box.whole}]") == 0
    found = [results(tmp_path / f"x_SAE{name}") for name in ("sae", "x")]
    assert found[0]["ce_before"] == results(box.whole)["ce_before"]
    assert found[1]["ce_before"] == pytest.approx(results(box.whole)["ce_after"], abs=1e-6)
    assert list((tmp_path / "figures").glob("sweep-SAE-*.png"))


# ---- results as data ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeds(box):
    runs = box.root / "seeds"
    for lr in ("1e-3", "1e-2"):
        for seed in (0, 1, 2):
            name = f"a_LR{lr}_s{seed}"
            assert main(box, runs, LR=lr, SEED=seed, RUN_NAME=name, TOKENS=256) == 0
    return runs


def test_runs_are_rows_with_what_varies_and_the_saes_own_sizes(box, seeds, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as m:
        stopped(box, seeds, m, step=6, act=kill, raises=BaseException, RUN_NAME="s", **ALWAYS)
    folders = [str(p) for p in sorted(seeds.iterdir())]
    frame = as_data.runs(folders)
    assert list(frame["state"]) == ["finished"] * 6 + ["stopped"]
    assert set(frame["k"]) == {4} and set(frame["d_sae"]) == {64}  # run.py says K = 80
    assert {"LR", "SEED"} <= set(frame) and "CONTEXT" not in frame
    one = results(seeds / "a_LR1e-3_s1")
    row = frame[frame["name"] == "a_LR1e-3_s1"].iloc[0]
    assert row["kl_after"] == one["kl_after"] and row["gap_closed"] == one["gap_closed"]
    unfinished = frame[frame["state"] == "stopped"].iloc[0]
    assert unfinished["kl_before"] > 0 and np.isnan(unfinished["kl_after"])
    assert 0 < unfinished["tokens"] < 1280
    for ending, read in ((".csv", pandas.read_csv), (".parquet", pandas.read_parquet)):
        path = str(tmp_path / f"r{ending}")
        assert as_data.main([*folders, "--out", path]) == 0
        assert list(read(path)["name"]) == [os.path.basename(f) for f in folders]
        capsys.readouterr()
        assert as_data.main([*folders, "--out", path]) == 2  # nothing is overwritten
        assert "is there already" in capsys.readouterr().err
    assert as_data.main(folders) == 0 and "a_LR1e-3_s1" in capsys.readouterr().out


def test_seeds_are_averaged_with_their_standard_error(seeds):
    folders = [str(p) for p in sorted(seeds.iterdir()) if p.name.startswith("a_")]
    mean = as_data.averaged(folders)
    assert list(mean["name"]) == ["a_LR1e-2", "a_LR1e-3"] and list(mean["n"]) == [3, 3]
    values = [results(seeds / f"a_LR1e-2_s{i}")["kl_after"] for i in range(3)]
    row = mean.iloc[0]
    assert row["kl_after"] == pytest.approx(np.mean(values))
    assert row["kl_after_se"] == pytest.approx(np.std(values, ddof=1) / 3**0.5)


def test_seeds_of_a_named_sweep_are_averaged_too(box, tmp_path):
    assert main(box, tmp_path, SEED="[0,1,2]", TOKENS=256) == 0
    assert not (tmp_path / "figures").exists()  # seeds are no axis
    mean = as_data.averaged([str(p) for p in sorted(tmp_path.iterdir())])
    values = [results(tmp_path / f"x_SEED{i}")["kl_after"] for i in range(3)]
    assert list(mean["name"]) == ["x"] and list(mean["n"]) == [3] and "SEED" not in mean
    assert mean["kl_after"][0] == pytest.approx(np.mean(values))


def test_an_unfinished_run_has_the_names_of_a_finished_one_and_no_gap_before_an_evaluation(
    box, tmp_path
):
    for name, step in (("early", 6), ("late", 14)):  # an evaluation comes after step 10
        with pytest.MonkeyPatch.context() as m:
            stopped(box, tmp_path, m, step=step, act=kill, raises=BaseException, RUN_NAME=name)
    folders = [str(tmp_path / "early"), str(tmp_path / "late"), str(box.whole)]
    frame = as_data.runs(folders)
    assert set(frame) == set(as_data.runs(folders[2:]))
    line = [x for x in metrics.evaluations(folders[1]) if x["step"]][-1]
    early, late, _ = (row for _, row in frame.iterrows())
    for name in ("gap_closed", "ce_after", "ce_after_no_special", "kl_after_no_special"):
        assert np.isnan(early[name]) and not np.isnan(late[name])
    assert late["gap_closed"] == line["val/gap_closed"]
    assert late["ce_recovered_after_no_special"] == line["val/ce_recovered_no_special"]
    assert early["ce_before_no_special"] == results(box.whole)["ce_before_no_special"]
    mean = as_data.averaged(folders[:2])
    assert np.isnan(mean["gap_closed"][0]) and mean["gap_closed"][1] == line["val/gap_closed"]


def test_curves_are_rows_too_with_what_varies(seeds, capsys):
    frame = as_data.curves([str(seeds / f"a_LR1e-2_s{i}") for i in (0, 1)])
    assert {"name", "step", "tokens", "train/kl", "val/ce_spliced"} <= set(frame)
    assert {*zip(frame["name"], frame["SEED"])} == {("a_LR1e-2_s0", 0), ("a_LR1e-2_s1", 1)}
    for what in ("--curves", "--latents"):
        with pytest.raises(SystemExit):
            as_data.main(["--mean", what, str(seeds / "a_LR1e-2_s0")])
        assert f"{what}: not allowed with argument --mean" in capsys.readouterr().err


def test_a_kl_that_was_not_measured_is_no_number(box, tmp_path):
    assert main(box, tmp_path, LOSS="mse", TOKENS=256) == 0
    lines = [line for line in read_metrics(str(tmp_path / "x")) if "train/mse" in line]
    assert lines and all(line["train/kl"] is None for line in lines)
    assert all(line["train/alpha"] is None for line in lines)
    drawn = plots.curves([str(tmp_path / "x")]).axes
    names = [axes.get_ylabel() for axes in drawn if axes.get_visible()]
    clip = "gradient norm, before clipping"
    assert names == ["training MSE", "learning rate", clip, "tokens per second"]


def test_a_look_at_a_run_keeps_none_from_starting(tmp_path):
    reader, run = open(tmp_path / "lock", "a+"), open(tmp_path / "lock", "a")
    fcntl.flock(reader, fcntl.LOCK_SH)
    threading.Timer(0.1, reader.close).start()
    storage.lock(run, "RUNS", wait=False)
    assert storage.in_use(str(tmp_path / "lock"))
    with open(tmp_path / "lock", "a") as other, pytest.raises(BlockingIOError):
        storage.lock(other, "RUNS", wait=False)
    run.close()
    assert not storage.in_use(str(tmp_path / "lock"))


def test_which_latents_changed(box):
    frame = as_data.latents([str(box.whole)])
    assert len(frame) == 64 and sorted(frame["latent"]) == list(range(64))
    assert frame["cosine_decoder"].is_monotonic_increasing
    before = np.load(box.whole / "before.npz")
    np.testing.assert_allclose(frame["rate_before"], before["fires"][frame["latent"]])
    assert before["fires"].sum() == pytest.approx(results(box.whole)["l0_before"], rel=1e-5)
    assert (frame["mean_after"][frame["rate_after"] > 0] > 0).all()


# ---- figures for a paper -----------------------------------------------------------------------


def test_a_figure_has_the_users_path_and_kind_and_overwrites_nothing(seeds, tmp_path, capsys):
    folders = [str(p) for p in sorted(seeds.iterdir()) if p.name.startswith("a_")]
    for name in ("a.pdf", "b.svg", "c.png"):
        path = str(tmp_path / "paper" / name)
        assert figures.main(["--x", "LR", "--out", path, *folders]) == 0
        assert os.path.getsize(path) > 1000
        assert figures.main(["--x", "LR", "--out", path, *folders]) == 2
        assert "is there already" in capsys.readouterr().err
        assert figures.main(["--x", "LR", "--out", path, "--force", *folders]) == 0
    assert figures.main(["--figure", "ce", "--out", str(tmp_path / "ce.pdf"), *folders]) == 0
    with pytest.raises(SystemExit):  # of an argument
        figures.main(["--figure", "ce", "--out", str(tmp_path / "ce.jpg"), *folders])
    assert "wanted .png, .pdf, .svg" in capsys.readouterr().err
    assert figures.main(["--x", "RANK", "--out", str(tmp_path / "d.png"), *folders]) == 2
    assert "they differ in LR, SEED" in capsys.readouterr().err
    text = (tmp_path / "paper" / "b.svg").read_text()
    assert "LR" in text


def test_unfinished_runs_have_curves(box, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as m:
        stopped(box, tmp_path, m, step=6, act=kill, raises=BaseException, **ALWAYS)
    path = str(tmp_path / "c.png")
    words = ["--curve", "kl", "lr", "grad_norm", "--out", path, str(tmp_path / "x"), str(box.whole)]
    assert figures.main(words) == 0 and os.path.getsize(path) > 1000
    assert figures.main(["--curve", "no", "--out", str(tmp_path / "e.png"), str(box.whole)]) == 2
    assert "wanted one of" in capsys.readouterr().err


# ---- one's own text ----------------------------------------------------------------------------


def texts(box, n=60):
    with open(box.text) as f:
        return [json.loads(line)["text"] for line in f][:n]


@pytest.mark.parametrize("kind", ["folder", "glob", "gz", "list"])
def test_a_text_may_be_a_folder_a_glob_a_gz_or_a_list(box, tmp_path, kind):
    found = texts(box, 120)
    where = tmp_path / "texts"
    (where / "deep").mkdir(parents=True)
    name = {"folder": where, "glob": f"{where}/*.txt"}.get(kind, where / f"a.{kind}")
    if kind in ("folder", "glob"):
        for i, text in enumerate(found):
            folder = where / "deep" if kind == "folder" and i % 2 else where
            (folder / f"{i:03}.txt").write_text(text)
    elif kind == "gz":
        name = where / "a.jsonl.gz"
        with gzip.open(name, "wt") as f:
            f.writelines(json.dumps({"text": text}) + "\n" for text in found)
    else:
        name = where / "a.json"
        name.write_text(json.dumps([{"text": text} for text in found]))
    assert main(box, tmp_path / "runs", DATASET=name, TOKENS=256) == 0


def held_out(runs) -> list:
    return np.fromfile(next((runs / "cache").glob("tokens-*")) / "val.bin", np.uint32).tolist()


@pytest.mark.parametrize("kind", ["folder", "glob"])
def test_texts_of_several_kinds_are_refused_by_their_kinds(box, tmp_path, capsys, kind):
    """Each was read by the kind of the first file, or left out."""
    rows = [json.dumps({"text": text}) + "\n" for text in texts(box)]
    where = tmp_path / "texts"
    where.mkdir()
    (where / "a.txt").write_text("a b " * 999)
    (where / "b.jsonl").write_text("".join(rows[:30]))
    with gzip.open(where / "c.jsonl.gz", "wt") as f:
        f.writelines(rows[30:])
    name = where if kind == "folder" else f"{where}/*"
    assert main(box, tmp_path / "runs", DATASET=name, TOKENS=0) == 2
    assert "several kinds: .jsonl, .jsonl.gz, .txt" in message(capsys)
    (where / "a.txt").unlink()  # lines of JSON, packed or not, are one kind
    cached = {"TOKENS": 0, "VAL_TOKENS": 2048, "CACHE": tmp_path / "a" / "cache"}
    assert main(box, tmp_path / "runs", DATASET=name, **cached) == 0, message(capsys)
    (tmp_path / "all.jsonl").write_text("".join(rows))
    cached = {"TOKENS": 0, "VAL_TOKENS": 2048, "CACHE": tmp_path / "b" / "cache"}
    assert main(box, tmp_path / "all", DATASET=tmp_path / "all.jsonl", **cached) == 0
    assert held_out(tmp_path / "a") == held_out(tmp_path / "b") != []
    (where / "z.md").write_text("not read")
    assert main(box, tmp_path / "runs", DATASET=f"{where}/*", TOKENS=0, RUN_NAME="y") == 2
    assert "z.md is of a kind not read here" in message(capsys)


def test_one_long_text_is_cut_in_two_with_a_gap(box, tmp_path):
    (tmp_path / "long.txt").write_text(" ".join(texts(box, 120)))
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
