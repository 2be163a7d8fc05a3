"""An SAE is the same function after writing and reading; a bad file is refused and runs nothing."""

import json
import os
import pickle
import random
import shutil
import time
import zipfile
from types import SimpleNamespace

import hub
import numpy as np
import pytest
import torch
from conftest import constants
from safetensors.torch import load_file, save_file

from klsplice.errors import LINES, UserError
from klsplice.formats import fits, sites
from klsplice.formats import read as reader
from klsplice.formats import saelens as saelens_format
from klsplice.formats import source as sources
from klsplice.formats import write as writer
from learners import start
from report import card
from sae import build

D, F, K, LAYER = 16, 48, 6, 3
GROUPS = [6, 12, 30]
LM = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=D))
ARCHITECTURES = ["topk", "batchtopk", "matryoshka", "relu", "jumprelu"]
OURS = ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D")


def random_weights(architecture, seed=0):
    """Encoder and decoder that point anywhere, biases that matter."""
    rng = torch.Generator().manual_seed(seed)
    sizes = {"W_enc_FD": (F, D), "b_enc_F": (F,), "W_dec_FD": (F, D), "b_dec_D": (D,)}
    w = {name: torch.randn(size, generator=rng) for name, size in sizes.items()}
    if architecture in ("topk", "batchtopk", "matryoshka"):
        w["W_dec_FD"] /= w["W_dec_FD"].norm(dim=1, keepdim=True)
        w["threshold"] = torch.tensor(2.0)
    if architecture == "jumprelu":
        w["threshold"] = torch.rand(F, generator=rng) * 3
    if architecture == "matryoshka":
        w["group_sizes"] = torch.tensor(GROUPS)
    return w


def some_x(n=40, seed=1):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) * 2


def dense(architecture, w, x):
    """Codes and reconstruction by their definition, in float64."""
    w = {n: t.double() for n, t in w.items()}
    x = x.double() - (0 if architecture == "jumprelu" else w["b_dec_D"])
    pre = x @ w["W_enc_FD"].T + w["b_enc_F"]
    if architecture == "topk":
        rank = pre.argsort(dim=1, descending=True).argsort(dim=1)
        z = pre.clamp(min=0) * (rank < K)
    elif architecture == "relu":
        z = pre.clamp(min=0)
    else:
        z = pre.clamp(min=0) * (pre > w["threshold"])
    return z, z @ w["W_dec_FD"] + w["b_dec_D"]


def setting(**changes):
    return constants(**{"LAYER": LAYER} | changes)


def opened(folder, **changes):
    """The SAE as run.py opens it, for evaluation."""
    cfg = setting(SAE=str(folder), **changes)
    source = start.find_source(cfg)
    start.read_source(cfg, source, LM)
    return build(source, source.weights()).eval(), source


def source_of(architecture, **more):
    k = None if architecture in ("relu", "jumprelu") else K
    return reader.Source("here", architecture, D, F, k=k, l1=0.02, **more)


def written(folder, architecture, source=None, seed=0):
    """-> an SAE and the weights that it was built from, saved in `folder`."""
    w = random_weights(architecture, seed)
    source = source or source_of(architecture)
    sae = build(source, w).eval()
    writer.save(str(folder), sae, source, setting().constants(), bos=True)
    return sae, w


@torch.no_grad()
def same(sae, architecture, w, scaled=False):
    """sae(x) equals the dense formula; `scaled`: its codes are those times the decoder's norms."""
    z, y = dense(architecture, w, some_x())
    y_found, z_found = sae(some_x())
    z = z * w["W_dec_FD"].double().norm(dim=1) if scaled else z
    assert (z > 0).any() and torch.equal(z_found > 0, z > 0)
    torch.testing.assert_close(z_found.double(), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y_found.double(), y, rtol=1e-5, atol=1e-5)


# ---- writing and reading ---------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_sae_computes_its_definition(architecture):
    w = random_weights(architecture)
    same(build(source_of(architecture), w).eval(), architecture, w)


@pytest.mark.parametrize("form", ["dictionary_learning", "SAELens", "both", "run"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_written_reads_as_the_same_function(at, architecture, form):
    _, w = written(at / "run/sae", architecture)
    (at / "run/run.json").write_text("{}")
    files = {"dictionary_learning": ("ae.pt", "config.json")}
    files["SAELens"] = ("cfg.json", "sae_weights.safetensors")
    for name in files.get(form, ()):
        os.makedirs(at / "alone", exist_ok=True)
        shutil.copy(at / "run/sae" / name, at / "alone" / name)
    folder = {"both": "run/sae", "run": "run"}.get(form, "alone")
    sae, source = opened(at / folder)
    same(sae, architecture, w, scaled=architecture in ("relu", "jumprelu"))
    as_jumprelu = form == "SAELens" and architecture in ("batchtopk", "matryoshka")
    assert source.architecture == ("jumprelu" if as_jumprelu else architecture)
    assert (source.site.layer, source.d_in, source.d_sae) == (LAYER, D, F)
    assert source.lm_name == "tiny"
    norm_F = sae.W_dec_FD.norm(dim=1)
    torch.testing.assert_close(norm_F, torch.ones(F), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["ae.pt", "SAELens"])
def test_a_batchtopk_that_has_no_threshold_yet_keeps_all_that_is_positive(at, form):
    w = random_weights("batchtopk") | {"threshold": torch.tensor(-1.0)}
    source = source_of("batchtopk")
    writer.save(str(at), build(source, w), source, setting().constants(), bos=True)
    if form == "SAELens":
        os.remove(at / "ae.pt")
    same(opened(at)[0], "relu", w)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_cards_plain_pytorch_is_the_sae_that_was_written(at, architecture):
    _, w = written(at, architecture)
    constants = setting(ARCHITECTURE=architecture).constants()
    code = card.loading({"constants": constants, "source": {}})["PyTorch alone"]
    found = {}
    exec(code.replace("path/to/this/folder", str(at)), found)  # as it stands there
    z, y = dense(architecture, w, some_x())
    scaled = architecture in ("relu", "jumprelu")
    z = z * w["W_dec_FD"].double().norm(dim=1) if scaled else z
    codes = found["encode"](some_x())
    torch.testing.assert_close(codes.double(), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["decode"](codes).double(), y, rtol=1e-5, atol=1e-5)


def test_ten_times_written_and_read_is_still_the_same(at):
    for architecture in ARCHITECTURES:
        folder = at / architecture
        _, w = written(folder / "0", architecture)
        for i in range(10):
            sae, source = opened(folder / str(i))
            after = setting(SAE=str(folder / str(i))).constants()
            writer.save(str(folder / str(i + 1)), sae, source, after, bos=True)
        same(opened(folder / "10")[0], architecture, w, scaled=architecture in ("relu", "jumprelu"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_written_tensors_are_plain_float32_on_the_cpu(at, architecture):
    written(at, architecture)
    tensors = torch.load(at / "ae.pt", weights_only=True)
    whole = {"k": torch.int32, "group_sizes": torch.int64}
    for name, t in tensors.items():
        assert t.dtype == whole.get(name, torch.float32) and t.is_contiguous()
        assert type(t) is torch.Tensor and not t.requires_grad and t.device.type == "cpu"
    names = {
        "topk": "encoder.weight encoder.bias decoder.weight b_dec k threshold",
        "relu": "encoder.weight encoder.bias decoder.weight bias",
        "jumprelu": "W_enc b_enc W_dec b_dec threshold",
        "matryoshka": "W_enc b_enc W_dec b_dec k threshold group_sizes",
    }
    assert set(tensors) == set(names.get(architecture, names["topk"]).split())
    shapes = {"encoder.weight": (F, D), "decoder.weight": (D, F), "W_enc": (D, F), "W_dec": (F, D)}
    assert all(tuple(tensors[n].shape) == shapes[n] for n in shapes if n in tensors)


def test_the_saelens_config_has_the_keys_that_saelens_knows(at):
    known = {"architecture", "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input"}
    known |= {"normalize_activations", "reshape_activations", "metadata"}
    for architecture in ARCHITECTURES:
        written(at / architecture, architecture)
        config = json.loads((at / architecture / "cfg.json").read_text())
        assert config.keys() == known | ({"k"} if architecture == "topk" else set())
        assert config["metadata"]["hook_name"] == f"blocks.{LAYER}.hook_resid_post"


def test_the_sources_config_is_copied_and_only_added_to(at):
    hub.make_sae(at / "a", d_in=D, d_sae=F, k=K, layer=LAYER, lm_name="who/tiny", seed=0)
    path = at / "a/config.json"
    config = json.loads(path.read_text()) | {"extra": {"a": [1, None, "é"]}}
    config["trainer"]["trainer_class"] = "its own"
    config["trainer"]["submodule_name"] = "gpt_neox.layers.3"
    path.write_text(json.dumps(config))
    sae, source = opened(at / "a")
    writer.save(str(at / "b"), sae, source, setting(SAE=str(at / "a")).constants(), bos=True)
    after = json.loads((at / "b/config.json").read_text())
    for block, values in config.items():
        assert after[block].items() >= values.items()
    assert after.keys() - config.keys() == {"klsplice"}
    assert source.config == config  # not changed in place


@pytest.mark.parametrize("target", ["batchtopk", "jumprelu", "matryoshka"])
def test_a_converted_sae_is_written_as_what_it_has_become(at, target):
    hub.make_sae(at / "a", d_in=D, d_sae=F, k=K, layer=LAYER, lm_name="tiny", seed=0)
    _, source = opened(at / "a")
    w = random_weights(target)
    sae = build(source_of(target), w)
    writer.save(str(at / "b"), sae, source, setting().constants(), bos=True)
    found, source = opened(at / "b")
    assert source.architecture == target
    same(found, target, w, scaled=target == "jumprelu")


def test_a_scaled_relu_is_written_for_plain_residuals(at):
    w = random_weights("relu")
    source = source_of("relu")
    sae = build(source, {n: t.clone() for n, t in w.items()})
    sae.scale_by(7.5, 3.0)
    writer.save(str(at), sae, source, setting().constants(), bos=True)
    same(opened(at)[0], "relu", w, scaled=True)


# ---- other people's files --------------------------------------------------------------------


def theirs(architecture, w):
    """The tensors of a dictionary_learning file, by the table of its trainers."""
    if architecture in ("matryoshka", "jumprelu"):
        t = {"W_enc": w["W_enc_FD"].T, "W_dec": w["W_dec_FD"]}
        t |= {"b_enc": w["b_enc_F"], "b_dec": w["b_dec_D"]}
    else:
        t = {"encoder.weight": w["W_enc_FD"], "decoder.weight": w["W_dec_FD"].T}
        t |= {"encoder.bias": w["b_enc_F"]}
        t["bias" if architecture == "relu" else "b_dec"] = w["b_dec_D"]
    if architecture in ("topk", "batchtopk", "matryoshka"):
        t["k"] = torch.tensor(K, dtype=torch.int32)
    return t | {n: w[n] for n in ("threshold", "group_sizes") if n in w}


DICT_CLASSES = {
    "topk": "AutoEncoderTopK",
    "batchtopk": "BatchTopKSAE",
    "matryoshka": "MatryoshkaBatchTopKSAE",
    "relu": "AutoEncoder",
    "jumprelu": "JumpReluAutoEncoder",
}


def dictionary_learning(folder, architecture, seed=0, buffer=None, **of_trainer):
    w = random_weights(architecture, seed)
    trainer = {"trainer_class": "Trainer", "dict_class": DICT_CLASSES[architecture]}
    trainer |= {"activation_dim": D, "dict_size": F, "layer": LAYER, "lm_name": "who/tiny"}
    trainer |= {"k": K} if "k" in theirs(architecture, w) else {"l1_penalty": 0.02}
    trainer |= of_trainer
    os.makedirs(folder, exist_ok=True)
    torch.save(theirs(architecture, w), folder / "ae.pt")
    write_config(folder, {"trainer": trainer, "buffer": {"ctx_len": 128} | (buffer or {})})
    return w


def write_config(folder, config, name="config.json"):
    (folder / name).write_text(json.dumps(config))


def saelens(folder, kind, **config):
    w = random_weights(kind)
    tensors = {"W_enc": w["W_enc_FD"].T, "W_dec": w["W_dec_FD"]}
    tensors |= {"b_enc": w["b_enc_F"], "b_dec": w["b_dec_D"]}
    if kind == "jumprelu":
        tensors["threshold"] = w["threshold"]
    name = {"relu": "standard"}.get(kind, kind)
    about = {"architecture": name, "d_in": D, "d_sae": F} | ({"k": K} if name == "topk" else {})
    about["metadata"] = {"hook_name": f"blocks.{LAYER}.hook_resid_post", "model_name": "tiny"}
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "sae_weights.safetensors")
    write_config(folder, about | config, "cfg.json")
    return w


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_dictionary_learning_file_reads_as_its_library_computes(at, architecture):
    w = dictionary_learning(at, architecture)
    sae, source = opened(at)
    same(sae, architecture, w)
    assert source.lm_name == "who/tiny"
    assert source.l1 == (0.02 if architecture == "relu" else None)
    if architecture == "matryoshka":
        assert sae.groups == GROUPS


def test_k_is_read_from_the_config_and_the_hubs_folder_loads(at):
    hub.make_sae(at / "trainer_2", d_in=D, d_sae=F, k=K, layer=LAYER, lm_name="tiny", seed=0)
    sae, source = opened(at / "trainer_2")
    assert (sae.k, source.k) == (K, K)
    assert (sae.encode(some_x()) > 0).sum(1).max() == K


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions_and_parameters_are_read_as_plain_float32(at, dtype):
    w = dictionary_learning(at, "topk")
    tensors = {n: t.to(dtype) if t.ndim else t for n, t in theirs("topk", w).items()}
    parameters = {n: torch.nn.Parameter(t) if t.ndim else t for n, t in tensors.items()}
    torch.save(parameters, at / "ae.pt")
    weights = opened(at)[1].weights()
    for name in OURS:
        assert weights[name].dtype == torch.float32 and not weights[name].requires_grad
        torch.testing.assert_close(weights[name], w[name].to(dtype).float())


def test_the_tensors_of_a_file_are_copies_that_may_be_changed(at):
    dictionary_learning(at, "topk")
    before = (at / "ae.pt").read_bytes()
    weights = opened(at)[1].weights()
    for name in OURS:
        assert weights[name].is_contiguous()
        weights[name].zero_()
    assert (at / "ae.pt").read_bytes() == before


@pytest.mark.parametrize("where", ["layer_3/width_16k/average_l0_71", "plain"])
def test_gemma_scope_reads_the_residual_itself(at, where):
    w = random_weights("jumprelu")
    arrays = {n: t.numpy() for n, t in theirs("jumprelu", w).items()}
    os.makedirs(at / where)
    np.savez(at / where / "params.npz", **arrays)
    sae, source = opened(where)
    same(sae, "jumprelu", w)
    assert source.site.layer == (3 if where != "plain" else None)


def test_gemma_scope_2_reads_the_residual_itself(at):
    w = random_weights("jumprelu")
    tensors = {n.lower(): t.contiguous() for n, t in theirs("jumprelu", w).items()}
    save_file(tensors, at / "params.safetensors")
    config = {"architecture": "jump_relu", "model_name": "who/tiny", "width": F, "l0": 60}
    write_config(at, config | {"hf_hook_point_in": f"model.layers.{LAYER}.output"})
    sae, source = opened(at)
    same(sae, "jumprelu", w)
    assert (source.site.layer, source.lm_name) == (LAYER, "who/tiny")


@pytest.mark.parametrize("centred", [None, True, False])
@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu"])
def test_an_saelens_file_is_centred_exactly_if_it_says_so(at, architecture, centred):
    """SAELens' default is to subtract b_dec, for a JumpReLU too."""
    config = {} if centred is None else {"apply_b_dec_to_input": centred}
    w = saelens(at, architecture, **config)
    shift = w["W_enc_FD"].double() @ w["b_dec_D"].double()
    folded = dict(w)
    if architecture == "jumprelu" and centred is not False:  # the formula does not subtract
        folded["b_enc_F"] = w["b_enc_F"] - shift
    if architecture != "jumprelu" and centred is False:  # the formula subtracts
        folded["b_enc_F"] = w["b_enc_F"] + shift
    same(opened(at)[0], architecture, folded)


def test_saelens_rescaling_by_decoder_norms_is_folded(at):
    w = saelens(at, "topk", rescale_acts_by_decoder_norm=True)
    scale_F1 = torch.rand(F, 1, generator=torch.Generator().manual_seed(3)) + 0.5
    w["W_dec_FD"] = w["W_dec_FD"] * scale_F1
    tensors = {"W_enc": w["W_enc_FD"].T, "W_dec": w["W_dec_FD"]}
    tensors |= {"b_enc": w["b_enc_F"], "b_dec": w["b_dec_D"]}
    save_file({n: t.contiguous() for n, t in tensors.items()}, at / "sae_weights.safetensors")
    wanted = {"W_enc_FD": w["W_enc_FD"] * scale_F1, "b_enc_F": w["b_enc_F"] * scale_F1[:, 0]}
    wanted |= {"W_dec_FD": w["W_dec_FD"] / scale_F1, "b_dec_D": w["b_dec_D"]}
    same(opened(at)[0], "topk", wanted)


OLD = {  # SAELens 3 to 5: architecture here, what the config says instead of version 6's words
    "3": ("relu", {"architecture": None, "activation_fn": "relu", "normalize_activations": False}),
    "4": ("relu", {"normalize_activations": None, "activation_fn_str": "relu"}),
    "4, topk": ("topk", {"architecture": "standard", "activation_fn_str": "topk"}),
    "5, topk": ("topk", {"activation_fn_str": "topk"}),
}


@pytest.mark.parametrize("version", OLD)
def test_older_files_of_saelens_read_as_they_compute(at, version):
    """Their k is among the activation's arguments; their latents may have scales of 1."""
    architecture, config = OLD[version]
    w = saelens(at, architecture, **config)
    path = at / "cfg.json"
    old = json.loads(path.read_text())
    top = old.pop("metadata") | ({"activation_fn_kwargs": {"k": K}} if old.pop("k", 0) else {})
    write_config(at, old | top, "cfg.json")
    file = at / "sae_weights.safetensors"
    save_file(load_file(file) | {"scaling_factor": torch.ones(F)}, file)
    sae, source = opened(at)
    same(sae, architecture, w)
    assert source.site.layer == LAYER and source.lm_name == "tiny"
    save_file(load_file(file) | {"scaling_factor": torch.full((F,), 2.0)}, file)
    refused(at, "scales its latents by scaling_factor")


@pytest.mark.parametrize("architecture", ["topk", "matryoshka"])
def test_older_files_of_dictionary_learning_read_as_they_compute(at, architecture):
    """k stood in the config alone; torch.compile puts a prefix before each name."""
    w = dictionary_learning(at, architecture)
    old = {f"_orig_mod.{n}": t for n, t in theirs(architecture, w).items() if n != "k"}
    torch.save(old, at / "ae.pt")
    sae, source = opened(at)
    same(sae, architecture, w)
    assert sae.k == source.k == K


def test_a_gemma_scope_2_folder_without_a_config_is_known_by_its_name(at):
    folder = at / "gemma-scope-2-1b-pt" / "resid_post_all" / "layer_3_width_16k_l0_small"
    folder.mkdir(parents=True)
    w = random_weights("jumprelu")
    names = {"w_enc": w["W_enc_FD"].T, "w_dec": w["W_dec_FD"], "threshold": w["threshold"]}
    names |= {"b_enc": w["b_enc_F"], "b_dec": w["b_dec_D"]}
    save_file({n: t.contiguous() for n, t in names.items()}, folder / "params.safetensors")
    sae, source = opened(folder, MODEL="google/gemma-3-1b-pt")
    same(sae, "jumprelu", w)
    assert source.site == sites.Site(3, sites.RESIDUAL)


PLACES = {  # how a file names where it reads -> the block, or None where it is something else
    "blocks.3.hook_resid_post": 3,
    "blocks.4.hook_resid_pre": 3,  # before a block is after the one under it
    "model.layers.3": 3,
    "model.layers.3.output": 3,
    "transformer.h.3": 3,
    "resid_post_layer_3": 3,
    "blocks.0.hook_resid_pre": None,
    "blocks.3.hook_resid_mid": None,
    "blocks.3.hook_mlp_out": None,
    "blocks.3.attn.hook_z": None,
    "model.layers.3.post_feedforward_layernorm.output": None,
    "mlp_out_layer_3": None,
    "hook_embed": None,
    "blocks.\N{SUPERSCRIPT TWO}.hook_resid_post": None,
}


@pytest.mark.parametrize("hook", PLACES)
@pytest.mark.parametrize("where", ["metadata", "hook_name", "hook_point", "dictionary_learning"])
def test_an_sae_that_does_not_read_the_residual_after_a_block_is_refused(at, hook, where):
    """Also with CHECK_SAE = False. SAELens said it at the top level before it had metadata."""
    if where == "dictionary_learning":
        dictionary_learning(at, "topk", submodule_name=hook)
    elif where == "metadata":
        saelens(at, "topk", metadata={"hook_name": hook})
    else:
        saelens(at, "topk", metadata=None, **{where: hook})
    if PLACES[hook] is None:
        refused(at, f"reads {hook}, not the residual after a block")
        refused(at, f"reads {hook}, not the residual after a block", CHECK_SAE=False)
    else:
        assert opened(at)[1].site == sites.Site(3, sites.RESIDUAL)
        refused(at, "LAYER = 2, the SAE is of layer 3", LAYER=2)


def test_the_input_of_a_module_is_no_residual_after_a_block(at):
    dictionary_learning(at, "topk", buffer={"io": "in"})
    refused(at, "reads the input of ")


FOLDERS = {  # -> the block, whether it is the residual (None: not said), and the LM
    "google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82": (12, True, "gemma-2-2b"),
    "google/gemma-scope-9b-it-res/layer_9/width_16k/average_l0_88": (9, True, "gemma-2-9b-it"),
    "google/gemma-scope-2b-pt-mlp/layer_12/width_16k/average_l0_60": (12, False, "gemma-2-2b"),
    "google/gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_7": (3, False, "gemma-2-2b"),
    "google/gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6": (None, False, "gemma-2-2b"),
    "google/gemma-scope-2-1b-pt/resid_post/layer_3_width_16k_l0_medium": (3, True, "gemma-3-1b"),
    "google/gemma-scope-2-1b-it/mlp_out/layer_3_width_16k_l0_big": (3, False, "gemma-3-1b-it"),
    "x/y_width-2pow14/resid_post_layer_12/trainer_2": (12, True, None),
    "somewhere/of/mine": (None, None, None),
}


@pytest.mark.parametrize("where", FOLDERS)
def test_a_folders_name_says_where_an_sae_reads_if_its_files_do_not(where):
    layer, residual, model = FOLDERS[where]
    site = sites.of_folder(where)
    assert site.layer == layer
    assert (site.what == sites.RESIDUAL if site.what else None) == residual
    found = sites.model_of_folder(where)
    assert (found is None) == (model is None) and (not model or sites.same_model(found, model))


def test_names_of_lms_are_compared_as_a_person_would():
    same = [("google/gemma-3-1b-pt", "gemma-v3-1b-pt"), ("google/gemma-3-270m-pt", "gemma-3-270m")]
    same += [("meta-llama/Meta-Llama-3.1-8B", "Llama-3.1-8B"), ("gpt2-small", "openai/gpt2")]
    same += [("/some/folder/Tiny/", "who/tiny")]
    other = [("gemma-3-1b-it", "gemma-3-1b-pt"), ("gemma-2-2b", "gemma-2b"), ("a-70m", "a-70m-v0")]
    assert all(sites.same_model(*pair) for pair in same)
    assert not any(sites.same_model(*pair) for pair in other)


def test_files_that_do_not_say_where_they_read_are_warned_of(at, capsys):
    saelens(at, "topk", metadata={})
    opened(at)
    assert (
        "where it reads; it is given the residual after block 3 (LAYER" in capsys.readouterr().out
    )


def test_decoder_rows_that_are_not_of_norm_1_are_said(at, capsys):
    w = dictionary_learning(at, "topk", submodule_name="resid_post_layer_3")
    opened(at)
    assert "warning" not in capsys.readouterr().out
    for factor, words in ((0.5, "norm 0.5 to 0.5"), (0.0, "norm 0 to 0")):
        torch.save(theirs("topk", w | {"W_dec_FD": factor * w["W_dec_FD"]}), at / "ae.pt")
        opened(at)
        assert words in capsys.readouterr().out


def test_another_layer_or_model_is_refused_or_with_check_sae_false_said(at, capsys):
    dictionary_learning(at, "topk")
    for change, words in (({"LAYER": 4}, "layer 3"), ({"MODEL": "a/big"}, "who/tiny")):
        refused(at, words, **change)
        opened(at, CHECK_SAE=False, **change)
        assert words in capsys.readouterr().out
    opened(at, MODEL="/some/folder/Tiny/")  # names compare without folder and case


# ---- the zoo ---------------------------------------------------------------------------------


def refused(folder, words="", **changes):
    """Opening it ends in a UserError with code 2, in time, with nothing run. -> its text"""
    started = time.process_time()
    with pytest.raises(UserError, match=words) as e:
        opened(folder, **changes)
    assert time.process_time() - started < 1
    text = str(e.value)
    assert e.value.code == 2 and "weights_only" not in text and "allow_pickle" not in text
    assert e.value.what.count("\n") <= LINES and len(text) < 1500
    assert not os.path.exists("canary"), "a file's code ran"
    return text


class Payload:
    def __reduce__(self):
        return os.system, ("touch canary",)


def payload_in_zip(at):
    torch.save({"encoder.weight": Payload()}, at / "ae.pt")


def payload_beside_tensors(at):
    w = theirs("topk", random_weights("topk"))
    torch.save(w | {"more": Payload()}, at / "ae.pt")


def legacy_payload(at):
    torch.save({"a": Payload()}, at / "ae.pt", _use_new_zipfile_serialization=False)


def bare_pickle(at):
    (at / "ae.pt").write_bytes(pickle.dumps(Payload()))


def legacy_tensors(at):
    tensors = theirs("topk", random_weights("topk"))
    torch.save(tensors, at / "ae.pt", _use_new_zipfile_serialization=False)


def content(data):
    return lambda at: (at / "ae.pt").write_bytes(data)


def cut(keep):
    def damage(at):
        data = (at / "ae.pt").read_bytes()
        (at / "ae.pt").write_bytes(data[: int(len(data) * keep)])

    return damage


def deflated(at):
    """16 MB of zeros in a few kB, for a reader that unpacks."""
    torch.save({"encoder.weight": torch.zeros(2000, 2000)}, at / "big.pt")
    big = zipfile.ZipFile(at / "big.pt")
    with zipfile.ZipFile(at / "ae.pt", "w", zipfile.ZIP_DEFLATED) as small:
        for name in big.namelist():
            small.writestr(name, big.read(name))
    assert (at / "ae.pt").stat().st_size < 100_000


def tensors(change):
    """ae.pt with the tensors that `change` makes of the good ones."""

    def damage(at):
        good = theirs("topk", random_weights("topk"))
        torch.save(change(good), at / "ae.pt")

    return damage


def one(name, change):
    return tensors(lambda t: t | {name: change(t[name])})


def without(name):
    return tensors(lambda t: {n: v for n, v in t.items() if n != name})


def renamed(t):
    return {n.replace("encoder.weight", "W_enc"): v for n, v in t.items()}


def with_value(value, index=(0, 0)):
    def change(t):
        t = t.clone()
        t[index] = value
        return t

    return change


def k_is(value, dtype=None):
    return one("k", lambda _: torch.tensor(value, dtype=dtype))


W = "encoder.weight"
BAD_WEIGHTS = {
    "a payload in a zip": (payload_in_zip, "cannot be read safely"),
    "a payload beside tensors": (payload_beside_tensors, "cannot be read safely"),
    "a payload in the legacy form": (legacy_payload, "cannot be read"),
    "a bare pickle": (bare_pickle, "cannot be read"),
    "tensors in the legacy form": (legacy_tensors, "cannot be read"),
    "HTML": (content(b"<!DOCTYPE html><html>404</html>"), "cannot be read"),
    "an LFS pointer": (
        content(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "cannot be read",
    ),
    "empty": (content(b""), "cannot be read"),
    "noise": (content(random.Random(0).randbytes(5000)), "cannot be read"),
    "truncated by a byte": (cut(0.9999), "cannot be read"),
    "truncated by half": (cut(0.5), "cannot be read"),
    "a header alone": (cut(0.01), "cannot be read"),
    "a list": (tensors(lambda t: list(t.values())), "holds a list"),
    "a tensor": (tensors(lambda t: t[W]), "holds a Tensor"),
    "an empty dict": (tensors(lambda t: {}), "holds a dict"),
    "a state in a dict": (tensors(lambda t: {"model": t}), "is a dict"),
    "a number for a tensor": (one(W, lambda t: 3.0), r"encoder.weight is \(\), its config says"),
    "None for a tensor": (one(W, lambda t: None), "is a NoneType"),
    "int tensors": (one(W, lambda t: t.int()), "torch.int32"),
    "bool tensors": (one("b_dec", lambda t: t > 0), "torch.bool"),
    "complex tensors": (one(W, lambda t: t.to(torch.complex64)), "torch.complex64"),
    "float8 tensors": (one(W, lambda t: t.to(torch.float8_e4m3fn)), "float8"),
    "sparse tensors": (one(W, lambda t: t.to_sparse()), "sparse"),
    "compressed sparse": (one(W, lambda t: t.to_sparse_csr()), "sparse|cannot be read"),
    "quantized tensors": (
        one(W, lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
        "quint8|qint8|cannot be read",
    ),
    "meta tensors": (one(W, lambda t: t.to("meta")), "nested|cannot be read"),
    "nested tensors": (
        one(W, lambda t: torch.nested.nested_tensor([t, t[:3]])),
        "nested|cannot be read",
    ),
    "a bomb of stride 0": (one(W, lambda t: torch.zeros(1).expand(10**6, 10**6)), "larger than"),
    "a bomb in a surplus name": (
        tensors(lambda t: t | {"x": torch.zeros(1).expand(10**6, 10**6)}),
        "larger than",
    ),
    "a bomb that unpacks": (deflated, "cannot be read"),
    "encoder missing": (without(W), "lacks encoder.weight"),
    "b_dec missing": (without("b_dec"), "lacks b_dec"),
    "a further tensor": (tensors(lambda t: t | {"scale": t["b_dec"]}), "has also scale"),
    "a number for a name": (tensors(lambda t: t | {3: t["b_dec"]}), "has also 3"),
    "a thousand names": (
        tensors(lambda t: t | {f"{i:0>500}": t["k"] for i in range(1000)}),
        "has also",
    ),
    "a renamed tensor": (tensors(renamed), "lacks encoder.weight and has also W_enc"),
    "a transposed encoder": (one(W, lambda t: t.T), "transposed"),
    "a transposed decoder": (one("decoder.weight", lambda t: t.T), "transposed"),
    "a longer bias": (one("b_dec", lambda t: torch.zeros(D + 1)), r"b_dec is \(17,\)"),
    "a bias of two dimensions": (one("encoder.bias", lambda t: t[None]), r"\(1, 48\)"),
    "an encoder of one dimension": (one(W, lambda t: t.flatten()), r"\(768,\)"),
    "a decoder of one dimension": (one("decoder.weight", lambda t: t.flatten()), r"\(768,\)"),
    "a decoder of three": (
        one("decoder.weight", lambda t: t[None]),
        r"decoder.weight is \(1, 16, 48\)",
    ),
    "a threshold a latent": (one("threshold", lambda t: torch.ones(F)), "threshold is"),
    "a whole threshold": (one("threshold", lambda t: torch.tensor(2)), "threshold is torch.int64"),
    "NaN": (one(W, with_value(float("nan"))), "1 values that are not finite"),
    "inf": (one("decoder.weight", with_value(float("inf"))), "not finite"),
    "NaN as a threshold": (one("threshold", lambda t: t * float("nan")), "not finite"),
    "too large for float32": (one(W, lambda t: t.double() * 1e300), "not finite"),
    "k = 0": (k_is(0), "k is 0 in the weights and 6"),
    "k = -1": (k_is(-1), "k is -1"),
    "k > F": (k_is(F + 1), "k is 49"),
    "another k": (k_is(K + 1), "k is 7 in the weights and 6 in the config"),
    "a float k": (k_is(6.0), "k is torch.float32"),
    "a bool k": (k_is(True), "k.* torch.bool"),
    "several k": (k_is([K] * 9999), "k is"),
    "no k in it": (k_is([], torch.int32), "k is"),
    "another k that is no tensor": (one("k", lambda t: K + 1), "k is 7 in the weights"),
    "a text k": (one("k", lambda t: "6"), "'k' is a str"),
}


@pytest.mark.filterwarnings("ignore")  # torch's, of the rare kinds of tensors made here
@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_are_refused_and_run_nothing(at, case):
    damage, words = BAD_WEIGHTS[case]
    dictionary_learning(at, "topk")
    damage(at)
    refused(at, words)


def trainer(**changes):
    return lambda c: {**c, "trainer": {**c["trainer"], **changes}}


def raw(text):
    return lambda c: text


BAD_CONFIGS = {
    "not JSON": (raw("trainer: topk"), "is not JSON"),
    "empty": (raw(""), "is not JSON"),
    "cut": (raw('{"trainer": {"dict_class": "Auto'), "is not JSON"),
    "not UTF-8": (raw(b'{"trainer": "\xff\xfe"}'), "is not JSON"),
    "a list": (lambda c: [c], "holds a list"),
    "a text": (lambda c: "trainer", "holds a str"),
    "null": (lambda c: None, "holds a NoneType"),
    "nested": (raw('{"a":' * 100_000 + "1" + "}" * 100_000), "is not JSON"),
    "nested lists": (raw("[" * 100_000), "is not JSON"),
    "huge": (raw('{"a": "' + "x" * 1_000_000 + '"}'), "bytes"),
    "a huge number": (raw('{"trainer": {"k": ' + "9" * 5000 + "}}"), "is not JSON"),
    "no trainer": (lambda c: {"buffer": {}}, "no trainer block"),
    "a trainer in a list": (lambda c: c | {"trainer": [c["trainer"]]}, "no trainer block"),
    "no dict_class": (trainer(dict_class=None), "dict_class = 'None' is not supported"),
    "unknown dict_class": (trainer(dict_class="IdentityDict"), "IdentityDict"),
    "a dict_class in a list": (trainer(dict_class=["AutoEncoderTopK"]), "is not supported"),
    "a long dict_class": (trainer(dict_class="x" * 9999), "is not supported"),
    "another dict_class": (trainer(dict_class="AutoEncoder"), "lacks bias and has also b_dec"),
    "dict_size as a text": (trainer(dict_size="48"), "dict_size = '48'"),
    "dict_size missing": (trainer(dict_size=None), "dict_size = None"),
    "dict_size too large": (trainer(dict_size=F * 2), r"its config says \(96, 16\)"),
    "dict_size astronomic": (trainer(dict_size=10**18), "its config says"),
    "activation_dim of another model": (trainer(activation_dim=D * 2), "reads width 32"),
    "activation_dim missing": (trainer(activation_dim=None), "activation_dim = None"),
    "a negative width": (trainer(activation_dim=-D), "activation_dim = -16"),
    "k = 0": (trainer(k=0), "k = 0"),
    "k = -1": (trainer(k=-1), "k = -1"),
    "k > F": (trainer(k=F + 1), "49"),
    "k a float": (trainer(k=6.0), "k = 6.0"),
    "k a text": (trainer(k="6"), "k = '6'"),
    "k true": (trainer(k=True), "k = True"),
    "k missing": (trainer(k=None), "k = None"),
    "another k": (trainer(k=K + 1), "6 in the weights and 7 in the config"),
    "another layer": (trainer(layer=4), "layer 4"),
    "another model": (trainer(lm_name="google/gemma-2-2b"), "google/gemma-2-2b"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_config_is_refused(at, case):
    change, words = BAD_CONFIGS[case]
    dictionary_learning(at, "topk")
    path = at / "config.json"
    new = change(json.loads(path.read_text()))
    new = new if isinstance(new, (str, bytes)) and case != "a text" else json.dumps(new)
    path.write_bytes(new if isinstance(new, bytes) else new.encode())
    refused(at, words)


@pytest.mark.parametrize("left", [["ae.pt"], ["config.json"], ["sae_weights.safetensors"], []])
def test_a_folder_without_both_files_is_refused_with_what_it_holds(at, left):
    for name in left:
        (at / name).write_text("{}")
    text = refused(at, "holds no SAE that is read here")
    assert all(name in text for name in left or ["nothing"])


def test_a_place_that_is_none_is_refused_before_the_hub_is_asked(at, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked"))
    os.makedirs("run")
    (at / "run/run.json").write_text("{}")
    for where in ("runs/none", "./none", "/none", "~/none", "none"):
        refused(where, "no such folder")
    refused("run", "run without sae/")


def test_a_penalty_that_is_no_number_is_refused(at):
    for value in (float("nan"), float("inf"), -1.0, "0.1", [0.1], 10**400):
        dictionary_learning(at, "relu")
        config = json.loads((at / "config.json").read_text())
        config["trainer"]["l1_penalty"] = value
        write_config(at, config)
        refused(at, "l1_penalty = ")


@pytest.mark.parametrize(
    "groups",
    [[6, 12], [6, 12, 31], [48, 0], [49, -1], [[6, 12, 30]], [6.0, 12.0, 30.0], [], 48],
)
def test_groups_that_do_not_sum_to_the_latents_are_refused(at, groups):
    w = dictionary_learning(at, "matryoshka")
    torch.save(theirs("matryoshka", w | {"group_sizes": torch.tensor(groups)}), at / "ae.pt")
    refused(at, "group")


def test_groups_that_only_sum_up_by_overflow_are_refused(at):
    w = dictionary_learning(at, "matryoshka")
    groups = torch.tensor([2**62, 2**62, 2**62, 2**62 + F])
    assert groups.sum() == F
    torch.save(theirs("matryoshka", w | {"group_sizes": groups}), at / "ae.pt")
    refused(at, "do not sum")


BAD_THRESHOLDS = {
    "negative": (lambda t: t - 2, "negative thresholds"),
    "NaN": (lambda t: t * float("nan"), "not finite"),
    "one for all": (lambda t: t[0], r"threshold is \(\)"),
    "too many": (lambda t: torch.cat([t, t]), r"threshold is \(96,\)"),
    "whole": (lambda t: t.int(), "torch.int32"),
    "complex": (lambda t: t.to(torch.complex64), "complex"),
}


@pytest.mark.parametrize("case", BAD_THRESHOLDS)
@pytest.mark.parametrize("form", ["ae.pt", "safetensors", "npz"])
def test_a_bad_jumprelu_threshold_is_refused(at, case, form):
    change, words = BAD_THRESHOLDS[case]
    w = random_weights("jumprelu")
    w["threshold"] = change(w["threshold"])
    tensors = {n: t.contiguous() for n, t in theirs("jumprelu", w).items()}
    if form == "ae.pt":
        dictionary_learning(at, "jumprelu")
        torch.save(tensors, at / "ae.pt")
    elif form == "safetensors":
        saelens(at, "jumprelu")
        save_file(tensors, at / "sae_weights.safetensors")
    else:
        np.savez(at / "params.npz", **{n: t.numpy() for n, t in tensors.items()})
    refused(at, words)


def test_a_jumprelu_without_thresholds_is_refused(at):
    w = dictionary_learning(at, "jumprelu")
    del w["threshold"]
    torch.save(theirs("jumprelu", w), at / "ae.pt")
    refused(at, "no thresholds")


BAD_SAELENS = {
    "gated": ({"architecture": "gated"}, "lacks b_gate, b_mag, r_mag"),
    "unknown": ({"architecture": "temporal"}, "'temporal' is not supported"),
    "an architecture in a list": ({"architecture": ["topk"]}, "is not supported"),
    "normalised input": ({"normalize_activations": "layer_norm"}, "layer_norm"),
    "scaled input": ({"normalize_activations": "expected_average_only_in"}, "expected_average"),
    "an attention output": ({"reshape_activations": "hook_z"}, "hook_z"),
    "no truth value": ({"apply_b_dec_to_input": "false"}, "no truth value"),
    "no truth value either": ({"rescale_acts_by_decoder_norm": 1}, "no truth value"),
    "another activation": (
        {"architecture": "standard", "activation_fn_str": "tanh-relu"},
        "activation_fn = 'tanh-relu'",
    ),
    "an old top-k without k": ({"activation_fn_kwargs": {"k": None}, "k": None}, "k = None"),
    "d_in a text": ({"d_in": "16"}, "d_in = '16'"),
    "d_sae of another": ({"d_sae": F + 1}, "its config says"),
    "another k": ({"k": 0}, "k = 0"),
    "k > F": ({"k": F + 1}, "k = 49 with 48 latents"),
    "another layer": ({"metadata": {"hook_name": "blocks.7.hook_resid_post"}}, "layer 7"),
    "another model": ({"metadata": {"model_name": "gemma-2-2b"}}, "gemma-2-2b"),
}


@pytest.mark.parametrize("case", BAD_SAELENS)
def test_a_bad_saelens_config_is_refused(at, case):
    change, words = BAD_SAELENS[case]
    saelens(at, "topk", **change)
    refused(at, words)


@pytest.mark.parametrize("centred", [True, False])
def test_saelens_shapes_are_checked_before_anything_is_folded(at, centred):
    for name, shape in (("b_dec", (D + 1,)), ("W_enc", (F, D)), ("W_enc", (D,)), ("W_dec", (F,))):
        w = saelens(at, "relu", apply_b_dec_to_input=centred)
        good = {"W_enc": w["W_enc_FD"].T, "W_dec": w["W_dec_FD"]}
        good |= {"b_enc": w["b_enc_F"], "b_dec": w["b_dec_D"]}
        tensors = {n: t.contiguous() for n, t in good.items()} | {name: torch.zeros(shape)}
        save_file(tensors, at / "sae_weights.safetensors")
        refused(at, "its config says")


@pytest.mark.parametrize(
    "data", [b"", b"<html>", b"\xff" * 100, b"\x10" + bytes(7) + b"{}", pickle.dumps(Payload())]
)
def test_a_file_that_is_no_safetensors_or_npz_is_refused(at, data):
    saelens(at, "topk")
    (at / "sae_weights.safetensors").write_bytes(data)
    refused(at, "cannot be read")
    os.remove(at / "cfg.json")
    (at / "params.npz").write_bytes(data)
    refused(at, "cannot be read")
    os.remove(at / "params.npz")
    os.remove(at / "sae_weights.safetensors")
    write_config(at, {"architecture": "jump_relu"})
    (at / "params.safetensors").write_bytes(data)
    refused(at, "cannot be read")


def npz(at, **changes):
    w = random_weights("jumprelu")
    arrays = {n: t.numpy() for n, t in theirs("jumprelu", w).items()} | changes
    np.savez(at / "params.npz", **{n: a for n, a in arrays.items() if a is not None})


BAD_NPZ = {
    "a pickled array": ({"W_enc": np.array([Payload()], object)}, "cannot be read safely"),
    "no encoder": ({"W_enc": None}, "no matrix W_enc"),
    "an encoder of one dimension": ({"W_enc": np.zeros(D)}, "no matrix W_enc"),
    "no bias": ({"b_enc": None}, "lacks b_enc"),
    "a surplus": ({"scale": np.zeros(3)}, "has also scale"),
    "texts": ({"b_enc": np.array(["a"] * F)}, "cannot be read"),
    "whole numbers": ({"b_enc": np.zeros(F, int)}, "int64"),
    "a longer bias": ({"b_dec": np.zeros(D + 1)}, r"b_dec is \(17,\), its other tensors say"),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_a_bad_npz_is_refused(at, case):
    changes, words = BAD_NPZ[case]
    npz(at, **changes)
    refused(at, words)


def test_an_npz_that_unpacks_to_more_than_it_holds_is_refused_before_it_is_unpacked(at):
    bomb = np.zeros((3000, 3000), np.float32)
    np.savez_compressed(at / "params.npz", W_enc=bomb)
    refused(at, "is compressed: 36,000,")
    with zipfile.ZipFile(at / "params.npz", "w") as z:  # a header that promises 4 TB
        header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }"
        z.writestr("W_enc.npy", b"\x93NUMPY\x01\x00\x76\x00" + header.ljust(118).encode())
    refused(at, "cannot be read")


# ---- damage at random ------------------------------------------------------------------------


def survives(folder, **changes):
    """The folder opens, or is refused; anything else is a bug. -> whether it opened"""
    try:
        sae, source = opened(folder, **changes)
    except UserError as e:
        assert e.code == 2 and "weights_only" not in str(e) and e.what.count("\n") <= LINES
        return False
    after = setting(SAE=str(folder)).constants()
    writer.save(os.path.join(folder, "again"), sae, source, after, bos=True)
    return True


@pytest.mark.parametrize("name", ["ae.pt", "sae_weights.safetensors", "params.npz"])
def test_flipped_and_missing_bytes_are_read_or_refused_but_never_crash(at, name, capsys):
    if name == "ae.pt":
        dictionary_learning(at, "topk")
    elif name == "params.npz":
        npz(at)
    else:
        saelens(at, "topk")
    good, rng = (at / name).read_bytes(), random.Random(0)
    ends = [i for i in range(len(good)) if i < 600 or i > len(good) - 1200]
    for _ in range(150):
        bad = bytearray(good)
        for _ in range(rng.choice((1, 1, 4))):
            bad[rng.choice(ends)] = rng.randrange(256)
        (at / name).write_bytes(bad if rng.random() < 0.8 else bad[: rng.randrange(len(bad))])
        survives(at)
    assert not os.path.exists("canary")


ODD = [None, True, False, -1, 0, 3, 1.5, 1e308, 10**30, "", "x", "é\ud800\x1b[31m\n", [], [1], {}]
ODD += [{"a": 1}, [[[]]], "9" * 5000]


@pytest.mark.parametrize("form", ["dictionary_learning", "relu", "saelens", "gemma_scope_2"])
def test_odd_values_in_a_config_are_read_or_refused_but_never_crash(at, form, capsys):
    if form == "dictionary_learning":
        dictionary_learning(at, "matryoshka")
    elif form == "relu":
        dictionary_learning(at, "relu")
    elif form == "saelens":
        saelens(at, "topk", apply_b_dec_to_input=True, normalize_activations="none")
    else:
        w = random_weights("jumprelu")
        tensors = {n.lower(): t.contiguous() for n, t in theirs("jumprelu", w).items()}
        save_file(tensors, at / "params.safetensors")
        write_config(at, {"architecture": "jump_relu", "hf_hook_point_in": "a", "model_name": "b"})
    name = "cfg.json" if form == "saelens" else "config.json"
    good = json.loads((at / name).read_text())
    opened_at_all = 0
    for block, inner in [(None, n) for n in good] + [
        (b, n) for b in good if isinstance(good[b], dict) for n in good[b]
    ]:
        for odd in ODD:
            bad = json.loads(json.dumps(good))
            (bad if block is None else bad[block])[inner] = odd
            write_config(at, bad, name)
            opened_at_all += survives(at, CHECK_SAE=False)
    assert opened_at_all


def test_the_sae_of_a_run_with_lora_on_the_lm_is_used_with_a_note(tmp_path, capsys):
    sizes = {"d_in": 8, "d_sae": 16, "k": 2, "layer": 0, "lm_name": "tiny", "seed": 0}
    hub.make_sae(tmp_path / "x" / "sae", **sizes)
    (tmp_path / "x" / "run.json").write_text("{}")
    reader.open_sae(str(tmp_path / "x"), "")
    assert capsys.readouterr().out == ""
    (tmp_path / "x" / "lora").mkdir()
    reader.open_sae(str(tmp_path / "x"), "")
    assert "used without that LoRA" in capsys.readouterr().out


# ---- what an SAE was trained on --------------------------------------------------------------


def said_of_text(capsys, text, **run) -> list[str]:
    source = reader.Source("x", "topk", 4, 8, text=text)
    given = {"starts_with_bos": True, "keep": "none", "context": 128} | run
    fits.check_text(source, **given)
    return capsys.readouterr().out.splitlines()


def test_an_sae_trained_on_other_contexts_is_warned_of_with_the_constant_to_set(capsys):
    for text, run, fix in (
        ({"bos": True}, {"starts_with_bos": False}, "BOS=always"),
        ({"bos": False}, {}, "BOS=never"),
        ({"without_special": True}, {}, "KEEP=special"),
        ({"without_special": False}, {"keep": "special"}, "KEEP=none"),
        ({"keep": "outliers"}, {}, "KEEP=outliers"),
        ({"keep": "none"}, {"keep": "special"}, "KEEP=none"),
        ({"context": 1024}, {}, "CONTEXT=1024"),
    ):
        (line,) = said_of_text(capsys, text, **run)
        assert line.startswith("warning: the SAE was trained ") and line.endswith(f" set {fix}")


def test_where_an_sae_and_a_run_agree_nothing_is_said(capsys):
    agree = {"bos": True, "without_special": False, "context": 128}
    assert said_of_text(capsys, agree) == said_of_text(capsys, {}) == []
    assert said_of_text(capsys, {"without_special": True}, keep="first") == []
    assert said_of_text(capsys, {"without_special": True}, keep="special") == []
    assert said_of_text(capsys, {"keep": "first"}, keep="first") == []


@pytest.mark.parametrize("keep", ["none", "first", "special", "outliers"])
def test_the_keep_of_the_run_that_trained_an_sae_is_known_and_counts_alone(at, keep, capsys):
    """A buffer's remove_bos is of the run before that one."""
    config = {"buffer": {"remove_bos": True}, "trainer": {}}
    w, source = random_weights("topk"), source_of("topk", config=config)
    made = setting(KEEP=keep).constants()
    writer.save(str(at), build(source, w), source, made, bos=True)
    found = opened(at)[1].text
    for now in ("none", "first", "special", "outliers"):
        said = said_of_text(capsys, found, keep=now, context=made["CONTEXT"])
        assert [line.rpartition(" set ")[2] for line in said] == [f"KEEP={keep}"] * (now != keep)


def test_configs_say_what_an_sae_was_trained_on():
    saelens = {"prepend_bos": False, "exclude_special_tokens": [1, 2], "context_size": 64}
    found = sources.text_of(saelens, saelens_format.SAELENS_TEXT)
    assert found == {"bos": False, "without_special": True, "context": 64}
    assert (
        sources.text_of({"context_size": "64", "prepend_bos": None}, saelens_format.SAELENS_TEXT)
        == {}
    )
    assert sources.text_of(None, saelens_format.SAELENS_TEXT) == {}
