"""What ends a run early: a mistake that the person at the keyboard can put right, or a signal."""

import difflib
import os
import re

LINES = 12  # of what another library says, at most


class UserError(Exception):
    """`what` says what was found and wanted, `hint` what to do; run.py prints both, no traceback.

    code: 2 = settings or files are wrong and nothing was started, 1 = failed while running.
    """

    def __init__(self, what: str, hint: str = "", *, code: int = 2):
        super().__init__(what)
        self.what, self.hint, self.code = what, hint, code

    def __str__(self) -> str:
        return f"error: {self.what}" + (f"\n  {self.hint}" if self.hint else "")


class OutOfMemory(UserError):
    """Too little memory for what the constants ask for."""


def first_line(error: BaseException, length: int = 160) -> str:
    """What it says, in one line of whole words; its type where it says nothing."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= length else line[:length].rsplit(" ", 1)[0] + " ..."


def whole(error: BaseException, *, named: bool = False) -> str:
    """All that another library says, and what it names as the cause: " ..." where that is one short
    line, or else indented lines that begin with a line break. named: with the error's type."""
    lines = []
    while error is not None:
        text = str(error).strip()
        said = f"{type(error).__name__}: {text}" if named or not text else text
        lines += [line.strip() for line in said.splitlines() if line.strip() not in ("", *lines)]
        error = error.__cause__
    if len(lines) == 1 and len(lines[0]) <= 160:
        return f" {lines[0]}"
    return "".join(f"\n       {line:.1000}" for line in lines[:LINES])


def out_of_resources(error: BaseException, sizes: dict[str, int], code: int) -> UserError | None:
    """The line for a machine with too little memory or disk; None for any other error.

    sizes: the constants that decide how much memory a step takes."""
    said = first_line(error)
    memory = ("out of memory", "allocate memory", "ALLOC_FAILED", "MemoryError")
    disk = ("No space left", "quota exceeded", "File too large", "inline_container.cc")
    if isinstance(error, (MemoryError, RuntimeError)) and any(word in said for word in memory):
        hint = "lower " + ", ".join(f"{name} (it is {size:,})" for name, size in sizes.items())
        return OutOfMemory(f"out of memory: {said}", hint, code=code)
    if isinstance(error, Exception) and any(word in said for word in disk):
        hint = "free some; the same command continues from the last checkpoint"
        return UserError(f"the disk is full: {said}", hint, code=code)
    return None


class Stopped(BaseException):
    """A polite stop by a signal, after saving. code = 128 + signal.

    Like KeyboardInterrupt it is no Exception, so that nobody's `except Exception` swallows it.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by signal {number}")
        self.code = 128 + number


def near_path(path: str, *further: str) -> str:
    """ "; did you mean ...?" where a folder, or one of `further`, has something of such a name.

    Never `path` itself, which may be there and yet be of no use; nor one with other numbers in its
    name, which is no slip: k8 is not k32."""
    folder, name = os.path.split(path.rstrip("/"))
    for place in (folder or ".", *further):
        same = os.path.abspath(place) == os.path.abspath(folder)
        names = [n for n in listed(place) if not (same and n == name)]
        names = [n for n in names if not _other_numbers(n, name)]
        for near in difflib.get_close_matches(name, names, n=1, cutoff=0.7):
            return f"; did you mean {os.path.normpath(os.path.join(place, near))}?"
    return ""


def near_name(name: str, known) -> str:
    """ "; did you mean ...?" with those of `known` that begin with a name, or are close to it."""
    begin = [n for n in known if n.lower().startswith(name.lower())]
    near = begin or difflib.get_close_matches(name, list(known), n=2, cutoff=0.7)
    return f"; did you mean {' or '.join(near[:3])}?" if near else ""


def _other_numbers(*names: str) -> bool:
    """Whether both have numbers in them, and not the same ones."""
    a, b = (re.findall(r"\d+", name) for name in names)
    return bool(a and b and a != b)


def listed(folder: str) -> list[str]:
    """The names in a folder, sorted; none where it cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []
