"""What the screen shows while something takes time, and the signals that ask a command to stop."""

import signal
import time

from tqdm import tqdm

from klsplice.errors import Stopped

SOON = 2.0  # seconds that something may take without a word
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
AT_ONCE = 1.0  # seconds in which the same signal again is the first one: `timeout` sends two


def tracked(parts, what: str):
    """`parts`, a sequence, with a bar of its own where going through it takes longer than SOON."""
    return tqdm(parts, desc=what, delay=SOON, leave=False, dynamic_ncols=True)


class Bar(tqdm):
    """One progress bar for runs that go together: tokens, and the range of what they log.

    total: tokens that they have to train on. done: how many of these they found done."""

    def __init__(self, names: list[str], *, total: int, done: int):
        title = names[0][-24:] if len(names) == 1 else f"{len(names)} runs"
        look = {"unit": " tokens", "unit_scale": True, "dynamic_ncols": True}
        super().__init__(desc=title, total=total, initial=done, **look)
        self.logged = {}

    def show(self, name: str, values: dict[str, float]) -> None:
        """values: what the run of that name has logged last."""
        self.logged[name] = values
        ranges = {}
        for value_name in dict.fromkeys(n for logged in self.logged.values() for n in logged):
            numbers = [v[value_name] for v in self.logged.values() if value_name in v]
            ends = {f"{min(numbers):.3g}", f"{max(numbers):.3g}"}
            ranges[value_name] = " to ".join(sorted(ends, key=float))
        self.set_postfix(ranges, refresh=False)


class Signals:
    """While inside, the signals of SIGNALS ask the command to stop.

    came: the first of them, or 0. saves: whether the training loop is under way, which reads `came`
    after its step. Elsewhere nothing would be lost, and the signal raises Stopped at once, as a
    second one does anywhere."""

    def __init__(self):
        self.came, self.saves, self._since, self._old = 0, False, 0.0, {}

    def __enter__(self):
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:  # nohup
                continue
            self._old[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _on_signal(self, number, frame):
        if number == self.came and time.monotonic() - self._since < AT_ONCE:
            return
        at_once = self.came or not self.saves
        self.came, self._since = number, time.monotonic()
        if at_once:
            raise Stopped(number)
        name = signal.Signals(number).name
        tqdm.write(f"{name}: finishing this step and saving; the same signal again stops at once")
