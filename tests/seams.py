"""Where tests reach into the program, in one table; a small run in one process; two runs compared.

SEAMS alone changes when files of the program move. What stands in for a seam counts its calls, and
a stand-in that nothing called fails the test that put it there: no patch quietly stops working.
"""

import contextlib
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import hub
import numpy as np
import pytest

SEAMS = {  # name: (module, path of the attribute in it)
    "learning rate": ("finetune", "learning_rate"),  # in a step: gradients are there, no update yet
    "step": ("finetune", "Optimizer.step"),
    "save a checkpoint": ("klsplice.tracking.checkpoint", "save"),
    "write a file of the run": ("klsplice.tracking.run_folder", "write_json"),
    "write a line": ("klsplice.tracking.run_folder", "Run.write_line"),
    "evaluate": ("eval", "Evaluation.measure"),  # in earnest, not from CACHE
    "score": ("eval", "score_head"),  # of a batch and a learner
    "set up": ("learners.start", "open_learner"),
    "poll": ("klsplice.tracking.loop", "Live._poll"),
    "clock": ("klsplice.tracking.loop", "time"),  # of the training's seconds
    "figures": ("report.figures", "run_figures"),
    "export": ("klsplice.formats.write", "save"),
}
ROOT = Path(__file__).resolve().parent.parent
SMALL = {  # 20 steps on a tiny model, an evaluation halfway
    "DEVICE": "cpu",
    "DTYPE": "float32",
    "CONTEXT": 32,
    "BATCH": 2,
    "MICRO_BATCH": 2,
    "EVAL_BATCH": 2,
    "TOKENS": 1280,
    "VAL_TOKENS": 256,
    "LAYER": 1,
    "CHECK_SAE": False,
    "WANDB_PROJECT": "",
    "EVAL_EVERY": 640,
    "LOG_EVERY": 2,
    "RUN_NAME": "x",
}
QUICK = {"TOKENS": 64, "EVAL_EVERY": 10**9}  # one step
ALWAYS = {"SAVE_EVERY": 1e-9}  # a checkpoint after every step
OF_THE_RUN = {"tokens", "seconds", "together", "tokens_per_second", "peak_memory_gb"}
OF_THE_RUN |= {"device", "commit"}  # what results.json has beside two evaluations
CLOCKS = {"seconds", "tokens_per_second", "train/tokens_per_second", "peak_memory_gb"}


# ---- seams -----------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for kill -9: nothing in the program may catch it."""


def find(name: str):
    """-> owner, name of its attribute, what is there now."""
    module, path = SEAMS[name]
    owner = importlib.import_module(module)
    *parents, attribute = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, attribute, getattr(owner, attribute)


def original(name: str):
    return find(name)[2]


def patch(monkeypatch, name: str, replacement, *, least: int = 1):
    """Put `replacement` (a function, or what stands for a module) at a seam -> a list of its calls.

    When `monkeypatch` undoes it, it must have been called `least` times.
    """
    owner, attribute, _ = find(name)
    hits = []

    def counted(*args, **options):
        hits.append((args, options))
        return replacement(*args, **options)

    class Counting:
        def __getattr__(self, name):
            hits.append(name)
            return getattr(replacement, name)

    new = counted if callable(replacement) else Counting()
    monkeypatch.setattr(owner, attribute, new)
    undo = monkeypatch.undo

    def undo_and_check():
        undo()
        if sys.exc_info()[0] is None:
            assert len(hits) >= least, f"nothing called the stand-in for {name!r}: {SEAMS[name]}"

    monkeypatch.undo = undo_and_check
    return hits


def on_call(monkeypatch, name: str, number: int, act):
    """Do `act` before the call `number` (from 0) of a seam; it must come to that call."""
    old, calls = original(name), itertools.count()

    def wrapped(*args, **options):
        if next(calls) == number:
            act()
        return old(*args, **options)

    return patch(monkeypatch, name, wrapped, least=number + 1)


def kill():
    raise Killed


def killed(box, runs, *, step: int, **changes) -> None:
    """A run that is killed within step `step` (from 0)."""
    with pytest.MonkeyPatch.context() as m:
        on_call(m, "learning rate", step, kill)
        with pytest.raises(Killed):
            main(box, runs, **changes)


class Clock:
    """A clock that stands still unless it is moved."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


# ---- a small run -----------------------------------------------------------------------------

_made = {}


@pytest.fixture(scope="session")
def box(tmp_path_factory):
    """A model, an SAE of it and a text, the same for all files of tests."""
    if "box" not in _made:
        _made["box"] = make_box(tmp_path_factory.mktemp("box"))
    return _made["box"]


def make_box(root: Path) -> SimpleNamespace:
    hub.make_gemma(root / "gem", seed=0)
    sae = {"d_in": 32, "d_sae": 64, "k": 4, "layer": 1, "lm_name": "gem", "seed": 0}
    hub.make_sae(root / "sae", **sae)
    texts = hub.make_pile(root / "pile", documents=120, seed=0)
    write_texts(root / "text.jsonl", texts)
    return SimpleNamespace(texts=texts, **vars(box_at(root)))


def box_at(root: Path) -> SimpleNamespace:
    """The paths of a box that was made."""
    paths = {"model": "gem", "sae": "sae", "text": "text.jsonl", "cache": "cache"}
    return SimpleNamespace(root=root, **{name: root / file for name, file in paths.items()})


def write_texts(path: Path, texts, key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing takes longer than a whole run here."""
    return patch(monkeypatch, "figures", lambda *args, **options: None, least=0)


def words_of(box, runs, **changes) -> list[str]:
    paths = {"MODEL": box.model, "SAE": box.sae, "DATASET": box.text, "CACHE": box.root / "cache"}
    settings = SMALL | paths | {"RUNS": runs} | changes
    return [f"{name}={value}" for name, value in settings.items()]


def main(box, runs, *words, **changes) -> int:
    """run.main with small constants. runs: the folder of run folders."""
    import run

    return run.main([*map(str, words), *words_of(box, runs, **changes)])


def read(folder: Path, name: str):
    return json.loads((folder / name).read_text())


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def arrays(path: Path) -> dict:
    with np.load(path) as found:
        return {name: found[name] for name in found.files}


def saved(folder: Path) -> list[str]:
    where = folder / "checkpoints"
    return sorted(p.name for p in where.iterdir()) if where.is_dir() else []


def stamps(folder: Path) -> dict:
    return {p: p.stat().st_mtime_ns for p in [folder, *folder.rglob("*")]}


# ---- two runs compared -----------------------------------------------------------------------


def differences(a: Path, b: Path) -> list[str]:
    """What two finished runs of the same constants do not have in common, clocks left out."""
    import torch

    found = [f"no {p}" for p in sorted(_files(a) ^ _files(b))]
    for name in sorted(_files(a) & _files(b)):
        one, other = a / name, b / name
        if name.endswith(".pt"):
            one, other = (torch.load(p, weights_only=True) for p in (one, other))
            same = one.keys() == other.keys() and all(
                torch.equal(one[n], other[n]) and one[n].dtype == other[n].dtype for n in one
            )
        elif name.endswith(".npz"):
            same = same_arrays(arrays(one), arrays(other))
        elif name in PARTS:
            same = PARTS[name](a) == PARTS[name](b)
        else:
            same = one.read_bytes() == other.read_bytes()
        found += [] if same else [name]
    return found


def same_arrays(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and np.array_equal(a[n], b[n]) for n in a
    )


def _files(folder: Path) -> set[str]:
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return {n for n in names if not n.startswith("figures/")} - {"lock"}


def _timeless(line: dict) -> dict:
    return {n: v for n, v in line.items() if n not in CLOCKS}


def _about(folder: Path) -> dict:
    """run.json without what may differ on resume, and the run's own name."""
    about = read(folder, "run.json")
    free = {"RUNS", "CACHE", "WANDB_PROJECT", "LOG_EVERY", "SAVE_EVERY", "RUN_NAME"}
    del about["wandb_id"]  # each run has its own
    about["constants"] = {n: v for n, v in about["constants"].items() if n not in free}
    return about


PARTS = {  # of files with something of the clock or the machine in them, what is compared
    "metrics.jsonl": lambda folder: [_timeless(line) for line in metrics(folder)],
    "results.json": lambda folder: _timeless(read(folder, "results.json")),
    "run.json": _about,
    "sae/README.md": lambda folder: re.sub(
        "- Made on .*", "", (folder / "sae/README.md").read_text()
    ),
}


# ---- a process of its own, with a hub and the real wandb ----------------------------------------


@pytest.fixture(scope="session")
def outside(tmp_path_factory):
    """What tests/outside.py leaves in `folder` and found.json, once for all files of tests."""
    if "outside" not in _made:
        _made["outside"] = _run_outside(tmp_path_factory.mktemp("outside"))
    return _made["outside"]


def _run_outside(folder: Path) -> SimpleNamespace:
    unset = ("HF_HUB_OFFLINE", "HF_TOKEN", "WANDB_MODE", "WANDB_API_KEY")
    env = {n: v for n, v in os.environ.items() if n not in unset}
    env |= {"HOME": str(folder), "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    env |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "outside.py")]
    with open(folder / "said", "w") as said:  # a pipe would be held open by wandb
        done = subprocess.run(
            command, cwd=folder, env=env, stdout=said, stderr=said, timeout=200, check=False
        )
    assert done.returncode == 0, (folder / "said").read_text()[-5000:]
    said = (folder / "said").read_text()
    return SimpleNamespace(
        folder=folder, runs=folder / "runs", said=said, **read(folder, "found.json")
    )


@contextlib.contextmanager
def folder_of(path: Path):
    """Work in `path`, as one who gives relative paths does."""
    old = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(old)


def constants_of_run() -> list[str]:
    """The names of run.py's constants, from its text."""
    return re.findall("^([A-Z][A-Z0-9_]*): ", (ROOT / "run.py").read_text(), re.M)
