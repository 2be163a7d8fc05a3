"""wandb, as a mirror of metrics.jsonl that can fail but never stop or slow a run."""

import hashlib
import os


class Wandb:
    """Charts against tokens, every constant in the config, the final numbers in the summary.

    run: a record.Run that has started.
    """

    def __init__(self, run):
        self.run = None
        try:
            import wandb

            mode = os.environ.get("WANDB_MODE")
            if mode is None and not wandb.login(prompt=False, verify=False):
                mode = "offline"
                print("wandb: no key found")
            self.run = self._start(wandb, run, mode)
        except Exception as e:
            print(
                f"warning: wandb is off ({type(e).__name__}: {str(e)[:80]}); metrics.jsonl has all"
            )

    def _start(self, wandb, run, mode):
        c = run.c
        options = {
            "project": c.WANDB_PROJECT,
            "name": run.name,
            "id": hashlib.sha256(os.path.abspath(run.folder).encode()).hexdigest()[:16],
            "resume": "allow",
            "group": "-".join(c.RECIPES) or c.LOSS,
            "job_type": c.TRAIN,
            "config": run.constants | {n: run.about[n] for n in ("commit", "versions", "device")},
        }
        settings = wandb.Settings(init_timeout=8, silent=True, console="off", x_disable_stats=True)
        try:
            started = wandb.init(mode=mode, settings=settings, **options)
        except Exception as e:
            print(f"wandb: not reached ({type(e).__name__})")
            started = wandb.init(mode="offline", settings=settings, **options)
        if started.offline:
            folder = os.path.relpath(os.path.dirname(started.dir))
            print(f"wandb: offline; to see it there later: wandb login && wandb sync {folder}")
        started.define_metric("tokens")
        for pattern in ("train/*", "val/*"):
            started.define_metric(pattern, step_metric="tokens")
        return started

    def _try(self, call, *args, **options):
        if self.run is not None:
            try:
                call(*args, **options)
            except Exception as e:
                print(
                    f"warning: wandb is off from here ({type(e).__name__}); metrics.jsonl has all"
                )
                self.run = None

    def log(self, line: dict) -> None:
        if self.run is not None:
            self._try(self.run.log, line)

    def summary(self, results: dict) -> None:
        if self.run is not None:
            self._try(self.run.summary.update, results)

    def finish(self, *, failed: bool) -> None:
        if self.run is not None:
            self._try(self.run.finish, exit_code=int(failed))
