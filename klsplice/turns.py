"""Several experiments in one process, in turns: one works at a time, and the others wait.

Each is a job in a thread of its own, and says at certain points how far it has come. The one that
has come least far goes on. So all of them make a step after one another, and what they share, a
clean pass, is made once. To a job it makes no difference whether it is alone.
"""

import signal
import threading
import time
import traceback

from tqdm import tqdm

from klsplice.progress import Bar

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
FINISHING = "finishing this step and saving; the same signal again stops at once"
AT_ONCE = 1.0  # seconds in which the same signal again is the first one: `timeout` sends two


class Alone:
    """The turns of an experiment that has no other beside it.

    signal: the first one that asked it to stop, or 0. n: how many there are."""

    several, n = False, 1

    def __init__(self):
        self.bar, self.signal, self._since = Bar(), 0, 0.0

    def note_signal(self, number: int) -> bool:
        """A signal came -> whether it is a second one, which stops at once."""
        if self.signal:
            return number != self.signal or time.monotonic() - self._since > AT_ONCE
        self.signal, self._since = number, time.monotonic()
        what = f" in each of the {self.n} runs" if self.n > 1 else ""
        tqdm.write(f"{signal.Signals(number).name}{what}: {FINISHING}")
        return False

    def wait(self, *progress: int) -> None:
        pass

    def failed(self) -> None:
        """Called in a job that has failed, before anything that takes time."""


class Turns(Alone):
    """Runs jobs in turns. on_start: called in a job's thread before it. on_failure: called with a
    job's number after it has failed, before another one has its turn. agree: the number
    of this process -> that of all, in a tuple."""

    several = True

    def __init__(self, on_start=lambda: None, on_failure=lambda job: None, agree=lambda n: (n,)):
        super().__init__()
        self.n, self._met = 0, set()
        self._on_start, self._on_failure, self._agree = on_start, on_failure, agree
        self._changed = threading.Condition()
        self._progress = {}  # of each job that has not ended
        self._working = None  # whose turn it is

    def run(self, jobs: list) -> list[int]:
        """jobs: callables without arguments -> their exit codes."""
        self.n, codes = len(jobs), [1] * len(jobs)
        self._progress = {i: (0,) for i in range(len(jobs))}
        threads = [
            threading.Thread(target=self._work, args=(i, job, codes), daemon=True)
            for i, job in enumerate(jobs)
        ]
        handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            self._working = 0
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():  # signals are handled between two waits
                    thread.join(0.1)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return codes

    def wait(self, *progress: int) -> None:
        """Called in a job, which has come this far: let the others come as far."""
        with self._changed:
            me = self._working
            self._progress[me] = progress
            self._hand_on()
            self._changed.wait_for(lambda: self._working == me)

    def failed(self) -> None:
        if self._working not in self._met:
            self._met.add(self._working)
            self._on_failure(self._working)

    def others_stand(self) -> bool:
        """Called in a job: whether another one is past its set-up."""
        with self._changed:
            return any(far > (0,) for i, far in self._progress.items() if i != self._working)

    def _work(self, me: int, job, codes: list[int]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._working == me)
        try:
            self._on_start()
            (came,) = self._agree(self.signal)
            codes[me] = 128 + came if came else job()
        except SystemExit as e:  # of a process whose main process said why
            codes[me] = e.code
        except BaseException:
            traceback.print_exc()
        try:
            if 0 < codes[me] < 128:
                self.failed()
        finally:
            with self._changed:
                del self._progress[me]
                self._hand_on()

    def _hand_on(self) -> None:
        least = min(self._progress.items(), key=lambda item: (item[1], item[0]), default=(None,))
        self._working = least[0]
        self._changed.notify_all()

    def _on_signal(self, number, frame) -> None:
        if self.note_signal(number):
            signal.signal(number, signal.SIG_DFL)  # it ends the process where it is
            signal.raise_signal(number)
