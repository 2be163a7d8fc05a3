"""The bench on a tiny LM: the same steps, the same numbers, a table."""

import json

import conftest  # noqa: F401  first: it puts the program on the path
import pytest
import transformers

import finetune
from bench import __main__ as bench
from bench import exact, loops

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}
CONSTANTS = {"CONTEXT": 16, "BATCH": 2, "MICRO_BATCH": 2, "CLEAN_BATCH": 4}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    shape = {"name": "tiny", "config": transformers.LlamaConfig(**SIZES), "layer": 1}
    monkeypatch.setitem(loops.SHAPES, "cpu", shape | {"saes": [(1024, 8)], "constants": CONSTANTS})


def test_both_loops_take_the_step_of_float64(tmp_path, capsys):
    path = tmp_path / "new" / "b.json"
    assert bench.main(["--device", "cpu", "--quick", "--out", str(path)]) == 0
    record = json.loads(path.read_text())
    assert len(record["errors"]) == 2 * 7 and max(record["errors"].values()) < 1e-4
    assert list(record["steps"]["1k, k 8"]) == ["naive", "klsplice"]
    assert record["dtype"] == "float32" and record["instructions"]
    assert len(record["stages"]) == 5 and all(s["seconds"] > 0 for s in record["stages"].values())
    assert "1k, k 8: klsplice" in capsys.readouterr().out


def test_half_a_gradient_makes_the_exit_code_1(monkeypatch, capsys):
    kl_head = finetune.kl_head
    half = lambda *a: kl_head(*a) * 0.5 + kl_head(*a).detach() * 0.5  # noqa: E731
    monkeypatch.setattr("finetune.kl_head", half)
    assert bench.main(["--device", "cpu", "--quick"]) == 1
    assert "dKL/dy" in capsys.readouterr().err


def test_an_error_that_is_no_number_is_the_farther_one():
    naive = dict.fromkeys(("naive dKL/dy", "naive W_enc_FD", "naive W_dec_FD"), 0.07)
    ours = {"ours dKL/dy": 0.09, "ours W_enc_FD": 0.08, "ours W_dec_FD": float("nan")}
    assert exact.farther(naive | ours) == ["dKL/dy", "W_dec_FD"]


def test_profile_prints_the_kernels_alone(capsys):
    assert bench.main(["--device", "cpu", "--profile", "--dtype", "bfloat16"]) == 0
    assert "aten::topk" in (out := capsys.readouterr().out) and "naive" not in out
