"""The bench on a tiny LM: the same steps, the same numbers, a table."""

import copy
import json

import conftest  # noqa: F401  first: it puts the program on the path
import pytest
import torch
import transformers

import finetune
from bench import __main__ as bench
from bench import exact, kernels, loops, parts

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}
TINY = {"config": lambda: transformers.LlamaConfig(**SIZES), "layer": 1, "batch": 2, "context": 16}
TINY |= {"clean_batch": 4, "saes": [(1024, 8)], "quick": [(1024, 8)], "product": 64}


@pytest.fixture
def tiny(monkeypatch):
    build = loops.build_lm
    monkeypatch.setitem(loops.SHAPES, "cpu", loops.SHAPES["cpu"] | TINY)
    # in bfloat16 the errors hang on roundings
    monkeypatch.setattr(loops, "build_lm", lambda *a: build(*a).float())
    return loops.SHAPES["cpu"]


def test_both_loops_take_the_same_step_and_the_table_has_them(tiny, tmp_path, capsys):
    path = tmp_path / "b.json"
    assert bench.main(["--device", "cpu", "--quick", "--out", str(path)]) == 0
    found = json.loads(path.read_text())
    assert max(e for n, e in found["errors"].items() if n.startswith("ours")) < 1e-4
    assert found["stages"].keys() == bench.counted(tiny, 1024, 8, cuda=False).keys()
    assert all(stage["predicted"] > 0 for stage in found["stages"].values())
    said = capsys.readouterr().out
    assert "| 1k, k 8 | klsplice |" in said and f"| 1k, k 8 | {exact.WIDE} |" in said
    wide = {n.removeprefix(exact.WIDE): e for n, e in found["errors"].items() if exact.WIDE in n}
    assert len(wide) == 7 and max(wide.values()) < 1e-4


def test_timing_waits_for_gradients_that_are_as_near_as_the_naive_loops(tiny, monkeypatch, capsys):
    naive = {"naive dKL/dy": 0.07, "naive W_enc_FD": 0.01, "naive W_dec_FD": 0.01}
    near = {"ours dKL/dy": 0.06, "ours W_enc_FD": 0.012, "ours W_dec_FD": 0.012}
    assert exact.farther(naive | near) == []
    assert exact.farther(naive | near | {"ours dKL/dy": 0.08}) == ["dKL/dy"]
    assert exact.farther(naive | near | {"ours W_dec_FD": float("nan")}) == ["W_dec_FD"]
    kl_head = finetune.kl_head  # a planted bug: half of the gradient
    monkeypatch.setattr(
        "finetune.kl_head", lambda *a: kl_head(*a) * 0.5 + kl_head(*a).detach() * 0.5
    )
    assert bench.main(["--device", "cpu", "--quick"]) == 1
    assert "farther from float64 than the naive loop: dKL/dy" in capsys.readouterr().err


def test_the_time_of_a_step_has_its_part_of_the_clean_pass(tiny):
    """CLEAN_BATCH of two steps: a clock that counts the sequences of clean passes."""
    lm = loops.build_lm(tiny, "cpu")
    sae = loops.build_sae(tiny, 64, 4, "cpu")
    ours = loops.Ours(lm, tiny, "cpu", sae, compiled=False)
    sequences, clean = [], ours.batches.clean
    ours.batches.clean = lambda tokens_BL: sequences.append(len(tokens_BL)) or clean(tokens_BL)

    class Counted:
        cuda = False

        def __call__(self, call):
            before = sum(sequences)
            call()
            return float(sum(sequences) - before)

    ours.close = lambda: None
    ours.step()  # the first of a pool, which is filled
    for _ in range(3):  # wherever in a pool the clock starts
        found = bench.whole({"ours": lambda: ours}, Counted(), tiny)
        assert found["ours"]["seconds"] == tiny["batch"]
        ours.step()


def test_loops_take_turns_and_the_median_of_them_counts(tiny):
    order, seconds = [], {"a": iter([3.0, 1.0, 2.0]), "b": iter([9.0, 7.0, 8.0])}

    class Loop:
        period = 2

        def __init__(self, name):
            self.step, self.close = lambda: order.append(name), lambda: order.append("closed")

    class Told:
        cuda = False

        def __call__(self, call):
            call()
            return next(seconds[order[-1]])

    builds = {name: lambda name=name: Loop(name) for name in "ab"}
    found = bench.whole(builds, Told(), tiny, turns=3)
    assert order == [*"aabb" * 3, "closed", "closed"]
    assert {name: r["seconds"] for name, r in found.items()} == {"a": 1.0, "b": 4.0}


def test_a_head_is_counted_as_three_products_and_the_passes_over_its_logits(tiny):
    logits = 2 * 16 * 97  # tokens x vocabulary
    for cuda, passes in ((False, 3), (True, 5)):
        flops, size = bench.counted(tiny, 1024, 8, cuda=cuda)["KL head"]
        assert flops == 3 * 2 * 32 * logits and size == passes * 2 * logits


def test_loops_that_take_turns_on_one_lm_do_not_touch_each_other(tiny):
    lm, make = loops.build_lm(tiny, "cpu"), lambda: loops.build_sae(tiny, 64, 4, "cpu")
    ours = loops.Ours(lm, tiny, "cpu", make(), compiled=False)
    loop, other = loops.Naive(lm, tiny, "cpu", make()), loops.Naive(lm, tiny, "cpu", make())
    alone = [other.step() for _ in range(3)]
    for wanted in alone:
        assert loop.step() == wanted
        found = ours.step()
        assert {n: float(found[n]) for n in wanted} == pytest.approx(wanted, rel=1e-4)


def test_the_curves_of_both_loops_agree(tiny):
    lm = loops.build_lm(tiny, "cpu")
    assert exact.curves(lm, tiny, "cpu", (64, 8), compiled=False, steps=8) < 1e-4


def test_a_sparse_sae_is_counted_as_one_dense_product():
    shape = loops.SHAPES["cuda"]
    dense, _ = bench.counted(shape, 65_536, 640, cuda=True)["SAE and its backward"]
    sparse, size = bench.counted(shape, 65_536, 80, cuda=True)["SAE and its backward"]
    assert 6 <= dense / sparse * 1.01 < 6.1 and size > 0


def test_saes_together_take_the_steps_that_they_take_alone(tiny):
    lm, sae = loops.build_lm(tiny, "cpu"), loops.build_sae(tiny, 64, 4, "cpu")
    alone = loops.Ours(lm, tiny, "cpu", copy.deepcopy(sae), compiled=False)
    together = loops.Several(lm, tiny, "cpu", copy.deepcopy(sae), n=3, compiled=False)
    for _ in range(3):
        alone.step()
        together.step()
    wanted = alone.learner.model.state_dict()
    for learner in together.learners:
        assert all(torch.equal(t, wanted[n]) for n, t in learner.model.state_dict().items())


def test_parts_are_held_against_float64_and_timed_and_a_failure_comes_first(
    tmp_path, monkeypatch, capsys
):
    path = tmp_path / "parts.json"
    small = {"n": 4, "many": 8, "d": 8, "f": 32, "v": 96, "rows": 2}
    monkeypatch.setattr(parts, "TINY", parts.TINY | small)
    assert parts.main(["--out", str(path)]) == 0
    found = json.loads(path.read_text())["parts"]
    errors = [part["error"] for part in found.values() if "error" in part]
    assert len(errors) >= 11 and max(errors) < 1e-2
    assert {*parts.SECTIONS} <= found.keys() and found["step: waits of the host"]["waits"] == 0
    half = kernels.triton_sae.decode
    monkeypatch.setattr(kernels.triton_sae, "decode", lambda *a: half(*a) / 2)
    capsys.readouterr()
    assert parts.main(["--only", "checks"]) == 1
    said = capsys.readouterr().out
    assert "\n\nFAILED" not in said and said.count("FAILED") == 1
    assert "FAILED check: TopK SAE: y and gradients: over 0.0001\n\n| part" in said
