"""lm-eval sees the LM that it should: its log-likelihoods are those of plain forward passes.

On a random Llama; where SmolLM2 is built (`make assets`), its accuracies on evals/tasks too.
"""

import json
import os

import hub
import pytest
import torch
import transformers

import run
from evals import benchmarks, common, stock
from klsplice.lm.splice import put, rows

pytest.importorskip("lm_eval")

ROOT = os.path.dirname(os.path.abspath(run.__file__))
SMALL = {"DEVICE": "cpu", "DTYPE": "float32", "LAYER": 1, "CONTEXT": 32, "BATCH": 2}
SMALL |= {"MICRO_BATCH": 2, "EVAL_BATCH": 4, "TOKENS": 1280, "VAL_TOKENS": 640, "LR": 1e-2}
SMALL |= {"CHECK_SAE": False, "WANDB_PROJECT": "", "RANK": 4}
RUNS = {
    "sae": {"KEEP": "first"},
    "kept": {"KEEP": "special"},
    "outliers": {"KEEP": "outliers"},
    "lora": {"TRAIN": "lm_lora", "LOSS": "kl", "LR": 3e-2},
    "mlp": {"TRAIN": "adapter", "ADAPTER": "mlp"},
}


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    """A model, a text and an SAE."""
    root = tmp_path_factory.mktemp("box")
    hub.make_gemma(root / "tiny", seed=0)  # for its tokeniser
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 300}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, initializer_range=0.2))
    rare = transformers.AutoTokenizer.from_pretrained(root / "tiny")("w").input_ids[-1]
    with torch.no_grad():
        model.model.embed_tokens.weight[rare] *= 100  # an outlier wherever it stands
    model.save_pretrained(root / "tiny")
    hub.make_sae(root / "sae", d_in=32, d_sae=64, k=4, layer=1, lm_name="tiny", seed=0)
    texts = hub.make_pile(root / "pile", documents=120, seed=0)
    with open(root / "text.jsonl", "w") as f:
        f.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return root


def finished(box, name, monkeypatch):
    c = SMALL | {"MODEL": box / "tiny", "SAE": box / "sae", "DATASET": box / "text.jsonl"}
    c |= {"RUNS": box / "runs", "CACHE": box / "cache", "RUN_NAME": name} | RUNS[name]
    assert run.main([f"{n}={value}" for n, value in c.items()]) == 0
    monkeypatch.chdir(ROOT)
    return str(box / "runs" / name)


def plainly(run_, with_lora, when, questions):
    """-> log-likelihoods (question, choice) of one forward pass each, without hooks or batches."""
    from peft import PeftModel

    cfg, folder = run_.cfg, run_.folder
    lm = transformers.AutoModelForCausalLM.from_pretrained(cfg.MODEL, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(cfg.MODEL)
    if with_lora:
        lm = PeftModel.from_pretrained(lm, os.path.join(folder, "lora")).merge_and_unload()
    sae = when and stock.load_sae(run_, when)
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}

    def logits(ids):
        model, x = lm.model, lm.model.embed_tokens(torch.tensor([ids]))
        angles = model.rotary_emb(x, torch.arange(len(ids))[None])
        for i, block in enumerate(model.layers):
            x = block(x, position_embeddings=angles, attention_mask=None)
            if i == cfg.LAYER and sae is not None:
                norms = x[0].norm(dim=-1)
                kept = {
                    "none": [False] * len(ids),
                    "first": [p == 0 for p in range(len(ids))],
                    "special": [t in special for t in ids],
                    "outliers": (norms > 10 * norms.median()).tolist(),
                }[cfg.KEEP]
                active_N = (~torch.tensor(kept)).nonzero()[:, 0]
                x = put(x, sae(rows(x, active_N))[0], active_N)
        return lm.lm_head(model.norm(x))[0]

    found = []
    with torch.no_grad():
        for q in questions:
            context = tokenizer(q["text"])["input_ids"]
            for choice in q["choices"]:
                ids = tokenizer(q["text"] + " " + choice)["input_ids"]
                log_p = logits(ids[:-1]).log_softmax(-1)[len(context) - 1 :]
                found.append(sum(log_p[i, t].item() for i, t in enumerate(ids[len(context) :])))
    return torch.tensor(found).view(len(questions), 4)


def questions(n):
    with open(os.path.join(ROOT, "evals", "tasks", "everyday.jsonl")) as f:
        return [json.loads(line) for line in f][:n]


@pytest.mark.parametrize("name", RUNS)
def test_log_likelihoods_are_those_of_plain_passes(box, name, monkeypatch):
    run_ = common.open_run(finished(box, name, monkeypatch))
    found = benchmarks.scored(run_, ["everyday"], limit=12, batch=8)
    wanted = {}
    for label, (with_lora, when) in stock.variants(run_).items():
        wanted[label] = plainly(run_, with_lora, when, questions(12))
        samples = found[label]["samples"]["everyday"]
        theirs = [[r[0] for r in s["filtered_resps"]] for s in samples]
        assert torch.allclose(torch.tensor(theirs), wanted[label], atol=1e-3), label
    tables = list(wanted.values())
    for i, a in enumerate(tables):
        assert all((a - b).abs().max() > 1e-2 for b in tables[:i])  # the variants do differ


def test_accuracy_and_its_paired_change(box, monkeypatch):
    folder = finished(box, "sae", monkeypatch)
    assert benchmarks.main([folder, "--limit", "30"]) == 0
    run_ = common.open_run(folder)
    with open(common.path(folder, "benchmarks")) as f:
        found = json.load(f)
    right = {}
    for label, (with_lora, when) in stock.variants(run_).items():
        best = plainly(run_, with_lora, when, questions(30)).argmax(1).tolist()
        right[label] = [float(b == q["answer"]) for b, q in zip(best, questions(30))]
        assert found["numbers"][f"{label}/everyday/acc"] == pytest.approx(sum(right[label]) / 30)
    lengths = torch.tensor([[len(x) for x in q["choices"]] for q in questions(30)])
    normed = {
        label: (plainly(run_, with_lora, when, questions(30)) / lengths).argmax(1)
        for label, (with_lora, when) in stock.variants(run_).items()
    }
    answers = torch.tensor([q["answer"] for q in questions(30)])
    change = (normed["after"] == answers).double() - (normed["LM"] == answers).double()
    assert found["numbers"]["after vs LM/everyday/change"] == pytest.approx(change.mean().item())
    error = (change.std() / 30**0.5).item()
    assert found["numbers"]["after vs LM/everyday/change_stderr"] == pytest.approx(error)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--tasks", "hellaswag"], "comes from the Hub"),
        (["--tasks", "nosuchtask"], "nosuchtask"),
    ],
)
def test_a_task_that_cannot_be_had_is_a_line(box, monkeypatch, capsys, words, reason):
    assert benchmarks.main([finished(box, "sae", monkeypatch), *words]) == 2
    said = capsys.readouterr().err.split("error: ")[-1]
    assert reason in said and "Traceback" not in said


def test_a_missing_gpu_is_a_line(box, monkeypatch, capsys):
    assert benchmarks.main([finished(box, "sae", monkeypatch), "--device", "cuda:7"]) == 2
    assert "DEVICE = 'cuda:7' is not there" in capsys.readouterr().err


def test_a_folder_without_a_finished_run_is_a_line(tmp_path, capsys):
    assert benchmarks.main([str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err


SMOLLM2 = os.path.join(ROOT, "runs", "demo-kl_mse")


@pytest.mark.skipif(not os.path.exists(SMOLLM2), reason="needs `make demo`")
def test_smollm2_answers_as_plain_passes_say(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    run_ = common.open_run(SMOLLM2)
    run_.cfg.DTYPE = "float32"
    numbers, _ = benchmarks.summary(
        benchmarks.scored(run_, ["everyday"], limit=24, batch=8), ["everyday"]
    )
    for label, (with_lora, when) in stock.variants(run_).items():
        best = plainly(run_, with_lora, when, questions(24)).argmax(1).tolist()
        right = sum(b == q["answer"] for b, q in zip(best, questions(24)))
        assert numbers[f"{label}/everyday/acc"] == pytest.approx(right / 24)
