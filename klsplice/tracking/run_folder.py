"""The run folder: run.json, metrics.jsonl, checkpoints/, results.json, sae/; loop.py fills it.

A run is its folder. Absent: it starts. Same constants and finished: nothing changes. Same and
unfinished: it resumes from the newest good checkpoint. Other constants, or another LM, SAE or text
than it began with: refused.
"""

import hashlib
import json
import os
import platform
import secrets
import shutil
from contextlib import suppress

import numpy as np

from klsplice import distributed, machine, metrics
from klsplice.errors import UserError, out_of_resources
from klsplice.settings import FREE
from klsplice.storage import finite, lock, read_json, write_json
from klsplice.tracking import checkpoint
from klsplice.tracking.dashboard import Wandb

SOURCE = ("architecture", "d_in", "d_sae", "k", "l1", "licence")  # what run.json has of it
MEMORY = ("MICRO_BATCH", "CLEAN_BATCH", "HEAD_CHUNK", "EVAL_BATCH")  # constants that decide it
SHOWN = ("ce_clean", "ce_spliced", "ce_recovered", "kl", "fvu", "l0")  # of an evaluation
UNBORN = {"lock", "run.json.tmp"}  # what a run killed while it started may leave
CONTENT = {  # a name in run.json -> the constants that it stands for
    "model": "MODEL (at MODEL_REVISION)",
    "sae": "SAE (at SAE_REVISION)",
    "tokens": "DATASET (at DATASET_REVISION), or how it is tokenised,",
}


def resolved(opened, source, tokens) -> dict:
    """What the names in the constants stood for: commits of the Hub, digests of local files.

    opened: lm.load.Opened. source: formats.read.Source. tokens: data.Tokens."""
    return {
        "model": opened.identity,
        "sae": source.identity,
        "sae_commit": source.commit,
        "dataset_commit": tokens.commit,
        "tokens": tokens.fingerprint,
        "documents_without_text": tokens.skipped,
    }


def check_same(folder: str, old: dict, new: dict) -> None:
    """Raises UserError where a run began with another LM, SAE or text than there is now.

    old, new: of `resolved`."""
    for name, constants in CONTENT.items():
        if old.get(name) is not None and old[name] != new[name]:
            change = f"{old[name]:.40} -> {new[name]:.40}"
            what = f"{constants} is not what {folder} began with: {change}"
            raise UserError(what, "put it back as it was, or start another run (RUN_NAME)")


class Run:
    """One experiment and its folder on the disk, with the lock of that folder.

    cfg: settings.Config. several: it is one of several of a command. source, learner, training,
    evaluations: what run.py opens for it, and its evaluations, "before" and "after".
    """

    def __init__(self, cfg, *, several: bool):
        self.cfg, self.several, self.constants = cfg, several, cfg.constants()
        self.name, self.folder = cfg.RUN_NAME or cfg.SAE, ""  # until it is opened
        self.writes, self.evaluations = distributed.rank() == 0, {}
        self.lock = self.about = self.wandb = self.results = None
        self.source = self.learner = self.training = None

    def path(self, *names) -> str:
        return os.path.join(self.folder, *names)

    @property
    def begun(self) -> bool:
        return os.path.exists(self.path("run.json"))

    def other_code(self) -> str:
        """What to say of a run that began when the program had other code."""
        other = machine.code_changed(read_json(self.path("run.json")))
        return "; the program's code has changed since it began" if other else ""

    def open(self, name: str) -> bool:
        """Take the folder of that name -> whether it holds this run finished. Raises UserError
        (exit 2) where it holds something else, is in use, cannot be written, or is no name."""
        plain = not set("/+") & set(name) and name not in (".", "..")
        if not plain or len(os.fsencode(name)) > 200:
            what = f"RUN_NAME = {name[:80]!r} is no folder name"
            raise UserError(what, "wanted a plain name, without / and +, of 200 bytes at most")
        self.name, self.folder = name, os.path.join(self.cfg.RUNS, name)
        self.prefix = f"{name}: " if self.several else ""  # of its lines on the screen
        return self._open()

    @distributed.main_process_only
    def _open(self) -> bool:
        runs = self.cfg.RUNS
        with suppress(OSError):
            os.makedirs(runs, exist_ok=True)
        if not os.path.isdir(runs) or not os.access(runs, os.W_OK):
            raise UserError(f"RUNS = {runs!r} cannot be written", "set RUNS to another folder")
        if self.begun:
            self.lock = locked(self.folder, runs)
            self._compare()
        elif os.path.isdir(self.folder) and set(os.listdir(self.folder)) - UNBORN:
            what = f"{self.folder} exists and holds no run"
            raise UserError(what, "set RUN_NAME to another name")
        return os.path.exists(self.path("results.json"))

    def _compare(self) -> None:
        hint, new = "set RUN_NAME to another name, or remove that folder", self.constants
        try:
            old = dict(read_json(self.path("run.json"))["constants"])
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{self.path('run.json')} is damaged", hint) from None
        names = [n for n in sorted((new.keys() | old.keys()) - FREE) if new.get(n) != old.get(n)]
        if names:
            changes = ", ".join(f"{n} {old.get(n)!r} -> {new.get(n)!r}" for n in names)
            raise UserError(f"{self.folder} holds a run with other constants: {changes}", hint)

    def digest(self) -> str:
        """Of the constants that decide a run's results: what a checkpoint is bound to."""
        kept = {n: v for n, v in self.constants.items() if n not in FREE}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]

    @distributed.main_process_only
    def start(self, opened, tokens, together: int) -> None:
        """Make the folder and run.json, or find them; from here on something is written.

        opened: lm.load.Opened. tokens: data.Tokens. together: how many runs share a clean pass.
        Raises UserError where a run that is found began with other content."""
        content = resolved(opened, self.source, tokens)
        if self.lock is None:
            machine.check_space("RUNS", self.cfg.RUNS, self._most_bytes())
            self.lock = locked(self.folder, self.cfg.RUNS)
            if self.begun:
                what = f"another process has run {self.folder} in the meantime"
                raise UserError(what, "run the same command again")
            write_json(self.path("run.json"), self._about(content))
        self.about = read_json(self.path("run.json"))
        if together > self.about.get("together", 1):  # it may begin alone and go on in a sweep
            self.about["together"] = together
            write_json(self.path("run.json"), self.about)
        check_same(self.folder, self.about["resolved"], content)
        print(f"run: {self.folder}{self.other_code()}")
        self.wandb = Wandb(self)

    def _about(self, content: dict) -> dict:
        """What run.json says. content: of `resolved`."""
        return {
            "constants": self.constants,
            "recipes": self.cfg.recipes,
            "resolved": content,
            "checked": self.learner.splice.checked,
            "wandb_id": secrets.token_hex(8),
            "source": {n: getattr(self.source, n) for n in SOURCE} | self._parts(),
            "trainable_parameters": sum(p.numel() for p in self.learner.parameters()),
            "commit": machine.git_commit(),
            "code": machine.code_digest("finetune"),
            "versions": machine.versions(),
            "python": platform.python_version(),
            "device": machine.device_name(self.cfg.DEVICE),
            "processes": distributed.size(),
        }

    def _parts(self) -> dict:
        """Of several SAEs what each is called; and whether they have skip connections."""
        each = [*self.learner.each(self.source)]
        names = [ending.strip("_") for _, _, ending in each]
        at = [one.site.name for one, _, _ in each]
        skips = any(sae.W_skip_DD is not None for _, sae, _ in each)
        return {"sites": names, "at": at, "skips": skips}

    def _most_bytes(self) -> int:
        """What it writes at most: a checkpoint before an older one goes, and the SAE twice."""
        trained = sum(p.nbytes for p in self.learner.parameters())
        # with AdamW's moments
        state = sum(t.nbytes for t in self.learner.state().values()) + 2 * trained
        sae = sum(t.nbytes for t in self.learner.model.state_dict().values())
        return (checkpoint.KEPT + 1) * state + 2 * sae

    def keep_evaluation(self, name: str, found, tokens_SL: np.ndarray, step: int) -> None:
        """Write <name>.json, with the held-out tokens <name>.npz, and the line of metrics.jsonl.

        name: "before" or "after". found: eval.Found. step: of training when it was made."""
        metrics.cut(self.folder, step, evaluations=False)  # of a kill between line and file
        seconds = self.training.loop.seconds if self.training else 0.0
        self.write_evaluation(step, seconds, found.few)
        np.savez_compressed(self.path(f"{name}.npz"), **found.arrays, tokens=tokens_SL)
        write_json(self.path(f"{name}.json"), found.numbers)

    def write_evaluation(self, step: int, seconds: float, numbers: dict) -> None:
        """numbers: on the first EVAL_TOKENS, so that those of a run are of the same tokens."""
        before = metrics.evaluations(self.folder) or [{"val/ce_spliced": numbers["ce_spliced"]}]
        ce = numbers["ce_clean"], before[0]["val/ce_spliced"], numbers["ce_spliced"]
        numbers = numbers | {"gap_closed": metrics.gap_closed(*ce)}
        self.write_line(step, seconds, {f"val/{n}": v for n, v in numbers.items()})

    def write_line(self, step: int, seconds: float, numbers: dict) -> None:
        """One line of metrics.jsonl, and of wandb."""
        if not self.writes:
            return
        tokens = step * self.cfg.BATCH * self.cfg.CONTEXT
        line = {"step": step, "tokens": tokens, "seconds": round(seconds, 3)} | numbers
        self.wandb.log(metrics.append(self.folder, line))

    def totals(self, tokens: int, seconds: float) -> dict:
        """What results.json has of a training on that many tokens."""
        return {
            "tokens": tokens,
            "seconds": seconds,
            "together": self.about.get("together", 1),  # runs that shared a clean pass
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "peak_memory_gb": machine.peak_memory_gb(self.cfg.DEVICE),
            **{name: self.about[name] for name in ("device", "commit")},
        }

    def finish(self, results: dict) -> None:
        """Write results.json, with which the run is finished, and drop its checkpoints."""
        self.results = results
        write_json(self.path("results.json"), finite(results))
        shutil.rmtree(self.path("checkpoints"), ignore_errors=True)

    def as_user_error(self, error: BaseException) -> BaseException:
        """The line for a machine with too little memory or disk, or the error as it is."""
        sizes = {name: self.constants[name] for name in MEMORY}
        return out_of_resources(error, sizes, code=2 if self.about is None else 1) or error

    def close(self, code: int) -> None:
        """Give back the lock and the memory. code: what the program would exit with, for wandb."""
        if self.wandb is not None:
            self.wandb.finish(code, self.results)
        if self.lock is not None:
            self.lock.close()
        self.lock = self.wandb = self.learner = self.training = None


def locked(folder: str, runs: str):
    """The open lock of a run's folder, which is made. Raises UserError."""
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(os.path.join(folder, "lock"), "a")  # "w" would touch a finished run
        lock(file, f"RUNS = {runs!r}", wait=False)
    except BlockingIOError:
        raise UserError(f"{folder} is in use by another process", "wait for it") from None
    except OSError as e:
        raise UserError(f"{folder} cannot be written or locked: {e.strerror}") from None
    return file


def brief(numbers: dict) -> str:
    """An evaluation in one line."""
    cells = (f"{n} {numbers[n]:.4g}" if n == "l0" else f"{n} {numbers[n]:.4f}" for n in SHOWN)
    return "  ".join(cells)
