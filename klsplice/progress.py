"""What the screen shows while something takes time."""

from tqdm import tqdm

SOON = 2.0  # seconds that something may take without a word


def tracked(parts, what: str):
    """`parts`, a sequence, with a bar of its own where going through it takes longer than SOON."""
    look = {"delay": SOON, "leave": False, "dynamic_ncols": True}
    return tqdm(parts, desc=what, **look)


class Bar:
    """One progress bar for all runs of a command: tokens, and the range of what they log."""

    def __init__(self):
        self._bar, self._open, self._shown = None, set(), {}

    def open(self, name: str, *, total: int, done: int) -> None:
        """A run that has `total` tokens to train on, of which it found some done."""
        if self._bar is None:
            look = {"unit": " tokens", "unit_scale": True, "dynamic_ncols": True}
            self._bar = tqdm(total=0, desc=name[-24:], **look)
        self._open.add(name)
        if len(self._open) > 1:
            self._bar.set_description(f"{len(self._open)} runs", refresh=False)
        if not self._bar.disable:  # a disabled one has no such fields
            self._bar.total += total
            self._bar.initial += done
            self._bar.n += done
            self._bar.refresh()

    def update(self, tokens: int) -> None:
        self._bar.update(tokens)

    def show(self, name: str, values: dict[str, float]) -> None:
        self._shown[name] = values
        names = dict.fromkeys(n for shown in self._shown.values() for n in shown)
        told = {n: [v[n] for v in self._shown.values() if n in v] for n in names}
        ends = {n: sorted({f"{min(v):.3g}", f"{max(v):.3g}"}, key=float) for n, v in told.items()}
        self._bar.set_postfix({n: " to ".join(v) for n, v in ends.items()}, refresh=False)

    def close(self, name: str) -> None:
        """That run is over; the bar goes with the last one."""
        self._open.discard(name)
        if self._bar is not None and not self._open:
            self._bar.close()
            self._bar = None
