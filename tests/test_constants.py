"""Every constant of run.py: changing it changes what it says it changes, and nothing else.

A run is looked at from outside, in facets: what it leaves, and what the LM was asked. ROWS says for
each constant which facets differ when it alone differs; all others have to be the same numbers.
"""

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import transformers
from seams import constants_of_run, no_figures  # noqa: F401

import run
from learners import start

pytestmark = pytest.mark.usefixtures("no_figures")
STEP = tiny.BATCH * tiny.CONTEXT  # tokens
BASE = {"TOKENS": 3 * STEP, "CLEAN_BATCH": 8, "EVAL_BATCH": 5, "LORA_DROPOUT": 0.0, "RANK": 4}
STILL = {"LR": 1e-12, "WEIGHT_DECAY": 0.0}  # what is saved is what training began with
ADAPTER = {"TRAIN": "adapter"}
SAE_LORA = {"TRAIN": "sae_lora"}
LM_LORA = {"TRAIN": "lm_lora", "LOSS": "kl"}
MSE = {"LOSS": "mse"}
MEASURED = {"TOKENS": 0}  # the SAE as it is
FRESH = {"SAE": "fresh", "D_SAE": 64, "K": 4, "DEAD_AFTER": 40, "AUXK": 0.5}
FRESH_RELU = {"SAE": "fresh", "D_SAE": 64, "K": 4, "ARCHITECTURE": "relu", "L1": 1.0, "PASSES": 2}
ONE = {"DATASET": "one context"}  # all sequences are the same
# Facets. `first`: losses of step 1, with the weights as they were. `gradient`: its norm. `later`:
# the steps after. `saved`: the checkpoints written. `passes`, `products`: the sizes with which its
# first block, which a spliced pass skips, and its last one ran. `said`: the configs beside the SAE.
TRAINED = "first gradient later weights after "
LEARNT = "gradient later weights after "
MOVED = "later weights after "
DATA = "held_out lm before " + TRAINED
LENGTH = "lr later weights after logged evaluated saved passes products"
EACH = [  # constant, value, the facets that differ, what else is set in both runs
    ("MODEL", "other gem", "lm before said passes " + TRAINED, {}),
    ("DTYPE", "bfloat16", "lm before dtype " + TRAINED, {}),
    ("LAYER", 2, "before said " + TRAINED, {}),
    ("SITE", "hook_mlp_out", "before said passes products " + TRAINED, FRESH),
    ("SAE", "other topk", "before " + TRAINED, {}),
    ("KEEP", "first", "before said " + TRAINED, {}),
    ("KEEP", "none", "before said " + TRAINED, LM_LORA),
    ("ARCHITECTURE", "jumprelu", "before said passes " + TRAINED, {}),
    ("D_SAE", 96, "before said " + TRAINED, FRESH),
    ("K", 6, "before said " + TRAINED, FRESH),
    ("DATASET", "other text", "said " + DATA, {}),
    ("TEXT_KEY", "other", DATA, {}),
    ("BOS", "never", DATA + "said passes", {}),
    ("CONTEXT", 8, DATA + "said " + LENGTH, {}),
    ("TOKENS", 2 * STEP, LENGTH, {}),
    ("TOKENS", 4 * STEP - 1, "", {}),
    ("PASSES", 2, LENGTH, {}),
    ("SKIP_TOKENS", STEP, TRAINED, {}),
    ("VAL_TOKENS", 6 * tiny.CONTEXT, DATA + "passes products", {}),
    ("TRAIN", "adapter", LEARNT, {}),
    ("TRAIN", "sae_lora", LEARNT, {}),
    ("TRAIN", "lm_lora", LEARNT + "files passes", {"LOSS": "kl"}),
    ("LOSS", "kl", LEARNT, {}),
    ("LOSS", "mse", TRAINED + "products", {}),
    ("MSE_WEIGHT", 3.0, LEARNT, {}),
    ("FREEZE", "encoder", LEARNT, {}),
    ("BATCH", 2, TRAINED + "lr logged evaluated saved", {"MICRO_BATCH": 2}),
    ("LR", 1e-3, "lr " + MOVED, {}),
    ("SCHEDULE", "constant", "lr " + MOVED, {}),
    ("WARMUP", 2, "lr " + MOVED, {}),
    ("WEIGHT_DECAY", 0.5, MOVED, {}),
    ("CLIP", 1e-9, MOVED, {}),
    ("SEED", 1, TRAINED, {}),
    ("SEED", 1, "before " + TRAINED, FRESH | ONE),
    ("SEED", 1, LEARNT, ADAPTER | ONE),
    ("SEED", 1, LEARNT, SAE_LORA | ONE),
    ("SEED", 1, LEARNT, LM_LORA | ONE),
    ("SHUFFLE", 8, TRAINED + "passes", MSE),
    ("L1", 0.1, LEARNT + "said", FRESH_RELU),
    ("AUXK", 0.1, MOVED, FRESH),
    ("DEAD_AFTER", 10**6, MOVED, FRESH),
    ("JUMPRELU_THRESHOLD", "ste", LEARNT, {"ARCHITECTURE": "jumprelu"}),
    ("ADAPTER", "mlp", LEARNT + "files", ADAPTER),
    ("RANK", 8, LEARNT, ADAPTER),
    ("LORA_BLOCKS", "one", LEARNT + "passes", LM_LORA),
    ("LORA_ALPHA", 8, LEARNT, LM_LORA),
    ("LORA_DROPOUT", 0.5, LEARNT, LM_LORA),
    ("MICRO_BATCH", 2, "products", {}),
    ("CLEAN_BATCH", 4, "passes products", {}),
    ("EVAL_BATCH", 3, "passes products", {}),
    ("LOGITS", "float32", TRAINED, {"DTYPE": "bfloat16"}),
    ("HEAD_CHUNK", 7, "", {}),  # and below
    ("LOW_MEMORY", True, "products", {}),
    ("COMPILE", False, "", {}),  # on CUDA alone; test_splice.py compiles blocks on a CPU
    ("EVAL_EVERY", 100, "evaluated products", {}),
    ("EVAL_TOKENS", 70, "", {}),  # and below
    ("LOG_EVERY", 2, "logged lr first gradient later", {}),
    ("SAVE_EVERY", 1e-9, "saved", {}),
    ("TOGETHER", 2, "", {}),  # of one run; test_sweep.py has several
]
# Below, and in test_bookkeeping.py, test_run.py, test_hub.py and test_data.py:
OWN_TESTS = {"MODEL_REVISION", "CHECK_SAE", "RUNS", "CACHE", "WANDB_PROJECT", "WANDB_MODE"}
OWN_TESTS |= {"RUN_NAME", "DEVICE", "SAE_REVISION", "DATASET_REVISION", "DATA_FILES", "SPLIT"}


def test_every_constant_has_a_row():
    assert {*constants_of_run()} == {name for name, *_ in EACH} | OWN_TESTS
    nothing = {name for name, *_ in EACH if not any(row[2] for row in EACH if row[0] == name)}
    assert nothing == {"HEAD_CHUNK", "COMPILE", "EVAL_TOKENS", "TOGETHER"}


# ---- looking at a run ------------------------------------------------------------------------


RENAMED = []  # where a run renames something to, while one is being watched


def _note(event, args):
    if event == "os.rename":
        RENAMED.append(os.fspath(args[1]))


sys.addaudithook(_note)


class Watch:
    """What transformers is asked for, and with which sizes the LM is called."""

    def __init__(self):
        self.asked, self.lm, self.sizes = [], None, {"passes": [], "products": []}

    @staticmethod
    def of(monkeypatch):
        watch, original = Watch(), transformers.AutoModelForCausalLM.from_pretrained

        def from_pretrained(name, **options):
            watch.asked.append((name, options))
            found = original(name, **options)
            watch.lm = found[0] if isinstance(found, tuple) else found
            decoder = watch.lm.get_decoder()
            lowest, highest = decoder.layers[0].self_attn, decoder.layers[-1].mlp
            for kind, module in (("passes", lowest), ("products", highest)):
                module.register_forward_pre_hook(watch._hook(kind), with_kwargs=True)
            return found

        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
        return watch

    def _hook(self, kind):
        def note(module, args, options):
            x = args[0] if args else options["hidden_states"]
            self.sizes[kind].append(len(x))

        return note


def looked_at(folder: Path, watch: Watch, renamed: list[str]) -> dict:
    before, after = (tiny.read(folder / f"{when}.json") for when in ("before", "after"))
    kept = tiny.arrays(folder / "before.npz")
    train, val = tiny.lines(folder, "train"), tiny.lines(folder, "val")
    losses = ("mse", "kl", "alpha", "l0")
    configs = {n: tiny.read(folder / "sae" / f"{n}.json") for n in ("config", "cfg")}
    configs["config"].pop("klsplice")
    saved = [re.search(r"checkpoints/step-(\d+)$", path) for path in renamed]
    files = [p.relative_to(folder) for p in folder.rglob("*")]
    clean = {n: v for n, v in before.items() if "clean" in n}
    return {
        "held_out": kept["tokens"].tolist(),
        "lm": clean | {n: v for n, v in after.items() if n in clean},
        "before": {n: v for n, v in before.items() if n not in clean},
        "dtype": {p.dtype for n, p in watch.lm.named_parameters() if "lora" not in n},
        "first": {n: train[0][n] for n in losses},
        "gradient": train[0]["grad_norm"],
        "lr": [line["lr"] for line in train],
        "later": [[line[n] for n in (*losses, "grad_norm")] for line in train[1:]],
        "weights": tiny.tensors(folder),
        "after": {n: v for n, v in after.items() if n not in clean},
        "logged": [line["step"] for line in train],
        "evaluated": [line["step"] for line in val],
        "saved": [int(found[1]) for found in saved if found],
        "passes": Counter(watch.sizes["passes"]),
        "products": Counter(watch.sizes["products"]),
        "said": configs,
        "files": {str(path) for path in files},
    }


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and tiny.apart(a, b) < 2e-5
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[n], b[n]) for n in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return a == pytest.approx(b, rel=1e-4, abs=1e-7)
    return a == b


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = tiny.make(tmp_path_factory.mktemp("world"))
    other = tmp_path_factory.mktemp("other")
    tiny.hub.make_gemma(other / "gem2", seed=1, layers=4)
    t = tiny.given("topk")
    tiny.write_sae(other / "topk2", "topk", t | {"b_dec": -t["b_dec"], "b_enc": t["b_enc"].flip(0)})
    tiny.write_sae(other / "wrong", "topk", t | {"W_dec": -t["W_dec"]})
    rows = [{"text": json.loads(row)["other"]} for row in world.text.read_text().splitlines()]
    (other / "text2.jsonl").write_text("\n".join(map(json.dumps, rows)))
    one_SL = tiny.packed(world.root)[1][1:2].repeat(40, 1).numpy()
    np.save(other / "one.npy", one_SL.astype(np.int32))
    files = {"other gem": "gem2", "other topk": "topk2", "wrong": "wrong"}
    files |= {"other text": "text2.jsonl", "one context": "one.npy"}
    world.others = {name: other / file for name, file in files.items()}
    return world


@pytest.fixture(scope="module")
def seen(world, tmp_path_factory):
    """-> settings -> what a run with them showed, its folder and the watch; each is run once."""
    known = {}

    def look(**settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in known:
            known[key] = watched(world, tmp_path_factory.mktemp("runs"), **settings)
        return known[key]

    return look


def watched(world, runs, **settings) -> SimpleNamespace:
    given = {n: world.others.get(v, v) if isinstance(v, str) else v for n, v in settings.items()}
    with pytest.MonkeyPatch.context() as m:
        watch = Watch.of(m)
        RENAMED.clear()
        folder = tiny.finished(world, runs, **{"CACHE": runs / "cache"} | BASE | given)
        facets = looked_at(folder, watch, [p for p in RENAMED if str(folder) in p])
    return SimpleNamespace(facets=facets, folder=folder, watch=watch)


@pytest.mark.parametrize("name, value, differ, given", EACH, ids=lambda x: str(x).replace("::", ""))
def test_a_constant_changes_what_it_says_and_nothing_else(seen, name, value, differ, given):
    here, there = seen(**given), seen(**given | {name: value})
    found = {facet for facet, a in here.facets.items() if not same(there.facets[facet], a)}
    surplus, missing = sorted(found - set(differ.split())), sorted(set(differ.split()) - found)
    show = {n: (here.facets[n], there.facets[n]) for n in surplus if n not in ("weights", "said")}
    assert (surplus, missing) == ([], []), show
    written = tiny.read(there.folder / "run.json")["constants"]
    assert {*constants_of_run()} == written.keys()
    places = ("MODEL", "SAE", "DATASET", "CACHE")
    assert name in places or (written[name], type(written[name])) == (value, type(value))
    card = (there.folder / "sae" / "README.md").read_text()
    shown = {n: v for n, v in re.findall(r"^([A-Z_]+) = (.+)$", card, re.M) if n not in places}
    assert shown == {n: repr(written[n]) for n in shown}


# ---- exactly how -----------------------------------------------------------------------------


def test_metrics_are_of_the_first_eval_tokens_and_results_of_all(seen):
    """Of those, whole batches: 70 tokens are 4 of 8 sequences, in two batches."""
    folder = seen(EVAL_EVERY=100, EVAL_TOKENS=70, EVAL_BATCH=2).folder
    lines = tiny.lines(folder, "val")
    assert len(lines) == 3 and len({line["ce_clean"] for line in lines}) == 1
    for line, when in ((lines[0], "before"), (lines[2], "after")):
        found, kept = tiny.read(folder / f"{when}.json"), tiny.arrays(folder / f"{when}.npz")
        for name, mine in (("ce_spliced", "ce"), ("ce_clean", "ce_clean")):
            for numbers, n in ((line, 4), (found, 8)):
                wanted = kept[mine][:n, :-1].mean(dtype="float64")
                assert numbers[name] == pytest.approx(wanted, abs=1e-12)
        assert line["fvu"] != found["fvu"] and line["ce_clean"] != found["ce_clean"]


def test_the_lm_is_loaded_in_dtype_and_stays_as_it_was(world, seen):
    """Frozen: no parameter asks for a gradient or has one, none has moved; LoRA's are its own."""
    half = {"DTYPE": "bfloat16"}
    for given in ({}, half, LM_LORA | half):
        watch, dtype = seen(**given).watch, getattr(torch, given.get("DTYPE", "float32"))
        ((name, options),) = watch.asked
        assert (name, options["dtype"]) == (str(world.model), dtype)
        assert options["trust_remote_code"] is False and options["local_files_only"] is True
        wanted = dict(tiny.lm_of(world.model).named_parameters())
        found = dict(watch.lm.named_parameters())
        learns = {n for n in found if "lora_" in n}
        assert bool(learns) == (given.get("TRAIN") == "lm_lora") and not watch.lm.training
        assert all(found[n].requires_grad and found[n].dtype == torch.float32 for n in learns)
        mine = {n.replace(".base_layer", ""): p for n, p in found.items() if n not in learns}
        assert mine.keys() == wanted.keys()
        assert not any(p.requires_grad or p.grad is not None for p in mine.values())
        assert all(torch.equal(p, wanted[n].to(dtype)) for n, p in mine.items())
    weights = seen(**half).facets["weights"]
    assert {t.dtype for t in weights.values()} == {torch.float32}
    assert (weights["W_enc"].bfloat16().float() == weights["W_enc"]).float().mean() < 0.1


def test_the_head_gets_its_chunk(world, tmp_path, monkeypatch):
    splice, calls = start.Splice, []
    monkeypatch.setattr(start, "Splice", lambda *a, **o: calls.append(o) or splice(*a, **o))
    tiny.finished(world, tmp_path, HEAD_CHUNK=7, TOKENS=STEP)
    assert {options["head_chunk"] for options in calls} == {7}


# ---- what a run begins with ------------------------------------------------------------------


def test_dropout_has_a_seed_of_its_own_in_every_micro_batch(world, tmp_path, monkeypatch):
    """And for every SEED: the last ones that torch is given are of 3 steps of 2 micro-batches."""
    given = SAE_LORA | {"MICRO_BATCH": 2, "LORA_DROPOUT": 0.5}
    seeds, original = {0: [], 1: []}, torch.manual_seed
    for seed, noted in seeds.items():
        monkeypatch.setattr(torch, "manual_seed", lambda s, to=noted: to.append(s) or original(s))
        watched(world, tmp_path / str(seed), SEED=seed, **given)
    assert len({*seeds[0][-6:], *seeds[1][-6:]}) == 12


# ---- on their way to a library ---------------------------------------------------------------


def test_the_revision_of_the_lm_reaches_transformers(world, tmp_path, monkeypatch):
    """As the commit that it stands for, for all three; each commit is measured anew."""
    asked, commits = [], {"abc": "c0" * 20, "main": "d1" * 20}

    def hf_hub_download(repo, name, *, revision):
        assert repo == "owner/gem"
        if name == "tokenizer.json":  # of the commit that config.json was found at
            assert revision in commits.values()
            return str(world.model / name)
        return f"cache/snapshots/{commits[revision]}/{name}"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    for cls in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        original = getattr(transformers, cls).from_pretrained

        def from_pretrained(name, *, _original=original, _cls=cls, **options):
            revision = options.pop("revision", None)
            if name != world.model:  # a tokeniser's own look at the config
                asked.append((_cls, name, revision))
            return _original(world.model, **options)

        monkeypatch.setattr(getattr(transformers, cls), "from_pretrained", from_pretrained)
    given = MEASURED | {"MODEL": "owner/gem", "CACHE": tmp_path / "cache"}
    for n, (revision, commit) in enumerate([("abc", commits["abc"]), ("", commits["main"])], 1):
        asked.clear()
        name = {"MODEL_REVISION": revision, "RUN_NAME": f"r{revision}"}
        folder = tiny.finished(world, tmp_path, **given, **name)
        assert {(cls, "owner/gem", commit) for cls, *_ in asked} == {*asked} and len({*asked}) == 3
        assert tiny.read(folder / "run.json")["resolved"]["model"] == f"owner/gem@{commit}"
        assert kinds(tmp_path / "cache") == {"tokens": 1, "zero": n, "eval": n}


def kinds(cache) -> dict:
    """How many things of each kind are kept."""
    return Counter(name.split("-")[0] for name in os.listdir(cache) if name != "lock")


def test_check_sae_refuses_an_sae_that_does_not_belong(world, tmp_path):
    """One that does not reconstruct, and one of another layer or model; unless one means it."""
    said = tiny.StringIO()
    others = [{"SAE": world.others["wrong"]}, {"LAYER": 2}, {"MODEL": world.others["other gem"]}]
    for given in others:
        with tiny.redirect_stdout(said), tiny.redirect_stderr(said):
            code = run.main(tiny.words(world, tmp_path, **{"CHECK_SAE": True} | BASE | given))
        assert code == 2 and "SAE" in said.getvalue()
    assert not (tmp_path / "x").exists()
    assert tiny.main(world, tmp_path, SAE=world.others["wrong"], CHECK_SAE=False) == 0


def test_runs_and_cache_say_where_things_are(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.finished(world, tmp_path / "r", CACHE="c", **BASE)
    assert {p.name for p in tmp_path.iterdir()} == {"r", "c"}
    assert kinds("c") == {"tokens": 1, "zero": 1, "eval": 2} and os.listdir("r") == ["x"]
