"""A list is a sweep: each of its runs is the run made alone, and what they share is made once."""

# ruff: noqa: F811  a fixture is imported, and is an argument

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from types import SimpleNamespace

import naive
import pytest
import torch
from test_run import (  # noqa: F401
    ALWAYS,
    LEARNERS,
    ROOT,
    box,
    main,
    on_call,
    results,
    same_run,
    settings_of,
    without_figures,
)

import eval as evaluation
import finetune
import run
from evals import timing
from klsplice import naming, settings, turns
from klsplice.errors import UserError
from klsplice.lm.splice import Splice
from klsplice.tracking import checkpoint
from learners import start
from report import runs

RATES = "LR=[1e-3,1e-2,3e-3]"


def folders(runs):
    return {p.name: p for p in runs.iterdir() if (p / "run.json").exists()}


def alone(box, runs, sweep, **changes):
    """Each run of a sweep's folder, made by itself, with the constants that it says."""
    for name, folder in folders(sweep).items():
        c = json.loads((folder / "run.json").read_text())["constants"]
        varied = {n: c[n] for n in ("LR", "LOSS", "SAE", "TRAIN", "SEED", "ARCHITECTURE")}
        assert main(box, runs, **changes | varied | {"RUN_NAME": name}) == 0
    return {name: (folder, runs / name) for name, folder in folders(sweep).items()}


# ---- what is asked for -----------------------------------------------------------------------


def test_lists_are_combined_and_each_run_is_named_after_what_varies():
    found = settings.read(["LR=[1e-4,3e-4]", "LOSS=[mse, kl]", "SAE=fresh"])
    wanted = {(lr, loss) for lr in (1e-4, 3e-4) for loss in ("mse", "kl")}
    assert len(found) == 4 and {(c.LR, c.LOSS) for c in found} == wanted
    names = [naming.run_name(c, None) for c in found]
    assert len(set(names)) == 4 and all(f"LR{c.LR}" in n for c, n in zip(found, names))
    for cfg, name in zip(found, names):  # as if it were asked for alone
        (one,) = settings.read([f"LR={cfg.LR}", f"LOSS={cfg.LOSS}", "SAE=fresh"])
        assert naming.run_name(one, None) == name and one.constants() == cfg.constants()
    named = settings.read(["RUN_NAME=x", "LR=[1e-4,3e-4]", "SAE=[a/b/c,d/e/f]"])
    assert {c.RUN_NAME for c in named} == {
        f"x_SAE{sae}_LR{lr}" for sae in "cf" for lr in (1e-4, 3e-4)
    }


def test_names_differ_where_values_do():
    def names(*words):
        found = settings.read(["SAE=fresh", *words])
        source = lambda: SimpleNamespace(architecture="topk", k=4, d_sae=64)  # noqa: E731
        return {naming.run_name(cfg, source) for cfg in found}

    widths = "[1000,1024,4000,4096,4100,64000,65536,66560]"
    assert len(names(f"D_SAE={widths}", "K=4")) == 8
    ends = {name.partition("_SAE")[2] for name in names("SAE=[a/b/sae,d/e,/f/g]")}
    assert ends == {f"{sae}_s0" for sae in ("sae", "e", "g")}
    named = settings.read(["SAE=[a/x,c/y]", "RUN_NAME=n"])
    assert [cfg.RUN_NAME for cfg in named] == ["n_SAEx", "n_SAEy"]


TWICE = (
    ["RUN_NAME=y", "--", "RUN_NAME=y", "LR=1e-3"],
    ["RUN_NAME=", "SEED=1", "--", "RUN_NAME=", "SEED=1"],
    ["RUN_NAME=", "ARCHITECTURE=[,topk]"],
    ["RUNS=runs", "RUN_NAME=y", "--", "RUNS=./runs/", "RUN_NAME=y", "LR=1e-3"],
)


@pytest.mark.parametrize("words", TWICE)
def test_two_runs_of_one_name_are_refused_before_anything_starts(box, tmp_path, capsys, words):
    given = [w for w in settings_of(box, tmp_path / "runs") if not w.startswith("RUN_NAME=")]
    both = [word for w in words for word in ([w, *given] if w == "--" else [w])]
    assert run.main([*given, *both]) == 2
    said = capsys.readouterr().err
    assert "two runs of this command are called" in said and said.count("error") == 1
    assert not (tmp_path / "runs").exists()


def test_a_recipe_and_run_py_may_hold_lists(at):
    (at / "k.py").write_text('SAE = ["a/b/trainer_0", "a/b/trainer_1"]\n')
    assert [c.SAE for c in settings.read(["k.py"])] == ["a/b/trainer_0", "a/b/trainer_1"]
    assert [c.SAE for c in settings.read(["k.py", "SAE=x"])] == ["x"]


def test_words_after_two_dashes_are_of_a_run_of_their_own():
    found = settings.read(["LR=1e-4", "--", "LR=[1e-3,1e-2]", "LOSS=mse", "--", "SEED=3"])
    assert [(c.LR, c.LOSS, c.SEED) for c in found] == [
        *((1e-4, "kl+mse", 0), (1e-3, "mse", 0), (1e-2, "mse", 0), (5e-5, "kl+mse", 3))
    ]
    assert len({c.sweep for c in found}) == 1 and "LOSS-LR-SEED" in found[0].sweep
    assert settings.read(["LR=1e-4"])[0].sweep == ""


def test_another_sweep_has_another_name_and_the_same_one_its_own():
    def name(*words):
        return settings.read([*words])[0].sweep

    first = name("LR=[1e-4,3e-4]")
    assert first == name("LR=[1e-4,3e-4]", "TOGETHER=1", "WANDB_MODE=offline")
    others = ["LR=[1e-4,3e-3]"], ["LR=[1e-4,3e-4,1e-3]"], ["LR=[1e-4,3e-4]", "SEED=1"]
    assert len({first, *(name(*words) for words in others)}) == 4


@pytest.mark.parametrize(
    "word", ["LR=[1e-4,x]", "LR=[]", "RUNS=[a,b]", "RUN_NAME=[a,b]", "LR=[0,1]"]
)
def test_a_list_with_an_impossible_value_is_refused(word):
    with pytest.raises(UserError) as e:
        settings.read([word])
    assert word.partition("=")[0] in e.value.what and e.value.code == 2


def test_only_runs_on_the_same_tokens_and_lm_share_a_world():
    words = [
        "LR=[1e-4,1e-3]",
        "SEED=[0,1]",
        "--",
        "TRAIN=lm_lora",
        "LOSS=kl",
        "--",
        "TRAIN=adapter",
    ]
    groups = start.worlds(settings.read(words))
    assert [len(group) for group in groups] == [3, 2, 1]
    assert [{c.SEED for c in group} for group in groups] == [{0}, {1}, {0}]
    assert groups[2][0].TRAIN == "lm_lora" and "adapter" in {c.TRAIN for c in groups[0]}


# ---- each run is the run made alone ----------------------------------------------------------


def test_runs_together_are_the_runs_alone_to_the_last_bit(box, tmp_path, capsys):
    """Two losses, two SAEs, two rates: evaluations on the way, results and curves."""
    lists = {"SAE": f"[{box.sae},{box.whole}]", "LR": "[1e-3,1e-2]", "LOSS": "[kl+mse,mse]"}
    assert main(box, tmp_path / "a", **lists) == 0
    said = capsys.readouterr().out
    assert said.count("held out") == 1  # the text, once
    pairs = alone(box, tmp_path / "b", tmp_path / "a")
    assert len(pairs) == 8 and all(same_run(*pair) for pair in pairs.values())
    for a, b in pairs.values():
        found = [results(folder) for folder in (a, b)]
        for x in found:
            for name in ("together", "seconds", "tokens_per_second", "peak_memory_gb"):
                del x[name]
        assert found[0] == found[1]
        abouts = [json.loads((folder / "run.json").read_text()) for folder in (a, b)]
        for about in abouts:  # a run on MSE alone has no pass with gradients through the LM
            by_itself = about["checked"].pop("learning", None) is None
            assert not by_itself or about["constants"]["LOSS"] == "mse"
        same = [{n: about[n] for n in ("resolved", "source", "checked")} for about in abouts]
        assert same[0] == same[1]


@pytest.mark.parametrize("case", [*LEARNERS, "micro-batches", "outliers"])
def test_whatever_learns_is_the_same_in_a_sweep(box, tmp_path, case):
    if "LoRA" in case:
        pytest.importorskip("peft")
    changes = LEARNERS.get(case, {}) | {"RANK": 4, "TOKENS": 512}
    changes.pop("LR", None)
    changes |= {"micro-batches": {"MICRO_BATCH": 1, "BATCH": 4, "CLEAN_BATCH": 2}}.get(case, {})
    changes |= {"outliers": {"KEEP": "outliers"}}.get(case, {})
    assert main(box, tmp_path / "a", "LR=[1e-3,1e-2]", **changes) == 0
    pairs = alone(box, tmp_path / "b", tmp_path / "a", **changes)
    assert len(pairs) == 2 and all(same_run(*pair) for pair in pairs.values())
    for a, b in pairs.values():
        files = sorted(p.relative_to(a) for p in a.rglob("*.safetensors"))
        assert files and all((a / f).read_bytes() == (b / f).read_bytes() for f in files)


def test_clean_passes_and_the_zero_ablated_pass_are_made_once(box, tmp_path, monkeypatch):
    seen = Counter()

    def counted(owner, name):
        f = getattr(owner, name)

        def wrapped(*args, **options):
            seen[name] += 1
            return f(*args, **options)

        monkeypatch.setattr(owner, name, wrapped)

    for owner, name in (
        *((Splice, "clean"), (Splice, "spliced"), (finetune, "training_step")),
        (evaluation.Evaluation, "_ce_zero"),
    ):
        counted(owner, name)
    cache = {"CACHE": tmp_path / "cache"}
    assert main(box, tmp_path, **cache) == 0
    one = Counter(seen)
    for path in (tmp_path / "cache").glob("*.npz"):
        path.unlink()
    seen.clear()
    assert main(box, tmp_path, RATES, RUN_NAME="y", **cache) == 0
    assert seen["training_step"] == 3 * one["training_step"]
    assert seen["clean"] == one["clean"]
    assert seen["spliced"] < 3 * one["spliced"]  # the zero-ablated ones


# ---- stopped, killed, failed -----------------------------------------------------------------


def test_a_sweep_whose_runs_were_stopped_at_different_steps_goes_on(box, tmp_path, capsys):
    for step, lr in ((3, 1e-3), (9, 1e-2)):  # the third has not begun
        name = {"RUN_NAME": f"x_LR{lr}", "LR": lr}
        with pytest.MonkeyPatch.context() as m:
            on_call(m, finetune, "training_step", step, lambda: os.kill(os.getpid(), signal.SIGINT))
            assert main(box, tmp_path / "a", **name, **ALWAYS) == 128 + signal.SIGINT
    assert main(box, tmp_path / "a", RATES) == 0
    said = capsys.readouterr().out
    assert "resuming after step 4" in said and "resuming after step 10" in said
    pairs = alone(box, tmp_path / "b", tmp_path / "a")
    assert len(pairs) == 3 and all(same_run(*pair) for pair in pairs.values())


@pytest.mark.parametrize("where", ["a step", "an evaluation", "the first evaluation"])
def test_a_signal_stops_all_runs_and_the_same_command_goes_on(
    box, tmp_path, monkeypatch, capsys, where
):
    owner, name, number = {
        "a step": (finetune, "training_step", 10),
        "an evaluation": (evaluation, "score_head", 5),
        "the first evaluation": (evaluation, "score_head", 5),
    }[where]
    if where == "the first evaluation":
        monkeypatch.setattr(evaluation.Evaluation, "_known_path", lambda self, learner: None)
    with pytest.MonkeyPatch.context() as m:
        on_call(m, owner, name, number, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main(box, tmp_path / "a", RATES) == 128 + signal.SIGTERM
    said = capsys.readouterr()
    assert (said.out + said.err).count("SIGTERM in each of the 3 runs: finishing") == 1
    assert not any(
        (folder / "results.json").exists() for folder in folders(tmp_path / "a").values()
    )
    assert main(box, tmp_path / "a", RATES) == 0
    pairs = alone(box, tmp_path / "b", tmp_path / "a")
    assert len(pairs) == 3 and all(same_run(*pair) for pair in pairs.values())


def test_runs_stop_after_the_step_that_a_signal_came_in(box, tmp_path, monkeypatch, capsys):
    made, new = [], turns.Turns.__init__
    monkeypatch.setattr(turns.Turns, "__init__", lambda s, *a: made.append(s) or new(s, *a))
    comes = lambda: made[0]._on_signal(signal.SIGINT, None)  # noqa: E731  in the fourth step
    on_call(monkeypatch, finetune, "training_step", 9, comes)
    assert main(box, tmp_path, RATES) == 128 + signal.SIGINT
    assert capsys.readouterr().out.count("stopped after step 4 of 20") == 3


def test_a_signal_while_the_last_run_is_saved_starts_no_further_one(box, tmp_path, monkeypatch):
    """Seeds share nothing, so each is a group of its own."""
    from klsplice.formats import write

    on_call(monkeypatch, write, "save", 0, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main(box, tmp_path, SEED="[0,1,2]") == 128 + signal.SIGTERM
    assert [(f / "results.json").exists() for f in folders(tmp_path).values()] == [True]


def test_runs_made_together_have_no_minutes_of_their_own(box, tmp_path, capsys):
    """The first one at a step makes the clean pass for all."""
    assert main(box, tmp_path, RATES) == main(box, tmp_path / "one", RATES, TOGETHER=1) == 0
    made = [*folders(tmp_path).values()], [*folders(tmp_path / "one").values()]
    for some, n in zip(made, (3, 1)):
        for folder in some:
            assert results(folder)["together"] == n
            assert (runs.read(str(folder))["minutes"] is None) == (n > 1)
            card = (folder / "sae" / "README.md").read_text()
            assert ("beside 2 other runs" in card) == (n > 1)
    capsys.readouterr()
    for some, noted in zip(made, (3, 0)):
        assert timing.main([str(folder) for folder in some]) == 0
        said = capsys.readouterr().out
        assert ("without minutes of their own: 3\n" in said) == bool(noted)


def test_one_run_that_fails_leaves_the_others(box, tmp_path, monkeypatch, capsys):
    """In its set-up, in a step, and while it saves; the code says so, and the rest is whole."""
    save = checkpoint.save

    def full(folder, *args, **about):
        if "LR0.01" in folder:
            raise OSError(28, "No space left on device")
        return save(folder, *args, **about)

    monkeypatch.setattr(checkpoint, "save", full)
    words = [*settings_of(box, tmp_path / "a"), "LR=[1e-3,1e-2]", "--"]
    assert main(box, tmp_path / "a", *words, SAE=tmp_path / "none", RUN_NAME="z") == 1
    said = capsys.readouterr()
    assert "LR0.01" in said.err and "free some" in said.err and "no such folder" in said.err
    assert said.out.endswith("runs that failed: 2; why stands above\n")
    monkeypatch.undo()
    found = folders(tmp_path / "a")
    assert [(f / "results.json").exists() for _, f in sorted(found.items())] == [True, False]


def test_what_no_memory_is_left_for_is_made_afterwards(box, tmp_path, monkeypatch):
    dry, tried = finetune.dry_step, []

    def dry_step(cfg, learner, batches):
        tried.append(cfg.LR)
        if len(tried) == 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return dry(cfg, learner, batches)

    monkeypatch.setattr(finetune, "dry_step", dry_step)
    assert main(box, tmp_path, RATES) == 0
    assert tried == [1e-3, 1e-2, 3e-3, 1e-2]
    assert all((f / "results.json").exists() for f in folders(tmp_path).values())


def test_where_there_is_no_memory_for_any_each_is_set_up_once(box, tmp_path, monkeypatch, capsys):
    tried = []

    def dry_step(cfg, learner, batches):
        tried.append(cfg.LR)
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(finetune, "dry_step", dry_step)
    assert main(box, tmp_path, RATES) == 2
    said = capsys.readouterr().err
    assert tried == [1e-3, 1e-2, 3e-3] and said.count("error: out of memory") == 1
    assert "LR0.001: error: " in said and "LR0.003: the same\n" in said


def test_what_fails_for_all_is_tried_and_said_once(box, tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr("data.prepare", lambda *a: made.append(1) or _refuse())
    assert main(box, tmp_path, RATES) == 2
    assert len(made) == 1 and capsys.readouterr().err.count("no text") == 1


def _refuse():
    raise UserError("no text", "wanted some")


def test_after_a_signal_in_a_set_up_no_other_one_begins(box, tmp_path, monkeypatch):
    tried, dry = [], finetune.dry_step

    def sends(*given):
        tried.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)  # the main thread, which handles it, has its turn
        return dry(*given)

    monkeypatch.setattr(finetune, "dry_step", sends)
    assert main(box, tmp_path, RATES) == 128 + signal.SIGTERM
    assert len(tried) == 1 and len(folders(tmp_path)) <= 1


def test_blocks_may_be_compiled_as_often_in_each_thread():
    """PyTorch's limit is a thread's own; over it blocks would run uncompiled, without a word."""
    lm, found = naive.build_lm("gemma2", seed=0, context=8), []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch, "compile", lambda f, **options: f)
        splice = Splice(lm, 1, head_chunk=8, compiled=True)

    def work():
        splice.clean(torch.ones((1, 4), dtype=torch.int64))
        found.append(torch._dynamo.config.recompile_limit)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [8 * len(splice.blocks)]


def test_a_run_that_failed_says_so_to_the_others_before_wandb_is_closed(box, tmp_path, monkeypatch):
    """Closing takes minutes on a slow network, and other processes wait for that word."""
    order = []

    class Quiet:
        def __init__(self, run):
            self.log = self.results = lambda *a: None

        def finish(self, code):
            order.append("wandb")

    monkeypatch.setattr("klsplice.tracking.run_folder.Wandb", Quiet)
    monkeypatch.setattr(turns.Turns, "failed", lambda self: order.append("failed"))
    monkeypatch.setattr(finetune, "training_step", lambda *a, **o: _refuse())
    assert main(box, tmp_path, RATES, WANDB_PROJECT="x") == 2
    assert order[:2] == ["failed", "wandb"]


def test_together_says_how_many_runs_go_at_once(box, tmp_path, monkeypatch):
    sizes, world = [], start.World.__init__
    monkeypatch.setattr(
        start.World,
        "__init__",
        lambda self, configs: sizes.append(len(configs)) or world(self, configs),
    )
    assert main(box, tmp_path, RATES, TOGETHER=2) == 0
    assert sizes == [2, 1] and len(folders(tmp_path)) == 3


def test_a_finished_sweep_is_left_as_it_is(box, tmp_path, capsys):
    assert main(box, tmp_path, RATES) == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.json*")}
    capsys.readouterr()
    assert main(box, tmp_path, RATES) == 0
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.json*")} == before
    said = capsys.readouterr().out
    assert said.count("is finished; nothing was changed") == 3 and "gap closed" in said


# ---- what people see -------------------------------------------------------------------------


def test_each_run_has_its_own_wandb_run_in_one_group(box, tmp_path):
    """The real wandb, offline, in a process of its own: it has hooks at its end."""
    words = [sys.executable, f"{ROOT}/run.py", *settings_of(box, tmp_path / "a", WANDB_PROJECT="p")]
    env = os.environ | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    pipes = {"capture_output": True, "text": True, "timeout": 200}
    done = subprocess.run([*words, RATES], cwd=tmp_path, env=env, **pipes)
    assert done.returncode == 0 and "wandb is off" not in done.stdout, done.stderr[-2000:]
    ids = {
        json.loads((f / "run.json").read_text())["wandb_id"]
        for f in folders(tmp_path / "a").values()
    }
    found = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(ids) == 3 and {p.name.rsplit("-", 1)[1] for p in found} == ids
    for path in found:
        (file,) = path.glob("*.wandb")
        data = file.read_bytes()
        assert b"sweep-LR-" in data and data.count(b"train/kl") > 3


def test_the_table_is_in_the_order_of_what_varies_and_there_is_a_figure(box, tmp_path, capsys):
    assert main(box, tmp_path, RATES) == 0
    said = capsys.readouterr().out
    at = [said.rindex(f"x_LR{lr}  ") for lr in (1e-3, 3e-3, 1e-2)]
    assert at == sorted(at)
    (figure,) = (tmp_path / "figures").glob("sweep-LR-*.png")
    assert f"the figure is {figure}" in said
    assert runs.varied(runs.of_folders([*map(str, folders(tmp_path).values())])) == ["LR"]


def test_twenty_kills_of_a_sweep_change_nothing(box, tmp_path):
    """Each at a random place, in a process of its own that dies at once."""
    rng, ends, long = random.Random(0), [], ALWAYS | {"PASSES": 4}
    for i in range(20):
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            owner, name = rng.choice(
                [(finetune, "training_step"), (evaluation, "score_head"), (checkpoint, "save")]
            )
            with pytest.MonkeyPatch.context() as m:
                on_call(m, owner, name, rng.randrange(12), lambda: os._exit(9))
                main(box, tmp_path / "a", RATES, **long)
            os._exit(0)
        rng = random.Random(i + 1)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    assert ends == [9] * 20  # none came to its end before
    assert main(box, tmp_path / "a", RATES, **long) == 0
    pairs = alone(box, tmp_path / "b", tmp_path / "a", PASSES=4)
    assert len(pairs) == 3 and all(same_run(*pair) for pair in pairs.values())
