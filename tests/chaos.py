"""`make test-chaos`: kill -9, torchrun, every recipe, and a planted bug for every promise.

As a program it kills more often and writes what came of it, a line a kill, going on where the file
ends: `python tests/chaos.py gemma2 100 records/chaos.json` and `... smollm2 5 ...` (needs
`make assets`). Each kill -9 comes at a random time of a run that saves after every step; the same
command then has to end with the weights of the unbroken run.
"""

import fcntl
import hashlib
import inspect
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import conftest
import hub
import pytest
import test_data
import test_distributed
import test_limits
import test_run
import torch

import finetune
from klsplice import machine, settings, storage
from klsplice.errors import UserError
from klsplice.formats import tensors
from klsplice.text import token_cache
from klsplice.tracking import checkpoint, dashboard, loop, run_folder

ROOT = Path(test_run.ROOT)
box = test_run.box
unfinished = test_run.unfinished
without_figures = test_run.without_figures
tokenizers, tokenizer = test_data.tokenizers, test_data.tokenizer


# ---- kill -9 ---------------------------------------------------------------------------------


def make_box(root: Path) -> dict:
    """A tiny Gemma-2, its SAE and a text -> the constants that name them."""
    hub.make_gemma(root / "gem", seed=0)
    sae = {"d_in": 32, "d_sae": 512, "k": 8, "layer": 1, "lm_name": "gem", "seed": 0}
    hub.make_sae(root / "sae", **sae)
    texts = hub.make_pile(root / "pile", documents=400, seed=0)
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (root / "text.jsonl").write_text("".join(lines))
    return {"MODEL": root / "gem", "SAE": root / "sae", "DATASET": root / "text.jsonl"}


def gemma2(root: Path, steps: int) -> list[str]:
    changes = test_run.SMALL | make_box(root) | {"TOKENS": 64 * steps, "EVAL_EVERY": 16 * steps}
    return [f"{name}={value}" for name, value in changes.items()]


def smollm2(root: Path, steps: int) -> list[str]:
    small = ["recipes/from_scratch_e2e.py", "recipes/small.py", f"TOKENS={1024 * steps}"]
    return [*small, "VAL_TOKENS=2048", f"EVAL_EVERY={512 * steps}", "RUN_NAME=x", "D_SAE=1024"]


class Kills:
    """Runs of one command, killed and unbroken, in folders below `root`."""

    def __init__(self, root: Path, words: list[str]):
        self.root, self.words = root, [*words, "SAVE_EVERY=1e-9"]
        started = time.monotonic()
        self.sha256 = self.to_the_end("unbroken")
        self.seconds = time.monotonic() - started

    def start(self, name: str) -> subprocess.Popen:
        words = [*self.words, f"RUNS={self.root / name}", f"CACHE={self.root / name / 'cache'}"]
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        log = open(self.root / f"{name}.log", "a")
        command = [sys.executable, "run.py", *words]
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)

    def to_the_end(self, name: str) -> str:
        """The same command until it is done -> sha256 of what is in sae/."""
        code = self.start(name).wait()
        assert code == 0, (self.root / f"{name}.log").read_text()[-2000:]
        sae = self.root / name / "x" / "sae"
        files = ("ae.pt", "sae_weights.safetensors", "config.json", "cfg.json")
        return hashlib.sha256(b"".join((sae / f).read_bytes() for f in files)).hexdigest()

    def kill(self, name: str, *, after_step: int = 0, after: float) -> dict:
        """Kill it `after` seconds, counted from the start or from that step's checkpoint.

        -> where the run was when it was killed, and whether it then ended the same.
        """
        process, started = self.start(name), time.monotonic()
        while process.poll() is None and self.saved(name) < after_step:
            time.sleep(0.002)
        time.sleep(after)
        process.kill()
        second = round(time.monotonic() - started, 3)
        finished = process.wait() == 0
        found = {"second": second, "finished": finished, "step": self.saved(name)}
        saved = test_run.saved(self.root / name / "x")
        found["in_a_save"] = any(s.endswith(".tmp") for s in saved)
        found["same"] = self.to_the_end(name) == self.sha256
        return found

    def saved(self, name: str) -> int:
        """The step of the newest whole checkpoint."""
        steps = [s[5:] for s in test_run.saved(self.root / name / "x")]
        return max((int(s) for s in steps if s.isdigit()), default=0)


def test_killed_at_any_step_the_weights_are_those_of_the_unbroken_run(tmp_path):
    kills = Kills(tmp_path, gemma2(tmp_path, 60))
    rng = random.Random(0)
    at = [{"after_step": rng.randrange(1, 58), "after": rng.uniform(0, 0.03)} for _ in range(4)]
    found = [kills.kill(f"killed{i}", **when) for i, when in enumerate(at)]
    assert all(kill["same"] for kill in found), found
    assert sum(0 < kill["step"] < 60 for kill in found) >= 3, found


def main(which: str, number: int, path: Path) -> None:
    """Kill until the record at `path` holds `number` kills of `which`."""
    record_ = json.loads(path.read_text()) if path.exists() else {}
    make, steps = {"gemma2": (gemma2, 1000), "smollm2": (smollm2, 10)}[which]
    with tempfile.TemporaryDirectory() as root:
        kills = Kills(Path(root), make(Path(root), steps))
        mine = record_.setdefault(which, {"kills": []})
        about = {"sha256": kills.sha256, "seconds": round(kills.seconds, 1), "steps": steps}
        about |= {"commit": machine.git_commit(), "device": machine.device_name("cpu")}
        assert mine.get("sha256", kills.sha256) == kills.sha256  # of an earlier piece
        record_[which] = mine = mine | about | {"torch": torch.__version__}
        while len(mine["kills"]) < number:
            name = f"killed{len(mine['kills'])}"
            found = kills.kill(name, after=random.uniform(0, kills.seconds))
            subprocess.run(["rm", "-r", Path(root) / name], check=True)
            if found.pop("finished") and found["same"]:
                continue  # too late to be a kill
            mine["kills"].append(found | {"commit": about["commit"]})
            mine |= {"n": len(mine["kills"]), "same": sum(k["same"] for k in mine["kills"])}
            storage.write_json(str(path), record_)
            print(name, found, flush=True)


# ---- every recipe ----------------------------------------------------------------------------

OVERLAYS = ("small", "gemma3")
RECIPES = sorted(p.stem for p in (ROOT / "recipes").glob("*.py") if p.stem not in OVERLAYS)
TINY = {"RANK": 4, "TEXT_KEY": "text", "MODEL_REVISION": "", "TOKENS": 640, "EVAL_EVERY": 10**6}


@pytest.fixture(scope="module")
def relu(box):
    assert test_run.main(box, box.root / "relu", **test_run.LEARNERS["relu"]) == 0
    return box.root / "relu" / "x"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_killed_at_half_ends_as_unbroken(box, relu, tmp_path, monkeypatch, name):
    path = str(ROOT / "recipes" / f"{name}.py")
    changes = dict(TINY)
    cfg = settings.read([path])[0]
    if cfg.SAE == "fresh":
        changes |= {"SAE": "fresh", "D_SAE": 64, "K": 8, "DEAD_AFTER": 128}
    changes |= {"relu": {"SAE": relu}, "gemma_scope": {"ARCHITECTURE": "jumprelu"}}.get(name, {})
    steps = 640 * cfg.PASSES // 64
    assert test_run.main(box, tmp_path / "whole", path, **changes) == 0

    with monkeypatch.context() as m:
        test_run.on_call(m, finetune.Optimizer, "step", steps // 2, test_run.kill)
        with pytest.raises(test_run.Killed):
            test_run.main(box, tmp_path / "again", path, **changes, **test_run.ALWAYS)
    assert test_run.saved(tmp_path / "again" / "x")[-1] == f"step-{steps // 2:09d}"
    assert test_run.main(box, tmp_path / "again", path, **changes) == 0
    a, b = tmp_path / "whole" / "x", tmp_path / "again" / "x"
    assert test_run.same_run(a, b)
    assert all(f.read_bytes() == (b / f.relative_to(a)).read_bytes() for f in a.rglob("*tensors"))


# ---- several processes -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def four(box):
    return test_distributed.processes(box, box.root / "four", 4)


@pytest.mark.parametrize(
    "case", [n for n, (size, _) in test_distributed.CASES.items() if size == 4]
)
def test_four_processes_equal_one_bit_for_bit(box, four, case):
    test_distributed.same_bits(box, four, case)


@pytest.mark.parametrize(
    "case", [n for n, (size, _) in test_distributed.NEARLY.items() if size == 4]
)
def test_four_processes_that_add_in_another_order_equal_one_nearly(box, four, case):
    test_distributed.nearly(box, four, case)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_torchrun_passes_a_signal_on_and_goes_on(box, tmp_path, number):
    changes = test_run.SMALL | test_distributed.ONE_EACH | {"TOKENS": 6400, "EVAL_EVERY": 10**6}
    changes |= {"MODEL": box.model, "SAE": box.sae, "DATASET": box.text}
    changes |= {"CACHE": tmp_path / "cache", "RUNS": tmp_path}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launcher += ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1,SIGHUP,SIGQUIT", ROOT / "run.py"]
    words = [sys.executable, *launcher, *(f"{n}={v}" for n, v in changes.items())]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = subprocess.Popen(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)
    lines = tmp_path / "x" / "metrics.jsonl"
    for _ in range(600):
        time.sleep(0.1)
        if lines.exists() and lines.read_text().count("train/kl") > 3:
            break
    started.send_signal(number)
    said, _ = started.communicate(timeout=120)
    assert started.returncode != 0 and "finishing this step and saving" in said, said
    assert len(re.findall(r"x: +0%\|", said)) == 1  # one progress bar
    (stopped,) = re.findall(r"stopped after step (\d+) of 100", said)
    assert test_run.saved(tmp_path / "x") == [f"step-{int(stopped):09d}"]
    assert not subprocess.run(["pgrep", "-f", f"RUNS={tmp_path}"], capture_output=True).stdout
    again = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr[-2000:]
    assert f"resuming after step {stopped}" in again.stdout
    assert test_run.main(box, tmp_path / "one", **changes | {"RUNS": tmp_path / "one"}) == 0
    assert test_run.same_run(tmp_path / "x", tmp_path / "one" / "x")


# ---- a planted bug for every promise ---------------------------------------------------------


def without_moments(learner, optimizer, state=checkpoint._state):
    return {n: t for n, t in state(learner, optimizer).items() if n.startswith("model.")}


def claimed(path):
    """The checksum that is beside the file instead of its own."""
    about = Path(path).parent / "state.json"
    return json.loads(about.read_text())["sha256"] if about.exists() else ""


def remove_first(folder, *args, save=checkpoint.save, **options):
    checkpoint.shutil.rmtree(folder, ignore_errors=True)
    save(folder, *args, **options)


def without_the_rest(cache, files, save=token_cache.TokenCache.save):
    left, cache.state["left"] = cache.state["left"], []
    save(cache, files)
    cache.state["left"] = left


def trusting(*args, load=torch.load, **options):
    return load(*args, **options | {"weights_only": False})


def in_the_loop(wandb, line):
    try:
        wandb.run.log(line)
    except Exception as e:
        raise UserError(str(e), code=1) from None


def nothing(*args, **options):
    pass


# Promise: what is replaced by what, and the test that has to turn red.
PLANTED = {
    "1 same SAE after a kill": (
        (checkpoint, "_state", without_moments),
        test_run.test_killed_in_every_step_a_run_ends_the_same,
    ),
    "2 a polite stop saves": (
        (loop.Live, "_poll", nothing),
        test_run.test_a_signal_during_an_evaluation_saves,
    ),
    "3 a damaged checkpoint is noticed": (
        (checkpoint, "digest", claimed),
        test_run.test_the_checkpoint_before_a_damaged_one_is_used,
    ),
    "4 disk full keeps the last one": (
        (checkpoint, "save", remove_first),
        test_run.test_a_full_disk_keeps_the_last_checkpoint,
    ),
    "5 no token is lost": (
        (token_cache.TokenCache, "save", without_the_rest),
        test_data.test_a_cache_interrupted_anywhere_goes_on_byte_for_byte,
    ),
    "6 wandb stops nothing": (
        (dashboard.Wandb, "log", in_the_loop),
        test_run.test_wandb_cannot_stop_or_change_a_run,
    ),
    "7 not finite is refused": (
        (finetune.Optimizer, "check", nothing),
        test_run.test_a_gradient_that_is_not_finite_is_never_saved,
    ),
    "8 no code of an SAE runs": (
        (tensors.torch, "load", trusting),
        test_run.test_bad_settings_are_refused_before_anything_is_written,
    ),
    "10 no secret is written": (
        (run_folder, "git_commit", lambda: os.environ.get("HF_TOKEN")),
        test_limits.test_no_secret_is_in_any_file_or_line,
    ),
    "11 one run at a time": (
        (fcntl, "flock", nothing),
        test_run.test_a_folder_in_use_is_refused,
    ),
    "11 never with other constants": (
        (run_folder.Run, "_compare", nothing),
        test_run.test_other_constants_are_refused_by_name,
    ),
    "11 nor with another run's checkpoint": (
        (run_folder.Run, "digest", lambda self: ""),
        test_limits.test_a_checkpoint_of_another_run_is_refused,
    ),
}
GIVEN = {"saves": "after each batch", "point": "pack", "case": "SAE with code"}
GIVEN |= {"damage": "flipped", "fails": "log"}


@pytest.mark.parametrize("promise", PLANTED)
def test_a_planted_bug_turns_a_test_red(promise, request, monkeypatch):
    (owner, name, bug), test = PLANTED[promise]
    wanted = inspect.signature(test).parameters
    args = [GIVEN[n] if n in GIVEN else request.getfixturevalue(n) for n in wanted]
    monkeypatch.setattr(owner, name, bug)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test(*args)


@pytest.mark.parametrize("bug", test_distributed.BUGS)
def test_a_planted_bug_makes_two_processes_differ_from_one(box, bug):
    found = test_distributed.processes(box, box.root / bug, 2, bug)
    assert [p.code for p in found] == [0, 0], found[0].stderr[-2000:]
    with pytest.raises(AssertionError):
        test_distributed.same_bits(box, found, "kl+mse")


if __name__ == "__main__":
    assert conftest.HERE
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]).resolve())
