"""Whose a run's folder is: absent, the same run's, or another's; and its lock."""

import hashlib
import json
import os

from klsplice import distributed
from klsplice.errors import UserError
from klsplice.machine import code_changed
from klsplice.settings import FREE
from klsplice.storage import lock, read_json

UNBORN = {"lock", "run.json.tmp"}  # what a run killed while it started may leave


class Folder:
    """A run's folder on the disk: whose it is, and whether it may be written.

    constants: all of the program's, by name. Raises UserError (exit 2) where the folder holds a run
    with other constants, is in use or cannot be written.
    """

    def __init__(self, name: str, constants: dict):
        plain = not set("/+") & set(name) and name not in (".", "..")
        if not plain or len(os.fsencode(name)) > 200:
            what = f"RUN_NAME = {name[:80]!r} is no folder name"
            raise UserError(what, "wanted a plain name, without / and +, of 200 bytes at most")
        self.name, self.constants, self.lock = name, constants, None
        self.folder = os.path.join(constants["RUNS"], name)

    def path(self, *names) -> str:
        return os.path.join(self.folder, *names)

    @distributed.main_process_only
    def open_run(self) -> bool:
        """Refuse a folder that is not for this run -> whether it holds it finished."""
        self._check_writable()
        if self.begun:
            self.take_lock()
            self._compare(self._old_constants())
        elif os.path.isdir(self.folder) and set(os.listdir(self.folder)) - UNBORN:
            what = f"{self.folder} exists and holds no run"
            raise UserError(what, "set RUN_NAME to another name")
        return os.path.exists(self.path("results.json"))

    @property
    def other_code(self) -> str:
        """What to say of a run that began when the program had other code."""
        other = code_changed(read_json(self.path("run.json")))
        return "; the program's code has changed since it began" if other else ""

    @property
    def begun(self) -> bool:
        return os.path.exists(self.path("run.json"))

    def _check_writable(self) -> None:
        runs = self.constants["RUNS"]
        try:
            os.makedirs(runs, exist_ok=True)
        except OSError as e:
            raise UserError(f"RUNS = {runs!r} cannot be made: {e.strerror}") from None
        if not os.access(runs, os.W_OK):
            raise UserError(f"RUNS = {runs!r} cannot be written", "set RUNS to another folder")

    def take_lock(self) -> None:
        try:
            os.makedirs(self.folder, exist_ok=True)
            self.lock = open(self.path("lock"), "a")  # "w" would touch a finished run
        except OSError as e:
            raise UserError(f"{self.folder} cannot be written: {e.strerror}") from None
        try:
            lock(self.lock, f"RUNS = {self.constants['RUNS']!r}", wait=False)
        except BlockingIOError:
            raise UserError(f"{self.folder} is in use by another process", "wait for it") from None
        except OSError as e:
            raise UserError(f"{self.path('lock')} cannot be locked: {e.strerror}") from None

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

    def digest(self) -> str:
        """Of the constants that decide a run's results: what a checkpoint is bound to."""
        kept = {n: v for n, v in self.constants.items() if n not in FREE}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
