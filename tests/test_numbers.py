"""Every number of an evaluation, and of results.json, equals a plain one: whole passes of the LM as
transformers runs it, in float64, the SAE from its files, means over the tokens one by one."""

import copy
import functools
import shutil

import naive
import numpy as np
import pytest
import seams
import tiny
import torch
from safetensors.torch import load_file
from seams import OF_THE_RUN

KINDS = ("ce_clean", "ce_spliced", "ce_zero", "kl", "ce_recovered")
OF_THE_SAE = ("fvu", "mse", "l0", "dead_fraction", "mean_square_norm", "smallest_active")
NAMES = {*KINDS, *(f"{n}_no_special" for n in KINDS), *OF_THE_SAE}
LM_LORA = {"TRAIN": "lm_lora", "LOSS": "kl", "RANK": 4}
CASES = {  # name: changes
    "none, topk": {"KEEP": "none"},
    "special, topk": {},
    "first, topk": {"KEEP": "first"},
    "special, relu": {"SAE": "relu"},
    "first, jumprelu": {"SAE": "jumprelu", "KEEP": "first"},
    "special, batchtopk": {"SAE": "batchtopk"},
    "none, matryoshka": {"SAE": "matryoshka", "KEEP": "none"},
    "special, folded adapter": {"TRAIN": "adapter", "RANK": 4},
    "special, merged lora": {"TRAIN": "sae_lora", "RANK": 4},
    "special, lora on the lm": LM_LORA,
    "first, lora after": LM_LORA | {"KEEP": "first", "LORA_BLOCKS": "after"},
}
# In training a ReLU SAE works on x / scale, and a file has both with rows of norm 1.
OTHER_UNITS = {"relu", "jumprelu"}
no_figures = seams.no_figures
pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run_of(world, tmp_path_factory):
    """-> name of a case -> the folder of its run; held-out batches of 3, 3 and 2 contexts."""

    @functools.cache
    def folder(name):
        changes = CASES[name] | {"SAE": world.saes[CASES[name].get("SAE", "topk")]}
        runs = tmp_path_factory.mktemp("runs")
        return tiny.finished(world, runs, EVAL_BATCH=3, EVAL_EVERY=100, **changes)

    return folder


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
    zero_SLV, _ = naive.run_lm(lm, tokens_SL, tiny.LAYER, lambda x_SLD: x_SLD * kept_SL1)

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


def off(found, wanted) -> dict:
    """The numbers that are not those of the plain form."""
    return {n: v for n, v in found.items() if v != pytest.approx(wanted[n], rel=2e-5, abs=2e-6)}


@pytest.mark.parametrize("name", CASES)
def test_every_number_of_an_evaluation_equals_a_plain_one(world, run_of, name):
    folder, changes = run_of(name), CASES[name]
    architecture, keep = changes.get("SAE", "topk"), changes.get("KEEP", "special")
    tokens_SL, _ = tiny.packed(world.root)
    lm = tiny.lm_of(world.model, torch.float64)
    spliced = {"before": lm, "after": with_lora(world, folder)}
    saes = {"before": world.saes[architecture], "after": folder / "sae"}
    for when in ("before", "after"):
        found = tiny.read(folder / f"{when}.json")
        wanted, per_token = plainly(lm, spliced[when], sae_of(saes[when]), tokens_SL, keep)
        assert found.keys() == wanted.keys() == NAMES
        if when == "after" and architecture in OTHER_UNITS:
            found.pop("smallest_active")
        assert off(found, wanted) == {}, wanted
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


def gap(clean, before, after):
    return (before - after) / (before - clean)


@pytest.mark.parametrize("name", ["special, topk", "first, lora after"])
def test_results_and_lines_are_those_of_the_evaluations(run_of, name):
    folder = run_of(name)
    both = before, after = [tiny.read(folder / f"{when}.json") for when in ("before", "after")]
    results = tiny.read(folder / "results.json")
    wanted = {"gap_closed": gap(after["ce_clean"], before["ce_spliced"], after["ce_spliced"])}
    wanted["kl_removed"] = (before["kl"] - after["kl"]) / before["kl"]
    for ending in ("", "_no_special"):
        wanted |= {f"{n}{ending}": after[f"{n}{ending}"] for n in ("ce_clean", "ce_zero")}
        for when, found in zip(("before", "after"), both):
            for ours, theirs in (("ce", "ce_spliced"), ("ce_recovered",) * 2, ("kl", "kl")):
                wanted[f"{ours}_{when}{ending}"] = found[f"{theirs}{ending}"]
    for when, found in zip(("before", "after"), both):
        wanted |= {f"{n}_{when}": found[n] for n in ("fvu", "mse", "l0", "dead_fraction")}
    assert results.keys() == wanted.keys() | OF_THE_RUN
    assert {n: results[n] for n in wanted} == pytest.approx(wanted, rel=1e-12)
    for n in ("ce_spliced", "ce_recovered", "kl", "ce_spliced_no_special", "kl_no_special"):
        assert before[n] != pytest.approx(after[n], rel=1e-4), n
    about = tiny.read(folder / "run.json")
    assert (results["device"], results["commit"]) == (about["device"], about["commit"])
    assert results["tokens"] == 3 * tiny.BATCH * tiny.CONTEXT
    assert results["tokens_per_second"] == pytest.approx(results["tokens"] / results["seconds"])

    lines = tiny.lines(folder, "val")
    assert [line["step"] for line in lines] == [0, 2, 3]  # 100 tokens are full after 128
    for line in lines:
        assert line.keys() == NAMES | {"step", "gap_closed"}
        closed = gap(before["ce_clean"], before["ce_spliced"], line["ce_spliced"])
        assert line["gap_closed"] == pytest.approx(closed, abs=1e-12)
        for n in ("ce_clean", "ce_zero", "ce_clean_no_special", "ce_zero_no_special"):
            assert line[n] == pytest.approx(before[n], rel=1e-9)
    first, between, last = ({n: line[n] for n in NAMES} for line in lines)
    assert [first, last] == both and before["kl"] != between["kl"] != after["kl"]


def test_a_topk_files_threshold_is_its_mean_smallest_activation(run_of):
    folder = run_of("special, topk")
    found = torch.load(folder / "sae" / "ae.pt", weights_only=True)["threshold"]
    wanted = tiny.read(folder / "after.json")["smallest_active"]
    assert found.item() == pytest.approx(wanted)


def test_saes_that_differ_in_their_threshold_are_evaluated_apart(world, run_of, tmp_path):
    run_of("special, batchtopk")
    t = tiny.given("batchtopk") | {"threshold": torch.tensor(4.0)}
    tiny.write_sae(tmp_path / "sae", "batchtopk", t)
    folder = tiny.finished(world, tmp_path, SAE=tmp_path / "sae", EVAL_BATCH=3)
    tokens_SL, _ = tiny.packed(world.root)
    lm = tiny.lm_of(world.model, torch.float64)
    wanted, _ = plainly(lm, lm, sae_of(tmp_path / "sae"), tokens_SL, "special")
    assert off(tiny.read(folder / "before.json"), wanted) == {}, wanted


def test_a_run_that_lost_its_end_makes_the_same_again(world, run_of, tmp_path):
    """The zero-ablated pass, too: of the LM as it is, although a LoRA has learnt by then."""
    whole, changes = run_of("first, lora after"), CASES["first, lora after"]
    folder = tmp_path / "x"
    shutil.copytree(whole, folder)
    for name in ("after.json", "after.npz", "results.json"):
        (folder / name).unlink()
    settings = {"EVAL_BATCH": 3, "EVAL_EVERY": 100, "CACHE": tmp_path / "c"} | changes
    assert tiny.finished(world, tmp_path, **settings) == folder
    wanted = tiny.read(whole / "after.json")
    assert tiny.read(folder / "after.json") == pytest.approx(wanted, rel=1e-5)
