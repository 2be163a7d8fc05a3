"""The run folder: run.json, metrics.jsonl, checkpoints/, results.json, sae/; loop.py fills it.

A run is its folder. Absent: it starts. Same constants and finished: nothing changes. Same and
unfinished: it resumes from the newest good checkpoint. Other constants: refused.
"""

import itertools
import os
import platform
import secrets
import shutil
import signal

import numpy as np

from klsplice import distributed, metrics
from klsplice.errors import Stopped, UserError, out_of_resources
from klsplice.identity import check_same, resolved
from klsplice.machine import (
    check_space,
    code_digest,
    device_name,
    git_commit,
    peak_memory_gb,
    versions,
)
from klsplice.storage import finite, read_json, write_json
from klsplice.tracking import checkpoint
from klsplice.tracking.dashboard import Wandb
from klsplice.tracking.folder import Folder
from klsplice.turns import SIGNALS, Alone

SOURCE = ("architecture", "d_in", "d_sae", "k", "l1", "licence")  # what run.json has of it
MEMORY = ("MICRO_BATCH", "CLEAN_BATCH", "HEAD_CHUNK", "EVAL_BATCH")  # constants that decide it
SHOWN = ("ce_clean", "ce_spliced", "ce_recovered", "kl", "fvu", "l0")  # of an evaluation


class Run(Folder):
    """One experiment's folder, as a context manager that holds its lock and its signal handlers.

    recipes: names of the files that set some of the constants. sweep: the name of what it belongs
    to, "" where it is alone. turns: turns.Turns, or Alone.
    """

    def __init__(self, name: str, constants: dict, recipes=(), sweep="", turns=None):
        super().__init__(name, constants)
        self.recipes, self.sweep, self.turns = recipes, sweep, turns or Alone()
        self.writes = distributed.rank() == 0
        self.finished = self.resumable = False  # resumable: a stop would lose nothing
        self.whole = False  # whether evaluations on the way are too: it began before EVAL_TOKENS
        self.about, self.wandb, self.old_handlers = None, None, {}

    def __enter__(self):
        self.finished = self.open_run()
        if not self.turns.several:  # else they have a handler for all
            self.old_handlers = {s: signal.signal(s, self._on_signal) for s in SIGNALS}
        return self

    def __exit__(self, *error):
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        self.turns.bar.close(self.name)
        if error[0] and getattr(error[1], "code", 1) < 128:  # no signal
            self.turns.failed()  # before wandb, which may take minutes
        if self.wandb is not None:
            self.wandb.finish(getattr(error[1], "code", 1) if error[0] else 0)
        if self.lock is not None:
            self.lock.close()
        sizes = {name: self.constants[name] for name in MEMORY}
        if plain := out_of_resources(error[1], sizes, code=2 if self.about is None else 1):
            raise plain from None

    def _on_signal(self, number, frame):
        if not self.resumable or self.turns.note_signal(number):
            raise Stopped(number)  # nothing to save yet, or the second signal

    def wait(self, *progress: int) -> None:
        """The run has come this far (stage, step, batch): others beside it catch up."""
        self.turns.wait(*progress)
        if self.turns.signal and not self.resumable:  # else the loop stops after its step
            raise Stopped(self.turns.signal)

    @property
    def said(self) -> str:
        """What its lines on the screen begin with."""
        return f"{self.name}: " if self.turns.several else ""

    @distributed.main_process_only
    def start(self, opened, source, tokens, learner) -> None:
        """Make the folder and run.json, or find them; from here on something is written.

        opened: lm.load.Opened. source: formats.read.Source. tokens: data.Tokens. Raises UserError
        where a run that is found began with other content."""
        content = resolved(opened, source, tokens)
        if self.lock is None:
            check_space("RUNS", self.constants["RUNS"], most_bytes(learner))
            self.take_lock()
            if os.path.exists(self.path("run.json")):
                what = f"another process has run {self.folder} in the meantime"
                raise UserError(what, "run the same command again")
            write_json(self.path("run.json"), self._about(content, source, learner))
        self.about = read_json(self.path("run.json"))
        if self.turns.n > self.about.get("together", 1):  # it may begin alone and go on in a sweep
            self.about["together"] = self.turns.n
            write_json(self.path("run.json"), self.about)
        self.whole = "EVAL_TOKENS" not in self.about["constants"]
        check_same(self.folder, self.about["resolved"], content)
        print(f"run: {self.folder}{self.other_code}")
        if self.constants["WANDB_PROJECT"]:
            self.wandb = Wandb(self)

    def _about(self, content: dict, source, learner) -> dict:
        return {
            "constants": self.constants,
            "recipes": self.recipes,
            "resolved": content,
            "checked": learner.splice.checked,
            "wandb_id": secrets.token_hex(8),
            "source": {n: getattr(source, n) for n in SOURCE},
            "trainable_parameters": sum(p.numel() for p in learner.parameters()),
            "commit": git_commit(),
            "code": code_digest("finetune"),
            "versions": versions(),
            "python": platform.python_version(),
            "device": device_name(self.constants["DEVICE"]),
            "processes": distributed.size(),
        }

    @distributed.main_process_only
    def once(self, name: str, measure, tokens_SL: np.ndarray, *, step: int, seconds: float) -> dict:
        """An evaluation, "before" or "after", that a resumed run does not repeat -> its numbers.

        measure(poll) -> eval.Found. Kept as <name>.json and, with the held-out tokens, <name>.npz.
        step, seconds: of training when it is made."""
        path = self.path(f"{name}.json")
        if not os.path.exists(path):
            found = measure(poll=self.batch_by_batch(1 if name == "before" else 3, step))
            # of a kill between the line and the file
            metrics.cut(self.folder, step, evaluations=False)
            self.write_evaluation(step, seconds, found.numbers if self.whole else found.few)
            np.savez_compressed(self.path(f"{name}.npz"), **found.arrays, tokens=tokens_SL)
            write_json(path, found.numbers)
        numbers = read_json(path)
        print(f"{self.said}{name + ':':8}{brief(numbers)}")
        return numbers

    def batch_by_batch(self, stage: int, step: int):
        """What an evaluation calls after each batch. On several processes, of which only one is at
        it, nobody waits."""
        batches = itertools.count(1)
        return lambda: self.wait(stage, step, next(batches)) if distributed.size() == 1 else None

    def write_evaluation(self, step: int, seconds: float, found: dict) -> None:
        """found: on the first EVAL_TOKENS, so that those of a run are of the same tokens."""
        before = metrics.evaluations(self.folder) or [{"val/ce_spliced": found["ce_spliced"]}]
        ce = found["ce_clean"], before[0]["val/ce_spliced"], found["ce_spliced"]
        found = found | {"gap_closed": metrics.gap_closed(*ce)}
        self.write_line(step, seconds, {f"val/{n}": v for n, v in found.items()})

    def write_line(self, step: int, seconds: float, numbers: dict) -> None:
        """One line of metrics.jsonl, and of wandb."""
        if not self.writes:
            return
        tokens = step * self.constants["BATCH"] * self.constants["CONTEXT"]
        line = {"step": step, "tokens": tokens, "seconds": round(seconds, 3)} | numbers
        line = metrics.append(self.folder, line)
        if self.wandb is not None:
            self.wandb.log(line)

    def finish(self, results: dict) -> None:
        """Write results.json, with which the run is finished, and drop its checkpoints."""
        write_json(self.path("results.json"), finite(results))
        shutil.rmtree(self.path("checkpoints"), ignore_errors=True)
        if self.wandb is not None:
            self.wandb.results(results)

    def totals(self, tokens: int, seconds: float) -> dict:
        """What results.json has of a training on that many tokens."""
        return {
            "tokens": tokens,
            "seconds": seconds,
            "together": self.about.get("together", 1),  # runs that shared a clean pass
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "peak_memory_gb": peak_memory_gb(self.constants["DEVICE"]),
            **{name: self.about[name] for name in ("device", "commit")},
        }


def most_bytes(learner) -> int:
    """What a run writes at most: a checkpoint before an older one goes, and the SAE twice."""
    trained = sum(p.nbytes for p in learner.parameters())
    state = sum(t.nbytes for t in learner.state().values()) + 2 * trained  # AdamW's moments
    sae = sum(t.nbytes for t in learner.model.state_dict().values())
    return (checkpoint.KEPT + 1) * state + 2 * sae


def brief(found: dict) -> str:
    """An evaluation in one line."""
    cells = (f"{n} {found[n]:.4g}" if n == "l0" else f"{n} {found[n]:.4f}" for n in SHOWN)
    return "  ".join(cells)
