"""wandb, as a mirror of metrics.jsonl that can fail but never stop or hang a run."""

import atexit
import os
import re
import threading

from klsplice.errors import first_line
from klsplice.metrics import charted
from klsplice.naming import short, without_seed

LONGEST = 128  # bytes of a name: wandb takes no more
PATIENCE = 300  # seconds, at the end of a run, for what is not sent yet


class Wandb:
    """Charts against tokens, every constant in the config, the final numbers in the summary.

    run: a run_folder.Run that has started."""

    def __init__(self, run):
        self.run, self.offline = None, ""
        os.environ.setdefault("WANDB_SILENT", "true")  # its lines would break into the table
        theirs = {} if "WANDB_PROJECT" in run.cfg.said else os.environ
        project = theirs.get("WANDB_PROJECT", run.cfg.WANDB_PROJECT)
        disabled = os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on")
        if project and not disabled:
            self._try(self._start, run, project)

    def _try(self, act, *given, **options) -> None:
        try:
            act(*given, **options)
        except Exception as e:
            print(f"warning: wandb is off from here ({type(e).__name__}: {first_line(e, 80)})")
            self.run = None

    def _start(self, run, project: str) -> None:
        import wandb

        entity, _, project = project.rpartition("/")
        quiet = {"silent": True, "console": "off", "x_disable_stats": True, "init_timeout": 8}
        options = {
            "entity": entity or None,
            "project": project,
            "name": short(run.name, longest=LONGEST),
            "id": run.about["wandb_id"],
            "resume": "allow",
            "reinit": "create_new",  # beside those of a sweep's other runs
            # the sweep; or the experiment, all its seeds
            "group": short(run.cfg.sweep or without_seed(run.name), longest=LONGEST),
            "job_type": "-".join(run.cfg.recipes) or "defaults",
            "config": run.constants | {n: run.about[n] for n in ("commit", "versions", "device")},
            "settings": wandb.Settings(finish_timeout=PATIENCE, **quiet),
        }
        mode = os.environ.get("WANDB_MODE") or run.cfg.WANDB_MODE
        keyless = mode == "online" and not wandb.login(prompt=False, verify=False)
        try:
            self.run = wandb.init(mode="offline" if keyless else mode, **options)
        except Exception as e:
            print(f"wandb: not reached ({type(e).__name__})")
            self.run = wandb.init(mode="offline", **options)
        if self.run.offline:
            self.offline = os.path.relpath(os.path.dirname(self.run.dir))
        self.run.define_metric("tokens")
        self.run.define_metric("*", step_metric="tokens")

    def log(self, line: dict) -> None:
        """Send what is charted of a line of metrics.jsonl."""
        if self.run is not None:
            shown = {"tokens": line["tokens"]} | {n: line[n] for n in charted(line)}
            # the step of training: what a resumed run sends again takes its old place
            self._try(self.run.log, shown, step=line["step"])

    def finish(self, code: int, results: dict | None) -> None:
        """End the run there. code: the program's. results: of a finished run, the summary."""
        if self.run is None:
            return
        ending = threading.Thread(target=self._try, args=(self._end, code, results), daemon=True)
        ending.start()
        ending.join(PATIENCE)
        if ending.is_alive():
            print("warning: wandb does not answer; metrics.jsonl and the run folder have all")
            atexit.register(os._exit, code)  # before wandb's own, which would wait for ever
        if self.offline:
            parts = re.sub(r"run-[\d_]+-", "run-*-", self.offline)  # a resumed run has several
            print(f"dashboard in this terminal: wandb leet {self.offline}")
            print(f"dashboard in a browser: wandb login && wandb sync {parts}")

    def _end(self, code: int, results: dict | None) -> None:
        self.run.summary.update(results or {})
        self.run.finish(exit_code=code)
