"""wandb, as a mirror of metrics.jsonl that can fail but never stop or slow a run."""

import atexit
import glob
import hashlib
import os
import queue
import re
import sys
import threading

from klsplice.metrics import charted
from klsplice.naming import short, without_seed

LONGEST = 128  # bytes of a name: wandb takes no more
PATIENCE = 300  # seconds, at the end of a run, for what is not sent yet


class Wandb:
    """Charts against tokens, every constant in the config, the final numbers in the summary.

    All but the start happens in a thread of its own. run: a run_folder.Run that has started.
    """

    def __init__(self, run):
        self.run, self.folder, self.name = None, run.folder, run.name
        self.offline, self.parts = "", []  # the folder of an offline run, and all its folders
        # wandb's calls can wait for the network; in a thread the training loop never does
        self.calls = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        os.environ.setdefault("WANDB_SILENT", "true")  # its lines would break into the table
        try:
            import wandb

            self.wandb = wandb
            mode = os.environ.get("WANDB_MODE")
            if mode is None and run.constants["WANDB_MODE"] == "offline":
                mode = "offline"
            if mode is None and not wandb.login(prompt=False, verify=False):
                mode = "offline"
                print("wandb: no key found")
            self.run = self._start(wandb, run, mode)
            self.thread.start()
        except Exception as e:
            print(
                f"warning: wandb is off ({type(e).__name__}: {str(e)[:80]}); metrics.jsonl has all"
            )

    def _start(self, wandb, run, mode):
        options = {
            "project": run.constants["WANDB_PROJECT"],
            "name": short(run.name, longest=LONGEST),
            "id": run.about.get("wandb_id") or _old_id(run.folder),
            "resume": "allow",
            # the sweep; or the experiment, all its seeds
            "group": short(run.sweep or without_seed(run.name), longest=LONGEST),
            "job_type": "-".join(run.recipes) or "defaults",
            "config": run.constants | {n: run.about[n] for n in ("commit", "versions", "device")},
        }
        if run.turns.several:
            options["reinit"] = "create_new"  # beside those of the others
        quiet = {"silent": True, "console": "off", "x_disable_stats": True}
        settings = wandb.Settings(init_timeout=8, finish_timeout=PATIENCE, **quiet)
        try:
            started = wandb.init(mode=mode, settings=settings, **options)
        except Exception as e:
            print(f"wandb: not reached ({type(e).__name__})")
            started = wandb.init(mode="offline", settings=settings, **options)
        if started.offline:
            self.offline = os.path.relpath(os.path.dirname(started.dir))
            print(f"wandb: offline, in {self.offline}")
            # one folder each time it was resumed; within a second of the last one, with an -1
            of_this_run = f"offline-run-*-{options['id']}*"
            self.parts = sorted(glob.glob(os.path.join(os.path.dirname(self.offline), of_this_run)))
        started.define_metric("tokens")
        for part in ("train", "val"):
            started.define_metric(f"{part}/*", step_metric="tokens")
        return started

    def _work(self) -> None:
        while (call := self.calls.get()) is not None:
            try:
                call()
            except Exception as e:
                cause = f"{type(e).__name__}: {str(e)[:80]}"
                print(f"warning: wandb is off from here ({cause}); metrics.jsonl has all")
                return

    def log(self, line: dict) -> None:
        """Send what is charted of a line of metrics.jsonl."""
        shown = {n: line[n] for n in charted(line)}
        step = line["step"]  # of training: what a resumed run sends again takes its old place
        self.calls.put(lambda: self.run.log({"tokens": line["tokens"]} | shown, step=step))

    def results(self, results: dict) -> None:
        """Send results.json as the summary, figures/ and sae/ as artifacts."""
        self.calls.put(lambda: self.run.summary.update(results))
        for kind in ("figures", "sae"):
            self.calls.put(lambda kind=kind: self._artifact(kind))

    def _artifact(self, kind: str) -> None:
        name = short(re.sub(r"[^\w.-]", "-", f"{kind}-{self.name}"), longest=LONGEST)
        artifact = self.wandb.Artifact(name, type=kind)
        in_place = {"policy": "immutable", "skip_cache": True}  # no further copy on this disk
        artifact.add_dir(os.path.join(self.folder, kind), **in_place)
        self.run.log_artifact(artifact)

    def finish(self, code: int) -> None:
        """End the run there; wait PATIENCE seconds at most for what is not sent yet.

        code: what the program exits with."""
        self.calls.put(lambda: self.run.finish(exit_code=code))
        self.calls.put(None)
        if self.run is not None:
            self.thread.join(PATIENCE)
            if self.thread.is_alive():
                print("warning: wandb does not answer; metrics.jsonl and the run folder have all")
                atexit.register(_leave, code)  # before wandb's own, which would wait for ever
        if self.offline:
            parts = " ".join(self.parts) or self.offline
            if len(self.parts) > 1:
                print(f"the run was resumed: wandb has it in {len(self.parts)} folders")
            print(f"dashboard in this terminal: wandb leet {self.offline}")
            print(f"dashboard in a browser: wandb login && wandb sync {parts}")


def _old_id(folder: str) -> str:
    """Of a run whose run.json has none yet."""
    return hashlib.sha256(os.path.abspath(folder).encode()).hexdigest()[:16]


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
