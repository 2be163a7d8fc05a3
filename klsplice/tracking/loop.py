"""What the training loop does beside training: resume, save, stop on a signal, log, keep time."""

import time

from safetensors import SafetensorError
from tqdm import tqdm

from klsplice import distributed, metrics
from klsplice.errors import Stopped, UserError
from klsplice.storage import read_json
from klsplice.tracking import checkpoint
from klsplice.tracking.run_folder import Run, brief


class Loop:
    """The steps of one learner in one run folder.

    total: steps in all. tokens_a_step: over all processes.
    """

    def __init__(self, run: Run, learner, optimizer, *, total: int, tokens_a_step: int):
        self.run, self.learner, self.optimizer = run, learner, optimizer
        self.total, self.tokens_a_step = total, tokens_a_step
        self.seconds = 0.0  # of training, up to the last step that is done
        self.started = None  # when the step that is under way began, evaluations left out
        self.logged = (0, 0.0)  # steps and seconds when the last line was written
        self.evaluated = set()  # steps after which an evaluation was made
        self.constants = run.constants

    def __iter__(self):
        """Yields the steps that are left; after one, saves if it is time or a signal came."""
        first, bar = self._resume(), self.run.turns.bar
        sizes = {"total": self.total, "done": first}
        bar.open(self.run.name, **{n: steps * self.tokens_a_step for n, steps in sizes.items()})
        self.run.resumable = True
        saved = time.monotonic()
        for step in range(first, self.total):
            self.run.wait(2, step, 0)
            self.started = time.monotonic()
            yield step
            self.seconds, self.started = self.clock(), None
            bar.update(self.tokens_a_step)
            due = time.monotonic() - saved > 60 * self.constants["SAVE_EVERY"]
            stop, due = distributed.largest(self.run.turns.signal, due)
            if stop or due or step + 1 == self.total:
                self.save(step + 1)
                saved = time.monotonic()
            if stop:
                self._stop(step + 1, stop)
        bar.close(self.run.name)
        self.run.resumable = False

    def _resume(self) -> int:
        """Restore the newest checkpoint -> how many steps are done."""
        folder = self.run.path("checkpoints")
        found = checkpoint.load(folder, self.learner, self.optimizer, run=self.run.digest())
        step, self.seconds = found
        if distributed.largest(step, -step) != (step, -step):
            what = f"not every process finds the checkpoint in {self.run.folder}"
            raise UserError(what, "RUNS has to be a folder that all machines share", code=1)
        distributed.broadcast(self.learner.state().values())
        self.evaluated = self._cut_metrics(step)
        self.logged = (step, self.seconds)
        if step in self.evaluated:  # it may be what the run ended for
            last = metrics.evaluations(self.run.folder)[-1]
            last = {n.removeprefix("val/"): v for n, v in last.items()}
            self.check_worth(last, step, save=False)
        return step

    @distributed.main_process_only
    def _cut_metrics(self, step: int) -> set[int]:
        return metrics.cut(self.run.folder, step, evaluations=True)

    @distributed.main_process_only
    def save(self, step: int) -> None:
        """Write a checkpoint. Raises UserError; those before it stay."""
        self.optimizer.check(step, {})
        about = {"step": step, "seconds": self.seconds, "run": self.run.digest()}
        folder = self.run.path("checkpoints")
        try:
            checkpoint.save(folder, self.learner, self.optimizer, **about)
        except (OSError, SafetensorError) as e:
            what = f"the checkpoint of step {step:,} could not be written: {e}"
            raise UserError(what, "free some disk; those before it are kept", code=1) from None

    def clock(self) -> float:
        """Seconds of training so far, with the step that is under way."""
        return self.seconds + (time.monotonic() - self.started if self.started is not None else 0)

    def _stop(self, step: int, number: int) -> None:
        done = f"stopped after step {step:,} of {self.total:,}"
        tqdm.write(f"{self.run.said}{done}; the same command resumes there")
        raise Stopped(number)

    def stop_on(self, problem: str | None, step: int) -> None:
        """End the run where its model says that training went wrong, with its state saved."""
        if problem:
            self.save(step + 1)
            raise UserError(f"{problem} (step {step + 1:,})", "lower LR or change L1", code=1)

    def check_worth(self, found: dict, step: int, *, save: bool) -> None:
        """End the run where training has brought the CE over that with the residual at zero.

        found: an evaluation after `step` steps. save: the state is not saved yet. Raises UserError.
        """
        ce, zero = found["ce_spliced"], found["ce_zero"]
        before = read_json(self.run.path("before.json"))["ce_spliced"]
        if metrics.worse_than_nothing(found, before):
            if save:
                self.save(step)
            what = f"CE with the SAE is {ce:.4f}, over that with the residual at zero, {zero:.4f}"
            raise UserError(f"{what} (step {step:,})", "lower LR", code=1)

    def wants_log(self, step: int) -> bool:
        return (step + 1) % self.constants["LOG_EVERY"] == 0 or step + 1 == self.total

    def log(self, step: int, scalars: dict) -> None:
        """One line after step `step`, in metrics.jsonl, in wandb and in short on the bar."""
        (steps, seconds), self.logged = self.logged, (step + 1, self.clock())
        rate = (step + 1 - steps) * self.tokens_a_step / max(self.logged[1] - seconds, 1e-9)
        line = {f"train/{n}": v for n, v in (scalars | {"tokens_per_second": rate}).items()}
        self.run.write_line(step + 1, self.clock(), line)
        names = [n for n in scalars if n not in ("mse", "alpha", "l0", "lr", "grad_norm")]
        names += ["mse", "lr"]
        shown = {n: scalars[n] for n in names if scalars[n] == scalars[n]}  # nan: no such term
        self.run.turns.bar.show(self.run.name, shown)

    def wants_evaluation(self, step: int) -> bool:
        """Whether EVAL_EVERY tokens are full after `step` steps, and it is not made yet."""
        every, tokens = self.constants["EVAL_EVERY"], step * self.tokens_a_step
        due = tokens // every > (tokens - self.tokens_a_step) // every
        return 0 < step < self.total and due and step not in self.evaluated

    def evaluate(self, step: int, evaluation) -> None:
        """Measure after `step` steps, off the clock, and write the line.

        evaluation: eval.Evaluation."""
        started = time.monotonic()
        wait = self.run.batch_by_batch(2, step)
        measure = distributed.main_process_only(evaluation.midway)
        how = {"poll": lambda: self._poll(step, wait), "whole": self.run.whole}
        found = measure(self.learner, **how).numbers
        self.started += time.monotonic() - started
        self.evaluated.add(step)
        self.run.write_evaluation(step, self.clock(), found)
        tqdm.write(f"{self.run.said}{step * self.tokens_a_step:>11,} tokens: {brief(found)}")
        self.check_worth(found, step, save=True)

    def results(self) -> dict:
        """What results.json has of the loop."""
        return self.run.totals(self.total * self.tokens_a_step, self.seconds)

    def _poll(self, step: int, wait) -> None:
        """A signal during an evaluation: save the state of before it, which is made again."""
        wait()
        if self.run.turns.signal:
            self.save(step)
            self._stop(step, self.run.turns.signal)
