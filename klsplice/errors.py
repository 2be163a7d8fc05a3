"""What ends a run early: a mistake that the person at the keyboard can put right, or a signal."""


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
