"""The program as a user starts it, against a stand-in of the Hugging Face hub on a loopback port.

Two processes of `python run.py`, and one more that tries what would cost a process each (`child`).
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
from types import SimpleNamespace

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MODEL, DATASET = "google/gemma-2-2b", "monology/pile-uncopyrighted"
SAE = (
    "canrager/saebench_gemma-2-2b_width-2pow16_date-0107/"
    "gemma-2-2b_top_k_width-2pow16_date-0107/resid_post_layer_12/trainer_2"
)
CANARY = "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"
SIZES = {"CONTEXT": 32, "TOKENS": 1280, "VAL_TOKENS": 128, "CHECK_SAE": False}
LONG = 70_000  # training tokens: they need more than 150 of the 200 documents
# What the hub answers to the n-th (from 1) GET of the second shard of datasets/faults/<name>.
PASSING = {
    "drop": lambda n: "drop" if n == 1 else None,
    "500": lambda n: "500" if n == 1 else None,
    "429": lambda n: "429" if n == 1 else None,
    "truncate": lambda n: "truncate" if n == 1 else None,
    "stall": lambda n: "stall" if n == 1 else None,
    "away": lambda n: "500" if n <= 14 else None,  # longer than datasets itself waits
}
UNEVEN = ("uneven/zst", "uneven/parquet")
FINAL = {
    "404": lambda n: "404" if n == 1 else None,
    "garbage": lambda n: "garbage" if n == 1 else None,
    "gone": lambda n: "500",
}


@pytest.fixture(scope="module")
def hubs(tmp_path_factory):
    """A folder of repositories: those that the constants name, and one dataset for each fault."""
    import hub

    root = tmp_path_factory.mktemp("hub")
    hub.make_gemma(root / "models" / MODEL, seed=0, layers=14)
    sae = {"d_in": 32, "d_sae": 64, "k": 8, "layer": 12, "lm_name": MODEL, "seed": 0}
    hub.make_sae(root / "models" / SAE, **sae)
    pile = root / "datasets" / DATASET
    texts = hub.make_pile(pile, documents=200, seed=0)
    for name in (*PASSING, *FINAL, "cut"):
        shutil.copytree(pile, root / "datasets" / "faults" / name)
    cut_at_a_block(root / "datasets" / "faults" / "cut" / "train" / "01.jsonl.zst")
    make_uneven(root / "datasets" / "uneven", texts)
    for part in ("old", "new"):
        folder = root / "datasets" / "some" / "parts" / part
        shutil.copytree(root / "datasets" / "uneven" / "parquet" / "train", folder)
    lines = (f"- config_name: the-{x}\n  data_files: {x}/*.parquet\n" for x in ("old", "new"))
    (folder.parent / "README.md").write_text(f"---\nconfigs:\n{''.join(lines)}---\n")
    shutil.copytree(pile, root / "datasets" / "some" / "gated")
    return SimpleNamespace(root=root, texts=texts)


def make_uneven(folder, texts):
    """The pile's texts in its two shards, whose other fields differ; with rows without text."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    half = len(texts) - len(texts) // 2
    parts = {"00": texts[:half], "01": [*texts[half:]]}
    further = {"00": {"meta": 1, "seen": None}, "01": {"meta": {"of": ["x"]}, "title": "a"}}
    for name, part in parts.items():
        rows = [{"text": text, **further[name]} for text in [part[0], None, *part[1:], " \n", ""]]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        for kind in ("zst", "parquet"):
            (folder / kind / "train").mkdir(parents=True, exist_ok=True)
        body = zstandard.compress(lines.encode())
        (folder / "zst" / "train" / f"{name}.jsonl.zst").write_bytes(body)
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, folder / "parquet" / "train" / f"{name}.parquet")


def cut_at_a_block(path):
    """The first half of a zstd file, ending between two blocks: no reader sees an error."""
    import zstandard

    body = zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
    lines = body.splitlines(keepends=True)
    compress = zstandard.ZstdCompressor().compressobj()
    half = compress.compress(b"".join(lines[: len(lines) // 2]))
    path.write_bytes(half + compress.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))


def faulty(method, path, count):
    name = re.search(r"/datasets/faults/(\w+)/.*/01\.jsonl\.zst", path)
    return (PASSING | FINAL).get(name[1], lambda n: None)(count) if name else None


def process(folder, *words, url="http://127.0.0.1:9", **env):
    """python <words> in `folder`, with no account, no cache and only that hub."""
    unset = ("HF_HUB_OFFLINE", "HF_TOKEN", "WANDB_MODE", "WANDB_API_KEY")
    inherited = {n: v for n, v in os.environ.items() if n not in unset}
    own = {"HF_ENDPOINT": url, "HF_HOME": str(folder / "hf"), "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    own |= {"HOME": str(folder), "HF_HUB_DOWNLOAD_TIMEOUT": "1", "PYTHONPATH": str(ROOT)}
    own |= {"OMP_NUM_THREADS": "1", **env}
    command = [sys.executable, *map(str, words)]
    options = {"cwd": folder, "env": inherited | own, "capture_output": True, "text": True}
    return subprocess.run(command, timeout=120, **options)


def as_words(settings: dict) -> list[str]:
    return [f"{name}={value}" for name, value in settings.items()]


# ---- python run.py ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def default(hubs, tmp_path_factory):
    """The default constants; only the device and the sizes are others."""
    import hub

    folder = tmp_path_factory.mktemp("default")
    with hub.Hub(hubs.root) as url:
        words = as_words({"DEVICE": "cpu"} | SIZES)
        done = process(folder, ROOT / "run.py", *words, url=url, HF_TOKEN=CANARY)
    runs = list((folder / "runs").glob("*"))
    return SimpleNamespace(folder=folder, done=done, run=runs[0] if runs else None)


def test_the_default_constants_run_to_the_end(default):
    assert default.done.returncode == 0, default.done.stderr
    found = {str(p.relative_to(default.run)) for p in default.run.rglob("*") if p.is_file()}
    sae = {f"sae/{n}" for n in ("ae.pt", "config.json", "cfg.json", "sae_weights.safetensors")}
    figures = {"figures/ce.png", "figures/cosine.png"}  # the latter reads the hub's SAE again
    assert {"run.json", "metrics.jsonl", "results.json"} | figures | sae <= found
    words = "CHECK_SAEFalse_CONTEXT32_DEVICEcpu_TOKENS1280_VAL_TOKENS128"
    assert default.run.name == f"gemma-2-2b_l12_topk_k8_64_kl-mse_{words}_s0"
    assert json.loads((default.run / "results.json").read_text())["tokens"] == 1280
    assert "gap closed" in default.done.stdout and "Traceback" not in default.done.stderr


def test_what_the_hub_gave_is_recorded(default):
    import hub

    import run

    about = json.loads((default.run / "run.json").read_text())
    assert about["resolved"]["sae_commit"] == about["resolved"]["sae"] == hub.SHA
    revision = about["constants"]["MODEL_REVISION"]
    assert about["resolved"]["model"] == f"{MODEL}@{revision}"
    pinned = {n: getattr(run, n) for n in ("MODEL_REVISION", "DATASET_REVISION")}
    assert pinned == {n: about["constants"][n] for n in pinned}
    config = json.loads((default.run / "sae" / "config.json").read_text())
    assert config["trainer"]["lm_name"] == MODEL and config["trainer"]["k"] == 8


def test_without_a_key_wandb_is_offline_and_says_how_to_sync(default):
    (sync,) = re.findall(r"wandb sync (\S+)", default.done.stdout)
    assert list((default.folder / sync).glob("run-*.wandb"))
    assert f"wandb leet {sync}\n" in default.done.stdout


def test_no_secret_is_written(default):
    kept = [p for p in default.folder.rglob("*") if p.is_file()]
    assert len(kept) > 30 and CANARY not in default.done.stdout + default.done.stderr
    assert not [p for p in kept if CANARY.encode() in p.read_bytes()]


def test_without_a_gpu_it_stops_in_seconds_and_names_the_demo(tmp_path):
    started = time.monotonic()
    done = process(tmp_path, ROOT / "run.py", CUDA_VISIBLE_DEVICES="")
    assert time.monotonic() - started < 30
    assert done.returncode == 2 and done.stdout == ""
    first, *rest = done.stderr.splitlines()
    assert first.startswith("error: DEVICE = 'cuda' is not there") and len(rest) == 1
    assert "`make demo`" in rest[0]
    assert not [p for p in (tmp_path / "runs").glob("*")]


def test_a_hub_that_cannot_be_reached_ends_it_in_seconds(tmp_path):
    started = time.monotonic()
    done = process(tmp_path, ROOT / "run.py", "DEVICE=cpu")
    assert time.monotonic() - started < 30  # 2 without the imports; the retries alone were 23
    assert done.returncode == 2 and "does not answer" in done.stdout
    first, *rest = done.stderr.splitlines()
    assert first.startswith("error: SAE = ") and len(rest) == 1
    assert "Retry" not in done.stderr


# ---- the rest, in one process ----------------------------------------------------------------


def child(folder, model, names):
    """Try everything, in this process -> found.json: {case: {code, error, seconds, ...}}."""
    import run

    found = {}
    local = {"DEVICE": "cpu", "MODEL": model, "WANDB_PROJECT": ""} | SIZES
    tries = {
        "gated": {"DEVICE": "cpu"},
        "no model": {"DEVICE": "cpu", "MODEL": "nobody/nothing"},
        "no SAE repository": local | {"SAE": "nobody/nothing/trainer_2"},
        "no SAE folder": local | {"SAE": SAE.replace("trainer_2", "trainer_99")},
        "no dataset": local | {"DATASET": "nobody/nothing"},
        "no text": local | {"TEXT_KEY": "body"},
        "no text in parquet": local | {"TEXT_KEY": "body", "DATASET": "uneven/parquet"},
        "no split": local | {"SPLIT": "tset"},
        "no files": local | {"DATA_FILES": "none/*"},
        "several configurations": local | {"DATASET": "some/parts"},
        "a gated text": local | {"DATASET": "some/gated"},
    }
    for case, changes in tries.items():
        started, said = time.monotonic(), io.StringIO()
        with contextlib.redirect_stderr(said):
            code = run.main(as_words(changes))
        seconds = time.monotonic() - started
        found[case] = {"code": code, "error": said.getvalue(), "seconds": seconds}
    import datasets

    import data
    from klsplice import settings
    from klsplice.errors import UserError
    from klsplice.lm import load
    from klsplice.text import token_cache

    waited, sleep, folders = [], time.sleep, []
    write = token_cache.TokenCache.write
    token_cache.TokenCache.write = lambda cache, n: folders.append(cache.folder) or write(cache, n)

    def prepare(name, tokens=LONG):
        waited.clear()
        time.sleep = lambda seconds: waited.append(seconds)
        (cfg,) = settings.read(as_words(local | {"DATASET": name, "TOKENS": tokens}))
        of_lm = {"device": cfg.DEVICE, "layer": cfg.LAYER, "context": cfg.CONTEXT}
        opened = load.open_lm(cfg.MODEL, cfg.MODEL_REVISION, **of_lm)
        out = {"code": 0, "error": ""}
        try:
            tokens = data.prepare(cfg, opened.tokenizer, opened.config)
            for part in ("val", "train"):
                array = getattr(tokens, f"{part}_SL")
                out["wanted"] = hashlib.sha256(array[: LONG // 32].tobytes()).hexdigest()
                out[part] = [len(array), hashlib.sha256(array.tobytes()).hexdigest()]
        except UserError as error:
            out |= {"code": error.code, "error": str(error)}
        finally:
            time.sleep = sleep
        return out | {"waited": sum(waited), "folder": folders[-1]}

    for name in ("undisturbed", *UNEVEN, *names):
        of = DATASET if name == "undisturbed" else name if name in UNEVEN else f"faults/{name}"
        found[name] = prepare(of)
        state = Path(found[name]["folder"], "state.json")
        state = json.loads(state.read_text()) if state.exists() else {"documents": 0}
        found[name] |= {"kept": state["documents"], "skipped": state.get("skipped")}
        if name in ("404", "garbage"):
            found[f"{name} again"] = prepare(f"faults/{name}")
    datasets.load_dataset_builder = None  # what is in the journal asks nobody
    found["from the journal"] = prepare(DATASET, LONG // 2)
    Path(folder, "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(hubs, tmp_path_factory):
    """What `child` found, against a hub whose default model is gated."""
    import hub

    folder = tmp_path_factory.mktemp("child")
    server = hub.Hub(hubs.root, gated={MODEL, "some/gated"})
    server.fault = faulty
    with server as url:
        words = [__file__, folder, hubs.root / "models" / MODEL, *PASSING, *FINAL, "cut"]
        done = process(folder, *words, url=url)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not [p for p in (folder / "runs").glob("*")]  # nothing was started
    return json.loads((folder / "found.json").read_text())


PAGE = f"https://huggingface.co/datasets/{DATASET}/tree/"
REFUSED = {
    "gated": (MODEL, "gated", f"https://huggingface.co/{MODEL}", "`hf auth login`", "`make demo`"),
    "no model": ("MODEL = 'nobody/nothing'",),
    "no SAE repository": ("SAE = 'nobody/nothing/trainer_2'",),
    "no SAE folder": ("resid_post_layer_12/trainer_99'",),
    "no dataset": ("DATASET = 'nobody/nothing'",),
    "no text": ("have no 'body'; they have text, meta", "TEXT_KEY"),
    "no text in parquet": ("have no 'body'; they have text, meta, seen", "TEXT_KEY"),
    "no split": ("has no split 'tset'; it has train", "set SPLIT"),
    "no files": ("No (supported) data files", f"set DATA_FILES to files with text of {PAGE}"),
    "several configurations": ("configurations: the-old, the-new", "DATA_FILES=old/*.parquet"),
    "a gated text": ("'some/gated' is gated", "datasets/some/gated, then `hf auth login`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_hub_does_not_give_ends_in_one_message(found, case):
    code, error, seconds = (found[case][n] for n in ("code", "error", "seconds"))
    lines = [line.rsplit("\r", 1)[-1] for line in error.split("\n")]
    said = lines[[line.startswith("error: ") for line in lines].index(True) :]
    assert code == 2 and seconds < 20, error
    assert len([line for line in said if line]) <= 2 and "Traceback" not in error, error
    assert all(words in "\n".join(said) for words in REFUSED[case]), error


def test_without_faults_nothing_waits_and_both_shards_are_read(found):
    plain = found["undisturbed"]
    assert plain["waited"] == 0 and plain["kept"] > 150
    assert plain["val"][0] == 4 and 32 * plain["train"][0] > LONG


@pytest.mark.parametrize("name", UNEVEN)
def test_other_fields_may_differ_between_shards_and_rows_without_text_are_skipped(found, name):
    assert found[name]["code"] == 0, found[name]["error"]
    assert found[name]["skipped"] >= 3
    for part in ("val", "wanted"):
        assert found[name][part] == found["undisturbed"][part]


@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_passes_changes_no_token(found, name):
    assert found[name]["code"] == 0, found[name]["error"]
    assert found[name]["waited"] > 0  # the fault was met
    for part in ("val", "train"):
        assert found[name][part] == found["undisturbed"][part]


@pytest.mark.parametrize("name", FINAL)
def test_a_fault_that_stays_says_how_far_it_got(found, name):
    assert found[name]["code"] == 1 and "after 64 documents" in found[name]["error"]


def test_the_hub_may_be_away_for_half_an_hour(found):
    assert found["gone"]["waited"] > 30 * 60 > found["404"]["waited"]


@pytest.mark.parametrize("name", ["404", "garbage"])
def test_the_same_command_goes_on_after_a_fault(found, name):
    again = found[f"{name} again"]
    assert again["code"] == 0, again["error"]
    assert [again[part] for part in ("val", "train")] == [
        found["undisturbed"][part] for part in ("val", "train")
    ]


@pytest.mark.parametrize("name", FINAL)
def test_what_was_read_before_a_fault_is_kept(found, name):
    assert found[name]["kept"] == 64


def test_a_stream_that_ends_early_is_an_error_and_no_shorter_run(found):
    assert found["cut"]["code"] in (1, 2)
    wanted = r"has [\d,]+ tokens in whole contexts; wanted [\d,]+|before the end-of-stream marker"
    assert re.search(wanted, found["cut"]["error"])  # the second where backports.zstd reads it


def test_a_full_journal_asks_nobody(found):
    assert found["from the journal"]["code"] == 0, found["from the journal"]["error"]
    assert found["from the journal"]["val"] == found["undisturbed"]["val"]


if __name__ == "__main__":
    child(sys.argv[1], sys.argv[2], sys.argv[3:])


def test_a_refused_sae_of_the_hub_is_told_what_its_repository_holds(hubs, tmp_path):
    """Not what was downloaded of it."""
    import hub

    root = tmp_path / "hub"
    files = ("layers.3/weights.bin", "layers.3/about.json", "layers.3/more/x", "README.md")
    for file in files:
        path = root / "models" / "some" / "saes" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    with hub.Hub(root) as url:
        for where, there in (("layers.3", "about.json, more/, weights.bin"), ("l9", "README.md")):
            code = f"from klsplice.formats import read; read.open_sae('some/saes/{where}', '')"
            done = process(tmp_path, "-c", code, url=url)
            assert there in done.stderr and "UserError" in done.stderr, done.stderr[-2000:]
