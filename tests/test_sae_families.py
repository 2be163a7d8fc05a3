"""Each family of public SAEs, its files as they lie in public, is here what its own code computes.

A writer puts an SAE of random tensors in a folder as its family does and returns what SAE= names,
with the family's formula in float64. Real libraries are asked in tests/libraries.py.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file

from klsplice.errors import UserError
from klsplice.formats import families, read
from klsplice.formats import source as sources
from sae import build

D, F, K, LAYER = 32, 64, 4, 1  # of tiny's LM
HOOK = f"blocks.{LAYER}.hook_resid_post"
S = "sae_weights.safetensors"


def drawn(unit=True) -> SimpleNamespace:
    rng = torch.Generator().manual_seed(19)
    normal = lambda *size: torch.randn(*size, generator=rng)  # noqa: E731
    w = SimpleNamespace(We=normal(F, D), be=normal(F) * 0.3, Wd=normal(F, D), bd=normal(D))
    if unit:
        w.Wd /= w.Wd.norm(dim=1, keepdim=True)
    w.gate = torch.rand(F, generator=rng) * 2
    w.r, w.b_gate, w.b_mag = normal(F) * 0.3, normal(F), normal(F)
    return w


def formula(w, kind, *, centred=True, threshold=None, times=1.0, gated_by_norm=False):
    """-> f(x) in float64: the reconstruction that the family's own code gives."""
    w = SimpleNamespace(**{name: t.double() for name, t in vars(w).items()})

    def f(x_ND):
        x_ND = x_ND.double() * times
        p_NF = (x_ND - w.bd * centred) @ w.We.T
        pre_NF = p_NF + w.be
        if kind == "relu":
            z_NF = pre_NF.clamp(min=0)
        elif kind == "topk":
            rank_NF = pre_NF.argsort(1, descending=True).argsort(1)
            z_NF = pre_NF.clamp(min=0) * (rank_NF < K)
        elif kind == "gated":
            z_NF = (p_NF + w.b_gate > 0) * (w.r.exp() * p_NF + w.b_mag).clamp(min=0)
        else:
            norm_F = w.Wd.norm(dim=1) if gated_by_norm else 1.0
            z_NF = pre_NF.clamp(min=0) * (pre_NF * norm_F > threshold)
        return (z_NF @ w.Wd + w.bd) / times

    return f


def put(folder, file, tensors, config=None, name="config.json"):
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.contiguous() if torch.is_tensor(t) else t for n, t in tensors.items()}
    if file.endswith(".safetensors"):
        save_file(tensors, path)
    elif file.endswith(".npz"):
        np.savez(path, **{name: t.numpy() for name, t in tensors.items()})
    else:
        torch.save(tensors, path)
    if config is not None:
        (folder / name).write_text(json.dumps(config))
    return folder


def linear(w):
    return {"encoder.weight": w.We, "encoder.bias": w.be, "decoder.weight": w.Wd.T}


def matrices(w):
    return {"W_enc": w.We.T, "b_enc": w.be, "W_dec": w.Wd, "b_dec": w.bd}


def trainer(dict_class, **more):
    about = {"dict_class": dict_class, "activation_dim": D, "dict_size": F, "layer": LAYER}
    about |= {"submodule_name": f"resid_post_layer_{LAYER}", "lm_name": "gem", "trainer_class": "T"}
    return {"trainer": about | more, "buffer": {"d_submodule": D, "io": "out", "ctx_len": 32}}


def topk_of_2024(at):
    """No k among the tensors before December 2024."""
    w, config = drawn(), trainer("AutoEncoderTopK", trainer_class="TrainerTopK", k=K)
    return put(at / "x", "ae.pt", linear(w) | {"b_dec": w.bd}, config), formula(w, "topk")


def compiled_topk(at):
    w = drawn()
    tensors = linear(w) | {"b_dec": w.bd, "k": torch.tensor(K), "threshold": torch.tensor(1.0)}
    tensors = {f"_orig_mod.{name}": t for name, t in tensors.items()}
    return put(at / "x", "ae.pt", tensors, trainer("AutoEncoderTopK", k=K)), formula(w, "topk")


def new_autoencoder(at):
    w, config = drawn(unit=False), trainer("AutoEncoderNew", l1_penalty=0.02)
    tensors = linear(w) | {"decoder.bias": w.bd}
    return put(at / "x", "ae.pt", tensors, config), formula(w, "relu", centred=False)


def gated(at):
    w, config = drawn(), trainer("GatedAutoEncoder", trainer_class="GatedSAETrainer")
    tensors = {"encoder.weight": w.We, "decoder.weight": w.Wd.T, "decoder_bias": w.bd}
    tensors |= {"r_mag": w.r, "gate_bias": w.b_gate, "mag_bias": w.b_mag}
    return put(at / "x", "ae.pt", tensors, config), formula(w, "gated")


def saelens(at, tensors, architecture, **more):
    metadata = {"sae_lens_version": "6.20.0", "model_name": "gem", "hook_name": HOOK}
    config = {"architecture": architecture, "d_in": D, "d_sae": F, "metadata": metadata}
    config |= {"apply_b_dec_to_input": True, "normalize_activations": "none"}
    return put(at / "x", S, tensors, config | more, "cfg.json")


def saelens_3(at):
    w = drawn()
    config = {"hook_point": HOOK, "d_in": D, "d_sae": F, "model_name": "gem"}
    tensors = matrices(w) | {"scaling_factor": torch.ones(F)}
    where = put(at / "x", S, tensors, config | {"activation_fn": "relu"}, "cfg.json")
    return where, formula(w, "relu")


def saelens_5_topk(at):
    w = drawn()
    config = {"hook_name": HOOK, "d_in": D, "d_sae": F, "model_name": "gem"}
    config |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    return put(at / "x", S, matrices(w), config, "cfg.json"), formula(w, "topk")


def saelens_gated(at):
    w = drawn()
    tensors = {"W_enc": w.We.T, "W_dec": w.Wd, "b_dec": w.bd}
    tensors |= {"b_gate": w.b_gate, "b_mag": w.b_mag, "r_mag": w.r}
    return saelens(at, tensors, "gated"), formula(w, "gated")


def saelens_batchtopk(at):
    """As a run leaves it, with a k that is a mean and rows that are rescaled."""
    w = drawn(unit=False)
    tensors = matrices(w) | {"topk_threshold": torch.tensor(9.0, dtype=torch.float64)}
    where = saelens(at, tensors, "batchtopk", k=float(K), rescale_acts_by_decoder_norm=True)
    return where, formula(w, "jumprelu", threshold=9.0, gated_by_norm=True)


def saelens_matryoshka(at):
    w = drawn()
    tensors = matrices(w) | {"topk_threshold": torch.tensor(2.0)}
    more = {"k": float(K), "matryoshka_widths": [8, 24]}
    where = saelens(at, tensors, "matryoshka_batchtopk", **more)
    return where, formula(w, "jumprelu", threshold=2.0)


def sparsify(at):
    """0 latents are an expansion factor."""
    w = drawn()
    tensors = {"encoder.weight": w.We, "encoder.bias": w.be, "W_dec": w.Wd, "b_dec": w.bd}
    config = {"d_in": D, "num_latents": 0, "expansion_factor": F // D, "k": K, "multi_topk": False}
    folder = at / f"layers.{LAYER}"
    return put(folder, "sae.safetensors", tensors, config, "cfg.json"), formula(w, "topk")


def lm_saes(config):
    about = {"d_model": D, "hook_point_in": HOOK, "hook_point_out": HOOK, "act_fn": "jumprelu"}
    return about | {"norm_activation": "dataset-wise", "expansion_factor": F // D} | config


def llama_scope(at):
    """A latent times the norm of its row is held against the threshold."""
    w, norm = drawn(unit=False), 10.0
    config = {"jump_relu_threshold": 2.0, "sparsity_include_decoder_norm": True, "d_sae": F}
    config |= {"dataset_average_activation_norm": {"in": norm, "out": norm}}
    file, tensors = "checkpoints/final.safetensors", linear(w) | {"decoder.bias": w.bd}
    folder = put(at / "Llama-L1R-8x", file, tensors, lm_saes(config), "hyperparams.json")
    more = {"centred": False, "times": D**0.5 / norm}
    return folder, formula(w, "jumprelu", threshold=2.0, gated_by_norm=True, **more)


def llama_scope_r1(at):
    w, norm = drawn(unit=False), 8.0
    tensors = linear(w) | {"decoder.bias": w.bd, "log_jumprelu_threshold": w.gate.log()}
    tensors[f"dataset_average_activation_norm.{HOOK}"] = torch.tensor(norm)
    config = lm_saes({"sae_type": "sae", "sparsity_include_decoder_norm": False})
    more = {"centred": False, "times": D**0.5 / norm}
    return put(at / "L1R", S, tensors, config), formula(
        w, "jumprelu", threshold=w.gate.double(), **more
    )


def llama_scope_folded(at):
    """Its norms are in the weights already; they may stand beside them."""
    w = drawn()
    tensors = linear(w) | {"decoder.bias": w.bd, "log_jumprelu_threshold": w.gate.log()}
    tensors[f"dataset_average_activation_norm.{HOOK}"] = torch.tensor(8.0)
    where = put(at / "L1R", S, tensors, lm_saes({"norm_activation": "inference"}))
    return where, formula(w, "jumprelu", centred=False, threshold=w.gate.double())


def gemma_scope(at):
    w = drawn(unit=False)
    folder = at / "gemma-scope-gem-pt-res" / f"layer_{LAYER}" / "width_64"
    where = put(folder, "params.npz", matrices(w) | {"threshold": w.gate})
    return where, formula(w, "jumprelu", centred=False, threshold=w.gate.double())


def gemma_scope_2(at, config=None):
    w = drawn(unit=False)
    tensors = {name.lower(): t for name, t in matrices(w).items()} | {"threshold": w.gate}
    folder = at / "resid_post" / f"layer_{LAYER}_width_64"
    where = put(folder, "params.safetensors", tensors, config)
    return where, formula(w, "jumprelu", centred=False, threshold=w.gate.double())


def gemma_scope_2_with_config(at):
    return gemma_scope_2(at, {"hf_hook_point_in": f"model.layers.{LAYER}.output"})


def qwen_scope(at):
    w = drawn()
    tensors = {"W_enc": w.We, "W_dec": w.Wd.T, "b_enc": w.be, "b_dec": w.bd}
    folder = at / f"SAE-Res-gem-W64K-L0_{K}"
    put(folder, "layer7.sae.pt", {name: t * 2 for name, t in tensors.items()})
    put(folder, f"layer{LAYER}.sae.pt", tensors)
    return folder / f"layer{LAYER}.sae.pt", formula(w, "topk", centred=False)


def goodfire(at):
    w, name = drawn(), f"gem-SAE-l{LAYER}"
    tensors = {"encoder_linear.weight": w.We, "encoder_linear.bias": w.be}
    tensors |= {"decoder_linear.weight": w.Wd.T, "decoder_linear.bias": w.bd}
    where = put(at / name, f"{name}.pth", tensors) / f"{name}.pth"
    return where, formula(w, "relu", centred=False)


def deepseek_r1(at):
    w, name = drawn(), f"gem-SAE-l{LAYER}.pt"
    put(at / "x", name, linear(w) | {"decoder.bias": w.bd})
    return at / "x" / name, formula(w, "relu", centred=False)


def openai(at):
    w, folder = drawn(), at / "resid_post_mlp" / "autoencoders"
    tensors = {"pre_bias": w.bd, "latent_bias": w.be}
    tensors |= {"encoder.weight": w.We, "decoder.weight": w.Wd.T, "activation": "ReLU"}
    return put(folder, f"{LAYER}.pt", tensors) / f"{LAYER}.pt", formula(w, "relu")


WRITERS = (
    *(topk_of_2024, compiled_topk, new_autoencoder, gated),
    *(saelens_3, saelens_5_topk, saelens_gated, saelens_batchtopk, saelens_matryoshka),
    *(sparsify, llama_scope, llama_scope_r1, llama_scope_folded),
    *(gemma_scope, gemma_scope_2, gemma_scope_2_with_config, qwen_scope, goodfire),
    *(deepseek_r1, openai),
)


def computes(where, f, **given):
    """The SAE that is opened computes f -> its Source."""
    source = read.open_sae(str(where), "", **given)
    sae = build(source, source.read_weights()).eval()
    x_ND = torch.randn(200, D, generator=torch.Generator().manual_seed(1)) * 3
    with torch.no_grad():
        y_ND, z_NF = sae(x_ND)
    wanted_ND = f(x_ND)
    assert (y_ND.double() - wanted_ND).abs().max() < 1e-5 * wanted_ND.abs().max()
    assert 0 < (z_NF > 0).float().mean() < 1
    return source


@pytest.mark.parametrize("writer", WRITERS)
def test_a_family_reads_as_its_own_code_computes(tmp_path, writer):
    source = computes(*writer(tmp_path))
    assert source.site == (LAYER, "the residual after a block")
    assert (source.lm_name or "gem").endswith("gem")


def test_every_row_has_a_writer(tmp_path, monkeypatch):
    describe, took = families.describe, set()

    def noted(family, files):
        source = describe(family, files)
        if source:
            took.add((family.weights, family.config))
        return source

    monkeypatch.setattr(read, "describe", noted)
    for writer in WRITERS:
        read.open_sae(str(writer(tmp_path / writer.__name__)[0]), "")
    rows = {(row.weights, row.config) for row in families.FAMILIES if row.kind is not families.own}
    assert rows - took == set()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("writer", [saelens_matryoshka, gemma_scope, qwen_scope])
def test_a_family_is_finetuned_and_saved(world, tmp_path, writer):
    where, _ = writer(tmp_path)
    folder = tiny.finished(world, tmp_path / "runs", SAE=where)
    results = json.loads((folder / "results.json").read_text())
    assert results["kl_after"] != results["kl_before"]
    again = tiny.finished(world, tmp_path / "runs", SAE=folder, RUN_NAME="y", TOKENS=0)
    again = json.loads((again / "before.json").read_text())
    assert again["kl"] == pytest.approx(results["kl_after"], rel=1e-5)


def refused(where, **given):
    """It is not read for the residual after block 1 -> the message."""
    with pytest.raises(UserError) as e:
        source = read.open_sae(str(where), "", **given)
        sources.check_fits(source, D, model="gem", layer=LAYER, strict=True)
        source.read_weights()
    return str(e.value)


HOOKPOINTS = {  # of sparsify -> the block, None where it is another place
    "layers.1": 1,
    "h.1": 1,
    "transformer.h.1": 1,
    "gpt_neox.layers.1": 1,
    "layers.1.mlp": None,
    "model.layers.1.mlp": None,
    "h.1.attn": None,
    "layers.1.self_attn": None,
    "embed_in": None,
}


@pytest.mark.parametrize("name", HOOKPOINTS)
def test_a_hookpoint_of_sparsify_says_where_it_reads(tmp_path, name):
    folder, _ = sparsify(tmp_path)
    folder = folder.rename(tmp_path / name)
    if HOOKPOINTS[name] is None:
        assert name in refused(folder)
    else:
        assert read.open_sae(str(folder), "").site == (1, "the residual after a block")


def changed_config(folder, **changes):
    (path,) = folder.glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_what_its_class_cannot_compute_is_refused(tmp_path):
    for i, (writer, changes) in enumerate(
        (
            (sparsify, {"transcode": True}),
            (sparsify, {"activation": "groupmax"}),
            (llama_scope, {"sae_type": "clt"}),
            (llama_scope, {"dataset_average_activation_norm": None}),
            (llama_scope_r1, {"norm_activation": "token-wise"}),
            (gemma_scope_2_with_config, {"hf_hook_point_in": ["a", "b"]}),
            (gemma_scope_2_with_config, {"type": "transcoder"}),
            (saelens_3, {"architecture": "skip_transcoder"}),
            (saelens_3, {"normalize_activations": "layer_norm"}),
            (saelens_3, {"activation_fn": "tanh-relu"}),
        )
    ):
        refused(changed_config(writer(tmp_path / str(i))[0], **changes))
    where, _ = openai(tmp_path / "a")
    torch.save(torch.load(where) | {"activation": "TopK"}, where)
    assert "TopK" in refused(where)
    assert "layer1.sae.pt" in refused(qwen_scope(tmp_path)[0].parent)  # a folder of several


# ---- files of one's own -----------------------------------------------------------------------


def own(at, tensors, name="mine.pt"):
    return put(at / "own", name, tensors) / name


def test_a_plain_file_takes_class_and_k_from_the_constants(world, tmp_path):
    where = own(tmp_path, matrices(drawn()))
    computes(where, formula(drawn(), "topk"), architecture="topk", k=K)
    given = {"SAE": where, "TOKENS": 0, "ARCHITECTURE": "topk", "K": K}
    folder = tiny.finished(world, tmp_path / "runs", **given)
    source = json.loads((folder / "run.json").read_text())["source"]
    assert (source["k"], source["architecture"]) == (K, "topk")
    assert tiny.main(world, tmp_path / "runs", RUN_NAME="y", **given | {"SAE": folder, "K": 5}) == 2


@pytest.mark.parametrize("more", [{}, {"threshold": 1.0}, {"k": 4, "threshold": 1.0}])
def test_a_file_that_does_not_say_its_class_is_refused(tmp_path, more):
    assert "ARCHITECTURE" in refused(own(tmp_path, matrices(drawn()) | more))


def test_a_plain_file_is_each_class_that_it_has_the_tensors_of(tmp_path):
    w = drawn()
    computes(own(tmp_path, matrices(w)), formula(w, "relu"), architecture="relu")
    computes(own(tmp_path, linear(w) | {"b_dec": w.bd, "k": K}), formula(w, "topk"))
    t = matrices(w) | {"k": K, "threshold": 2.0, "group_sizes": torch.tensor([4, 60])}
    over = formula(w, "jumprelu", threshold=2.0)
    assert computes(own(tmp_path, t), over, architecture="matryoshka").k == K
    del t["group_sizes"]
    computes(own(tmp_path, t), over, architecture="batchtopk")
    in_a_dict = own(tmp_path, {"epoch": "x", "state_dict": t})
    computes(in_a_dict, formula(w, "topk"), architecture="topk")


def test_thresholds_may_be_one_for_all_or_logarithms(tmp_path):
    w = drawn(unit=False)
    f = formula(w, "jumprelu", centred=False, threshold=2.0)
    for one in (2.0, torch.tensor([2.0])):
        computes(own(tmp_path, matrices(w) | {"threshold": one}), f, architecture="jumprelu")
    where = own(tmp_path, matrices(w) | {"log_threshold": torch.full((F,), 2.0).log()})
    computes(where, f)
    each = formula(w, "jumprelu", centred=False, threshold=w.gate.double())
    computes(own(tmp_path, matrices(w) | {"threshold": w.gate}, "my.pth"), each)


@pytest.mark.parametrize("wrapper", ["module.", "module._orig_mod."])
def test_a_wrappers_name_is_no_matter(tmp_path, wrapper):
    w = drawn()
    for style in (linear(w) | {"b_dec": w.bd}, matrices(w)):
        where = own(tmp_path, {wrapper + name: t for name, t in style.items()})
        computes(where, formula(w, "relu"), architecture="relu")


@pytest.mark.parametrize("name", ["X-SAE-l1.pt", "layer1.sae.pt", "15.pt", "params.safetensors"])
def test_a_file_is_what_is_in_it_whatever_its_name(tmp_path, name):
    w = drawn()
    where = own(tmp_path, matrices(w) | {"k": torch.tensor(K)}, name)
    found = computes(where, formula(w, "topk"))
    assert (found.k, found.site.layer) == (K, 1 if "1." in name else None)
    where = own(tmp_path, linear(w) | {"decoder.bias": w.bd}, "X-SAE-l1.pt")  # qresearch's names
    computes(where, formula(w, "topk"), architecture="topk", k=K)


def test_a_bias_may_be_folded_as_the_readme_says(tmp_path):
    """An encoder that reads x, and a JumpReLU's that reads x - b_dec."""
    w = drawn()
    t = matrices(w) | {"W_enc": w.We}
    computes(
        own(tmp_path, t | {"k": K, "b_enc": w.be + w.We @ w.bd}), formula(w, "topk", centred=False)
    )
    t |= {"threshold": w.gate, "b_enc": w.be - w.We @ w.bd}
    computes(own(tmp_path, t), formula(w, "jumprelu", threshold=w.gate.double()))


BAD_OWN = {  # what differs from a good file -> architecture
    "k of two": ({"k": torch.tensor([3, 4])}, "topk"),
    "k a fraction": ({"k": 3.5}, "topk"),
    "no groups": ({}, "matryoshka"),
    "no thresholds": ({}, "jumprelu"),
    "another encoder": ({"W_enc": torch.ones(D + 1, F)}, "relu"),
    "thresholds of another": ({"threshold": torch.ones(5)}, "jumprelu"),
    "a further tensor": ({"steps": torch.ones(3)}, "relu"),
    "another bias": ({"b_enc": torch.ones(F - 1)}, "relu"),
    "a square": ({"W_enc": torch.eye(D), "W_dec": torch.eye(D), "b_enc": torch.ones(D)}, "relu"),
    "a module": ({"model": torch.nn.Linear(2, 2)}, "relu"),
}


@pytest.mark.parametrize("case", BAD_OWN)
def test_a_bad_file_of_ones_own_is_refused(tmp_path, case):
    change, architecture = BAD_OWN[case]
    where = own(tmp_path, matrices(drawn()) | change)
    refused(where, architecture=architecture, k=K)


def test_rows_of_any_norm_are_measured_and_not_trained(world, tmp_path):
    w = drawn(unit=False)
    where = own(tmp_path, matrices(w) | {"k": K})
    assert tiny.main(world, tmp_path / "runs", SAE=where, TOKENS=0) == 0
    assert tiny.main(world, tmp_path / "runs", SAE=where, RUN_NAME="y") == 2
    assert not (tmp_path / "runs" / "y").exists()
