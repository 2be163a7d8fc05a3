"""Every constant of run.py: changing it changes what it says it changes, and nothing else.

A run is looked at from outside, in facets: what it leaves, and what the LM was asked. ROWS says for
each constant which facets differ when it alone differs; all others have to be the same numbers.
"""

import inspect
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import naive
import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file
from seams import constants_of_run, patch
from torch.utils._python_dispatch import TorchDispatchMode

import run

STEP = tiny.BATCH * tiny.CONTEXT  # tokens
BASE = {
    "TOKENS": 3 * STEP,
    "CLEAN_BATCH": 8,
    "EVAL_BATCH": 5,
    "LORA_DROPOUT": 0.0,
    "RANK": 4,
}
STILL = {"LR": 1e-12, "WEIGHT_DECAY": 0.0}  # what is saved is what training began with
ADAPTER = {"TRAIN": "adapter"}
SAE_LORA = {"TRAIN": "sae_lora"}
LM_LORA = {"TRAIN": "lm_lora", "LOSS": "kl"}
MSE = {"LOSS": "mse"}
FRESH = {"SAE": "fresh", "D_SAE": 64, "K": 4, "DEAD_AFTER": 40}
FRESH_RELU = FRESH | {"ARCHITECTURE": "relu", "L1": 0.01}
# Facets. `first`: losses of step 1, with the weights as they were. `gradient`: its norm. `later`:
# the steps after. `saved`: the checkpoints written. `passes`, `products`: the sizes with which its
# first block, which a spliced pass skips, and its last one ran. `said`: the configs beside the SAE.
TRAINED = "first gradient later weights after "
DATA = "held_out lm before " + TRAINED
LENGTH = "lr later weights after logged evaluated saved passes products"
ROWS = {  # constant: [(value, the facets that differ, what else is set in both runs)]
    "MODEL": [("other gem", "lm before said " + TRAINED, {})],
    "DTYPE": [("bfloat16", "lm before dtype " + TRAINED, {})],
    "LAYER": [(2, "before said " + TRAINED, {})],
    "SAE": [("other topk", "before " + TRAINED, {})],
    "KEEP": [
        ("none", "before said " + TRAINED, {}),
        ("first", "before said " + TRAINED, {}),
        ("none", "before said " + TRAINED, MSE),
        ("none", "before said " + TRAINED, MSE | {"SHUFFLE": 8}),
        ("none", "before said " + TRAINED, FRESH),
        ("none", "before said " + TRAINED, LM_LORA),
    ],
    "ARCHITECTURE": [
        ("jumprelu", "before said passes " + TRAINED, {}),
        ("batchtopk", "before said passes " + TRAINED, {}),
        ("matryoshka", "before said passes " + TRAINED, {}),
        ("relu", "before said " + TRAINED, FRESH),
        ("topk", "", {}),
    ],
    "D_SAE": [(96, "before said " + TRAINED, FRESH)],
    "K": [
        (6, "before said " + TRAINED, FRESH),
        (60, "later weights after", FRESH_RELU | {"L1": 1.0, "PASSES": 2}),
    ],
    "DATASET": [("other text", "said " + DATA, {})],
    "TEXT_KEY": [("other", DATA, {})],
    "BOS": [("never", DATA + "said", {}), ("always", "", {})],
    "CONTEXT": [(8, DATA + "said " + LENGTH, {})],
    "TOKENS": [(2 * STEP, LENGTH, {}), (4 * STEP - 1, "", {})],
    "PASSES": [(2, LENGTH, {})],
    "SKIP_TOKENS": [(STEP, TRAINED, {}), (tiny.CONTEXT - 1, "", {})],
    "VAL_TOKENS": [
        (6 * tiny.CONTEXT, DATA + "passes products", {}),
        (9 * tiny.CONTEXT - 1, "", {}),
    ],
    "TRAIN": [
        ("adapter", "gradient later weights after", {}),
        ("sae_lora", "gradient later weights after", {}),
        ("lm_lora", "gradient later weights after files passes", {"LOSS": "kl"}),
    ],
    "LOSS": [
        ("kl", "gradient later weights after", {}),
        ("mse", TRAINED + "products", {}),
    ],
    "BATCH": [(2, TRAINED + "lr logged evaluated saved", {"MICRO_BATCH": 2})],
    "LR": [(1e-3, "lr later weights after", {})],
    "SCHEDULE": [("constant", "lr later weights after", {})],
    "WARMUP": [(2, "lr later weights after", {}), (2, "lr later weights after", LM_LORA)],
    "WEIGHT_DECAY": [(0.5, "later weights after", {}), (0.5, "later weights after", LM_LORA)],
    "CLIP": [
        (1e-9, "later weights after", {}),
        (1e-9, "later weights after", ADAPTER),
        (1e-9, "later weights after", LM_LORA),
    ],
    "SEED": [
        (1, TRAINED, {}),
        (1, TRAINED, MSE),
        (1, "before " + TRAINED, FRESH),
        (1, "", {"DATASET": "one context"}),
        (1, "before " + TRAINED, FRESH | {"DATASET": "one context"}),
        (1, "before " + TRAINED, FRESH_RELU | {"DATASET": "one context"}),
        (1, "gradient later weights after", ADAPTER | {"DATASET": "one context"}),
        (1, "gradient later weights after", SAE_LORA | {"DATASET": "one context"}),
        (1, "gradient later weights after", LM_LORA | {"DATASET": "one context"}),
    ],
    "SHUFFLE": [(8, TRAINED + "passes", MSE), (4, "passes", MSE)],  # 4: within a step
    "L1": [(0.1, "gradient later weights after said", FRESH_RELU), (0.1, "", {"SAE": "relu"})],
    "AUXK": [(0.5, "later weights after", FRESH)],
    "DEAD_AFTER": [
        (10**6, "later weights after", FRESH | {"AUXK": 0.5}),
        (10**6, "", FRESH),
    ],
    "JUMPRELU_THRESHOLD": [
        ("ste", "gradient later weights after", {"SAE": "jumprelu"}),
        ("ste", "gradient later weights after", {"ARCHITECTURE": "jumprelu"}),
    ],
    "ADAPTER": [("mlp", "gradient later weights after files", ADAPTER)],
    "FOLD": [(False, "weights files", ADAPTER)],
    "RANK": [
        (8, "gradient later weights after", ADAPTER),
        (8, "gradient later weights after", SAE_LORA),
        (8, "gradient later weights after", LM_LORA),
    ],
    "LORA_BLOCKS": [
        ("after", "gradient later weights after passes", LM_LORA),
        ("one", "gradient later weights after passes", LM_LORA),
    ],
    "LORA_MODULES": [
        ("attention", "gradient later weights after", LM_LORA),
        ("mlp", "gradient later weights after", LM_LORA),
    ],
    "LORA_ALPHA": [
        (8, "gradient later weights after", SAE_LORA),
        (8, "gradient later weights after", LM_LORA),
        (4, "", SAE_LORA),
    ],
    "LORA_DROPOUT": [
        (0.5, "gradient later weights after", SAE_LORA),
        (0.5, "gradient later weights after", LM_LORA),
    ],
    "MORE_SAES": [("3:other topk", "before passes " + TRAINED, LM_LORA | {"LORA_BLOCKS": "after"})],
    "MICRO_BATCH": [
        (2, "products", {}),
        (1, "", MSE),
        (2, "passes products", LM_LORA),
    ],
    "CLEAN_BATCH": [
        (4, "passes", MSE),
        (4, "passes products", {}),
        (2, "passes products", {"MICRO_BATCH": 2}),
    ],
    "EVAL_BATCH": [(3, "passes products", {}), (3, "passes products", FRESH)],
    "LOGITS": [("float32", TRAINED, {"DTYPE": "bfloat16"}), ("float32", "", {})],
    "HEAD_CHUNK": [(7, "", {}), (7, "", LM_LORA)],
    "LOW_MEMORY": [(True, "products", {}), (True, "passes products", LM_LORA)],
    "COMPILE": [(False, "", {})],
    "EVAL_EVERY": [(100, "evaluated products", {})],
    "EVAL_TOKENS": [(70, "", {})],  # and below
    "LOG_EVERY": [(2, "logged lr first gradient later", {})],
    "SAVE_EVERY": [(1e-9, "saved", {})],
    "TOGETHER": [(2, "", {})],
}
OWN_TESTS = {  # constant: the test that has it
    "MODEL_REVISION": "test_the_revision_of_the_lm_reaches_transformers",
    "SAE_REVISION": "test_the_revision_of_the_sae_reaches_the_hub",
    "DATASET_REVISION": "test_a_datasets_revision_files_and_split_reach_datasets",
    "DATA_FILES": "test_a_datasets_revision_files_and_split_reach_datasets",
    "SPLIT": "test_a_datasets_revision_files_and_split_reach_datasets",
    "CHECK_SAE": "test_check_sae_refuses_an_sae_that_does_not_belong",
    "DEVICE": "test_a_device_that_is_not_there_is_refused",
    "RUN_NAME": "test_a_run_without_a_name_gets_one",
    "WANDB_MODE": "test_wandb_is_asked_for_its_project_or_not_at_all",
    "RUNS": "test_runs_and_cache_say_where_things_are",
    "CACHE": "test_runs_and_cache_say_where_things_are",
    "WANDB_PROJECT": "test_wandb_is_asked_for_its_project_or_not_at_all",
}
NO_EFFECT_HERE = {"COMPILE": "on CUDA alone; test_splice.py compiles blocks on a CPU"}
NO_EFFECT_HERE["TOGETHER"] = "of one run; test_sweep.py has several"


def constants() -> set[str]:
    """The names that run.py assigns, from its text."""
    return set(constants_of_run())


def test_every_constant_has_a_row():
    assert constants() == ROWS.keys() | OWN_TESTS.keys()
    nothing = {name for name, rows in ROWS.items() if not any(differ for _, differ, _ in rows)}
    own_below = {"HEAD_CHUNK", "EVAL_TOKENS"}  # have tests of their own
    assert nothing == NO_EFFECT_HERE.keys() | own_below
    assert all(inspect.isfunction(globals()[name]) for name in OWN_TESTS.values())


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
    world.others = {"other gem": other / "gem2", "other topk": other / "topk2"}
    world.others["wrong"] = other / "wrong"
    world.others |= {"other text": other / "text2.jsonl", "one context": other / "one.npy"}
    world.others |= {"3:other topk": f"3:{other / 'topk2'}"}
    world.others |= {name: world.saes[name] for name in ("relu", "jumprelu")}
    return world


@pytest.fixture(scope="module")
def seen(world, tmp_path_factory):
    """-> settings -> what a run with them showed, its folder and the watch; each is run once."""
    known = {}

    def look(**settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in known:
            runs = tmp_path_factory.mktemp("runs")
            known[key] = watched(world, runs, **settings)
        return known[key]

    return look


def watched(world, runs, **settings) -> SimpleNamespace:
    given = {n: v for n, v in settings.items()}
    for name in ("MODEL", "SAE", "DATASET", "MORE_SAES"):
        if name in given:
            given[name] = world.others.get(given[name], given[name])
    with pytest.MonkeyPatch.context() as m:
        drawn, watch = patch(m, "figures", lambda *_: None), Watch.of(m)
        RENAMED.clear()
        folder = tiny.finished(world, runs, **{"CACHE": runs / "cache"} | BASE | given)
        assert len(drawn) == len(watch.asked) == 1
        facets = looked_at(folder, watch, [p for p in RENAMED if str(folder) in p])
    return SimpleNamespace(facets=facets, folder=folder, watch=watch)


EACH = [(name, *row) for name, rows in ROWS.items() for row in rows]
IDS = [f"{name}={value}" + f" with {given}" * bool(given) for name, value, _, given in EACH]


@pytest.mark.parametrize("name, value, differ, given", EACH, ids=IDS)
def test_a_constant_changes_what_it_says_and_nothing_else(seen, name, value, differ, given):
    here = seen(**given)
    there = seen(**given | {name: value})
    found = {facet for facet, a in here.facets.items() if not same(there.facets[facet], a)}
    surplus, missing = sorted(found - set(differ.split())), sorted(set(differ.split()) - found)
    show = {n: (here.facets[n], there.facets[n]) for n in surplus if n not in ("weights", "said")}
    assert (surplus, missing) == ([], []), show
    written = tiny.read(there.folder / "run.json")["constants"]
    assert constants() == written.keys()
    others = ("MODEL", "SAE", "DATASET", "MORE_SAES")
    assert name in others or (written[name], type(written[name])) == (value, type(value))
    card = (there.folder / "sae" / "README.md").read_text()
    shown = dict(re.findall(r"^([A-Z_]+) = (.+)$", card, re.M))
    assert {n: v for n, v in shown.items() if n not in (*others, "CACHE")} == {
        n: repr(written[n]) for n in shown if n not in (*others, "CACHE")
    }


FREE = {"LOG_EVERY", "SAVE_EVERY", "WANDB_MODE", "TOGETHER"}
PLACES = {"RUN_NAME", "RUNS", "CACHE", "WANDB_PROJECT"}  # other folders, or none of a run's numbers
LEGAL = {
    "WANDB_MODE": "offline",
    "DEVICE": "cpu:0",
    "MODEL_REVISION": "x",
    "SAE_REVISION": "x",
    "DATASET_REVISION": "x",
    "DATA_FILES": "x",
    "SPLIT": "x",
    "CHECK_SAE": True,
    "COMPILE": False,
    "SHUFFLE": 4,
    "D_SAE": 96,
    "BATCH": 8,
}


def first_value(name):
    return LEGAL[name] if name in LEGAL else ROWS[name][0][0]


@pytest.mark.parametrize("name", sorted(constants() - PLACES))
def test_the_folder_of_a_run_refuses_every_other_constant(world, seen, name):
    """Or takes it as free: then it has nothing to do and changes nothing."""
    given = {"MORE_SAES": LM_LORA | {"LORA_BLOCKS": "after"}, "SHUFFLE": MSE}.get(name, {})
    given = FRESH if name in ("K", "D_SAE", "AUXK", "DEAD_AFTER") else given
    folder = seen(**given).folder
    value = world.others.get(first_value(name), first_value(name))
    settings = {"CACHE": folder.parent / "cache"} | BASE | given | {name: value}
    said, files = tiny.StringIO(), {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    with tiny.redirect_stdout(said), tiny.redirect_stderr(said):
        code = run.main(tiny.words(world, folder.parent, **settings))
    assert code == (0 if name in FREE else 2)
    assert "is finished" in said.getvalue() if name in FREE else f"{name} " in said.getvalue()
    assert files == {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


# ---- exactly how -----------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 2])
def test_the_learning_rate_is_that_of_the_formula(seen, schedule, warmup):
    given = {"SCHEDULE": schedule} | ({"WARMUP": warmup} if warmup else {"PASSES": 2})
    found = seen(**given).facets["lr"]
    steps, lr = 3 if warmup else 6, tiny.SMALL["LR"]
    wanted = [lr * min(1, (s + 1) / (warmup + 1)) for s in range(steps)]
    if schedule == "linear":
        wanted = [lr * (1 - s / steps) for s, lr in enumerate(wanted)]
    assert found == pytest.approx(wanted, rel=1e-9)


def test_clip_bounds_the_update_and_not_the_norm_that_is_logged(seen):
    """AdamW divides by its gradient's size, until that is small beside its eps of 1e-8."""
    whole, clipped = seen(), seen(CLIP=1e-9)
    assert whole.facets["gradient"] == pytest.approx(clipped.facets["gradient"], rel=1e-6)
    start = tiny.given("topk")["b_enc"] * (1 - 0.01 * sum(whole.facets["lr"]))
    moved = [tiny.apart(x.facets["weights"]["b_enc"], start) for x in (whole, clipped)]
    assert moved[0] > 0.05 and moved[1] < 2e-3


def test_weight_decay_is_decoupled(seen):
    decayed, plainly = (seen(WEIGHT_DECAY=wd, TOKENS=STEP) for wd in (0.5, 0.0))
    apart = plainly.facets["weights"]["b_enc"] - decayed.facets["weights"]["b_enc"]
    wanted = tiny.SMALL["LR"] * 0.5 * tiny.given("topk")["b_enc"]
    assert torch.allclose(apart, wanted, atol=1e-7)


def test_tokens_are_rounded_to_whole_steps_and_contexts(seen):
    """In what is trained and held out, and in what the card says of it."""
    for given, trained in (({"TOKENS": 4 * STEP - 1}, 3), ({"PASSES": 2}, 6)):
        folder = seen(**given).folder
        assert tiny.read(folder / "results.json")["tokens"] == trained * STEP
        assert f"on {trained * STEP:,} tokens" in (folder / "sae" / "README.md").read_text()
    for given, contexts in (({"VAL_TOKENS": 9 * 16 - 1}, 8), ({"VAL_TOKENS": 96}, 6)):
        folder = seen(**given).folder
        assert len(tiny.arrays(folder / "after.npz")["tokens"]) == contexts
        card = (folder / "sae" / "README.md").read_text()
        assert f"on {contexts * 16:,} held-out tokens" in card


def test_the_sequences_come_as_the_text_has_them(world, seen):
    """The first line's MSE is of the first BATCH; SKIP_TOKENS leaves out as many as it says."""
    _, train_SL = tiny.packed(world.root)
    sae = tiny.plain_sae(tiny.read_sae(world.saes["topk"]))
    lm = tiny.lm_of(world.model)
    for given, first in (({}, 0), ({"SKIP_TOKENS": STEP}, 4), ({"SKIP_TOKENS": 37}, 2), (MSE, 0)):
        tokens_BL = train_SL[first : first + tiny.BATCH]
        with torch.no_grad():
            x_ND = naive.run_lm(lm, tokens_BL, tiny.LAYER)[1][~tiny.kept("special", tokens_BL)]
            wanted = (sae(x_ND)[0] - x_ND).square().mean().item()
        assert seen(**given).facets["first"]["mse"] == pytest.approx(wanted, rel=1e-5)


def test_a_second_pass_has_the_same_sequences_in_the_same_order(seen):
    given = {"PASSES": 2, **STILL}
    found = [line[:2] for line in seen(**given).facets["later"]]
    first = [seen(**given).facets["first"][n] for n in ("mse", "kl")]
    assert same([first, *found[:2]], found[2:])


def test_shuffled_tokens_are_those_of_the_pool(seen):
    """Each once: over the steps of a pool the mean MSE is what it is without."""
    given = MSE | STILL | {"TOKENS": 2 * STEP, "KEEP": "none"}
    shuffled, plainly = (seen(**given | x).facets for x in ({"SHUFFLE": 8}, {}))
    one, other = ([x["first"]["mse"], x["later"][0][0]] for x in (shuffled, plainly))
    assert sum(one) == pytest.approx(sum(other), rel=1e-5) and one != pytest.approx(other, rel=1e-3)


def test_evaluations_come_when_eval_every_tokens_are_crossed(seen):
    """Every 100 tokens, a step having 64: no multiple of one falls on the other."""
    found = seen(EVAL_EVERY=100, PASSES=2).facets["evaluated"]
    assert found == [0, 2, 4, 5, 6]
    assert seen(EVAL_EVERY=100).facets["evaluated"] == [0, 2, 3]
    assert seen().facets["evaluated"] == [0, 3]


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
    closed = [(lines[0]["ce_spliced"] - x["ce_spliced"]) for x in lines]
    gap = lines[0]["ce_spliced"] - lines[0]["ce_clean"]
    assert [x["gap_closed"] for x in lines] == pytest.approx([c / gap for c in closed])
    assert lines[1]["ce_spliced"] not in (lines[0]["ce_spliced"], lines[2]["ce_spliced"])


def test_lines_are_written_every_log_every_steps_and_after_the_last(seen):
    every, some = (tiny.lines(seen(**x).folder, "train") for x in ({}, {"LOG_EVERY": 2}))
    for lines in (every, some):
        for line in lines:
            assert line.pop("tokens_per_second") > 0
    assert some == [line for line in every if line["step"] in (2, 3)]


def test_a_checkpoint_is_written_when_it_is_time_and_after_the_last_step(seen):
    assert seen().facets["saved"] == [3]
    assert seen(SAVE_EVERY=1e-9).facets["saved"] == [1, 2, 3]


def test_the_lm_is_loaded_in_dtype_and_stays_as_it_was(world, seen):
    """Frozen: no parameter asks for a gradient or has one, none has moved; LoRA's are its own."""
    half = {"DTYPE": "bfloat16"}
    for given in ({}, half, LM_LORA, LM_LORA | half, ADAPTER, FRESH):
        watch = seen(**given).watch
        dtype = getattr(torch, given.get("DTYPE", "float32"))
        ((name, options),) = watch.asked
        assert (name, options["dtype"]) == (str(world.model), dtype)
        assert options["trust_remote_code"] is False and options["local_files_only"] is True
        wanted = dict(tiny.lm_of(world.model).named_parameters())
        found = dict(watch.lm.named_parameters())
        learns = {n for n in found if "lora_" in n}
        assert bool(learns) == (given.get("TRAIN") == "lm_lora")
        assert all(found[n].requires_grad and found[n].dtype == torch.float32 for n in learns)
        mine = {n.replace(".base_layer", ""): p for n, p in found.items() if n not in learns}
        assert mine.keys() == wanted.keys() and not watch.lm.training
        for n, p in mine.items():
            assert not p.requires_grad and p.grad is None, n
            assert torch.equal(p, wanted[n].to(dtype)), n


def test_the_sae_is_float32_under_every_dtype(seen):
    for given in ({"DTYPE": "bfloat16"}, {"DTYPE": "bfloat16", "LOGITS": "float32"}):
        tensors = seen(**given).facets["weights"]
        assert {t.dtype for t in tensors.values()} == {torch.float32}
        spared = tensors["W_enc"].bfloat16().float() == tensors["W_enc"]
        assert spared.float().mean() < 0.1


class Products(TorchDispatchMode):
    """Notes how many rows of logits a product makes; 300 tokens are in the vocabulary."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function._schema.name in ("aten::mm", "aten::addmm") and out.shape[-1] == 300:
            self.rows.append(len(out))
        return out


@pytest.mark.parametrize("given", [{}, LM_LORA], ids=["sae", "lm_lora"])
def test_no_more_logits_than_head_chunk_exist_at_a_time(world, tmp_path, given):
    """But for the check of the head, on 16 tokens, and where its scale is found, on 8."""
    given = given | {"TOKENS": STEP, "VAL_TOKENS": 2 * tiny.CONTEXT}
    found = {}
    for chunk in (2048, 7):
        with Products() as products:
            watched(world, tmp_path / str(chunk), HEAD_CHUNK=chunk, **given)
        found[chunk] = Counter(products.rows)
    assert max(found[2048]) > 32
    assert set(found[7]) <= {*range(1, 9), 16} and found[7][16] <= 3 and found[7][7] > 8


def test_batches_of_the_lm_are_as_large_as_they_say(seen):
    """Of 3 steps of 4 sequences and 8 held out. Single sequences, and once all 8, are for looking
    at the LM itself."""
    itself = Counter({1: 20, 8: 1})
    assert seen().facets["passes"] == itself + Counter({5: 1, 3: 1, 8: 2})
    assert seen(CLEAN_BATCH=4).facets["passes"] == itself + Counter({5: 1, 3: 1, 4: 3})
    assert seen(EVAL_BATCH=3).facets["passes"] == itself + Counter({3: 2, 2: 1, 8: 2})
    residuals = seen(**MSE, MICRO_BATCH=1).facets["passes"]
    assert residuals == itself + Counter({5: 1, 3: 1, 8: 2})
    # spliced and at zero; so before, but for what is known of the check; and after
    check, evaluations = {5: 2}, {5: 2, 3: 3}
    wanted = Counter({1: 20, 5: 1, 3: 1, 8: 4, 4: 3}) + Counter(check) + Counter(evaluations)
    wanted += Counter({4: 1})  # the LM against itself with gradients, in a micro-batch
    assert seen().facets["products"] == wanted
    assert seen(MICRO_BATCH=2).facets["products"] == wanted - Counter({4: 4}) + Counter({2: 7})
    assert seen(LOW_MEMORY=True).facets["products"] == wanted + Counter({4: 3})


# ---- what a run begins with ------------------------------------------------------------------


@torch.no_grad()
def first_residuals(world, n, keep):
    """x_ND where the SAE stands in, of the first n training contexts."""
    tokens_BL = tiny.packed(world.root)[1][:n]
    _, x_BLD = naive.run_lm(tiny.lm_of(world.model), tokens_BL, tiny.LAYER)
    return x_BLD[~tiny.kept(keep, tokens_BL)]


@pytest.mark.parametrize("keep", ["none", "special", "first"])
@pytest.mark.parametrize("steps", [3, 17])
def test_a_fresh_sae_begins_at_the_mean_of_what_it_will_read(world, seen, keep, steps):
    """Of 64 contexts at most; its rows are tied and of norm 1, its encoder's bias is zero."""
    given = FRESH | STILL | {"KEEP": keep, "TOKENS": steps * STEP} | MSE
    t = seen(**given).facets["weights"]
    x_ND = first_residuals(world, min(64, 4 * steps), keep)
    assert torch.allclose(t["b_dec"], x_ND.mean(0), atol=1e-5)
    assert torch.allclose(t["W_enc"], t["W_dec"], atol=1e-6) and t["b_enc"].abs().max() < 1e-6
    assert torch.allclose(t["W_dec"].norm(dim=1), torch.ones(64), atol=1e-6)


@pytest.mark.parametrize("keep", ["none", "special"])
@pytest.mark.parametrize("architecture", ["jumprelu", "batchtopk", "matryoshka"])
def test_a_converted_topk_gets_the_threshold_of_its_own_l0(world, seen, architecture, keep):
    """Over which K pre-activations a token lie, on the tokens where it will stand in."""
    found = seen(**STILL, ARCHITECTURE=architecture, KEEP=keep)
    x_ND = first_residuals(world, 12, keep)
    sae = tiny.plain_sae(tiny.read_sae(world.saes["topk"]))
    with torch.no_grad():
        threshold = sae.pre(x_ND).flatten().sort(descending=True).values[tiny.K * len(x_ND)]
        held_out = tiny.packed(world.root)[0]
        _, x_SLD = naive.run_lm(tiny.lm_of(world.model), held_out, tiny.LAYER)
        pre_NF = sae.pre(x_SLD[~tiny.kept(keep, held_out)])
    l0 = (pre_NF > threshold).sum(1).float().mean().item()
    assert found.facets["before"]["l0"] == pytest.approx(l0, rel=1e-3)
    t = found.facets["weights"]
    moved = 1e-5 if architecture == "jumprelu" else 1e-2
    assert torch.allclose(t["threshold"], threshold, rtol=moved)
    if architecture == "jumprelu":
        assert torch.allclose(t["b_enc"], sae.b_enc - sae.W_enc @ sae.b_dec, atol=1e-4)


@pytest.mark.parametrize("given", [ADAPTER | {"FOLD": False}, LM_LORA], ids=["adapter", "lm_lora"])
def test_what_learns_begins_with_no_effect_and_by_the_seed(seen, given):
    given = given | STILL | {"DATASET": "one context"}
    one, two = (seen(**given | {"SEED": s}).facets for s in (0, 1))
    for facets in (one, two):
        assert same(facets["before"] | {"dead_fraction": 0}, facets["after"] | {"dead_fraction": 0})
    random = [n for n in one["weights"] if re.search(r"down\.weight|lora_A", n)]
    zero = [n for n in one["weights"] if re.search(r"up\.weight|lora_B", n)]
    assert random and zero
    assert all(tiny.apart(one["weights"][n], two["weights"][n]) > 0.5 for n in random)
    assert all(one["weights"][n].abs().max() < 1e-10 for n in zero)


def test_dropout_has_a_seed_of_its_own_in_every_micro_batch_of_every_seed(
    world, tmp_path, monkeypatch
):
    """The last seeds that torch is given are those of 3 steps of 2 micro-batches."""
    given, found, original = (
        SAE_LORA | {"MICRO_BATCH": 2, "LORA_DROPOUT": 0.5},
        {},
        torch.manual_seed,
    )
    for seed in (0, 1):
        seeds = found[seed] = []
        monkeypatch.setattr(torch, "manual_seed", lambda s, to=seeds: to.append(s) or original(s))
        watched(world, tmp_path / str(seed), SEED=seed, **given)
    assert len({*found[0][-6:], *found[1][-6:]}) == 12


def test_lora_is_where_the_constants_say_and_as_large(seen):
    """The tensors in lora/, and what adapter_config.json tells peft of them."""
    blocks = {"all": range(4), "after": (2, 3), "one": (2,)}
    for given in (
        {},
        {"LORA_BLOCKS": "after"},
        {"LORA_BLOCKS": "one"},
        {"RANK": 8},
        {"LORA_ALPHA": 8},
        {"LORA_DROPOUT": 0.5},
    ):
        folder = seen(**LM_LORA | given).folder / "lora"
        found = load_file(folder / "adapter_model.safetensors")
        where = blocks[given.get("LORA_BLOCKS", "all")]
        places = naive.lora_places("gemma2", blocks=where)
        wanted = {f"base_model.model.model.{p}.lora_{s}.weight" for p in places for s in "AB"}
        assert found.keys() == wanted
        rank = given.get("RANK", 4)
        assert all(t.shape["lora_B" in n] == rank for n, t in found.items())
        config = tiny.read(folder / "adapter_config.json")
        options = {"r": rank, "lora_alpha": given.get("LORA_ALPHA", rank)}
        options["lora_dropout"] = given.get("LORA_DROPOUT", 0.0)
        assert {n: config[n] for n in options} == options


def test_an_adapter_is_as_large_as_rank_and_folds_only_where_it_can(seen):
    sizes = {"down.weight": (4, 32), "up.weight": (32, 4)}
    mlp = sizes | {"down.bias": (4,), "up.bias": (32,)}
    for given, wanted in (({"FOLD": False}, sizes), ({"ADAPTER": "mlp"}, mlp), ({}, {})):
        shown = seen(**ADAPTER | given)
        path = shown.folder / "sae" / "adapter.safetensors"
        found = load_file(path) if path.exists() else {}
        assert {n: tuple(t.shape) for n, t in found.items()} == wanted
        given_sae, saved = tiny.given("topk"), shown.facets["weights"]
        assert torch.equal(saved["W_enc"], given_sae["W_enc"])
        assert torch.equal(saved["W_dec"], given_sae["W_dec"]) == bool(wanted)
    whole, apart = (seen(**ADAPTER | x).facets["weights"] for x in ({}, {"FOLD": False}))
    update = apart["sae/up.weight"] @ apart["sae/down.weight"]
    assert torch.allclose(whole["W_dec"], apart["W_dec"] + apart["W_dec"] @ update.T, atol=1e-6)


def test_the_configs_beside_the_sae_say_what_it_is_for(world, seen):
    changes = {}, {"KEEP": "none"}, {"KEEP": "first"}, {"CONTEXT": 8}, {"LAYER": 2}, FRESH_RELU
    for given in changes:
        folder = seen(**given).folder / "sae"
        cfg, config = (tiny.read(folder / f"{n}.json") for n in ("cfg", "config"))
        layer, context = given.get("LAYER", 1), given.get("CONTEXT", 16)
        wanted = {
            "model_name": "gem",
            "hook_name": f"blocks.{layer}.hook_resid_post",
            "hf_hook_name": f"model.layers.{layer}",
            "prepend_bos": True,
            "context_size": context,
            "dataset_path": "text.jsonl",
            "exclude_special_tokens": given.get("KEEP", "special") == "special",
        }
        assert wanted.items() <= cfg["metadata"].items()
        assert config["buffer"] == {"ctx_len": context, "d_submodule": 32, "io": "out"}
        told = config["klsplice"]
        written = tiny.read(folder.parent / "run.json")["constants"]
        places = {"SAE", "DATASET"}
        assert {n: v for n, v in told.items() if n.upper() not in places} == {
            n: written[n.upper()] for n in told if n.upper() not in places
        }
        assert len(told) == 9
    assert config["trainer"]["l1_penalty"] == 0.01
    assert tiny.read(seen(SAE="relu").folder / "sae/config.json")["trainer"]["l1_penalty"] == 0.05


# ---- on their way to a library ---------------------------------------------------------------


@pytest.fixture
def lm_of_the_hub(world, monkeypatch):
    """The world's LM as owner/gem -> commits, by revision; and what transformers is asked for."""
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
    return commits, asked


def test_the_revision_of_the_lm_reaches_transformers(world, tmp_path, monkeypatch, lm_of_the_hub):
    """As the commit that it stands for, for all three."""
    commits, asked = lm_of_the_hub
    calls = patch(monkeypatch, "figures", lambda *_: None)
    for revision in ("abc", ""):
        asked.clear()
        given = {"MODEL": "owner/gem", "MODEL_REVISION": revision, "RUN_NAME": f"r{revision}"}
        tiny.finished(world, tmp_path, **given)
        found = {cls: (name, at) for cls, name, at in asked}
        commit = commits[revision or "main"]
        assert len(found) == 3 and set(found.values()) == {("owner/gem", commit)}
        resolved = tiny.read(tmp_path / f"r{revision}" / "run.json")["resolved"]
        assert resolved["model"] == f"owner/gem@{commit}"
    assert len(calls) == 2


def test_an_lm_whose_branch_has_moved_is_measured_anew(world, tmp_path, monkeypatch, lm_of_the_hub):
    """What CACHE has of the old commit is not taken for the new one's."""
    commits, _ = lm_of_the_hub
    patch(monkeypatch, "figures", lambda *_: None)
    given = {"MODEL": "owner/gem", "CACHE": tmp_path / "cache"}
    found = []
    for name in ("old", "same", "new"):
        if name == "new":
            commits["main"] = "e2" * 20
        tiny.finished(world, tmp_path, RUN_NAME=name, **given)
        kept = os.listdir(tmp_path / "cache")
        found.append(Counter(file.split("-")[0] for file in kept if file != "lock"))
    assert found[0] == found[1] == {"tokens": 1, "zero": 1, "eval": 2}
    assert found[2] == {"tokens": 1, "zero": 2, "eval": 4}


def test_the_revision_of_the_sae_reaches_the_hub(world, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repo, *, revision, **options):
        asked.append((repo, revision))
        root = tmp_path / "snapshots" / "5eed"
        if not root.exists():
            root.mkdir(parents=True)
            (root / "folder").symlink_to(world.saes["topk"])
        return str(root)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    calls = patch(monkeypatch, "figures", lambda *_: None)
    for revision in ("abc", ""):
        given = {"SAE": "owner/repo/folder", "SAE_REVISION": revision, "RUN_NAME": f"r{revision}"}
        folder = tiny.finished(world, tmp_path / "runs", **given)
        assert asked.pop() == ("owner/repo", revision or "main") and not asked
        assert tiny.read(folder / "run.json")["resolved"]["sae_commit"] == "5eed"
    more = {"TRAIN": "lm_lora", "LOSS": "kl", "MORE_SAES": "3:owner/repo/folder"}
    tiny.finished(world, tmp_path / "runs", **more, SAE_REVISION="abc", RUN_NAME="more")
    assert asked == [("owner/repo", "abc")] and len(calls) == 3


def test_a_datasets_revision_files_and_split_reach_datasets(world, tmp_path, monkeypatch):
    import datasets

    asked, original, given = [], datasets.load_dataset_builder, {}

    def load_dataset_builder(name, **options):
        asked.append((name, options))
        return original("json", data_files={given["SPLIT"]: str(world.text)})

    monkeypatch.setattr("datasets.load_dataset_builder", load_dataset_builder)
    calls, fingerprints = patch(monkeypatch, "figures", lambda *_: None), set()
    start = {"DATASET_REVISION": "a" * 40, "DATA_FILES": "", "SPLIT": "train", "TEXT_KEY": "text"}
    changes = {"DATASET_REVISION": "b" * 40, "DATA_FILES": "x/*.json", "SPLIT": "validation"}
    changes["TEXT_KEY"] = "other"
    for i, (name, value) in enumerate([("TEXT_KEY", "text"), *changes.items()]):
        given.update(start | {name: value})
        settings = {"DATASET": "owner/text", "TOKENS": STEP, "CACHE": tmp_path / "cache"} | given
        folder = tiny.finished(world, tmp_path, **settings, RUN_NAME=f"r{i}")
        (found,) = asked
        files = given["DATA_FILES"] or None
        wanted = {"revision": given["DATASET_REVISION"], "data_files": files}
        assert found == ("owner/text", wanted)
        asked.clear()
        resolved = tiny.read(folder / "run.json")["resolved"]
        assert resolved["dataset_commit"] == given["DATASET_REVISION"]
        fingerprints.add(resolved["tokens"])
    assert len(fingerprints) == len(calls) == 5


def test_check_sae_refuses_an_sae_that_does_not_belong(world, tmp_path, monkeypatch):
    """One that does not reconstruct, and one of another layer or model; unless one means it."""
    said = tiny.StringIO()
    for given, why in (
        ({"SAE": world.others["wrong"]}, "does not reconstruct"),
        ({"LAYER": 2}, "LAYER = 2, the SAE is of layer 1"),
        ({"MODEL": world.others["other gem"]}, "the SAE is of gem"),
    ):
        with tiny.redirect_stdout(said), tiny.redirect_stderr(said):
            code = run.main(tiny.words(world, tmp_path, **{"CHECK_SAE": True} | BASE | given))
        assert code == 2 and why in said.getvalue()
    assert not (tmp_path / "x").exists()
    calls = patch(monkeypatch, "figures", lambda *_: None)
    assert tiny.main(world, tmp_path, SAE=world.others["wrong"], CHECK_SAE=False) == 0 and calls


def test_a_device_that_is_not_there_is_refused(world, tmp_path):
    assert tiny.main(world, tmp_path, DEVICE="cuda:97") == 2
    assert torch.cuda.is_available() or tiny.main(world, tmp_path, DEVICE="cuda") == 2
    assert not (tmp_path / "x").exists()


def test_a_run_without_a_name_gets_one(world, tmp_path, monkeypatch):
    calls = patch(monkeypatch, "figures", lambda *_: None)
    assert tiny.main(world, tmp_path, RUN_NAME="", TOKENS=STEP, SEED=3) == 0
    (found,) = (p.name for p in tmp_path.iterdir())
    told = {"CONTEXT": 16, "KEEP": "special", "TOKENS": STEP}  # words of the command, as others are
    assert re.fullmatch("gem_l1_topk_k6_64_kl-mse_[A-Z].*_s3", found) and calls
    assert all(f"_{name}{value}_" in found for name, value in told.items())
    assert not re.search("RUN|CACHE|MODEL[^_]|SEED|LAYER", found)


def test_runs_and_cache_say_where_things_are(seen, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = patch(monkeypatch, "figures", lambda *_: None)
    tiny.finished(world, tmp_path / "r", CACHE="c", **BASE)
    assert {p.name for p in tmp_path.iterdir()} == {"r", "c"} and calls
    kinds = Counter(p.name.split("-")[0] for p in (tmp_path / "c").iterdir())
    assert kinds == {"tokens": 1, "zero": 1, "eval": 2}
    assert [p.name for p in (tmp_path / "r").iterdir()] == ["x"]
    found, wanted = (tiny.read(f / "after.json") for f in (tmp_path / "r" / "x", seen().folder))
    assert same(found, wanted)


def test_wandb_is_asked_for_its_project_or_not_at_all(world, tmp_path, monkeypatch):
    import wandb

    asked = []

    def init(**options):
        asked.append(options)
        raise OSError("not here")

    monkeypatch.setattr(wandb, "init", init)
    calls = patch(monkeypatch, "figures", lambda *_: None)
    tiny.finished(world, tmp_path, TOKENS=STEP)
    assert not asked
    folder = tiny.finished(world, tmp_path, TOKENS=STEP, RUN_NAME="y", WANDB_PROJECT="mine")
    assert {options["project"] for options in asked} == {"mine"} and len(calls) == 2
    constants = tiny.read(folder / "run.json")["constants"]
    assert constants.items() <= asked[0]["config"].items()
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "login", lambda **options: True)  # there is a key
    for mode, wanted in (("online", None), ("offline", "offline")):
        asked.clear()
        named = {"RUN_NAME": mode, "WANDB_PROJECT": "mine", "WANDB_MODE": mode}
        tiny.finished(world, tmp_path, TOKENS=STEP, **named)
        assert asked[0]["mode"] == wanted
