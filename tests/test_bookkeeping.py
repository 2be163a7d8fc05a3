"""What a run writes of itself: seconds, evaluations, results, wandb; and what it gives back."""

import fcntl
import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import seams
import torch
from seams import ALWAYS, QUICK, Clock, differences, killed, main, metrics, on_call, patch, read

import finetune

box, outside, no_figures = seams.box, seams.outside, seams.no_figures
pytestmark = pytest.mark.usefixtures("no_figures")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.mark.parametrize("name", seams.SEAMS)
def test_every_seam_is_there(name):
    assert seams.original(name) is not None


def test_a_stand_in_that_nothing_calls_is_noticed(box, tmp_path):
    with pytest.raises(AssertionError, match="nothing called"), pytest.MonkeyPatch.context() as m:
        patch(m, "step", lambda *args: None)
    with pytest.MonkeyPatch.context() as m:
        hits = on_call(m, "step", 19, lambda: None)
        assert main(box, tmp_path) == 0
        assert len(hits) == 20


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


@pytest.mark.parametrize("stops", [[], [7], [3, 7, 12]])
def test_seconds_are_those_of_training_summed_over_resumes(box, tmp_path, clock, stops):
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
    assert "in 4.8 minutes" in (tmp_path / "x" / "sae" / "README.md").read_text()


def test_save_every_is_minutes_between_checkpoints(box, tmp_path, clock, monkeypatch):
    """One is due after more than 60 seconds; the last step has one."""
    save, found = seams.original("save a checkpoint"), []

    def noted(*args, **options):
        save(*args, **options)
        found.append(seams.saved(tmp_path / "x")[-1])

    patch(monkeypatch, "save a checkpoint", noted)
    apart = {"EVAL_EVERY": 10**9, "CACHE": tmp_path / "cache"}
    assert main(box, tmp_path, SAVE_EVERY=1.0, **apart) == 0
    assert found == [f"step-{step:09d}" for step in (8, 13, 17, 20)]


# ---- evaluations on the way ------------------------------------------------------------------

OFTEN = {"EVAL_EVERY": 200}  # of 64 tokens a step: no multiple is ever met, all are crossed
CROSSED = [0, 4, 7, 10, 13, 16, 19, 20]


def evaluated(folder) -> list[int]:
    return [line["step"] for line in metrics(folder) if "val/kl" in line]


def counting(monkeypatch, box):
    """Evaluations of all held-out tokens that were made in earnest."""
    old, whole = seams.original("evaluate"), []

    def counted(*args, **options):
        found = old(*args, **options)
        if found.arrays["kl"].shape == (8, 32):
            whole.append(1)
        return found

    patch(monkeypatch, "evaluate", counted)
    return whole


@pytest.mark.parametrize("step", [6, 7, 8, 19])
def test_evaluations_come_at_crossings_and_once_after_a_resume(box, tmp_path, monkeypatch, step):
    cache = {"CACHE": tmp_path / "cache"} | OFTEN
    assert main(box, tmp_path / "whole", **cache) == 0
    whole, again = tmp_path / "whole" / "x", tmp_path / "again" / "x"
    assert evaluated(whole) == CROSSED
    made = counting(monkeypatch, box)
    killed(box, tmp_path / "again", step=step, **cache, **ALWAYS)
    before = len(made)
    assert evaluated(again) == [s for s in CROSSED if s <= step]
    assert before == len(evaluated(again)) - 1  # the first one is in CACHE
    assert main(box, tmp_path / "again", **cache) == 0
    assert len(made) - before == len([s for s in CROSSED if step < s < 20])  # the last one, too
    assert differences(whole, again) == []


def test_an_evaluation_of_steps_that_are_made_again_is_made_again(box, tmp_path):
    """Killed without a checkpoint, a run starts from the first step, and has each line once."""
    assert main(box, tmp_path / "whole", **OFTEN) == 0
    killed(box, tmp_path / "again", step=11, **OFTEN)
    assert evaluated(tmp_path / "again" / "x") == [0, 4, 7, 10]
    assert main(box, tmp_path / "again", **OFTEN) == 0
    assert evaluated(tmp_path / "again" / "x") == CROSSED
    assert differences(tmp_path / "whole" / "x", tmp_path / "again" / "x") == []


def test_the_line_of_an_evaluation_holds_that_evaluation(box, tmp_path):
    assert main(box, tmp_path) == 0
    folder = tmp_path / "x"
    lines = {line["step"]: line for line in metrics(folder) if "val/kl" in line}
    for step, name in ((0, "before.json"), (20, "after.json")):
        found = {n.removeprefix("val/"): v for n, v in lines[step].items() if n.startswith("val/")}
        closed = found.pop("gap_closed")
        assert found == read(folder, name)
        assert closed == pytest.approx(0 if step == 0 else read(folder, "results.json")[GAP])
    before = read(folder, "before.json")
    gap = before["ce_spliced"] - before["ce_clean"]
    closed = 1 - (lines[10]["val/ce_spliced"] - lines[10]["val/ce_clean"]) / gap
    assert lines[10]["val/gap_closed"] == pytest.approx(closed)


# ---- results ---------------------------------------------------------------------------------

GAP = "gap_closed"
BOTH = ("", "_no_special")


def test_results_say_of_each_evaluation_what_it_found(box, tmp_path):
    assert main(box, tmp_path, LR=1e-2, KEEP="special") == 0
    folder = tmp_path / "x"
    before, after = (read(folder, f"{when}.json") for when in ("before", "after"))
    wanted = {f"{n}{end}": after[f"{n}{end}"] for n in ("ce_clean", "ce_zero") for end in BOTH}
    for when, found in (("before", before), ("after", after)):
        for end in BOTH:
            wanted[f"ce_{when}{end}"] = found[f"ce_spliced{end}"]
            wanted[f"ce_recovered_{when}{end}"] = found[f"ce_recovered{end}"]
            wanted[f"kl_{when}{end}"] = found[f"kl{end}"]
        for n in ("fvu", "mse", "l0", "dead_fraction"):
            wanted[f"{n}_{when}"] = found[n]
    results = read(folder, "results.json")
    closed = (before["ce_spliced"] - after["ce_spliced"]) / (
        before["ce_spliced"] - before["ce_clean"]
    )
    assert results.pop(GAP) == pytest.approx(closed)
    assert {n: v for n, v in results.items() if n not in seams.OF_THE_RUN} == wanted
    assert results["tokens"] == 1280 and results.keys() >= seams.OF_THE_RUN
    distinct = [v for n, v in wanted.items() if not n.startswith(("l0", "dead"))]
    assert len(set(distinct)) == len(distinct), "two numbers are equal: a swap would not be seen"
    same = read(folder, "run.json")
    assert (results["device"], results["commit"]) == (same["device"], same["commit"])
    assert 0.05 < results["peak_memory_gb"] < 50


def test_the_numbers_are_means_of_the_arrays(box, tmp_path):
    assert main(box, tmp_path, LR=1e-2) == 0
    for when in ("before", "after"):
        found = seams.arrays(tmp_path / "x" / f"{when}.npz")
        about = read(tmp_path / "x", f"{when}.json")
        ordinary = ~np.isin(found["tokens"], [0, 1, 2])
        assert 0.02 < 1 - ordinary.mean() < 0.5
        for end, kept in (("", np.ones_like(ordinary)), ("_no_special", ordinary)):
            scored = kept.copy()
            scored[:, -1] = False
            for ours, name in (("ce_clean", "ce_clean"), ("ce", "ce_spliced")):
                mean = found[ours][scored].mean(dtype=np.float64)
                assert about[name + end] == pytest.approx(mean, rel=1e-9)
            mean = found["kl"][kept].mean(dtype=np.float64)
            assert about["kl" + end] == pytest.approx(mean, rel=1e-9)


# ---- wandb -----------------------------------------------------------------------------------


class FakeWandb:
    """wandb that keeps what each run was started with, sent, and ended with."""

    def __init__(self):
        self.runs, self.Settings = [], dict

    def login(self, **options):
        return True

    def init(self, **options):
        self.runs.append(SimpleNamespace(options=options, lines=[], summary={}, ended=[]))
        run = self.runs[-1]
        run.offline, run.dir = False, "wandb/run/files"
        run.define_metric = lambda *args, **options: None
        run.log = lambda line, **options: run.lines.append(line)
        run.log_artifact = lambda artifact: None
        run.finish = lambda exit_code=0: run.ended.append(exit_code)
        return run

    def Artifact(self, name, type):
        return SimpleNamespace(add_dir=lambda path, **options: None)


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


CHARTS = {  # of what metrics.jsonl has, these go to wandb
    *("train/kl", "train/mse", "train/alpha", "train/lr", "train/grad_norm"),
    *("train/tokens_per_second", "val/ce_clean", "val/ce_spliced", "val/ce_recovered"),
    *("val/gap_closed", "val/kl", "val/fvu", "val/l0", "val/dead_fraction", "tokens"),
}
P = {"WANDB_PROJECT": "p"}


def test_wandb_gets_what_metrics_jsonl_has(box, tmp_path, wandb):
    assert main(box, tmp_path, **P) == 0
    (run,) = wandb.runs
    sent = [{n: v for n, v in line.items() if n in CHARTS} for line in metrics(tmp_path / "x")]
    assert run.lines == sent and set().union(*run.lines) == CHARTS
    assert run.summary == read(tmp_path / "x", "results.json") and run.ended == [0]


def test_wandb_gets_the_term_of_a_loss_of_ones_own(box, tmp_path, wandb, monkeypatch):
    def mine(*given):
        return finetune.kl(*given)

    loss = finetune.Loss(finetune.balanced, (mine,))
    monkeypatch.setitem(finetune.LOSSES, "kl+mse", loss)
    assert main(box, tmp_path, **P) == 0
    assert [n for line in wandb.runs[0].lines for n in line].count("train/mine") > 1


def test_wandb_is_told_which_run_it_is(box, tmp_path, wandb):
    assert main(box, tmp_path, RUN_NAME="a_s3", SEED=3, **QUICK, **P) == 0
    assert main(box, tmp_path, RUN_NAME="a_s4", SEED=4, **QUICK, **P) == 0
    first, second = (run.options for run in wandb.runs)
    about = read(tmp_path / "a_s3", "run.json")
    assert (first["project"], first["name"], first["group"]) == ("p", "a_s3", "a")
    assert first["resume"] == "allow" and first["job_type"] == "defaults"
    wanted = about["constants"] | {n: about[n] for n in ("commit", "versions", "device")}
    assert first["config"] == wanted
    assert second["name"] == "a_s4" and second["group"] == "a" and first["id"] != second["id"]
    assert 1 <= len(first["id"]) <= 64


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_resumed_run_goes_on_in_the_same_wandb_run(box, tmp_path, wandb, monkeypatch, how):
    """Also when the folder is given by a relative path the second time."""
    if how == "killed":
        killed(box, tmp_path / "runs", step=6, **P, **ALWAYS)
    else:
        with pytest.MonkeyPatch.context() as m:
            on_call(m, "learning rate", 6, lambda: signal.raise_signal(signal.SIGTERM))
            assert main(box, tmp_path / "runs", **P) == 143
    monkeypatch.chdir(tmp_path)
    assert main(box, "runs", **P) == 0
    first, second = wandb.runs
    assert first.options["id"] == second.options["id"] and second.options["resume"] == "allow"
    assert first.ended == [{"killed": 1, "stopped": 143}[how]] and second.ended == [0]
    steps = [line["tokens"] // 64 for run in (first, second) for line in run.lines]
    assert [s for s, n in Counter(steps).items() if n == 2] == [10, 20]  # a log and an evaluation
    assert not main(box, "other", **QUICK, **P)
    assert wandb.runs[-1].options["id"] != first.options["id"]


def test_a_run_that_fails_ends_as_failed_in_wandb(box, tmp_path, wandb):
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory")

    for name, act in (("memory", fail), ("bug", lambda: 1 / 0)):
        with pytest.MonkeyPatch.context() as m:
            on_call(m, "learning rate", 3, act)
            if name == "memory":
                assert main(box, tmp_path, RUN_NAME=name, **P) == 1
            else:
                with pytest.raises(ZeroDivisionError):
                    main(box, tmp_path, RUN_NAME=name, **P)
        assert wandb.runs[-1].ended == [1] and not wandb.runs[-1].summary


def test_without_a_project_wandb_is_left_alone_and_a_finished_run_is_not_started(
    box, tmp_path, wandb
):
    assert main(box, tmp_path, **QUICK) == 0
    assert main(box, tmp_path, **QUICK, **P) == 0  # finished
    assert wandb.runs == []


def records(path):
    """The records of a .wandb file: LevelDB's log format around protobufs."""
    from wandb.proto.wandb_internal_pb2 import Record

    body, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(body):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = int.from_bytes(body[at + 4 : at + 6], "little"), body[at + 6]
        part += body[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(part)
            yield record
        part = part if kind in (2, 3) else b""


def offline_runs(folder) -> list[dict]:
    """What the real wandb wrote, in the order of time."""
    found = []
    paths = folder.glob("wandb/offline-run-*/*.wandb")
    for path in sorted(paths, key=lambda p: p.stat().st_mtime_ns):
        run = {"lines": [], "exit": None}
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run" and "about" not in run:
                run["about"] = record.run
                updates = record.run.config.update
                run["config"] = {u.key: json.loads(u.value_json) for u in updates if u.key}
            elif kind == "history":
                items = record.history.item
                line = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
                run["lines"].append({n: v for n, v in line.items() if not n.startswith("_")})
            elif kind == "exit":
                run["exit"] = record.exit.exit_code
        found.append(run)
    return found


def test_the_real_wandb_has_the_runs_as_they_were(outside):
    """Offline: one stopped by a signal, the same gone on with, and one that failed."""
    assert outside.wandb == {"stopped": 143, "gone on": 0, "failed": 1}
    stopped, gone_on, failed = offline_runs(outside.folder)
    assert [run["exit"] for run in (stopped, gone_on, failed)] == [143, 0, 1]
    about = stopped["about"]
    assert (about.project, about.display_name, about.run_group) == ("p", "w_s0", "w")
    assert about.run_id == gone_on["about"].run_id != failed["about"].run_id
    assert about.run_id == read(outside.runs / "w_s0", "run.json")["wandb_id"]
    wanted = read(outside.runs / "w_s0", "run.json")["constants"]
    assert {n: v for n, v in stopped["config"].items() if n in wanted} == wanted
    lines = [line for run in (stopped, gone_on) for line in run["lines"]]
    sent = {}  # lines of one step are one of wandb's
    for line in metrics(outside.runs / "w_s0"):
        mine = {n: v for n, v in line.items() if n in CHARTS}
        sent[line["step"]] = sent.get(line["step"], {}) | mine
    assert lines == list(sent.values())


def test_an_offline_run_is_read_back_without_an_account(outside):
    """By the terminal dashboard that the run's last lines name."""
    folders = sorted((outside.folder / "wandb").glob("offline-run-*"))
    words = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json"]
    found = {}
    for folder in folders:
        done = subprocess.run([*words, folder], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        summary = json.loads(done.stdout)
        found[summary["name"], summary["state"]] = summary
        assert f"wandb leet wandb/{folder.name}\n" in outside.said
    of_a_run = {}  # its folders, in the order of time
    for folder in folders:
        run_id = folder.name.split("-")[3]  # offline-run-<time>-<id>, and -1 in the same second
        of_a_run.setdefault(run_id, []).append(f"wandb/{folder.name}")
        parts = " ".join(of_a_run[run_id])
        assert f"wandb login && wandb sync {parts}\n" in outside.said
    assert sorted(map(len, of_a_run.values())) == [1, 2]
    assert "the run was resumed: wandb has it in 2 folders\n" in outside.said
    shown = found["w_s0", "finished"]
    results = read(outside.runs / "w_s0", "results.json")
    numbers = {n: v for n, v in results.items() if isinstance(v, float)}
    assert numbers == pytest.approx({n: shown["summary"][n] for n in numbers})
    assert shown["summary"]["train/kl"] and shown["config"]["LAYER"] == 1
    assert shown["exit_code"] == 0


# ---- what is shared and given back -----------------------------------------------------------


def lock_of(box, cache, runs):
    """The lock of the token cache of a small run, from a run in another CACHE."""
    assert main(box, runs, RUN_NAME="probe", CACHE=runs / "probe-cache", **QUICK) == 0
    tokens = read(runs / "probe", "run.json")["resolved"]["tokens"]
    folder = cache / f"tokens-{tokens}"
    folder.mkdir(parents=True)
    return folder / "lock"


@pytest.mark.parametrize("written", [False, True])
def test_a_run_waits_for_another_that_writes_the_same_tokens(box, tmp_path, monkeypatch, written):
    """And then takes what that one has written."""
    cache, events = tmp_path / "cache", []
    lock = lock_of(box, cache, tmp_path)
    held = open(lock, "w")
    fcntl.flock(held, fcntl.LOCK_EX)
    pack, load = seams.original("pack the text"), seams.original("tokenizer")

    def release():
        events.append("released")
        for file in (tmp_path / "probe-cache" / lock.parent.name).iterdir() if written else ():
            if file.name != "lock":
                shutil.copy(file, lock.parent)
        held.close()

    def loaded(*args, **options):
        found = load(*args, **options)
        threading.Timer(0.7, release).start()  # the tokens come next
        return found

    def packed(*args, **options):
        events.append("packed")
        return pack(*args, **options)

    patch(monkeypatch, "tokenizer", loaded)
    patch(monkeypatch, "pack the text", packed, least=0 if written else 1)
    assert main(box, tmp_path, CACHE=cache, **QUICK) == 0
    assert events[0] == "released" and ("packed" in events) != written


def test_a_run_that_writes_tokens_keeps_others_from_it_and_lets_them_after(
    box, tmp_path, monkeypatch
):
    cache, refused = tmp_path / "cache", []
    lock = lock_of(box, cache, tmp_path)
    pack, rate = seams.original("pack the text"), seams.original("learning rate")

    def taken() -> bool:
        with open(lock) as f:
            try:
                fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)  # a shared one would share it
            except BlockingIOError:
                return True
        return False

    def packed(*args, **options):
        refused.append(taken())
        return pack(*args, **options)

    def trained(*args, **options):
        assert not taken()
        return rate(*args, **options)

    patch(monkeypatch, "pack the text", packed)
    patch(monkeypatch, "learning rate", trained)
    assert main(box, tmp_path, CACHE=cache, **QUICK) == 0
    assert refused and all(refused)


def test_the_lock_of_a_run_is_held_to_its_end_and_then_given_back(box, tmp_path, monkeypatch):
    found, rate = [], seams.original("learning rate")

    def taken() -> bool:
        with open(tmp_path / "x" / "lock") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)  # a shared one would share it
            except BlockingIOError:
                return True
        return False

    def trained(*args, **options):
        found.append(taken())
        return rate(*args, **options)

    patch(monkeypatch, "learning rate", trained)
    assert main(box, tmp_path, **QUICK) == 0
    assert found == [True] and not taken()
    killed(box, tmp_path, step=1, RUN_NAME="y")
    assert (tmp_path / "y" / "lock").exists()
    assert main(box, tmp_path, RUN_NAME="y") == 0


def handlers() -> dict:
    return {number: signal.getsignal(number) for number in SIGNALS}


def test_the_signal_handlers_are_given_back_however_a_run_ends(box, tmp_path):
    mine = {number: (lambda *args: None) for number in SIGNALS}
    old = {number: signal.signal(number, handler) for number, handler in mine.items()}
    seen = []

    def look():
        seen.append(handlers())

    try:
        with pytest.MonkeyPatch.context() as m:
            on_call(m, "learning rate", 0, look)
            assert main(box, tmp_path, **QUICK) == 0
        assert all(seen[0][n] not in (mine[n], signal.SIG_DFL) for n in SIGNALS)  # its own
        assert handlers() == mine, "finished"
        assert main(box, tmp_path, **QUICK) == 0 and handlers() == mine, "shown again"
        assert main(box, tmp_path, LR=1.0) == 2 and handlers() == mine, "refused"
        assert main(box, tmp_path, RUN_NAME="y", MODEL="/none") == 2 and handlers() == mine
        killed(box, tmp_path, step=2, RUN_NAME="z")
        assert handlers() == mine, "killed"
        with pytest.MonkeyPatch.context() as m:
            on_call(m, "learning rate", 2, lambda: signal.raise_signal(signal.SIGTERM))
            assert main(box, tmp_path, RUN_NAME="w") == 143
        assert handlers() == mine, "stopped"
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("how", ["compiled", "checkpointed", "both"])
def test_blocks_that_were_changed_are_given_back(box, how):
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(box.model)
    speed = {n: how in (n, "both") for n in ("compiled", "checkpointed")}
    splice = seams.original("splice")(lm, 1, head_chunk=64, **speed)
    blocks = list(lm.get_decoder().layers)
    tokens_BL, changed = torch.arange(3, 19)[None], []
    for block in blocks:
        block.register_forward_hook(lambda m, a, o: changed.append("forward" in vars(m)))
    x_BLD = splice.residual(tokens_BL)
    assert torch.isfinite(splice.spliced(tokens_BL, x_BLD).h_BLD).all()
    assert changed and all(changed)  # while a pass runs, and not a moment longer
    assert not any("forward" in vars(block) for block in blocks)
    assert torch.isfinite(lm(tokens_BL).logits).all()


# ---- whatever learns goes on the same ----------------------------------------------------------

LEARNERS = {
    "sae": {"MICRO_BATCH": 1},
    "adapter": {"TRAIN": "adapter", "ADAPTER": "mlp"},
    "sae_lora": {"TRAIN": "sae_lora"},
    "lm_lora": {"TRAIN": "lm_lora", "LOSS": "kl"},
}


@pytest.mark.parametrize("train", LEARNERS)
def test_killed_and_gone_on_with_a_run_is_the_same_in_every_file(box, tmp_path, train):
    changes = LEARNERS[train] | {"RANK": 4, "LR": 1e-3} | OFTEN
    assert main(box, tmp_path / "whole", **changes) == 0
    killed(box, tmp_path / "again", step=8, **changes, **ALWAYS)
    killed(box, tmp_path / "again", step=6, **changes, **ALWAYS)
    assert seams.saved(tmp_path / "again" / "x")[-1] == "step-000000014"
    assert main(box, tmp_path / "again", **changes) == 0
    whole, again = tmp_path / "whole" / "x", tmp_path / "again" / "x"
    assert differences(whole, again) == []
    results = read(whole, "results.json")
    assert results["ce_before"] != results["ce_after"] and math.isfinite(results["ce_after"])


def test_two_runs_that_are_not_the_same_are_told_apart(box, tmp_path):
    assert main(box, tmp_path / "a") == 0
    assert main(box, tmp_path / "b", LR=1e-3) == 0
    found = set(differences(tmp_path / "a" / "x", tmp_path / "b" / "x"))
    assert {"sae/ae.pt", "sae/sae_weights.safetensors", "sae/config.json"} <= found
    assert {"metrics.jsonl", "after.json", "after.npz", "results.json", "run.json"} <= found
    assert not {"before.json", "before.npz", "sae/cfg.json"} & found
