"""Every number of an evaluation, and of results.json, equals a plain one: whole passes of the LM as
transformers runs it, in float64, the SAE from its files, means over the tokens one by one."""

import copy
import functools
import shutil

import naive
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from seams import OF_THE_RUN, patch

KINDS = ("ce_clean", "ce_spliced", "ce_zero", "kl", "ce_recovered")
OF_THE_SAE = ("fvu", "mse", "l0", "dead_fraction", "mean_square_norm", "smallest_active")
NAMES = {*KINDS, *(f"{n}_no_special" for n in KINDS), *OF_THE_SAE}
CASES = {  # name: changes
    "none, topk": {"KEEP": "none"},
    "special, topk": {"KEEP": "special"},
    "first, topk": {"KEEP": "first"},
    "special, relu": {"SAE": "relu"},
    "first, jumprelu": {"SAE": "jumprelu", "KEEP": "first"},
    "special, batchtopk": {"SAE": "batchtopk"},
    "none, matryoshka": {"SAE": "matryoshka", "KEEP": "none"},
    "special, folded adapter": {"TRAIN": "adapter", "RANK": 4},
    "special, merged lora": {"TRAIN": "sae_lora", "RANK": 4},
    "special, lora on the lm": {"TRAIN": "lm_lora", "LOSS": "kl", "RANK": 4},
    "first, lora after": {
        "TRAIN": "lm_lora",
        "LOSS": "kl",
        "RANK": 4,
        "KEEP": "first",
        "LORA_BLOCKS": "after",
    },
}
# In training a ReLU SAE works on x / scale, and a file has both with rows of norm 1.
OTHER_UNITS = {"relu", "jumprelu"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run_of(world, tmp_path_factory):
    """-> name of a case -> the folder of its run; held-out batches of 3, 3 and 2 contexts."""
    with pytest.MonkeyPatch.context() as m:
        calls = patch(m, "figures", lambda *_: None)

        @functools.cache
        def folder(name):
            changes = dict(CASES[name])
            changes["SAE"] = world.saes[changes.get("SAE", "topk")]
            runs = tmp_path_factory.mktemp("runs")
            found = tiny.finished(world, runs, EVAL_BATCH=3, EVAL_EVERY=100, **changes)
            assert calls
            return found

        yield folder


def with_lora(world, folder):
    """The LM in float64 with the run's LoRA added to its weights; alpha = rank."""
    lm = copy.deepcopy(tiny.lm_of(world.model, torch.float64))
    if not (folder / "lora").is_dir():
        return lm
    found = load_file(folder / "lora" / "adapter_model.safetensors")
    assert len(found) > 8 and any(t.any() for n, t in found.items() if "lora_B" in n)
    for name in found:
        if "lora_A" in name:
            update = found[name.replace("lora_A", "lora_B")].double() @ found[name].double()
            place = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            lm.get_submodule(place).weight.data += update
    return lm


@torch.no_grad()
def plainly(lm, lm_spliced, sae, tokens_SL, keep):
    """-> (numbers, per-token arrays), all contexts in one pass."""
    kept_SL = tiny.kept(keep, tokens_SL)
    kept_SL1 = kept_SL[..., None]

    def splice(x_SLD):
        y_ND, _ = sae(x_SLD.flatten(0, 1))
        return torch.where(kept_SL1, x_SLD, y_ND.view_as(x_SLD))

    clean_SLV, _ = naive.run_lm(lm, tokens_SL, tiny.LAYER)
    spliced_SLV, x_SLD = naive.run_lm(lm_spliced, tokens_SL, tiny.LAYER, splice)
    zero = lambda x_SLD: x_SLD * kept_SL1  # noqa: E731
    zero_SLV, _ = naive.run_lm(lm, tokens_SL, tiny.LAYER, zero)

    def ce(logits_SLV):
        logp_SLV = logits_SLV[:, :-1].log_softmax(-1)
        return -logp_SLV.gather(-1, tokens_SL[:, 1:, None])[..., 0]

    per_token = {"ce_clean": ce(clean_SLV), "ce_spliced": ce(spliced_SLV), "ce_zero": ce(zero_SLV)}
    per_token["kl"] = naive.kl_per_token(clean_SLV, spliced_SLV)
    out = {}
    ordinary_SL = ~torch.isin(tokens_SL, torch.tensor(tiny.SPECIAL))
    for ending, counted_SL in (("", torch.ones_like(ordinary_SL)), ("_no_special", ordinary_SL)):
        for name, values in per_token.items():
            out[name + ending] = values[counted_SL[:, : values.shape[1]]].mean().item()
        zero, spliced, clean = (out[f"ce_{n}{ending}"] for n in ("zero", "spliced", "clean"))
        out[f"ce_recovered{ending}"] = (zero - spliced) / (zero - clean)
    x_ND = x_SLD[~kept_SL]
    y_ND, z_NF = sae(x_ND)
    smallest = [z_F[z_F > 0].min().item() if (z_F > 0).any() else 0.0 for z_F in z_NF]
    square = (y_ND - x_ND).square()
    out |= {
        "fvu": (square.sum() / (x_ND - x_ND.mean(0)).square().sum()).item(),
        "mse": square.mean().item(),
        "l0": (z_NF > 0).sum(1).double().mean().item(),
        "dead_fraction": (~(z_NF > 0).any(0)).double().mean().item(),
        "mean_square_norm": x_ND.square().sum(1).mean().item(),
        "smallest_active": sum(smallest) / len(smallest),
    }
    return out, per_token


def sae_of(folder):
    return tiny.plain_sae(tiny.read_sae(folder)).double().eval()


def same(found, wanted):
    return found == pytest.approx(wanted, rel=2e-5, abs=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_every_number_of_an_evaluation_equals_a_plain_one(world, run_of, name):
    folder, changes = run_of(name), CASES[name]
    architecture, keep = changes.get("SAE", "topk"), changes.get("KEEP", "special")
    tokens_SL, _ = tiny.packed(world.root)
    middle = torch.isin(tokens_SL[:, 1:-1], torch.tensor(tiny.SPECIAL)).sum(1)
    assert len(tokens_SL) == 8 and len(middle.unique()) > 2  # EOS, unequal in number
    lm = tiny.lm_of(world.model, torch.float64)
    spliced = {"before": lm, "after": with_lora(world, folder)}
    saes = {"before": world.saes[architecture], "after": folder / "sae"}
    for when in ("before", "after"):
        found = tiny.read(folder / f"{when}.json")
        wanted, per_token = plainly(lm, spliced[when], sae_of(saes[when]), tokens_SL, keep)
        assert found.keys() == wanted.keys() == NAMES
        if when == "after" and architecture in OTHER_UNITS:
            found.pop("smallest_active"), wanted.pop("smallest_active")
        assert {n: v for n, v in found.items() if not same(v, wanted[n])} == {}, wanted
        kept = tiny.arrays(folder / f"{when}.npz")
        assert kept.keys() == {"ce_clean", "ce", "kl", "tokens", "fires", "mean"}
        assert np.array_equal(kept["tokens"], tokens_SL.numpy())
        assert np.isclose(kept["fires"].sum(), found["l0"], rtol=1e-5)
        assert (kept["fires"] == 0).mean() == found["dead_fraction"]
        for mine, theirs in (("ce_clean", "ce_clean"), ("ce", "ce_spliced"), ("kl", "kl")):
            wanted_SL = per_token[theirs].numpy()
            found_SL = kept[mine][:, : wanted_SL.shape[1]]
            assert kept[mine].shape == tokens_SL.shape and kept[mine].dtype == np.float32
            assert np.allclose(found_SL, wanted_SL, rtol=5e-5, atol=2e-5), mine


def test_the_cases_tell_the_numbers_apart(run_of):
    """A number swapped with another, or one mask with another, would show."""
    found = [tiny.read(run_of("special, topk") / f"{w}.json") for w in ("before", "after")]
    numbers = [v for f in found for n, v in f.items() if "clean" not in n and "zero" not in n]
    numbers = sorted(v for v in numbers if v != tiny.K)
    numbers = [v for v in numbers if v not in (found[0]["mean_square_norm"],)]
    assert all(b / a > 1 + 1e-4 for a, b in zip(numbers, numbers[1:]) if a > 0), numbers
    assert 0 < found[0]["dead_fraction"] < 1


def gap(clean, before, after):
    return (before - after) / (before - clean)


@pytest.mark.parametrize("name", ["special, topk", "special, relu", "first, lora after"])
def test_results_are_those_of_the_two_evaluations(run_of, name):
    folder = run_of(name)
    before, after = (tiny.read(folder / f"{when}.json") for when in ("before", "after"))
    results = tiny.read(folder / "results.json")
    wanted = {"gap_closed": gap(after["ce_clean"], before["ce_spliced"], after["ce_spliced"])}
    for ending in ("", "_no_special"):
        wanted[f"ce_clean{ending}"] = after[f"ce_clean{ending}"]
        wanted[f"ce_zero{ending}"] = after[f"ce_zero{ending}"]
        for when, found in (("before", before), ("after", after)):
            for ours, theirs in (("ce", "ce_spliced"), ("ce_recovered",) * 2, ("kl", "kl")):
                wanted[f"{ours}_{when}{ending}"] = found[f"{theirs}{ending}"]
    for when, found in (("before", before), ("after", after)):
        wanted |= {f"{n}_{when}": found[n] for n in ("fvu", "mse", "l0", "dead_fraction")}
    assert results.keys() == wanted.keys() | OF_THE_RUN
    assert {n: results[n] for n in wanted} == pytest.approx(wanted, rel=1e-12)
    moved = ("fvu", "mse", "l0") if "lora" not in name else ()
    moved = [n for n in moved if n != "l0" or "topk" not in name]
    moved += ["ce", "ce_recovered", "kl", "ce_no_special", "kl_no_special"]
    for n in moved:
        head, _, tail = n.partition("_no")
        ends = [f"{head}_{when}" + (f"_no{tail}" if tail else "") for when in ("before", "after")]
        assert results[ends[0]] != pytest.approx(results[ends[1]], rel=1e-4), n
    about = tiny.read(folder / "run.json")
    assert (results["device"], results["commit"]) == (about["device"], about["commit"])
    assert results["tokens"] == 3 * tiny.BATCH * tiny.CONTEXT
    assert results["tokens_per_second"] == pytest.approx(results["tokens"] / results["seconds"])


@pytest.mark.parametrize("name", ["special, topk", "special, relu"])
def test_the_lines_of_evaluations_are_those_numbers_and_the_gap_closed_so_far(run_of, name):
    folder = run_of(name)
    before, after = (tiny.read(folder / f"{when}.json") for when in ("before", "after"))
    lines = tiny.lines(folder, "val")
    assert [line["step"] for line in lines] == [0, 2, 3]  # 100 tokens are full after 128
    for line in lines:
        assert line.keys() == NAMES | {"step", "gap_closed"}
        closed = gap(before["ce_clean"], before["ce_spliced"], line["ce_spliced"])
        assert line["gap_closed"] == pytest.approx(closed, abs=1e-12)
        for n in ("ce_clean", "ce_zero", "ce_clean_no_special", "ce_zero_no_special"):
            assert line[n] == pytest.approx(before[n], rel=1e-9)
    first, between, last = ({n: line[n] for n in NAMES} for line in lines)
    assert (first, last) == (before, after)
    assert before["kl"] != between["kl"] != after["kl"]


def test_the_threshold_of_a_topk_file_is_the_mean_of_the_smallest_activations(run_of):
    for name in ("none, topk", "special, topk"):
        folder = run_of(name)
        found = torch.load(folder / "sae" / "ae.pt", weights_only=True)["threshold"]
        assert found.item() == pytest.approx(tiny.read(folder / "after.json")["smallest_active"])


def test_a_second_run_finds_the_same_evaluation_in_the_cache(world, run_of, tmp_path):
    """Its numbers and its per-token arrays. Another EVAL_BATCH may round otherwise: its own."""
    first = run_of("special, topk")
    with pytest.MonkeyPatch.context() as m:
        patch(m, "figures", lambda *_: None)
        second = tiny.finished(world, tmp_path, EVAL_BATCH=3)
        other = tiny.finished(world, tmp_path, EVAL_BATCH=5, RUN_NAME="y")
        alone = tiny.finished(world, tmp_path, EVAL_BATCH=5, CACHE=tmp_path / "c", RUN_NAME="z")
    wanted, kept = tiny.read(first / "before.json"), tiny.arrays(first / "before.npz")
    assert tiny.read(other / "before.json") == tiny.read(alone / "before.json")
    assert tiny.read(second / "before.json") == wanted
    for folder in (second, other):
        assert tiny.read(folder / "before.json") == pytest.approx(wanted, rel=1e-5)
        found = tiny.arrays(folder / "before.npz")
        assert found.keys() == kept.keys()
        assert all(np.allclose(found[n], kept[n], rtol=1e-4, atol=1e-5) for n in kept)


CHANGED_KEYS = {  # what the evaluation of one and the same SAE depends on: changes
    "LAYER": {"LAYER": 2},
    "KEEP": {"KEEP": "none"},
    "DTYPE": {"DTYPE": "bfloat16"},
    "VAL_TOKENS": {"VAL_TOKENS": 6 * tiny.CONTEXT},
    "TEXT_KEY": {"TEXT_KEY": "other"},
    "ARCHITECTURE": {"ARCHITECTURE": "jumprelu"},
}


@pytest.mark.parametrize("name", CHANGED_KEYS)
def test_an_evaluation_of_something_else_is_not_taken_from_the_cache(
    world, run_of, tmp_path, monkeypatch, name
):
    """The same numbers with a cache that is full and with an empty one."""
    run_of("special, topk")
    patch(monkeypatch, "figures", lambda *_: None)
    few = {"TOKENS": tiny.BATCH * tiny.CONTEXT, "EVAL_BATCH": 3}
    full = tiny.finished(world, tmp_path, **few, **CHANGED_KEYS[name])
    empty = {"CACHE": tmp_path / "c", "RUN_NAME": "y"}
    empty = tiny.finished(world, tmp_path, **few, **empty, **CHANGED_KEYS[name])
    for when in ("before", "after"):
        wanted = tiny.read(empty / f"{when}.json")
        assert tiny.read(full / f"{when}.json") == pytest.approx(wanted, rel=1e-6)
        found, kept = (tiny.arrays(f / f"{when}.npz") for f in (full, empty))
        assert all(found[n].shape == kept[n].shape for n in kept)
        assert all(np.allclose(found[n], kept[n], rtol=1e-5) for n in kept)


@pytest.mark.parametrize(
    "architecture, name, value", [("batchtopk", "threshold", 4.0), ("topk", "k", 5)]
)
def test_two_saes_that_differ_in_one_number_are_evaluated_apart(
    world, run_of, tmp_path, monkeypatch, architecture, name, value
):
    run_of(f"special, {architecture}")
    t = tiny.given(architecture) | ({name: torch.tensor(value)} if name == "threshold" else {})
    if name == "k":
        monkeypatch.setattr(tiny, "K", value)
    tiny.write_sae(tmp_path / "sae", architecture, t)
    patch(monkeypatch, "figures", lambda *_: None)
    folder = tiny.finished(world, tmp_path, SAE=tmp_path / "sae", EVAL_BATCH=3)
    tokens_SL, _ = tiny.packed(world.root)
    lm = tiny.lm_of(world.model, torch.float64)
    wanted, _ = plainly(lm, lm, sae_of(tmp_path / "sae"), tokens_SL, "special")
    found = tiny.read(folder / "before.json")
    assert {n: v for n, v in found.items() if not same(v, wanted[n])} == {}, wanted


def test_a_run_that_lost_its_cache_and_its_end_makes_the_same_end_again(
    world, run_of, tmp_path, monkeypatch
):
    """The zero-ablated pass, too: of the LM as it is, although a LoRA has learnt by then."""
    whole, changes = run_of("first, lora after"), CASES["first, lora after"]
    folder = tmp_path / "x"
    shutil.copytree(whole, folder)
    for name in ("after.json", "after.npz", "results.json"):
        (folder / name).unlink()
    settings = {"EVAL_BATCH": 3, "EVAL_EVERY": 100, "CACHE": tmp_path / "c"} | changes
    patch(monkeypatch, "figures", lambda *_: None)
    assert tiny.finished(world, tmp_path, **settings) == folder
    wanted = tiny.read(whole / "after.json")
    assert tiny.read(folder / "after.json") == pytest.approx(wanted, rel=1e-5)
    lines = [tiny.lines(f, "train") for f in (whole, folder)]
    for line in sum(lines, []):
        line.pop("tokens_per_second")
    assert lines[0] == lines[1]
