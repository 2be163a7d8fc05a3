"""Each family of public SAEs, its files as they lie in public, is here what its own code computes.

A writer puts an SAE of random tensors in a folder as its family does and returns what SAE= names,
with the family's formula in float64. Real libraries are asked in tests/libraries.py.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from test_formats import LM, refused
from test_run import box, main, without_figures  # noqa: F401  fixtures

from klsplice.formats import read
from klsplice.formats.families import FAMILIES
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
    w = drawn(unit=False)
    where = put(at / "layer_1" / "resid_post", "mine.safetensors", linear(w) | {"b_dec": w.bd})
    return where / "mine.safetensors", formula(w, "relu")


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
        *(qwen_scope, goodfire, deepseek_r1, openai),
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


def test_a_plain_file_takes_class_and_k_from_the_constants(box, tmp_path, capsys):  # noqa: F811
    w = drawn()
    where = put(tmp_path / "x", "mine.pt", matrices(w)) / "mine.pt"
    source = read.open_sae(str(where), "", architecture="topk", k=K)
    sae = build(source, source.read_weights()).eval()
    x_ND = torch.randn(50, D, generator=torch.Generator().manual_seed(1))
    wanted_ND = formula(w, "topk")(x_ND)
    assert (sae(x_ND)[0].double() - wanted_ND).abs().max() < 1e-5 * wanted_ND.abs().max()
    few = {"SAE": where, "TOKENS": 256, "ARCHITECTURE": "topk", "K": K}
    assert main(box, tmp_path / "runs", **few) == 0
    assert (
        f"taken for a topk with k = {K}, whose encoder reads x - b_dec" in capsys.readouterr().out
    )
    assert json.loads((tmp_path / "runs/x/run.json").read_text())["source"]["k"] == K
    put(tmp_path / "y", "mine.pt", {"W_enc": w.We.T, "b_enc": w.be})
    refused(tmp_path / "y" / "mine.pt", "lacks W_dec or decoder.weight, b_dec or decoder.bias")
    square = torch.eye(D)
    put(tmp_path / "z", "mine.pt", matrices(w) | {"W_enc": square, "b_enc": w.bd, "W_dec": square})
    refused(tmp_path / "z" / "mine.pt", "may lie either way")


def test_every_row_of_the_table_has_a_writer_here_or_in_test_formats():
    assert LM.get_text_config().hidden_size  # the LM that refused() opens an SAE for
    described = {row.describe for row in FAMILIES}
    assert len(FAMILIES) == 15 and len(described) == 11
