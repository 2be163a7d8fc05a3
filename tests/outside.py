"""Runs with the real wandb, in a process of their own: one stopped and gone on with, one failing.

`python tests/outside.py` in an empty folder, as seams.outside starts it, leaves runs/<name>, wandb/
and found.json: each case's exit code.
"""

import json
import os
import signal
from pathlib import Path

import pytest
import seams

LONGER = {"WANDB_PROJECT": "p", "TOKENS": 640, "EVAL_EVERY": 320, "SEED": 0}


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def fail():
    raise MemoryError


def main() -> None:
    box, found = seams.make_box(Path("box")), {}
    cases = {"stopped": ("w_s0", stop), "gone on": ("w_s0", None), "failed": ("f_s1", fail)}
    for case, (name, act) in cases.items():
        with pytest.MonkeyPatch.context() as m:
            seams.patch(
                m, "figures", lambda folder, results: os.makedirs(f"{folder}/figures"), least=0
            )
            if act:
                seams.on_call(m, "learning rate", 4, act)
            found[case] = seams.main(box, "runs", RUN_NAME=name, **LONGER)
    Path("found.json").write_text(json.dumps({"wandb": found}))


if __name__ == "__main__":
    main()
