"""The program as a user starts it, against a stand-in of the Hugging Face hub on a loopback port.

A process of `python run.py`, and one more that tries what would cost a process each (`child`).
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import hub
import pytest

from klsplice.lm import load

ROOT = Path(__file__).resolve().parent.parent
MODEL, DATASET = "google/gemma-2-2b", "monology/pile-uncopyrighted"
SAE = (
    "canrager/saebench_gemma-2-2b_width-2pow16_date-0107/"
    "gemma-2-2b_top_k_width-2pow16_date-0107/resid_post_layer_12/trainer_2"
)
COMMIT = "b" * 40
SIZES = {"CONTEXT": 32, "TOKENS": 1280, "VAL_TOKENS": 128, "CHECK_SAE": False}
LONG = 70_000  # training tokens: they need more than 150 of the 200 documents
# What the hub answers to the n-th (from 1) GET of the second shard of datasets/faults/<name>.
PASSING = {
    "truncate": lambda n: "truncate" if n == 1 else None,
    "away": lambda n: "500" if n <= 14 else None,  # longer than huggingface_hub itself waits
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of repositories: those that the constants name, and one dataset for each fault."""
    root = tmp_path_factory.mktemp("hub")
    hub.make_gemma(root / "models" / MODEL, seed=0, layers=14)
    sae = {"d_in": 32, "d_sae": 64, "k": 8, "layer": 12, "lm_name": MODEL, "seed": 0}
    hub.make_sae(root / "models" / SAE, **sae)
    datasets = root / "datasets"
    hub.make_pile(datasets / DATASET, documents=200, seed=0)
    for name in PASSING:
        shutil.copytree(datasets / DATASET, datasets / "faults" / name)
    (datasets / "some" / "script").mkdir(parents=True)
    (datasets / "some" / "script" / "script.py").write_text("raise SystemExit\n")
    return root


def faulty(path, count):
    name = re.search(r"/datasets/faults/(\w+)/.*/01\.jsonl\.zst", path)
    return PASSING[name[1]](count) if name else None


def process(folder, *words, url):
    """python <words> in `folder`, with no account, no cache and only that hub."""
    unset = ("HF_HUB_OFFLINE", "HF_TOKEN", "WANDB_MODE", "WANDB_API_KEY")
    inherited = {n: v for n, v in os.environ.items() if n not in unset}
    own = {"HF_ENDPOINT": url, "HF_HOME": str(folder / "hf"), "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    own |= {"HOME": str(folder), "HF_HUB_DOWNLOAD_TIMEOUT": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, words)]
    options = {"cwd": folder, "env": inherited | own, "capture_output": True, "text": True}
    return subprocess.run(command, timeout=120, **options)


def as_words(settings: dict) -> list[str]:
    return [f"{name}={value}" for name, value in settings.items()]


# ---- python run.py ---------------------------------------------------------------------------


def test_the_default_constants_run_to_the_end(root, tmp_path):
    """Only the device and the sizes are others. What the hub gave is recorded."""
    with hub.Hub(root) as url:
        words = as_words({"DEVICE": "cpu", "SAE_REVISION": COMMIT} | SIZES)
        done = process(tmp_path, ROOT / "run.py", *words, url=url)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    (run,) = (tmp_path / "runs").glob("*")
    results, about = (json.loads((run / f"{n}.json").read_text()) for n in ("results", "run"))
    assert results["tokens"] == 1280
    constants, resolved = about["constants"], about["resolved"]
    assert resolved["sae_commit"] == resolved["sae"] == COMMIT
    assert resolved["model"] == f"{MODEL}@{constants['MODEL_REVISION']}"
    assert resolved["dataset_commit"] == constants["DATASET_REVISION"]
    config = json.loads((run / "sae" / "config.json").read_text())
    assert config["trainer"]["lm_name"] == MODEL and config["trainer"]["k"] == 8
    (sync,) = re.findall(r"wandb sync (\S+)", done.stdout)  # without a key it is offline
    assert list(tmp_path.glob(f"{sync}/*.wandb")) or list(tmp_path.glob(sync))


# ---- the rest, in one process ----------------------------------------------------------------


def child(folder, model, *names):
    """Try everything, in this process -> found.json: {case: {code, error, seconds, ...}}."""
    import data
    import run
    from klsplice import settings

    found = {}
    local = {"DEVICE": "cpu", "MODEL": model, "WANDB_PROJECT": ""} | SIZES
    for case, changes in REFUSED.items():
        started, said = time.monotonic(), io.StringIO()
        with contextlib.redirect_stderr(said):
            base = {"DEVICE": "cpu"} if "MODEL" in case else local
            code = run.main(as_words(base | changes))
        seconds = time.monotonic() - started
        found[case] = {"code": code, "error": said.getvalue(), "seconds": seconds}
    waited, sleep = [], time.sleep

    def prepare(name):
        waited.clear()
        time.sleep = waited.append
        (cfg,) = settings.read(as_words(local | {"DATASET": name, "TOKENS": LONG}))
        of_lm = {"device": cfg.DEVICE, "layer": cfg.LAYER, "context": cfg.CONTEXT}
        opened = load.open_lm(cfg.MODEL, cfg.MODEL_REVISION, **of_lm)
        tokens, out = data.prepare(cfg, opened.tokenizer, opened.config), {}
        for part in ("val", "train"):
            array = getattr(tokens, f"{part}_SL")
            out[part] = hashlib.sha256(array[: LONG // 64].tobytes()).hexdigest()
        time.sleep = sleep
        return out | {"waited": sum(waited)}

    for name in ("undisturbed", *names):
        found[name] = prepare(DATASET if name == "undisturbed" else f"faults/{name}")
    Path(folder, "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(root, tmp_path_factory):
    """What `child` found, against a hub whose default model is gated."""
    folder = tmp_path_factory.mktemp("child")
    with hub.Hub(root, gated={MODEL}, fault=faulty) as url:
        words = [__file__, folder, root / "models" / MODEL, *PASSING]
        done = process(folder, *words, url=url)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not [p for p in (folder / "runs").glob("*")]  # nothing was started
    return json.loads((folder / "found.json").read_text())


REFUSED = {
    "gated MODEL": {},
    "no MODEL": {"MODEL": "nobody/nothing"},
    "no folder of SAE": {"SAE": SAE.replace("trainer_2", "trainer_99")},
    "no DATASET": {"DATASET": "nobody/nothing"},
    "no SPLIT": {"SPLIT": "tset"},
    "a script: DATASET_REVISION": {"DATASET": "some/script"},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_hub_does_not_give_ends_in_one_line_and_a_hint(found, case):
    code, error, seconds = (found[case][n] for n in ("code", "error", "seconds"))
    lines = [line.rsplit("\r", 1)[-1] for line in error.splitlines()]
    said = lines[[line.startswith("error: ") for line in lines].index(True) :]
    assert code == 2 and seconds < 20 and "Traceback" not in error, error
    assert len([line for line in said if line]) == 2 and "network" not in said[1], error
    assert case.split()[-1] in "\n".join(said), error


@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_passes_changes_no_token(found, name):
    assert found[name]["waited"] > 0 == found["undisturbed"]["waited"]  # the fault was met
    for part in ("val", "train"):
        assert found[name][part] == found["undisturbed"][part]


if __name__ == "__main__":
    child(*sys.argv[1:])
