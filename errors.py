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


class Stopped(BaseException):
    """A polite stop by a signal, after saving. code = 128 + signal.

    Like KeyboardInterrupt it is no Exception, so that nobody's `except Exception` swallows it.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by signal {number}")
        self.code = 128 + number
