"""Runs in a process of their own, for tests: from a stand-in of the hub, and with the real wandb.

`python tests/outside.py` in an empty folder, as seams.outside starts it, leaves runs/<case>,
cache/, wandb/ and found.json: each case's exit code, what was asked of the hub, and CACHE's files.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import hub

HERE = Path.cwd()
A, B, C, OTHER = "a" * 40, "b" * 40, "c" * 40, "d" * 40  # commits; the stand-in has every one
PINNED = {"MODEL_REVISION": A, "SAE_REVISION": B, "DATASET_REVISION": C}
CASES = {  # what differs from the first: all in one CACHE
    "pinned": {},
    "other model revision": {"MODEL_REVISION": OTHER},
    "other model": {"MODEL": "google/tiny-2"},
    "other dataset": {"DATASET": "owner/pile-2"},
    "other dataset revision": {"DATASET_REVISION": OTHER},
    "other split": {"SPLIT": "test"},
    "other files": {"DATA_FILES": "train/01*"},
    "not pinned": {"MODEL_REVISION": "", "SAE_REVISION": "main", "DATASET_REVISION": ""},
}


def words(**changes) -> list[str]:
    import seams

    hubs = {"MODEL": "google/tiny", "SAE": "owner/saes/layer_1", "DATASET": "owner/pile"}
    settings = seams.SMALL | seams.QUICK | hubs | PINNED | {"RUNS": "runs", "CACHE": "cache"}
    return [f"{name}={value}" for name, value in (settings | changes).items()]


def make_repositories(root: Path) -> None:
    for seed, name in enumerate(("tiny", "tiny-2")):
        hub.make_gemma(root / "models/google" / name, seed=seed)
    sae = {"d_in": 32, "d_sae": 64, "k": 4, "layer": 1, "lm_name": "google/tiny", "seed": 0}
    hub.make_sae(root / "models/owner/saes/layer_1", **sae)
    (root / "models/owner/saes/README.md").write_text("---\nlicense: cc-by-4.0\n---\n# SAEs\n")
    pile = root / "datasets/owner/pile"
    hub.make_pile(pile, documents=200, seed=0)
    (pile / "test").mkdir()  # beside train/, a file alone is no split
    (pile / "test.jsonl.zst").rename(pile / "test/00.jsonl.zst")
    shutil.copytree(pile, root / "datasets/owner/pile-2")


def from_the_hub(server) -> dict:
    import run

    found = {}
    for case, changes in CASES.items():
        server.requests.clear()
        code = run.main(words(RUN_NAME=case.replace(" ", "-"), **changes))
        kept = sorted(p.name for p in Path("cache").iterdir())
        asked = sorted({path for _, path in server.requests})
        found[case] = {"code": code, "asked": asked, "cache": kept}
    return found


def with_wandb(root: Path) -> dict:
    """A run stopped and gone on with, and one that fails."""
    import pytest
    import seams

    import run

    local = {"MODEL": root / "models/google/tiny", "SAE": root / "models/owner/saes/layer_1"}
    local |= {"MODEL_REVISION": "", "SAE_REVISION": "", "WANDB_PROJECT": "p"}
    local |= {"TOKENS": 640, "EVAL_EVERY": 320, "SEED": 0}
    found = {}

    def stop():
        os.kill(os.getpid(), signal.SIGTERM)

    def fail():
        raise MemoryError

    cases = {"stopped": ("w_s0", stop), "gone on": ("w_s0", None), "failed": ("f_s1", fail)}
    for case, (name, act) in cases.items():
        with pytest.MonkeyPatch.context() as m:
            if act:
                seams.on_call(m, "learning rate", 4, act)
            found[case] = run.main(words(RUN_NAME=name, **local))
    return found


def main() -> None:
    root = HERE / "hub"
    server = hub.Hub(root)
    with server as url:
        os.environ["HF_ENDPOINT"] = url  # read when the libraries are imported
        make_repositories(root)
        import pytest
        import seams

        with pytest.MonkeyPatch.context() as m:
            seams.patch(m, "figures", lambda folder, results: os.makedirs(f"{folder}/figures"))
            found = {"hub": from_the_hub(server), "wandb": with_wandb(root)}
    Path("found.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
