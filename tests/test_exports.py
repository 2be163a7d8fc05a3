"""What a run writes for others: the SAE as it learnt, in both formats, with all a reader needs.

The files are read here by their formats alone. tests/test_formats.py reads them by this program.
"""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import GROUPS, D, F, K

from klsplice.formats import write

DICT_CLASSES = {
    "topk": ("AutoEncoderTopK", "TopKTrainer"),
    "batchtopk": ("BatchTopKSAE", "BatchTopKTrainer"),
    "matryoshka": ("MatryoshkaBatchTopKSAE", "MatryoshkaBatchTopKTrainer"),
    "relu": ("AutoEncoder", "StandardTrainerAprilUpdate"),
    "jumprelu": ("JumpReluAutoEncoder", "JumpReluTrainer"),
}
IN_SAELENS = {"topk": "topk", "relu": "standard"}  # the others are jumprelu there
OURS = ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D")
FRESH = {"SAE": "fresh", "D_SAE": F, "K": K, "L1": 0.02, "LOSS": "mse"}
CASES = {  # name: the source's architecture, constants
    "topk": ("topk", {}),
    "batchtopk": ("batchtopk", {"KEEP": "none", "DTYPE": "bfloat16"}),
    "matryoshka": ("matryoshka", {"KEEP": "first", "CONTEXT": 8}),
    "relu": ("relu", {"L1": 0.5}),
    "jumprelu": ("jumprelu", {"JUMPRELU_THRESHOLD": "ste", "BOS": "never"}),
    "fresh topk": ("topk", FRESH | {"ARCHITECTURE": "topk", "LAYER": 0}),
    "to matryoshka": ("topk", {"ARCHITECTURE": "matryoshka"}),
    "adapter": ("topk", {"TRAIN": "adapter", "RANK": 8}),
    "LoRA on the LM": ("topk", {"TRAIN": "lm_lora", "LOSS": "kl", "RANK": 2}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """case -> its run, once: folder, constants c, the module that was saved, its architecture."""
    root = tmp_path_factory.mktemp("exports")
    (root / "world").mkdir()
    world, done, save = tiny.make(root / "world"), {}, write.save

    def run_of(case):
        architecture, changes = CASES[case]
        saved = []

        def noted(folder, sae, *args, **options):
            saved.append(deepcopy(sae).cpu())
            save(folder, sae, *args, **options)

        given = {"SAE": world.saes[architecture], "RUN_NAME": case.replace(" ", "-")} | changes
        with pytest.MonkeyPatch.context() as m:
            m.setattr(write, "save", noted)
            folder = tiny.finished(world, root / "runs", **given)
        c = SimpleNamespace(**tiny.read(folder / "run.json")["constants"])
        kind = c.ARCHITECTURE or architecture
        config = tiny.read(world.saes[architecture] / "config.json") if c.SAE != "fresh" else {}
        return SimpleNamespace(folder=folder, c=c, sae=saved[0], kind=kind, config=config)

    def make(case):
        if case not in done:
            done[case] = run_of(case)
        return done[case]

    return make


def of_dictionary_learning(folder) -> tuple[dict, dict]:
    """-> weights under our names, and what else is in ae.pt."""
    t = torch.load(folder / "sae" / "ae.pt", weights_only=True)
    assert all(type(x) is torch.Tensor and x.is_contiguous() for x in t.values())
    if "W_enc" in t:
        w = {"W_enc_FD": t.pop("W_enc").T, "b_enc_F": t.pop("b_enc"), "W_dec_FD": t.pop("W_dec")}
    else:
        w = {"W_enc_FD": t.pop("encoder.weight"), "b_enc_F": t.pop("encoder.bias")}
        w["W_dec_FD"] = t.pop("decoder.weight").T
    return w | {"b_dec_D": t.pop("bias") if "bias" in t else t.pop("b_dec")}, t


def of_saelens(folder) -> tuple[dict, dict]:
    t = load_file(folder / "sae" / "sae_weights.safetensors")
    w = {"W_enc_FD": t.pop("W_enc").T, "b_enc_F": t.pop("b_enc"), "W_dec_FD": t.pop("W_dec")}
    return w | {"b_dec_D": t.pop("b_dec")}, t


def expected(sae, kind) -> dict:
    """What was learnt as every library reads it: for plain residuals, rows of norm 1."""
    t = {n: x.detach().double() for n, x in {**sae.state_dict()}.items()}
    w = {n: t[n] for n in OURS}
    threshold = t.get("threshold_F", t.get("threshold"))
    if kind == "relu":
        w["b_enc_F"], w["b_dec_D"] = w["b_enc_F"] * t["scale"], w["b_dec_D"] * t["scale"]
    if kind in ("relu", "jumprelu"):
        norm_F = w["W_dec_FD"].norm(dim=1)
        w["W_dec_FD"], w["W_enc_FD"] = (
            w["W_dec_FD"] / norm_F[:, None],
            w["W_enc_FD"] * norm_F[:, None],
        )
        w["b_enc_F"] = w["b_enc_F"] * norm_F
        threshold = None if threshold is None else threshold * norm_F
    return w | ({} if threshold is None else {"threshold": threshold})


def close(a, b) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_the_files_hold_what_was_learnt(made, case):
    run = made(case)
    wanted = expected(run.sae, run.kind)
    (ours, further), (theirs, more) = of_dictionary_learning(run.folder), of_saelens(run.folder)
    for name in OURS:
        close(ours[name], wanted[name])
        assert torch.equal(ours[name], theirs[name])
        assert ours[name].dtype == theirs[name].dtype == torch.float32
    names = {"threshold"} if run.kind != "relu" else set()
    names |= {"k"} if run.kind in ("topk", "batchtopk", "matryoshka") else set()
    names |= {"group_sizes"} if run.kind == "matryoshka" else set()
    assert further.keys() == names
    if "k" in names:
        assert further["k"].dtype == torch.int32 and further["k"].item() == K
    if "threshold" in names:
        close(further["threshold"], wanted["threshold"])
    if run.kind == "matryoshka":
        assert further["group_sizes"].tolist() == run.sae.groups
        assert run.sae.groups == (GROUPS if case == "matryoshka" else [2, 4, 8, 16, 34])
    if run.kind in ("topk", "relu"):
        assert not more
    else:
        threshold = further["threshold"].clamp(min=0).expand(F)
        assert more.keys() == {"threshold"} and torch.equal(more["threshold"], threshold)


@pytest.mark.parametrize("case", CASES)
def test_what_learnt_has_moved_and_the_rest_has_not(made, case):
    run = made(case)
    if run.c.SAE == "fresh" or run.c.ARCHITECTURE:
        return
    found, further = of_dictionary_learning(run.folder)
    given = tiny.given(run.kind)
    moved = [n for n in OURS if not torch.equal(found[n], given[n.rpartition("_")[0]])]
    learn = {"adapter": ["b_enc_F", "W_dec_FD", "b_dec_D"], "lm_lora": []}
    assert moved == learn.get(run.c.TRAIN, ["W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D"])
    if run.kind == "topk" and run.c.TRAIN != "lm_lora":
        smallest = tiny.read(run.folder / "after.json")["smallest_active"]
        assert further["threshold"].item() == pytest.approx(smallest, rel=1e-6)
    elif run.kind != "relu":
        started = given.get("threshold", torch.tensor(-1.0))
        same = torch.allclose(further["threshold"], started, rtol=1e-5)
        assert same == (run.c.TRAIN == "lm_lora")


@pytest.mark.parametrize("case", CASES)
def test_the_saelens_config_says_all_that_a_reader_needs(made, case):
    run, c = made(case), made(case).c
    kind = IN_SAELENS.get(run.kind, "jumprelu")
    wanted = {
        "architecture": kind,
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": run.kind != "jumprelu",
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.0.0",
            "model_name": "gem",
            "hook_name": f"blocks.{c.LAYER}.hook_resid_post",
            "hf_hook_name": f"model.layers.{c.LAYER}",
            "prepend_bos": c.BOS != "never",
            "context_size": c.CONTEXT,
            "dataset_path": "text.jsonl",
            "exclude_special_tokens": c.KEEP == "special",
        },
    }
    if kind == "topk":
        wanted["k"] = K
    assert tiny.read(run.folder / "sae/cfg.json") == wanted


@pytest.mark.parametrize("case", CASES)
def test_the_other_config_is_the_sources_with_what_a_reader_needs(made, case):
    run, c = made(case), made(case).c
    dict_class, trainer_class = DICT_CLASSES[run.kind]
    trainer = {"trainer_class": trainer_class, "dict_class": dict_class, "activation_dim": D}
    trainer |= {"dict_size": F, "layer": c.LAYER, "lm_name": "gem"}
    trainer["submodule_name"] = f"resid_post_layer_{c.LAYER}"
    if run.kind in ("topk", "batchtopk", "matryoshka"):
        trainer["k"] = K
    if run.kind == "relu":
        trainer["l1_penalty"] = c.L1
    theirs = dict(run.config.get("trainer", {}))
    if c.ARCHITECTURE:  # it has become another class
        theirs = {n: v for n, v in theirs.items() if n not in ("dict_class", "trainer_class", "k")}
    found = tiny.read(run.folder / "sae/config.json")
    ours = found.pop("klsplice")
    buffer = {"ctx_len": c.CONTEXT, "d_submodule": D, "io": "out"}
    assert found == {"trainer": trainer | theirs, "buffer": buffer}
    names = ("SAE", "TRAIN", "LOSS", "LR", "TOKENS", "PASSES", "DATASET", "KEEP", "SEED")
    local = {"dataset": "text.jsonl", "sae": c.SAE.rpartition("/")[2]}
    assert ours == {n.lower(): getattr(c, n) for n in names} | local
