"""lm-eval sees the LM that it should: its log-likelihoods are those of plain forward passes."""

import json
import os

import naive
import pytest
import torch
import transformers
from evals_world import LAYER, World

from evals import benchmarks, common
from evals.open import load_sae, variants

pytest.importorskip("lm_eval")

EVERYDAY = os.path.join(benchmarks.HERE, "everyday.jsonl")


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    return World(tmp_path_factory.mktemp("benchmarks"))


def questions(n):
    with open(EVERYDAY) as f:
        return [json.loads(line) for line in f][:n]


@torch.no_grad()
def plainly(box, run, with_lora, when, n):
    """-> log-likelihoods (question, choice) of one forward pass each, eager and without batches."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(box.root / "tiny")
    lm = box.lm
    if with_lora:
        from peft import PeftModel

        lm = transformers.AutoModelForCausalLM.from_pretrained(box.root / "tiny")
        lm = PeftModel.from_pretrained(lm, os.path.join(run.folder, "lora")).merge_and_unload()
    sae = when and load_sae(run, when)
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    found = []
    for q in questions(n):
        context = tokenizer(q["text"])["input_ids"]
        for choice in q["choices"]:
            ids = tokenizer(q["text"] + " " + choice)["input_ids"]

            def edit(x_BLD, ids=ids[:-1]):
                norms = x_BLD[0].norm(dim=-1)
                kept = {
                    "none": [False] * len(ids),
                    "first": [p == 0 for p in range(len(ids))],
                    "special": [t in special for t in ids],
                    "outliers": (norms > 10 * norms.median()).tolist(),
                }[run.cfg.KEEP]
                rows = [x_D if k else sae(x_D[None])[0][0] for x_D, k in zip(x_BLD[0], kept)]
                return torch.stack(rows)[None]

            logits_BLV, _ = naive.run_lm(lm, torch.tensor([ids[:-1]]), LAYER, sae and edit)
            log_p = logits_BLV[0].log_softmax(-1)[len(context) - 1 :]
            found.append(sum(log_p[i, t].item() for i, t in enumerate(ids[len(context) :])))
    return torch.tensor(found).view(n, 4)


@pytest.mark.parametrize("name", ["kept", "special", "outliers", "lora", "mlp"])
def test_log_likelihoods_are_those_of_plain_passes(box, name):
    run = common.open_run(box.run(name))
    found, wanted = benchmarks.scored(run, ["everyday"], limit=6, batch=8), []
    for label, (with_lora, when) in variants(run).items():
        wanted.append(plainly(box, run, with_lora, when, 6))
        samples = found[label]["everyday"]["samples"]["everyday"]
        theirs = [[r[0] for r in s["filtered_resps"]] for s in samples]
        assert torch.allclose(torch.tensor(theirs), wanted[-1], atol=1e-3), label
    for i, a in enumerate(wanted):
        assert all((a - b).abs().max() > 1e-2 for b in wanted[:i])  # the variants do differ


def test_task_that_cannot_be_had_writes_nothing(box, capsys):
    assert benchmarks.main([box.run("special"), "--tasks", "hellaswag"]) == 2
    assert "hellaswag" in capsys.readouterr().err
    assert not (box.root / "runs/special/evals").exists()
