"""The screen, which never ends a run. Without any package that may be missing."""

import os
import sys


class Screen:
    """stdout or stderr, which never ends a run: where nobody reads it any more, what is written is
    lost (`| tee` that dies, a terminal that is gone, a full disk)."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act, *given) -> None:
        try:
            act(*given)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def keep_screen() -> None:
    """Make such a Screen of both."""
    for number in range(3):  # one that was closed at the start (>&-) is another file's number soon
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free
    sys.stdout = Screen(sys.stdout or open(1, "w", closefd=False))
    sys.stderr = Screen(sys.stderr or open(2, "w", closefd=False))
