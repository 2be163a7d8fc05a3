"""Each family of public SAEs, its files as they lie in public, is here what its own code computes.

A writer puts an SAE of random tensors in a folder as its family does and returns what SAE= names,
with the family's formula in float64. Real libraries are asked in tests/libraries.py.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_formats import refused
from test_run import box, main, without_figures  # noqa: F401  fixtures

from klsplice.errors import UserError
from klsplice.formats import read
from klsplice.formats.families import FAMILIES
from report import changes
from sae import build

D, F, K, LAYER = 32, 64, 4, 1  # of the box's LM
HOOK = f"blocks.{LAYER}.hook_resid_post"
S = "sae_weights.safetensors"


def drawn(unit=True) -> SimpleNamespace:
    rng = torch.Generator().manual_seed(len(FAMILIES))
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


# ---- dictionary_learning ----------------------------------------------------------------------


def topk_of_2024(at):
    """No k among the tensors before December 2024."""
    w, config = drawn(), trainer("AutoEncoderTopK", trainer_class="TrainerTopK", k=K)
    return put(at / "x", "ae.pt", linear(w) | {"b_dec": w.bd}, config), formula(w, "topk")


def compiled_topk(at):
    w = drawn()
    tensors = linear(w) | {"b_dec": w.bd, "k": torch.tensor(K), "threshold": torch.tensor(1.0)}
    tensors = {f"_orig_mod.{name}": t for name, t in tensors.items()}
    return put(at / "x", "ae.pt", tensors, trainer("AutoEncoderTopK", k=K)), formula(w, "topk")


def p_anneal(at):
    w, config = drawn(), trainer("AutoEncoder", trainer_class="PAnnealTrainer", p_start=1)
    return put(at / "x", "ae.pt", linear(w) | {"bias": w.bd}, config), formula(w, "relu")


def new_autoencoder(at):
    w, config = drawn(unit=False), trainer("AutoEncoderNew", l1_penalty=0.02)
    tensors = linear(w) | {"decoder.bias": w.bd}
    return put(at / "x", "ae.pt", tensors, config), formula(w, "relu", centred=False)


def gated(at):
    w, config = drawn(), trainer("GatedAutoEncoder", trainer_class="GatedSAETrainer")
    tensors = {"encoder.weight": w.We, "decoder.weight": w.Wd.T, "decoder_bias": w.bd}
    tensors |= {"r_mag": w.r, "gate_bias": w.b_gate, "mag_bias": w.b_mag}
    return put(at / "x", "ae.pt", tensors, config), formula(w, "gated")


# ---- SAELens ----------------------------------------------------------------------------------


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


# ---- single projects --------------------------------------------------------------------------


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


def own_matrices(at):
    """A module of one's own, its matrices as einsum likes them; k in the file."""
    w = drawn()
    tensors = {"W_enc": w.We.T, "b_enc": w.be, "W_dec": w.Wd, "b_dec": w.bd, "k": torch.tensor(K)}
    return put(at / "resid_post_layer_1", "mine.pt", tensors) / "mine.pt", formula(w, "topk")


def own_linear(at):
    w = drawn()
    tensors = linear(w) | {"b_dec": w.bd, "k": torch.tensor(K)}
    where = put(at / "layer_1" / "resid_post", "mine.safetensors", tensors)
    return where / "mine.safetensors", formula(w, "topk")


def own_jumprelu(at):
    w = drawn(unit=False)
    where = put(at / "resid_post_layer_1", "my.pth", matrices(w) | {"threshold": w.gate})
    return where / "my.pth", formula(w, "jumprelu", centred=False, threshold=w.gate.double())


WRITERS = {
    writer.__name__: writer
    for writer in (
        *(topk_of_2024, compiled_topk, p_anneal, new_autoencoder, gated),
        *(saelens_3, saelens_5_topk, saelens_gated, saelens_batchtopk, saelens_matryoshka),
        *(sparsify, llama_scope, llama_scope_r1, llama_scope_folded),
        *(
            gemma_scope,
            gemma_scope_2,
            gemma_scope_2_with_config,
            qwen_scope,
            goodfire,
            deepseek_r1,
            openai,
        ),
        *(own_matrices, own_linear, own_jumprelu),
    )
}


@pytest.mark.parametrize("family", WRITERS)
def test_a_family_reads_as_its_own_code_computes(tmp_path, family):
    where, f = WRITERS[family](tmp_path)
    source = read.open_sae(str(where), "")
    sae = build(source, source.read_weights()).eval()
    x_ND = torch.randn(200, D, generator=torch.Generator().manual_seed(1)) * 3
    with torch.no_grad():
        y_ND, z_NF = sae(x_ND)
    wanted_ND = f(x_ND)
    assert (y_ND.double() - wanted_ND).abs().max() < 1e-5 * wanted_ND.abs().max()
    assert 0 < (z_NF > 0).float().mean() < 1
    assert source.site == (LAYER, "the residual after a block")
    assert (source.lm_name or "gem").endswith("gem")


@pytest.mark.parametrize("family", WRITERS)
def test_a_family_is_finetuned_saved_and_read_again(box, tmp_path, capsys, family):  # noqa: F811
    where, _ = WRITERS[family](tmp_path)
    few = {"TOKENS": 2048, "EVAL_EVERY": 10**6, "LR": 1e-3}
    assert main(box, tmp_path / "runs", SAE=where, **few) == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "runs" / "x" / "results.json").read_text())
    assert results["kl_after"] != results["kl_before"]
    assert main(box, tmp_path / "runs", SAE=tmp_path / "runs/x", RUN_NAME="y", **few) == 0
    again = json.loads((tmp_path / "runs" / "y" / "results.json").read_text())
    assert again["kl_before"] == pytest.approx(results["kl_after"], rel=1e-5)


OTHERS = {  # files that hold no SAE of one residual stream -> what the refusal calls them
    "transcoder": (S, {"architecture": "skip_transcoder", "d_in": D}, "cfg.json"),
    "a crosscoder": ("params.safetensors", {"hf_hook_point_in": ["a", "b"]}, "config.json"),
    "crosscoder or cross-layer": ("params_layer_0.safetensors", None, ""),
    "a transcoder": ("sae.safetensors", {"transcode": True}, "cfg.json"),
    "is a clt": (S, {"sae_type": "clt"}, "config.json"),
    "temporal SAE": ("latest_ckpt.safetensors", {}, "conf.yaml"),
    "attention outputs": ("gpt2.pt", {}, "gpt2_cfg.json"),
    "set of transcoders": ("layer_3.safetensors", None, ""),
    "layout of its own": ("sae.pt", {"sae_type": "batchtopk"}, "config.json"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_sae_of_the_residual_is_refused_by_its_name(tmp_path, kind):
    file, config, name = OTHERS[kind]
    put(tmp_path / "x", file, {"W_enc": torch.ones(2, D, F)}, config, name)
    refused(tmp_path / "x", kind, CHECK_SAE=False)


def test_a_folder_of_several_saes_is_refused_with_one_to_name(tmp_path):
    where, _ = qwen_scope(tmp_path)
    assert f"SAE={where.parent}/layer1.sae.pt" in refused(where.parent, "name one of them")
    sparsify(tmp_path / "repo")
    assert f"SAE={tmp_path}/repo/layers.1/" in refused(tmp_path / "repo", "name one of them")


def test_what_cannot_be_folded_is_refused_with_its_reason(tmp_path):
    where, _ = openai(tmp_path / "a")
    tensors = torch.load(where) | {"activation": "TopK", "activation_state_dict": {"k": K}}
    torch.save(tensors, where)
    refused(where, "mean 0 and variance 1, each token by its own")
    tensors = linear(drawn()) | {"decoder.bias": drawn().bd, "log_jumprelu_threshold": drawn().gate}
    refused(put(tmp_path / "b", S, tensors, lm_saes({})), "in = None")
    for more in ({"norm_activation": "token-wise"}, {"act_fn": "topk"}):
        refused(put(tmp_path / "c", S, tensors, lm_saes(more)), "is not supported")


# ---- files of one's own -----------------------------------------------------------------------


def own(at, tensors, name="mine.pt"):
    return put(at / "own", name, tensors) / name


def same(where, f, **given):
    """Whether the SAE that is opened computes f."""
    source = read.open_sae(str(where), "", **given)
    sae = build(source, source.read_weights()).eval()
    x_ND = torch.randn(50, D, generator=torch.Generator().manual_seed(1))
    wanted_ND = f(x_ND)
    assert (sae(x_ND)[0].double() - wanted_ND).abs().max() < 1e-5 * wanted_ND.abs().max()
    return source


@pytest.mark.parametrize("tokens", [256, 0])
def test_a_plain_file_takes_class_and_k_from_the_constants(box, tmp_path, capsys, tokens):  # noqa: F811
    w = drawn()
    where = own(tmp_path, matrices(w))
    same(where, formula(w, "topk"), architecture="topk", k=K)
    few = {"SAE": where, "TOKENS": tokens, "ARCHITECTURE": "topk", "K": K}
    assert main(box, tmp_path / "runs", **few) == 0, capsys.readouterr().err
    assert (
        f"taken for a topk with k = {K}, whose encoder reads x - b_dec" in capsys.readouterr().out
    )
    source = json.loads((tmp_path / "runs/x/run.json").read_text())["source"]
    assert (source["k"], source["architecture"]) == (K, "topk")


NOT_SAID = [
    ({}, "set ARCHITECTURE=relu, or ARCHITECTURE=topk (or batchtopk) and K"),
    (
        {"threshold": torch.tensor(1.0)},
        "set ARCHITECTURE=topk or batchtopk and K, or ARCHITECTURE=j",
    ),
    ({"k": 4, "threshold": 1.0}, "set ARCHITECTURE=topk or batchtopk, or ARCHITECTURE="),
]


@pytest.mark.parametrize(("more", "hint"), NOT_SAID)
def test_a_plain_file_that_does_not_say_its_class_is_asked_for_it(tmp_path, more, hint):
    """k and a threshold stand in a TopK's file and in a BatchTopK's."""
    where = own(tmp_path, matrices(drawn()) | more)
    assert hint in refused(where, "mine.pt does not say its activation")


def test_a_plain_file_is_read_as_each_class_that_it_has_the_tensors_of(tmp_path):
    w = drawn()
    same(own(tmp_path, matrices(w)), formula(w, "relu"), architecture="relu")
    t = matrices(w) | {"k": K, "threshold": 2.0, "group_sizes": torch.tensor([4, 60])}
    found = same(own(tmp_path, t), formula(w, "jumprelu", threshold=2.0), architecture="matryoshka")
    assert found.k == K
    del t["group_sizes"]
    same(own(tmp_path, t), formula(w, "jumprelu", threshold=2.0), architecture="batchtopk")
    same(own(tmp_path, {"epoch": "x", "state_dict": t}), formula(w, "topk"), architecture="topk")


def test_a_jumprelus_thresholds_may_be_one_for_all_or_logarithms(tmp_path):
    w = drawn()
    f = formula(w, "jumprelu", centred=False, threshold=2.0)
    for one in (2.0, torch.tensor([2.0])):
        same(own(tmp_path, matrices(w) | {"threshold": one}), f, architecture="jumprelu")
    where = own(tmp_path, matrices(w) | {"log_threshold": torch.full((F,), 2.0).log()})
    same(where, f)
    same(where, f, architecture="jumprelu")


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "sae."])
def test_the_name_of_a_wrapper_before_every_tensor_is_no_matter(tmp_path, wrapper):
    w = drawn()
    for style in (linear(w) | {"b_dec": w.bd}, matrices(w)):
        where = own(tmp_path, {wrapper + name: t for name, t in style.items()})
        same(where, formula(w, "relu"), architecture="relu")


def test_a_topk_of_ones_own_is_converted(box, tmp_path, capsys):  # noqa: F811
    where = own(tmp_path, matrices(drawn()) | {"k": K})
    for name in ("matryoshka", "jumprelu"):
        few = {"SAE": where, "TOKENS": 256, "ARCHITECTURE": name, "RUN_NAME": name}
        assert main(box, tmp_path / "runs", **few) == 0, capsys.readouterr().err
        assert f"the TopK SAE is converted to {name}" in capsys.readouterr().out


class Module(torch.nn.Module):
    pass


W = torch.ones
BAD_OWN = {  # what differs from a good file, or what is in it instead -> words, architecture
    "k of two": ({"k": torch.tensor([3, 4])}, r"mine.pt: k is \[3, 4\]", "topk"),
    "k a fraction": ({"k": 3.5}, r"mine.pt: k is 3.5", "topk"),
    "no groups": ({}, "mine.pt has no group_sizes, as a matryoshka has", "matryoshka"),
    "no thresholds": ({}, "mine.pt has no threshold, as a jumprelu has", "jumprelu"),
    "another encoder": (
        {"W_enc": W(D + 1, F)},
        r"mine.pt: W_enc is \(33, 64\), its biases say \(64, 32\)",
        "relu",
    ),
    "thresholds of another": (
        {"threshold": W(5)},
        r"mine.pt: threshold is \(5,\), its biases say \(64,\)",
        "jumprelu",
    ),
    "more": ({"steps": W(3)}, "mine.pt has also steps(?s:.*)save it without them", "relu"),
    "another bias": (
        {"b_enc": W(F - 1)},
        r"mine.pt: W_enc is \(32, 64\), its biases say \(63, 32\)",
        "relu",
    ),
    "a dict in a dict": (lambda t: {"model": t}, "'model' is a dict", "relu"),
    "a module": (lambda t: Module(), "it asks to run code", "relu"),
}


@pytest.mark.parametrize("case", BAD_OWN)
def test_a_bad_file_of_ones_own_is_refused_by_what_is_in_it(tmp_path, case):
    change, words, architecture = BAD_OWN[case]
    t = matrices(drawn())
    where = own(tmp_path, t)
    torch.save(change(t) if callable(change) else t | change, where)
    with pytest.raises(UserError, match=words) as e:
        read.open_sae(str(where), "", architecture=architecture, k=K).read_weights()
    said = str(e.value)
    assert "config" not in said and said.count("\n") == 1  # its hint
    assert "torch.save(sae.state_dict(), PATH)" in said or not callable(change)


CLAIMED = ["2024-05.pt", "X-SAE-l1.pt", "X-SAE-l1.pth", "layer1.sae.pt", "15.pt"]


@pytest.mark.parametrize("name", [*CLAIMED, "params.safetensors"])
@pytest.mark.parametrize("style", [linear, matrices])
def test_a_file_of_ones_own_is_what_is_in_it_whatever_its_name(tmp_path, name, style):
    w = drawn()
    where = own(tmp_path, style(w) | {"b_dec": w.bd, "k": torch.tensor(K)}, name)
    found = same(where, formula(w, "topk"))
    assert (found.k, found.site.layer) == (K, 1 if "1." in name else None)


def test_a_file_that_names_no_class_is_of_the_class_that_one_says_whatever_its_name(tmp_path):
    w = drawn()
    where = own(tmp_path, linear(w) | {"decoder.bias": w.bd}, "X-SAE-l1.pt")
    same(where, formula(w, "topk"), architecture="topk", k=K)
    assert "reads x" in same(where, formula(w, "relu", centred=False)).note  # qresearch's


def test_k_that_is_said_must_be_the_saes_own(box, tmp_path, capsys):  # noqa: F811
    where = own(tmp_path, matrices(drawn()) | {"k": K})
    assert main(box, tmp_path / "runs", SAE=where, TOKENS=0, K=K + 1) == 2
    assert f"K = {K + 1}: the SAE has k = {K}" in capsys.readouterr().err
    assert main(box, tmp_path / "runs", SAE=where, TOKENS=0, K=K) == 0


def test_rows_of_any_norm_are_measured_and_not_trained(box, tmp_path, capsys):  # noqa: F811
    w = drawn(unit=False)
    w.Wd[3] = 0
    where = own(tmp_path, matrices(w) | {"k": K})
    same(where, formula(w, "topk"))
    assert main(box, tmp_path / "runs", SAE=where, TOKENS=0) == 0, capsys.readouterr().err
    assert main(box, tmp_path / "runs", SAE=where, TOKENS=256, RUN_NAME="y") == 2
    assert "not of unit norm" in capsys.readouterr().err


def test_the_cosines_are_there_for_an_sae_given_as_a_file(box, tmp_path):  # noqa: F811
    where = own(tmp_path, matrices(drawn()))
    few = {"SAE": where, "TOKENS": 256, "ARCHITECTURE": "topk", "K": K, "LR": 1e-2}
    assert main(box, tmp_path / "runs", **few) == 0
    found = changes.turned(str(tmp_path / "runs" / "x"))
    assert found["decoder"].shape == (F,) and 0.5 < found["decoder"].min() < 0.9999


def test_an_encoder_that_reads_x_is_brought_into_a_file_as_the_readme_says(tmp_path):
    """And a JumpReLU's that reads x - b_dec."""
    w = drawn()
    t = matrices(w) | {"W_enc": w.We, "k": K}
    where = own(tmp_path, t | {"b_enc": w.be + w.We @ w.bd})
    same(where, formula(w, "topk", centred=False))
    t = matrices(w) | {"W_enc": w.We, "threshold": w.gate, "b_enc": w.be - w.We @ w.bd}
    same(own(tmp_path, t), formula(w, "jumprelu", threshold=w.gate.double()))


def test_a_plain_file_lacks_nothing_and_its_matrices_say_how_they_lie(tmp_path):
    w = drawn()
    put(tmp_path / "y", "mine.pt", {"W_enc": w.We.T, "b_enc": w.be})
    refused(tmp_path / "y" / "mine.pt", "lacks W_dec or decoder.weight, b_dec or decoder.bias")
    square = torch.eye(D)
    put(tmp_path / "z", "mine.pt", matrices(w) | {"W_enc": square, "b_enc": w.bd, "W_dec": square})
    refused(tmp_path / "z" / "mine.pt", "may lie either way")


def test_every_row_of_families_has_a_writer_in_this_file(tmp_path, monkeypatch):
    files, took = read._files, []

    def noted(family, *args):
        found = files(family, *args)
        took.extend([family] if found else [])
        return found

    monkeypatch.setattr(read, "_files", noted)
    rows = set()
    for name, writer in WRITERS.items():
        where, _ = writer(tmp_path / name)
        read.open_sae(str(where), "")
        rows.add(took[-1])  # the first that describes it ends the search
    assert [row.weights for row in FAMILIES if row not in rows] == []
