"""The run folder: run.json, metrics.jsonl, checkpoints/, results.json, figures/, sae/; and wandb.

A run is its folder. Absent: it starts. Same constants and finished: its table is printed and
nothing changes. Same and unfinished: it goes on from the newest good checkpoint. Other constants:
refused.
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import signal
import time

import numpy as np
from safetensors import SafetensorError
from tqdm import tqdm

import card
import checkpoint
import distributed
import formats
import language_model
import plots
import report
from checkpoint import finite, read_json, write_json
from dashboard import Wandb
from errors import Stopped, UserError, too_little
from eval import gap_closed
from machine import check_space, device_name, git_commit, peak_memory_gb, versions

FREE = {"RUNS", "CACHE", "WANDB_PROJECT", "LOG_EVERY", "SAVE_EVERY"}  # may differ on resume
UNBORN = {"lock", "run.json.tmp"}  # what a run killed while it started may leave
SOURCE = ("architecture", "d_in", "d_sae", "k", "licence")  # what run.json has of it
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Run:
    """One experiment's folder, as a context manager that holds its lock and its signal handlers.

    c: the constants. Raises UserError (exit 2) where the folder holds a run with other constants,
    is in use or cannot be written.
    """

    def __init__(self, c):
        self.c = c
        self.name = c.RUN_NAME or default_name(c)
        plain = not set("/+") & set(self.name) and self.name not in (".", "..")
        if not plain or len(os.fsencode(self.name)) > 200:
            what = f"RUN_NAME = {self.name[:80]!r} is no folder name"
            raise UserError(what, "wanted a plain name, without / and +, of 200 bytes at most")
        self.folder = os.path.join(c.RUNS, self.name)
        self.constants = {n: v for n, v in vars(c).items() if n != "RECIPES"}
        self.stop_signal, self.wandb, self.bar, self.lock = 0, None, None, None
        self.writes = distributed.rank() == 0
        self.optimizer, self.seconds, self.finished = None, 0.0, False
        self.started = None  # when the step that is under way began, evaluations left out
        self.about, self.logged = None, (0, 0.0)  # steps and seconds when the last line was written

    # ---- opening and closing ----

    def __enter__(self):
        self.finished = self._open()
        self.old_handlers = {s: signal.signal(s, self._on_signal) for s in SIGNALS}
        return self

    def __exit__(self, *error):
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        if self.bar is not None:
            self.bar.close()
        if self.wandb is not None:
            self.wandb.finish(getattr(error[1], "code", 1) if error[0] else 0)
        if self.lock is not None:
            self.lock.close()
        if plain := too_little(error[1], self.c, code=2 if self.about is None else 1):
            raise plain from None

    @distributed.alone
    def _open(self) -> bool:
        """Refuse a folder that is not for this run -> whether it holds it finished."""
        self._check_writable()
        if os.path.exists(self.path("run.json")):
            self._take_lock()
            self._compare(self._old_constants())
        elif os.path.isdir(self.folder) and set(os.listdir(self.folder)) - UNBORN:
            what = f"{self.folder} exists and holds no run"
            raise UserError(what, "set RUN_NAME to another name")
        return os.path.exists(self.path("results.json"))

    def path(self, *names) -> str:
        return os.path.join(self.folder, *names)

    def _check_writable(self) -> None:
        try:
            os.makedirs(self.c.RUNS, exist_ok=True)
        except OSError as e:
            raise UserError(f"RUNS = {self.c.RUNS!r} cannot be made: {e.strerror}") from None
        if not os.access(self.c.RUNS, os.W_OK):
            raise UserError(
                f"RUNS = {self.c.RUNS!r} cannot be written", "set RUNS to another folder"
            )

    def _check_disk(self, learner) -> None:
        trained = sum(p.nbytes for p in learner.parameters())
        state = sum(t.nbytes for t in learner.state().values()) + 2 * trained  # AdamW's moments
        sae = sum(t.nbytes for t in learner.model.state_dict().values())
        needed = (checkpoint.KEPT + 1) * state + 2 * sae  # a checkpoint is written before one goes
        check_space("RUNS", self.c.RUNS, needed)

    def _take_lock(self) -> None:
        try:
            os.makedirs(self.folder, exist_ok=True)
            self.lock = open(self.path("lock"), "a")  # "w" would touch a finished run
        except OSError as e:
            raise UserError(f"{self.folder} cannot be written: {e.strerror}") from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.folder} is in use by another process", "wait for it") from None

    def _old_constants(self) -> dict:
        try:
            return dict(read_json(self.path("run.json"))["constants"])
        except (ValueError, TypeError, KeyError):
            what = f"{self.path('run.json')} is damaged"
            raise UserError(what, "set RUN_NAME to another name, or remove that folder") from None

    def _compare(self, old: dict) -> None:
        new = {n: v for n, v in self.constants.items() if n not in FREE}
        old = {n: v for n, v in old.items() if n not in FREE}
        names = [n for n in sorted(new.keys() | old.keys()) if new.get(n) != old.get(n)]
        if names:
            changes = ", ".join(f"{n} {old.get(n)!r} -> {new.get(n)!r}" for n in names)
            what = f"{self.folder} holds a run with other constants: {changes}"
            raise UserError(what, "set RUN_NAME to another name, or remove that folder")

    def _digest(self) -> str:
        """Of what a checkpoint is bound to: the constants that decide a run's results."""
        kept = {n: v for n, v in self.constants.items() if n not in FREE}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]

    def _on_signal(self, number, frame):
        if self.optimizer is None or self.stop_signal:
            raise Stopped(number)  # nothing to save yet, or the second signal
        self.stop_signal = number
        name = signal.Signals(number).name
        tqdm.write(f"{name}: finishing this step and saving; the same signal again stops at once")

    @distributed.alone
    def say_finished(self) -> None:
        print(f"{self.folder} is finished; nothing was changed")
        print(report.table([self.folder]))

    def start(self, source, tokens, learner) -> None:
        """Make the folder and run.json, or find them; from here on something is written."""
        self.tokens_a_step, self.total = tokens.tokens_a_step, tokens.steps
        self._begin(source, tokens, learner)

    @distributed.alone
    def _begin(self, source, tokens, learner) -> None:
        if self.lock is None:
            self._check_disk(learner)
            self._take_lock()
            if os.path.exists(self.path("run.json")):
                what = f"another process has run {self.folder} in the meantime"
                raise UserError(what, "run the same command again")
            about = {
                "constants": self.constants,
                "recipes": self.c.RECIPES,
                "resolved": {
                    "sae_commit": source.commit,
                    "dataset_commit": tokens.commit,
                    "tokens": tokens.fingerprint,
                },
                "source": {n: getattr(source, n) for n in SOURCE},
                "trainable_parameters": sum(p.numel() for p in learner.parameters()),
                "commit": git_commit(),
                "versions": versions(),
                "python": platform.python_version(),
                "device": device_name(self.c.DEVICE),
                "processes": distributed.size(),
            }
            write_json(self.path("run.json"), about)
        self.about = read_json(self.path("run.json"))
        print(f"run: {self.folder}")
        if self.c.WANDB_PROJECT:
            self.wandb = Wandb(self)

    @distributed.alone
    def once(self, name: str, measure) -> dict:
        """An evaluation that a resumed run does not repeat; kept as <name>.json and <name>.npz."""
        path = self.path(f"{name}.json")
        if not os.path.exists(path):
            found = measure()
            step = 0 if name == "before" else self.total
            self._cut_metrics(step, evaluations=False)  # of a kill between the line and the file
            self._write_evaluation(step, found, found if name == "before" else None)
            tokens_SL = measure.tokens.val_SL
            np.savez_compressed(self.path(f"{name}.npz"), **measure.per_token, tokens=tokens_SL)
            write_json(path, found)
        found = read_json(path)
        print(f"{name + ':':8}{_brief(found)}")
        return found

    # ---- training ----

    def steps(self, learner, optimizer, tokens):
        """Yields the steps that are left; after one, saves if it is time or a signal came."""
        where, bound = self.path("checkpoints"), self._digest()
        step, self.seconds = checkpoint.load(where, learner, optimizer, run=bound)
        if distributed.largest(step, -step) != (step, -step):
            what = f"not every process finds the checkpoint in {self.folder}"
            raise UserError(what, "RUNS has to be a folder that all machines share", code=1)
        distributed.copy_from_first(learner.state().values())
        self.evaluated, self.logged = self._cut_metrics(step), (step, self.seconds)
        self.learner, self.optimizer = learner, optimizer
        at = {"total": tokens.tokens, "initial": step * self.tokens_a_step, "desc": self.name[-24:]}
        self.bar = tqdm(unit=" tokens", unit_scale=True, dynamic_ncols=True, **at)
        saved = time.monotonic()
        for step in range(step, self.total):
            self.started = time.monotonic()
            yield step
            self.seconds, self.started = self._clock(), None
            self.bar.update(self.tokens_a_step)
            due = time.monotonic() - saved > 60 * self.c.SAVE_EVERY
            stop, due = distributed.largest(self.stop_signal, due)
            if stop or due or step + 1 == self.total:
                self._save(step + 1)
                saved = time.monotonic()
            if stop:
                self._stop(step + 1, stop)
        self.bar.close()
        self.optimizer = None

    @distributed.alone
    def _save(self, step: int) -> None:
        self.optimizer.check(step, {})
        where = self.path("checkpoints")
        about = {"step": step, "seconds": self.seconds, "run": self._digest()}
        try:
            checkpoint.save(where, self.learner, self.optimizer, **about)
        except (OSError, SafetensorError) as e:
            what = f"the checkpoint of step {step:,} could not be written: {e}"
            raise UserError(what, "free some disk; those before it are kept", code=1) from None

    def _clock(self) -> float:
        """Seconds of training so far, with the step that is under way."""
        return self.seconds + (time.monotonic() - self.started if self.started is not None else 0)

    def stop_on(self, problem: str | None, step: int) -> None:
        """End the run where training went wrong, with its state saved."""
        if problem:
            self._save(step + 1)
            raise UserError(f"{problem} (step {step + 1:,})", "lower LR or change L1", code=1)

    def _stop(self, step: int, number: int) -> None:
        tqdm.write(f"stopped after step {step:,} of {self.total:,}; the same command goes on there")
        raise Stopped(number)

    def wants_log(self, step: int) -> bool:
        return (step + 1) % self.c.LOG_EVERY == 0 or step + 1 == self.total

    def log(self, step: int, scalars: dict) -> None:
        """One line of metrics.jsonl after step `step`; also to wandb and in short to the bar."""
        (steps, seconds), self.logged = self.logged, (step + 1, self._clock())
        rate = (step + 1 - steps) * self.tokens_a_step / max(self.logged[1] - seconds, 1e-9)
        line = {f"train/{n}": v for n, v in (scalars | {"tokens_per_second": rate}).items()}
        self._write_line(step + 1, line)
        self.bar.set_postfix({n: f"{scalars[n]:.3g}" for n in ("kl", "mse", "lr")}, refresh=False)

    def wants_evaluation(self, step: int) -> bool:
        """Whether EVAL_EVERY tokens are full after `step` steps, and it is not made yet."""
        every, tokens = self.c.EVAL_EVERY, step * self.tokens_a_step
        due = tokens // every > (tokens - self.tokens_a_step) // every
        return 0 < step < self.total and due and step not in self.evaluated

    def evaluate(self, step: int, measure) -> None:
        """Measure after `step` steps, off the clock, and write the line."""
        started = time.monotonic()
        found = distributed.alone(measure)(poll=lambda: self._poll(step), keep=False)
        self.started += time.monotonic() - started
        self.evaluated.add(step)
        self._write_evaluation(step, found)
        tqdm.write(f"{step * self.tokens_a_step:>11,} tokens: {_brief(found)}")

    def _poll(self, step: int) -> None:
        """A signal during an evaluation: the state is that of before it, which is made again."""
        if self.stop_signal:
            self._save(step)
            self._stop(step, self.stop_signal)

    def _write_evaluation(self, step: int, found: dict, before: dict | None = None) -> None:
        before = before or read_json(self.path("before.json"))
        ce = found["ce_clean"], before["ce_spliced"], found["ce_spliced"]
        found = found | {"gap_closed": gap_closed(*ce)}
        self._write_line(step, {f"val/{n}": v for n, v in found.items()})

    def _write_line(self, step: int, numbers: dict) -> None:
        if not self.writes:
            return
        line = {
            "step": step,
            "tokens": step * self.tokens_a_step,
            "seconds": round(self._clock(), 3),
        }
        line = finite(line | numbers)
        with open(self.path("metrics.jsonl"), "a") as f:
            f.write(json.dumps(line) + "\n")
        if self.wandb is not None:
            self.wandb.log(line)

    @distributed.alone
    def _cut_metrics(self, step: int, *, evaluations: bool = True) -> set[int]:
        """Drop the lines of steps that will be made again, and a half-written last one.

        evaluations: whether the one made after `step` steps stays. -> the steps evaluated.
        """
        kept = [line for line in report.read_metrics(self.folder) if line["step"] <= step]
        if not evaluations:
            kept = [line for line in kept if line["step"] < step or "val/kl" not in line]
        with open(self.path("metrics.jsonl.tmp"), "w") as f:
            f.writelines(json.dumps(line) + "\n" for line in kept)
        os.replace(self.path("metrics.jsonl.tmp"), self.path("metrics.jsonl"))
        return {line["step"] for line in kept if "val/kl" in line}

    # ---- the end ----

    def finish(self, before: dict, after: dict, tokens) -> None:
        """results.json and figures, with which the run is finished; then its table."""
        results = summary(before, after) | {
            "tokens": tokens.tokens,
            "seconds": self.seconds,
            "tokens_per_second": tokens.tokens / max(self.seconds, 1e-9),
            "peak_memory_gb": peak_memory_gb(self.c.DEVICE),
            "device": self.about["device"],
            "commit": self.about["commit"],
        }
        plots.run_figures(self.folder, results)
        card.write(self.folder, results, self.about)
        write_json(self.path("results.json"), finite(results))
        shutil.rmtree(self.path("checkpoints"), ignore_errors=True)
        if self.wandb is not None:
            self.wandb.results(results)
        print(report.table([self.folder]))
        print(f"the SAE is in {self.path('sae')}, the figures are in {self.path('figures')}")


def summary(before: dict, after: dict) -> dict:
    """What results.json says of two evaluations on the same tokens."""
    out = {
        "ce_clean": after["ce_clean"],
        "ce_zero": after["ce_zero"],
        "gap_closed": gap_closed(after["ce_clean"], before["ce_spliced"], after["ce_spliced"]),
    }
    out |= {f"{n}_no_special": after[f"{n}_no_special"] for n in ("ce_clean", "ce_zero")}
    for when, found in (("before", before), ("after", after)):
        for ending in ("", "_no_special"):
            out[f"ce_{when}{ending}"] = found[f"ce_spliced{ending}"]
            out[f"ce_recovered_{when}{ending}"] = found[f"ce_recovered{ending}"]
            out[f"kl_{when}{ending}"] = found[f"kl{ending}"]
        out |= {f"{n}_{when}": found[n] for n in ("fvu", "mse", "l0", "dead_fraction")}
    return out


# ---- small things ----------------------------------------------------------------------------


PLAIN = {"small", "kl_mse", "kl_only", "mse_only"}  # recipes that the rest of a name tells


@distributed.alone
def default_name(c) -> str:
    """model_layer_architecture_k_width_loss[_recipe or what learns]_seed; never of a time.

    Looks into the SAE's config, which may raise UserError."""
    architecture, k, width = c.ARCHITECTURE or "topk", c.K, c.D_SAE
    if c.SAE != "fresh":
        language_model.check_device(c.DEVICE)  # before anything is downloaded
        language_model.look_for_hub(c)
        source = formats.open_sae(c.SAE, c.SAE_REVISION)
        architecture, k, width = c.ARCHITECTURE or source.architecture, source.k, source.d_sae
    parts = [os.path.basename(os.path.normpath(c.MODEL)), f"l{c.LAYER}", architecture]
    parts += [f"k{k}"] * (k is not None and architecture not in ("relu", "jumprelu"))
    parts += [f"{width // 1000}k" if width >= 1000 else str(width), c.LOSS.replace("+", "-")]
    small, fresh = c.TRAIN != "sae", c.SAE == "fresh"
    parts += [r for r in c.RECIPES if r not in PLAIN] or [c.TRAIN] * small or ["fresh"] * fresh
    parts += [f"r{c.RANK}"] * small
    return "_".join(parts + [f"s{c.SEED}"])[-200:]


def _brief(found: dict) -> str:
    names = ("ce_clean", "ce_spliced", "ce_recovered", "kl", "fvu", "l0")
    return "  ".join(f"{n} {found[n]:.4g}" if n == "l0" else f"{n} {found[n]:.4f}" for n in names)
