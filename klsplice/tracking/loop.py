"""What the training loop does beside training: resume, save, stop on a signal, log, keep time."""

import os
import sys
import time
from contextlib import contextmanager

from safetensors import SafetensorError
from tqdm import tqdm

from klsplice import distributed, metrics
from klsplice.errors import OutOfMemory, Stopped, UserError
from klsplice.progress import Bar, Signals
from klsplice.storage import read_json
from klsplice.tracking import checkpoint
from klsplice.tracking.run_folder import Run, brief


class NoneLeft(Exception):
    """No run is left that the next phase could be of."""


class Live:
    """The runs that go together, as a context manager: one that fails or is finished leaves it.

    alone: a failure ends the command, since there is no other run, or there are other processes.
    codes: of those that left, the program's exit codes. late: the Configs of those that there was
    no memory left for.
    """

    def __init__(self, runs: list[Run], signals: Signals, *, alone: bool):
        self.runs, self.signals, self.alone = runs, signals, alone
        self.codes, self.late, self.bar = [], [], None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.signals.saves = False
        if self.bar is not None:
            self.bar.close()
        if kind in (None, NoneLeft) or not self.runs:
            return kind is NoneLeft
        plain = self.runs[0].as_user_error(error)
        for run in [*self.runs]:
            self.leave(run, getattr(plain, "code", 1))
        if isinstance(plain, UserError) and not self.alone:  # it is of what they share
            print(plain, file=sys.stderr)
            return True
        if plain is not error:
            raise plain from None
        return False

    def leave(self, run: Run, code: int) -> None:
        self.runs.remove(run)
        self.codes.append(code)
        run.close(code)

    def each(self, act, runs=None) -> None:
        """act(run) for each of them, or of `runs`. Raises NoneLeft where none stays."""
        runs = [*(self.runs if runs is None else runs)]
        for i, run in enumerate(runs):
            try:
                act(run)
            except Exception as e:
                error = run.as_user_error(e)
                if self.alone or not isinstance(error, UserError):
                    raise
                if isinstance(error, OutOfMemory) and run.about is None and run is not self.runs[0]:
                    self.late = [later.cfg for later in runs[i:]]
                    for later in runs[i:]:
                        self.runs.remove(later)
                        later.close(0)
                    return
                print(f"{run.name}: {error}", file=sys.stderr)
                self.leave(run, error.code)
        if not self.runs:
            raise NoneLeft

    def at(self, step: int) -> list[Run]:
        """Those that make this step; the others had made it before they were stopped."""
        return [run for run in self.runs if run.training.loop.first <= step]

    def once(self, name: str, evaluation, step: int) -> None:
        """An evaluation of each after `step` steps, "before" or "after", into run.evaluations.

        A resumed run does not repeat it. evaluation: eval.Evaluation."""
        for run, numbers in zip(self.runs, self._once(name, evaluation, step)):
            run.evaluations[name] = numbers
            print(f"{run.prefix}{name + ':':8}{brief(numbers)}")

    @distributed.main_process_only
    def _once(self, name: str, evaluation, step: int) -> list[dict]:
        missing = [run for run in self.runs if not os.path.exists(run.path(f"{name}.json"))]
        for run, found in zip(missing, evaluation([run.learner for run in missing])):
            run.keep_evaluation(name, found, evaluation.tokens.val_SL, step)
        return [read_json(run.path(f"{name}.json")) for run in self.runs]

    def steps(self):
        """Yields the steps that are left; after one, all save if it is time or a signal came."""
        loops = [run.training.loop for run in self.runs]
        total, tokens = loops[0].total, loops[0].tokens_a_step
        firsts = [loop.first for loop in loops]
        sizes = {"total": total * len(loops) * tokens, "done": sum(firsts) * tokens}
        self.bar = Bar([run.name for run in self.runs], **sizes)
        self.signals.saves, saved = True, time.monotonic()
        for step in range(min(firsts), total):
            yield step
            for run in self.at(step):
                self.bar.update(tokens)
                self.bar.show(run.name, run.training.loop.shown)
            due = time.monotonic() - saved > 60 * self.runs[0].cfg.SAVE_EVERY
            stop, due = distributed.largest(self.signals.came, due)
            if stop or due or step + 1 == total:
                self.save(step + 1, stop)
                saved = time.monotonic()
        self.signals.saves = False
        self.bar.close()

    def save(self, step: int, stop: int = 0) -> None:
        """A checkpoint of each after `step` steps. stop: the signal that ends the runs then."""
        self.each(lambda run: run.training.loop.save(step), self.at(step - 1))
        if stop:
            tqdm.write(f"stopped after step {step:,}; the same command resumes there")
            raise Stopped(stop)

    def evaluate(self, step: int, evaluation) -> None:
        """Measure those that want it after `step` steps, and write their lines."""
        due = [run for run in self.at(step) if run.training.loop.wants_evaluation(step)]
        if due:
            for run, numbers in zip(due, self._midway(step, due, evaluation)):
                self.each(lambda one: one.training.loop.note(step, numbers), [run])  # noqa: B023

    @distributed.main_process_only
    def _midway(self, step: int, due: list[Run], evaluation) -> list[dict]:
        learners = [run.learner for run in due]
        found = evaluation.measure(learners, evaluation.few, lambda: self._poll(step))
        return [one.numbers for one in found]

    def _poll(self, step: int) -> None:
        """A signal during an evaluation: save the state of before it, which is made again."""
        if self.signals.came:
            self.save(step, self.signals.came)


class Loop:
    """One run's way through the steps: where it resumes, its clock, its lines and checkpoints.

    total: steps in all. tokens_a_step: over all processes. first: the first step that is left.
    """

    def __init__(self, run: Run, learner, optimizer, *, total: int, tokens_a_step: int):
        self.run, self.learner, self.optimizer = run, learner, optimizer
        self.total, self.tokens_a_step = total, tokens_a_step
        self.folder = run.path("checkpoints")
        self.started = None  # when the step that is under way began
        self.shown = {}  # of the last line, for the bar
        # seconds of training, up to the last step that is done
        found = checkpoint.load(self.folder, learner, optimizer, run=run.digest())
        self.first, self.seconds = found
        if distributed.largest(self.first, -self.first) != (self.first, -self.first):
            what = f"not every process finds the checkpoint in {run.folder}"
            raise UserError(what, "RUNS has to be a folder that all machines share", code=1)
        distributed.broadcast(learner.state().values())
        self.logged = self.first, self.seconds  # steps and seconds when the last line was written
        # steps after which an evaluation was made
        self.evaluated = metrics.cut(run.folder, self.first, evaluations=True)
        if self.first in self.evaluated:  # it may be what the run ended for
            last = metrics.evaluations(run.folder)[-1]
            self.check_worth({n.removeprefix("val/"): v for n, v in last.items()}, self.first)

    @contextmanager
    def timed(self):
        """While inside, a step is under way."""
        self.started = time.monotonic()
        yield
        self.seconds += time.monotonic() - self.started

    @distributed.main_process_only
    def save(self, step: int) -> None:
        """Write a checkpoint. Raises UserError; those before it stay."""
        self.optimizer.check(step, {})
        about = {"step": step, "seconds": self.seconds, "run": self.run.digest()}
        try:
            checkpoint.save(self.folder, self.learner, self.optimizer, **about)
        except (OSError, SafetensorError) as e:
            what = f"the checkpoint of step {step:,} could not be written: {e}"
            raise UserError(what, "free some disk; those before it are kept", code=1) from None

    def stop_on(self, problem: str | None, step: int, hint="lower LR or change L1") -> None:
        """End the run where training went wrong, with its state after `step` saved: UserError."""
        if problem:
            self.save(step + 1)
            raise UserError(f"{problem} (step {step + 1:,})", hint, code=1)

    def check_worth(self, numbers: dict, step: int) -> None:
        """End the run, too, where the CE has come over that with the residual at zero.

        numbers: of an evaluation after `step` steps."""
        if not self.learner.splice.at_residual:  # elsewhere zero costs little
            return
        if metrics.worse_than_nothing(numbers, self.run.evaluations["before"]["ce_spliced"]):
            ce, zero = numbers["ce_spliced"], numbers["ce_zero"]
            problem = f"CE with the SAE is {ce:.4f}, and {zero:.4f} with the residual at zero"
            self.stop_on(problem, step - 1, "lower LR")

    def wants_log(self, step: int) -> bool:
        return (step + 1) % self.run.cfg.LOG_EVERY == 0 or step + 1 == self.total

    def log(self, step: int, scalars: dict) -> None:
        """One line after step `step`, in metrics.jsonl, in wandb and in short on the bar."""
        steps, seconds = self.logged
        self.logged = step + 1, self.seconds + time.monotonic() - self.started
        rate = (step + 1 - steps) * self.tokens_a_step / max(self.logged[1] - seconds, 1e-9)
        line = {f"train/{n}": v for n, v in (scalars | {"tokens_per_second": rate}).items()}
        self.run.write_line(step + 1, self.logged[1], line)
        names = [n for n in scalars if n not in ("alpha", "l0", "grad_norm")]
        self.shown = {n: scalars[n] for n in names if scalars[n] == scalars[n]}  # nan: no such term

    def wants_evaluation(self, step: int) -> bool:
        """Whether EVAL_EVERY tokens are full after `step` steps, and it is not made yet."""
        every, tokens = self.run.cfg.EVAL_EVERY, step * self.tokens_a_step
        due = tokens // every > (tokens - self.tokens_a_step) // every
        return 0 < step < self.total and due and step not in self.evaluated

    def note(self, step: int, numbers: dict) -> None:
        """Write the line of an evaluation after `step` steps."""
        self.evaluated.add(step)
        self.run.write_evaluation(step, self.seconds, numbers)
        tqdm.write(f"{self.run.prefix}{step * self.tokens_a_step:>11,} tokens: {brief(numbers)}")
        self.check_worth(numbers, step)
