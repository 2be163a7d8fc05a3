"""The bench on a tiny LM: the same gradient, the same numbers, a table."""

import json

import conftest  # noqa: F401  first: it puts the program on the path
import pytest
import transformers

import finetune
from bench import __main__ as bench

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}
CONSTANTS = {"CONTEXT": 16, "BATCH": 2, "MICRO_BATCH": 2, "CLEAN_BATCH": 4}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    shape = {"name": "tiny", "config": transformers.LlamaConfig(**SIZES), "layer": 1}
    monkeypatch.setitem(bench.SHAPES, "cpu", shape | {"saes": [(1024, 8)], "constants": CONSTANTS})


def test_both_loops_have_the_gradient_of_float64(tmp_path, capsys):
    path = tmp_path / "new" / "b.json"
    assert bench.main(["--device", "cpu", "--quick", "--out", str(path)]) == 0
    record = json.loads(path.read_text())
    assert len(record["errors"]) == 2 and max(record["errors"].values()) < 1e-4
    assert list(record["steps"]["1k, k 8"]) == ["naive", "klsplice"]
    assert record["dtype"] == "float32" and record["instructions"]
    assert len(record["stages"]) == 5 and all(s["seconds"] > 0 for s in record["stages"].values())
    assert "| 1k, k 8 | klsplice |" in capsys.readouterr().out


@pytest.mark.parametrize("factor", [0.5, float("nan")])
def test_half_a_gradient_makes_the_exit_code_1(monkeypatch, factor):
    kl_head = finetune.kl_head
    part = lambda *a: kl_head(*a) * factor + kl_head(*a).detach() * (1 - factor)  # noqa: E731
    monkeypatch.setattr("finetune.kl_head", part)
    assert bench.main(["--device", "cpu", "--quick"]) == 1


def test_profile_prints_the_kernels_alone(capsys):
    assert bench.main(["--device", "cpu", "--profile", "--dtype", "bfloat16"]) == 0
    assert "aten::topk" in (out := capsys.readouterr().out) and "naive" not in out
