"""Each family of public SAEs, its files as they lie in public, is here what its own code computes.

A writer puts an SAE of random tensors in a folder as its family does and returns what SAE= names,
with the family's formula in float64. Real libraries are asked in tests/libraries.py.
"""

import json
from fnmatch import fnmatch
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file

from klsplice.errors import UserError
from klsplice.formats import families, read
from klsplice.formats import source as sources
from klsplice.site import RESIDUAL, Site, at
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


def lens(architecture, **more):
    metadata = {"sae_lens_version": "6.20.0", "model_name": "gem", "hook_name": HOOK}
    config = {"architecture": architecture, "d_in": D, "d_sae": F, "metadata": metadata}
    return config | {"apply_b_dec_to_input": True, "normalize_activations": "none"} | more


def old_lens(**more):
    """SAELens 3 to 5 had no metadata."""
    return {"hook_point": HOOK, "d_in": D, "d_sae": F, "model_name": "gem"} | more


def lm_saes(**more):
    about = {"d_model": D, "hook_point_in": HOOK, "hook_point_out": HOOK, "act_fn": "jumprelu"}
    return about | {"norm_activation": "dataset-wise", "expansion_factor": F // D} | more


w, u = drawn(), drawn(unit=False)
TOPK = linear(w) | {"b_dec": w.bd}
BOTH_W, BOTH_U = (linear(x) | {"decoder.bias": x.bd} for x in (w, u))
GATES = {"b_gate": w.b_gate, "b_mag": w.b_mag, "r_mag": w.r}
GATED = {"encoder.weight": w.We, "decoder.weight": w.Wd.T, "decoder_bias": w.bd, "r_mag": w.r}
GATED |= {"gate_bias": w.b_gate, "mag_bias": w.b_mag}
LENS_GATED = {"W_enc": w.We.T, "W_dec": w.Wd, "b_dec": w.bd} | GATES
QWEN = {"W_enc": w.We, "W_dec": w.Wd.T, "b_enc": w.be, "b_dec": w.bd}
GOODFIRE = {name.replace("coder.", "coder_linear."): t for name, t in BOTH_W.items()}
OPENAI = {"pre_bias": w.bd, "latent_bias": w.be, "encoder.weight": w.We}
OPENAI |= {"decoder.weight": w.Wd.T, "activation": "ReLU"}
GEMMA = matrices(u) | {"threshold": u.gate}
GEMMA_2 = {name.lower(): t for name, t in GEMMA.items()}
NORM = "dataset_average_activation_norm"
SCOPE = {"jump_relu_threshold": 2.0, "sparsity_include_decoder_norm": True, "d_sae": F}
SCOPE |= {NORM: {"in": 10.0, "out": 10.0}}
SPARSIFY = {"encoder.weight": w.We, "encoder.bias": w.be, "W_dec": w.Wd, "b_dec": w.bd}
SPARSE = {"d_in": D, "num_latents": 0, "expansion_factor": F // D, "k": K, "multi_topk": False}
R1 = BOTH_U | {"log_jumprelu_threshold": u.gate.log(), f"{NORM}.{HOOK}": torch.tensor(8.0)}
over_gate = partial(formula, kind="jumprelu", centred=False, threshold=u.gate.double())
C, G, HYPER = "cfg.json", "config.json", "checkpoints/final.safetensors"
FAMILIES = {  # folder, file, tensors, name of the config, config, what its own code computes
    # no k among the tensors before December 2024
    "topk of 2024": ("x", "ae.pt", TOPK, G, trainer("AutoEncoderTopK", k=K), formula(w, "topk")),
    "new": ("x", "ae.pt", BOTH_U, G, trainer("AutoEncoderNew"), formula(u, "relu", centred=False)),
    "gated": ("x", "ae.pt", GATED, G, trainer("GatedAutoEncoder"), formula(w, "gated")),
    "SAELens 3": (
        *("x", S, matrices(w) | {"scaling_factor": torch.ones(F)}, C),
        *(old_lens(activation_fn="relu"), formula(w, "relu")),
    ),
    "SAELens 5": (
        *("x", S, matrices(w), C),
        *(old_lens(activation_fn_str="topk", activation_fn_kwargs={"k": K}), formula(w, "topk")),
    ),
    "SAELens gated": ("x", S, LENS_GATED, C, lens("gated"), formula(w, "gated")),
    # as a run leaves it, with a k that is a mean and rows that are rescaled
    "SAELens batchtopk": (
        *("x", S, matrices(u) | {"topk_threshold": torch.tensor(9.0, dtype=torch.float64)}, C),
        lens("batchtopk", k=float(K), rescale_acts_by_decoder_norm=True),
        formula(u, "jumprelu", threshold=9.0, gated_by_norm=True),
    ),
    "SAELens matryoshka": (
        *("x", S, matrices(w) | {"topk_threshold": torch.tensor(2.0)}, C),
        lens("matryoshka_batchtopk", k=float(K), matryoshka_widths=[8, 24]),
        formula(w, "jumprelu", threshold=2.0),
    ),
    "sparsify": ("layers.1", "sae.safetensors", SPARSIFY, C, SPARSE, formula(w, "topk")),
    # a latent times the norm of its row is held against the threshold
    "Llama Scope": (
        *("Llama-L1R-8x", HYPER, BOTH_U, "hyperparams.json", lm_saes(**SCOPE)),
        formula(
            *(u, "jumprelu"), centred=False, times=D**0.5 / 10, threshold=2.0, gated_by_norm=True
        ),
    ),
    "Llama Scope R1": (
        *("L1R", S, R1, G, lm_saes(sae_type="sae", sparsity_include_decoder_norm=False)),
        over_gate(u, times=D**0.5 / 8),
    ),
    # its norms are in the weights already; they may stand beside them
    "Llama Scope, folded": (
        *("L1R", S, R1, G),
        lm_saes(norm_activation="inference", sparsity_include_decoder_norm=False),
        over_gate(u),
    ),
    "Gemma Scope": (
        *("gemma-scope-gem-pt-res/layer_1/width_64", "params.npz", GEMMA, G, None),
        over_gate(u),
    ),
    "Gemma Scope 2": (
        *("resid_post/layer_1_width_64", "params.safetensors", GEMMA_2, G, None),
        over_gate(u),
    ),
    "Gemma Scope 2, with its config": (
        *("x", "params.safetensors", GEMMA_2, G),
        *({"hf_hook_point_in": "model.layers.1.output"}, over_gate(u)),
    ),
    "Qwen-Scope": (
        *(f"SAE-Res-gem-W64K-L0_{K}", "layer1.sae.pt", QWEN, G, None),
        formula(w, "topk", centred=False),
    ),
    "Goodfire": (
        *("gem-SAE-l1", "gem-SAE-l1.pth", GOODFIRE, G, None),
        formula(w, "relu", centred=False),
    ),
    "qresearch": ("x", "gem-SAE-l1.pt", BOTH_W, G, None, formula(w, "relu", centred=False)),
    "OpenAI": ("resid_post_mlp/autoencoders", "1.pt", OPENAI, G, None, formula(w, "relu")),
}


A = torch.randn(D, D, generator=torch.Generator().manual_seed(4)) * 0.1  # of a skip, (out, in)


def skips(f):
    return lambda x_ND: f(x_ND) + x_ND.double() @ A.double().T


def of_lens(architecture, reads="mlp.hook_in"):
    config = lens(architecture, apply_b_dec_to_input=False)
    names = {
        "hook_name": f"blocks.{LAYER}.{reads}",
        "hook_name_out": f"blocks.{LAYER}.hook_mlp_out",
    }
    return config | {"metadata": config["metadata"] | names}


def traced(**more):
    """circuit-tracer's config.yaml; JSON is YAML."""
    hooks = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    return {"model_name": "gem", "model_kind": "transcoder_set", "scan": "x"} | hooks | more


free, topk_free = (partial(formula, w, kind, centred=False) for kind in ("relu", "topk"))
TRACED = {"W_enc": w.We, "W_dec": w.Wd, "b_enc": w.be, "b_dec": w.bd}
LAYER_1, YAML = f"layer_{LAYER}.safetensors", "config.yaml"
IN, OUT, POST = "mlp.hook_in", "hook_mlp_out", "post_feedforward_layernorm.output"
SCOPE_IN = {"hook_point_in": f"blocks.{LAYER}.ln2.hook_normalized"}
SCOPE_IN |= {
    "hook_point_out": f"blocks.{LAYER}.hook_mlp_out",
    "sparsity_include_decoder_norm": False,
}
AT = {  # the same, and the site
    "SAELens transcoder": ("x", S, matrices(w), C, of_lens("transcoder"), free(), f"{IN}:{OUT}"),
    "SAELens skip": (
        *("x", S, matrices(w) | {"W_skip": A}, C, of_lens("skip_transcoder", "hook_mlp_in")),
        *(skips(free()), f"hook_resid_mid:{OUT}"),
    ),
    "SAELens jumprelu skip": (
        *("x", S, GEMMA | {"W_skip": A}, C, of_lens("jumprelu_skip_transcoder")),
        *(skips(over_gate(u)), f"{IN}:{OUT}"),
    ),
    "SAELens z": (
        *("x", S, matrices(w), C, lens("standard", reshape_activations="hook_z")),
        *(formula(w, "relu"), "attn.hook_z"),
    ),
    "sparsify transcoder": (
        *("layers.1.mlp", "sae.safetensors", SPARSIFY | {"W_skip": A}, C),
        *(SPARSE | {"transcode": True, "skip_connection": True}, skips(topk_free())),
        f"{IN}:mlp.hook_out",
    ),
    "sparsify of 2024": (
        *("layers.1.mlp", "sae.safetensors", SPARSIFY | {"W_skip": A}, C),
        *(SPARSE | {"skip_connection": True}, skips(formula(w, "topk")), f"{IN}:mlp.hook_out"),
    ),
    "sparsify SAE": (
        *("layers.1.mlp", "sae.safetensors", SPARSIFY, C, SPARSE | {"transcode": False}),
        *(formula(w, "topk"), "mlp.hook_out"),
    ),
    "Gemma Scope transcoder": (
        *("gemma-scope-gem-pt-transcoders/layer_1/width_64", "params.npz", GEMMA, G, None),
        *(over_gate(u), f"ln2.hook_normalized:{OUT}"),
    ),
    "Gemma Scope z": (
        *("gemma-scope-gem-pt-att/layer_1/width_64", "params.npz", GEMMA, G, None),
        *(over_gate(u), "attn.hook_z"),
    ),
    "Gemma Scope 2 transcoder": (
        *("x", "params.safetensors", GEMMA_2 | {"affine_skip_connection": A.T}, G),
        {
            "type": "transcoder",
            "hf_hook_point_in": "model.layers.1.pre_feedforward_layernorm.output",
            "hf_hook_point_out": f"model.layers.1.{POST}",
        },
        *(skips(over_gate(u)), f"{IN}:{OUT}"),
    ),
    "Gemma Scope 2 z": (
        *("x", "params.safetensors", GEMMA_2, G),
        *({"hf_hook_point_in": "model.layers.1.self_attn.o_proj.input"}, over_gate(u)),
        "attn.hook_z",
    ),
    "Llama Scope transcoder": (
        *("L1M", HYPER, BOTH_U, "hyperparams.json"),
        lm_saes(**SCOPE | SCOPE_IN | {NORM: {"in": 10.0, "out": 10.0}}),
        *(formula(u, "jumprelu", centred=False, times=D**0.5 / 10, threshold=2.0),),
        f"ln2.hook_normalized:{OUT}",
    ),
    "circuit-tracer": ("x", LAYER_1, TRACED, YAML, traced(), free(), f"hook_resid_mid:{OUT}"),
    "circuit-tracer topk": (
        *("x", LAYER_1, TRACED, YAML, traced(activation="topk", k=K), topk_free()),
        f"hook_resid_mid:{OUT}",
    ),
    "circuit-tracer jumprelu": (
        *("x", LAYER_1),
        {
            **{"W_enc": u.We, "W_dec": u.Wd, "b_enc": u.be, "b_dec": u.bd, "W_skip": A},
            "activation_function.threshold": u.gate,
        },
        *(YAML, traced(feature_input_hook=IN), skips(over_gate(u)), f"{IN}:{OUT}"),
    ),
}
AT["SAELens z"][4]["metadata"] = AT["SAELens z"][4]["metadata"] | {
    "hook_name": f"blocks.{LAYER}.attn.hook_z"
}


@pytest.mark.parametrize("family", AT)
def test_a_family_at_another_site_computes_as_its_own_code(tmp_path, family):
    folder, file, tensors, name, config, f, where = AT[family]
    source = computes(put(tmp_path / folder, file, tensors, config, name), f)
    assert source.site == at(where, LAYER)
    assert f"set SITE={where}" in refused(tmp_path / folder)


def test_a_transcoder_that_does_not_say_where_is_taken_at_its_word(tmp_path):
    """SITE decides, of sparsify's files in a folder of any name."""
    config = SPARSE | {"transcode": True}
    folder = put(tmp_path / "mine", "sae.safetensors", SPARSIFY, config, C)
    source = read.open_sae(str(folder), "")
    assert source.site.reads is None
    given = {"model": "gem", "layer": LAYER, "where": f"{IN}:{OUT}", "strict": True}
    sources.check_fits(source, D, **given)
    x_ND = torch.randn(50, D)
    with torch.no_grad():
        y_ND, _ = build(source, source.read_weights()).eval()(x_ND)
    assert torch.allclose(y_ND.double(), topk_free()(x_ND), atol=1e-4)


def written(at, family, **changes):
    """-> what SAE= names, and what its own code computes. changes: of the config."""
    folder, file, tensors, name, config, wanted = FAMILIES[family]
    config = config if config is None else config | changes
    folder = put(at / folder, file, tensors, config, name)
    bare = family in ("Qwen-Scope", "Goodfire", "qresearch", "OpenAI")
    return folder / file if bare else folder, wanted


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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_reads_as_its_own_code_computes(tmp_path, family):
    source = computes(*written(tmp_path, family))
    assert source.site == Site(LAYER)
    assert (source.lm_name or "gem").endswith("gem")


def test_every_row_is_tried():
    every = [*FAMILIES.values(), *AT.values()]
    files = [(file, name if config else "") for _, file, _, name, config, *_ in every]
    for row in families.FAMILIES:
        fits = [fnmatch(file, row.weights) and name == row.config for file, name in files]
        assert any(fits) or row.kind is families.own


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("world"))


def test_a_family_is_finetuned_and_saved(world, tmp_path):
    where, _ = written(tmp_path, "Qwen-Scope")
    folder = tiny.finished(world, tmp_path / "runs", SAE=where)
    results = tiny.read(folder / "results.json")
    assert results["kl_after"] != results["kl_before"]
    again = tiny.finished(world, tmp_path / "runs", SAE=folder, RUN_NAME="y", TOKENS=0)
    again = tiny.read(again / "before.json")
    assert again["kl"] == pytest.approx(results["kl_after"], rel=1e-5)


def refused(where, **given):
    """It is not read for the residual after block 1 -> the message."""
    with pytest.raises(UserError) as e:
        source = read.open_sae(str(where), "", **given)
        given = {"model": "gem", "layer": LAYER, "where": RESIDUAL, "strict": True}
        sources.check_fits(source, D, **given)
        source.read_weights()
    return str(e.value)


HOOKPOINTS = {"h.1": 1, "gpt_neox.layers.1": 1, "model.layers.1.mlp": "mlp.hook_out"}
HOOKPOINTS |= {"embed_in": "embed_in"}


@pytest.mark.parametrize("name", HOOKPOINTS)
def test_a_hookpoint_of_sparsify_says_where_it_reads(tmp_path, name):
    folder = written(tmp_path, "sparsify")[0].rename(tmp_path / name)
    if isinstance(HOOKPOINTS[name], str):
        assert f"reads {HOOKPOINTS[name]}" in refused(folder)
    else:
        assert read.open_sae(str(folder), "").site == Site(1)


FOREIGN = (
    ("sparsify", {"transcode": True}),  # of a whole block
    ("sparsify", {"activation": "groupmax"}),
    ("Llama Scope", {"sae_type": "clt"}),
    ("Llama Scope", {"dataset_average_activation_norm": None}),
    ("Gemma Scope 2, with its config", {"type": "transcoder"}),
    ("SAELens 3", {"architecture": "skip_transcoder"}),
    ("SAELens 3", {"normalize_activations": "layer_norm"}),
)


@pytest.mark.parametrize(("family", "changes"), FOREIGN)
def test_what_its_class_cannot_compute_is_refused(tmp_path, family, changes):
    refused(written(tmp_path, family, **changes)[0])


# ---- files of one's own -----------------------------------------------------------------------


def own(at, tensors, name="mine.pt"):
    return put(at / "own", name, tensors) / name


def test_a_plain_file_takes_class_and_k_from_the_constants(world, tmp_path):
    where = own(tmp_path, matrices(w))
    computes(where, formula(w, "topk"), architecture="topk", k=K)
    given = {"SAE": where, "TOKENS": 0, "ARCHITECTURE": "topk", "K": K}
    folder = tiny.finished(world, tmp_path / "runs", **given)
    source = json.loads((folder / "run.json").read_text())["source"]
    assert (source["k"], source["architecture"]) == (K, "topk")
    assert tiny.main(world, tmp_path / "runs", RUN_NAME="y", **given | {"SAE": folder, "K": 5}) == 2


def test_a_plain_file_is_each_class_that_it_has_the_tensors_of(tmp_path):
    computes(own(tmp_path, matrices(w)), formula(w, "relu"), architecture="relu")
    computes(own(tmp_path, TOPK | {"k": K}), formula(w, "topk"))
    t = matrices(w) | {"k": K, "threshold": 2.0, "group_sizes": torch.tensor([4, 60])}
    over = formula(w, "jumprelu", threshold=2.0)
    assert computes(own(tmp_path, t), over, architecture="matryoshka").k == K
    del t["group_sizes"]
    computes(own(tmp_path, t), over, architecture="batchtopk")
    in_a_dict = own(tmp_path, {"epoch": "x", "state_dict": t})
    computes(in_a_dict, formula(w, "topk"), architecture="topk")


def test_thresholds_may_be_one_for_all_or_logarithms(tmp_path):
    f = formula(u, "jumprelu", centred=False, threshold=2.0)
    where = own(tmp_path, matrices(u) | {"threshold": 2.0})
    computes(where, f, architecture="jumprelu")
    where = own(tmp_path, matrices(u) | {"log_threshold": torch.full((F,), 2.0).log()})
    computes(where, f)
    computes(own(tmp_path, GEMMA, "my.pth"), over_gate(u))


def test_a_wrappers_name_is_no_matter(tmp_path):
    for style in (TOPK, matrices(w)):
        where = own(tmp_path, {"module._orig_mod." + name: t for name, t in style.items()})
        computes(where, formula(w, "relu"), architecture="relu")


BAD_OWN = {  # what differs from a good file -> architecture
    "no thresholds": ({}, "jumprelu"),
    "thresholds of another": ({"threshold": torch.ones(5)}, "jumprelu"),
    "a further tensor": ({"steps": torch.ones(3)}, "relu"),
}


@pytest.mark.parametrize("case", BAD_OWN)
def test_a_bad_file_of_ones_own_is_refused(tmp_path, case):
    change, architecture = BAD_OWN[case]
    refused(own(tmp_path, matrices(w) | change), architecture=architecture, k=K)


def test_rows_of_any_norm_are_measured_and_not_trained(world, tmp_path):
    where = own(tmp_path, matrices(u) | {"k": K})
    assert tiny.main(world, tmp_path / "runs", SAE=where, TOKENS=0) == 0
    assert tiny.main(world, tmp_path / "runs", SAE=where, RUN_NAME="y") == 2
    assert not (tmp_path / "runs" / "y").exists()
