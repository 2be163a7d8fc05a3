"""SAEBench on a run, through evals.saebench: its scores are ours on the same tokens.

Run by `make test-formats` in the environment of sae-bench, on a random Llama of three blocks.
"""

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]

import hub
import pytest
import torch
import transformers

import run
from evals import common, saebench, saebench_calls, stock

SMALL = {"DEVICE": "cpu", "DTYPE": "float32", "LAYER": 1, "CONTEXT": 32, "BATCH": 2}
SMALL |= {"MICRO_BATCH": 2, "EVAL_BATCH": 4, "TOKENS": 1280, "VAL_TOKENS": 640, "LR": 1e-2}
SMALL |= {"CHECK_SAE": False, "WANDB_PROJECT": "", "RANK": 4}
LORA = {"TRAIN": "lm_lora", "LOSS": "kl", "LR": 3e-2}


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    """A model, a text and an SAE."""
    root = tmp_path_factory.mktemp("box")
    hub.make_gemma(root / "tiny", seed=0)  # for its tokeniser
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 300}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(0, 0.2, generator=rng)
    model.save_pretrained(root / "tiny")
    hub.make_sae(root / "sae", d_in=32, d_sae=64, k=4, layer=1, lm_name="tiny", seed=0)
    texts = hub.make_pile(root / "pile", documents=120, seed=0)
    with open(root / "text.jsonl", "w") as f:
        f.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return root


def finished(box, name, **changes):
    """-> the folder of a run, made where it is not there yet."""
    c = SMALL | {"MODEL": box / "tiny", "SAE": box / "sae", "DATASET": box / "text.jsonl"}
    c |= {"RUNS": box / "runs", "CACHE": box / "cache", "RUN_NAME": name} | changes
    assert run.main([f"{n}={value}" for n, value in c.items()]) == 0
    return str(box / "runs" / name)


def numbers_of(folder, *words):
    assert saebench.main([folder, *words]) == 0
    with open(common.path(folder, "saebench")) as f:
        return json.load(f)["numbers"]


def test_core_score_is_our_ce_recovered_without_special_tokens(box):
    folder = finished(box, "none")
    numbers, ours = numbers_of(folder, "--eval", "core"), common.open_run(folder).results
    assert abs(ours["ce_zero_no_special"] - ours["ce_clean_no_special"]) > 0.1
    for when in ("before", "after"):
        core = {n.split("/")[-1]: v for n, v in numbers.items() if n.startswith(when)}
        assert abs(core["ce_loss_score"] - ours[f"ce_recovered_{when}_no_special"]) < 1e-3
        assert abs(core["ce_loss_with_sae"] - ours[f"ce_{when}_no_special"]) < 1e-4
        assert abs(core["kl_div_with_sae"] - ours[f"kl_{when}_no_special"]) < 1e-4
        assert abs(ours[f"ce_{when}"] - ours[f"ce_{when}_no_special"]) > 1e-3  # they do differ
    assert abs(numbers["before/core/ce_loss_score"] - numbers["after/core/ce_loss_score"]) > 1e-2


def test_core_keeps_special_tokens_where_the_run_did(box):
    folder = finished(box, "special", KEEP="special")
    numbers, ours = numbers_of(folder, "--eval", "core"), common.open_run(folder).results
    for when in ("before", "after"):
        theirs = numbers[f"{when}/core/ce_loss_with_sae"]
        assert abs(theirs - ours[f"ce_{when}_no_special"]) < 1e-4


def test_core_runs_the_lm_with_its_lora_merged(box):
    folder = finished(box, "lora", **LORA)
    numbers, ours = numbers_of(folder, "--eval", "core"), common.open_run(folder).results
    for label, when in (("LM + SAE", "before"), ("LoRA + SAE", "after")):
        theirs = numbers[f"{label}/core/ce_loss_with_sae"]
        assert abs(theirs - ours[f"ce_{when}_no_special"]) < 1e-3
    clean = {x: numbers[f"{x} + SAE/core/ce_loss_without_sae"] for x in ("LM", "LoRA")}
    assert abs(clean["LM"] - ours["ce_clean_no_special"]) < 1e-3 < abs(clean["LoRA"] - clean["LM"])


def test_keep_first_gets_a_bos_whose_residual_is_kept(box):
    folder = finished(box, "first", KEEP="first")
    opened = stock.open_lm(common.open_run(folder))
    tokenizer = opened.tokenizer
    text = saebench_calls.held_out(common.open_run(folder), opened.config, tokenizer)
    assert {row["tokens"][0] for row in text} == {tokenizer.bos_token_id}
    ours = common.open_run(folder).results  # its contexts begin with BOS anyway
    numbers = numbers_of(folder, "--eval", "core")
    assert numbers["after/core/ce_loss_without_sae"] == pytest.approx(
        ours["ce_clean_no_special"], abs=1e-3
    )


def test_sparse_probing_scores_lm_and_sae(box):
    folder = finished(box, "none")
    data_set = ["--datasets", "119_us_state_TX"]
    numbers = numbers_of(folder, "--eval", "sparse_probing", *data_set)
    for when in ("before", "after"):
        for metric in ("llm_test_accuracy", "sae_top_1_test_accuracy", "sae_top_5_test_accuracy"):
            assert 0.4 < numbers[f"{when}/sparse_probing/{metric}"] <= 1


def test_an_error_that_saebench_swallows_ends_in_a_line(box, monkeypatch, capsys):
    import sae_bench.evals.core.main as core

    def broken(**_):
        raise ValueError("the probe fell over")

    monkeypatch.setattr(core, "run_evals", broken)
    assert saebench.main([finished(box, "none"), "--eval", "core"]) == 1
    said = capsys.readouterr().err.split("error: ")[-1]
    assert "left no complete result" in said and "the probe fell over" in said


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--eval", "ravel"], "transformers 5"),
        (["--eval", "mdl"], "loguru"),
        (["--eval", "cores"], "no such evaluation"),
        (["--eval", "sparse_probing", "--datasets", "nothing"], "nothing"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(box, capsys, words, reason):
    assert saebench.main([finished(box, "none"), *words]) == 2
    assert reason in capsys.readouterr().err.split("error: ")[-1]


def test_a_missing_gpu_is_a_line(box, capsys):
    assert saebench.main([finished(box, "none"), "--device", "cuda:7"]) == 2
    assert "DEVICE = 'cuda:7' is not there" in capsys.readouterr().err


def test_an_adapter_that_no_sae_holds_is_refused(box, capsys):
    folder = finished(box, "mlp", TRAIN="adapter", ADAPTER="mlp", SAE=box / "sae")
    assert saebench.main([folder, "--eval", "core"]) == 2
    assert "adapter" in capsys.readouterr().err
    assert not os.path.exists(os.path.join(folder, "evals"))
