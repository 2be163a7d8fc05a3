"""SAEBench on a run, through evals.saebench: its scores are ours on the same tokens.

Run by `make test-formats` in the environment of sae-bench, on a random Llama of three blocks.
"""

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]

import pytest
from evals_world import World

from evals import common, saebench
from evals.open import open_lm


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    return World(tmp_path_factory.mktemp("saebench"))


def numbers_of(folder, *words):
    """-> SAEBench's numbers, and the run's own."""
    assert saebench.main([folder, *words]) == 0
    with open(os.path.join(folder, "evals", "saebench.json")) as f:
        return json.load(f)["numbers"], common.open_run(folder).results


@pytest.mark.parametrize("name", ["sae", "special"])
def test_core_scores_are_ours_without_special_tokens(box, name):
    numbers, ours = numbers_of(box.run(name), "--eval", "core")
    assert abs(ours["ce_zero_no_special"] - ours["ce_clean_no_special"]) > 0.1
    for when in ("before", "after"):
        core = {n.split("/")[-1]: v for n, v in numbers.items() if n.startswith(when)}
        assert abs(core["ce_loss_with_sae"] - ours[f"ce_{when}_no_special"]) < 1e-4
        if name == "sae":  # what is kept it zeroes in its ablation
            assert abs(core["ce_loss_score"] - ours[f"ce_recovered_{when}_no_special"]) < 1e-3
            assert abs(core["kl_div_with_sae"] - ours[f"kl_{when}_no_special"]) < 1e-4
    assert abs(ours["ce_after"] - ours["ce_after_no_special"]) > 1e-3
    assert abs(numbers["before/core/ce_loss_score"] - numbers["after/core/ce_loss_score"]) > 1e-2


def test_core_runs_the_lm_with_its_lora_merged(box):
    numbers, ours = numbers_of(box.run("lora"), "--eval", "core")
    for label, when in (("LM + SAE", "before"), ("LoRA + SAE", "after")):
        theirs = numbers[f"{label}/core/ce_loss_with_sae"]
        assert abs(theirs - ours[f"ce_{when}_no_special"]) < 1e-3
    clean = {x: numbers[f"{x} + SAE/core/ce_loss_without_sae"] for x in ("LM", "LoRA")}
    assert abs(clean["LM"] - ours["ce_clean_no_special"]) < 1e-3 < abs(clean["LoRA"] - clean["LM"])


def test_keep_first_gets_a_bos_and_probes_score_lm_and_sae(box):
    run = common.open_run(box.run("kept"))
    opened = open_lm(run)
    contexts = saebench.held_out(run, opened)
    assert {row["tokens"][0] for row in contexts} == {opened.tokenizer.bos_token_id}
    numbers, ours = numbers_of(run.folder)
    clean = numbers["after/core/ce_loss_without_sae"]
    assert clean == pytest.approx(ours["ce_clean_no_special"], abs=1e-3)
    for when in ("before", "after"):
        for metric in ("llm_test_accuracy", "sae_top_1_test_accuracy", "sae_top_5_test_accuracy"):
            assert 0.4 < numbers[f"{when}/sparse_probing/{metric}"] <= 1


def test_what_no_class_of_saelens_holds_is_refused(box):
    assert saebench.main([box.run("mlp"), "--eval", "core"]) == 2
    assert saebench.main([box.run("sae"), "--device", "cuda:7"]) == 2
    assert not (box.root / "runs/mlp/evals").exists()
