"""An SAE is the same function after writing and reading; a bad file is refused and runs nothing.

tests/test_sae_families.py has the public layouts, tests/test_exports.py what a run writes.
"""

import contextlib
import json
import os
import pickle
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import constants
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from klsplice.errors import UserError
from klsplice.formats import read as reader
from klsplice.formats import sites
from klsplice.formats import source as sources
from klsplice.formats import write as writer
from klsplice.site import RESIDUAL, Site
from learners import checks, start
from report import card
from sae import ARCHITECTURES, build

D, F, K, LAYER = 16, 48, 6, 3
LM = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=D))
RESCALED = ("relu", "jumprelu")  # their rows are written with norm 1


def random_weights(architecture):
    """Encoder and decoder that point anywhere, biases that matter."""
    rng = torch.Generator().manual_seed(0)
    sizes = {"W_enc_FD": (F, D), "b_enc_F": (F,), "W_dec_FD": (F, D), "b_dec_D": (D,)}
    w = {name: torch.randn(size, generator=rng) for name, size in sizes.items()}
    if architecture not in RESCALED:
        w["W_dec_FD"] = normalize(w["W_dec_FD"], dim=1)
        w["threshold"] = torch.tensor(2.0)
    if architecture == "jumprelu":
        w["threshold"] = torch.rand(F, generator=rng) * 3
    if architecture == "matryoshka":
        w["group_sizes"] = torch.tensor([6, 12, 30])
    return w


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


@torch.no_grad()
def same(encode_decode, architecture, w, scaled=False):
    """It is the dense formula; `scaled`: its codes are those times the decoder's norms."""
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(1)) * 2
    z, y = dense(architecture, w, x)
    y_found, z_found = encode_decode(x)
    z = z * w["W_dec_FD"].double().norm(dim=1) if scaled else z
    assert (z > 0).any() and torch.equal(z_found > 0, z > 0)
    torch.testing.assert_close(z_found.double(), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y_found.double(), y, rtol=1e-5, atol=1e-5)


def opened(folder, **changes):
    """The SAE as run.py opens it, for evaluation."""
    cfg = constants(**{"LAYER": LAYER, "SAE": str(folder)} | changes)
    source = start.find_source(cfg)
    start.read_source(cfg, source, LM)
    return build(source, source.weights()).eval(), source


def source_of(architecture, **more):
    k = K if ARCHITECTURES[architecture].has_k else None
    return reader.Source("here", architecture, D, F, k=k, l1=0.02, **more)


def save(folder, sae, source, **changes):
    made = constants(**{"LAYER": LAYER} | changes).constants()
    writer.save(str(folder), sae, source, made, bos=True)


def written(folder, architecture):
    """-> the weights of an SAE that is saved in `folder`."""
    w = random_weights(architecture)
    copies = {n: t.clone() for n, t in w.items()}
    save(folder, build(source_of(architecture), copies).eval(), source_of(architecture))
    return w


def refused(folder, **changes):
    """Opening it ends in a UserError and runs nothing -> its text."""
    with pytest.raises(UserError) as e:
        opened(folder, **changes)
    assert e.value.code == 2 and "weights_only" not in str(e.value)
    assert not os.path.exists("canary"), "a file's code ran"
    return str(e.value)


def edited(path, change):
    """A JSON file after change(config)."""
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def trainer(**changes):
    return lambda c: c["trainer"].update(changes)


# ---- written and read --------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dictionary_learning", "SAELens", "run"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_written_reads_as_the_same_function(at, architecture, form):
    w = written(at / "run/sae", architecture)
    (at / "run/run.json").write_text("{}")
    files = {"dictionary_learning": ("ae.pt", "config.json")}
    files["SAELens"] = ("cfg.json", "sae_weights.safetensors")
    for name in files.get(form, ()):
        os.makedirs(at / "alone", exist_ok=True)
        shutil.copy(at / "run/sae" / name, at / "alone" / name)
    sae, source = opened(at / ("run" if form == "run" else "alone"))
    same(sae, architecture, w, scaled=architecture in RESCALED)
    as_jumprelu = form == "SAELens" and architecture in ("batchtopk", "matryoshka")
    assert source.architecture == ("jumprelu" if as_jumprelu else architecture)
    assert (source.site.layer, source.d_in, source.d_sae) == (LAYER, D, F)
    assert source.lm_name == "tiny"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_cards_plain_pytorch_is_the_sae(at, architecture):
    w = written(at, architecture)
    about = {"constants": constants(ARCHITECTURE=architecture).constants(), "source": {}}
    code, found = card.loading(about)["PyTorch alone"], {}
    exec(code.replace("path/to/this/folder", str(at)), found)  # as it stands there
    both = lambda x: (found["decode"](found["encode"](x)), found["encode"](x))  # noqa: E731
    same(both, architecture, w, scaled=architecture in RESCALED)


def test_a_scaled_relu_is_written_for_plain_residuals(at):
    w = random_weights("relu")
    sae = build(source_of("relu"), {n: t.clone() for n, t in w.items()})
    sae.scale_by(7.5, 3.0)
    save(at, sae, source_of("relu"))
    same(opened(at)[0], "relu", w, scaled=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_and_parameters_are_float32_copies(at, dtype):
    w = written(at, "topk")
    tensors = torch.load(at / "ae.pt")
    old = {n: torch.nn.Parameter(t.to(dtype)) if t.ndim else t for n, t in tensors.items()}
    torch.save(old, at / "ae.pt", _use_new_zipfile_serialization=dtype is torch.float64)
    before, weights = (at / "ae.pt").read_bytes(), opened(at)[1].weights()
    for name in ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D"):
        assert weights[name].dtype == torch.float32 and not weights[name].requires_grad
        torch.testing.assert_close(weights[name], w[name].to(dtype).float())
        weights[name].zero_()
    assert (at / "ae.pt").read_bytes() == before


# ---- SAELens' options --------------------------------------------------------------------------


def saelens(folder, kind, w, **config):
    tensors = {"W_enc": w["W_enc_FD"].T, "W_dec": w["W_dec_FD"]}
    tensors |= {"b_enc": w["b_enc_F"], "b_dec": w["b_dec_D"]}
    if kind == "jumprelu":
        tensors["threshold"] = w["threshold"]
    name = "standard" if kind == "relu" else kind
    about = {"architecture": name, "d_in": D, "d_sae": F} | ({"k": K} if name == "topk" else {})
    about["metadata"] = {"hook_name": f"blocks.{LAYER}.hook_resid_post", "model_name": "tiny"}
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(about | config))


@pytest.mark.parametrize("centred", [None, True, False])
@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu"])
def test_an_encoder_is_centred_exactly_if_its_config_says_so(at, architecture, centred):
    """SAELens' default is to subtract b_dec, for a JumpReLU too."""
    w = random_weights(architecture)
    config = {} if centred is None else {"apply_b_dec_to_input": centred}
    saelens(at, architecture, w, **config)
    shift = w["W_enc_FD"].double() @ w["b_dec_D"].double()
    folded = dict(w)
    if architecture == "jumprelu" and centred is not False:  # the formula does not subtract
        folded["b_enc_F"] = w["b_enc_F"] - shift
    if architecture != "jumprelu" and centred is False:  # the formula subtracts
        folded["b_enc_F"] = w["b_enc_F"] + shift
    same(opened(at)[0], architecture, folded)


def test_rescaling_by_decoder_norms_is_folded(at):
    w = random_weights("topk")
    scale_F1 = torch.rand(F, 1, generator=torch.Generator().manual_seed(3)) + 0.5
    saelens(
        at, "topk", w | {"W_dec_FD": w["W_dec_FD"] * scale_F1}, rescale_acts_by_decoder_norm=True
    )
    w["W_enc_FD"], w["b_enc_F"] = w["W_enc_FD"] * scale_F1, w["b_enc_F"] * scale_F1[:, 0]
    same(opened(at)[0], "topk", w)


def test_latents_that_are_scaled_are_refused(at):
    saelens(at, "relu", random_weights("relu"))
    file = at / "sae_weights.safetensors"
    save_file(load_file(file) | {"scaling_factor": torch.full((F,), 2.0)}, file)
    assert "scaling_factor" in refused(at)


# ---- where it reads, and of which LM -----------------------------------------------------------

PLACES = {  # how a file names where it reads -> the block, or what else it is
    "blocks.3.hook_resid_post": 3,
    "blocks.4.hook_resid_pre": 3,  # before a block is after the one under it
    "model.layers.3": 3,
    "model.layers.3.output": 3,
    "resid_post_layer_3": 3,
    "blocks.0.hook_resid_pre": "blocks.0.hook_resid_pre",
    "blocks.3.hook_mlp_out": "hook_mlp_out",
    "mlp_out_layer_3": "hook_mlp_out",
    "hook_embed": "hook_embed",
}


@pytest.mark.parametrize("hook", PLACES)
def test_only_the_residual_after_a_block_is_read(at, hook):
    """Also with CHECK_SAE = False."""
    written(at, "topk")
    edited(at / "config.json", trainer(submodule_name=hook))
    if isinstance(PLACES[hook], str):
        said = refused(at, CHECK_SAE=False)
        assert f"reads {PLACES[hook]}" in said
        assert ("set SITE=hook_mlp_out" in said) == (PLACES[hook] == "hook_mlp_out")
    else:
        assert opened(at)[1].site == Site(3)
        assert "LAYER" in refused(at, LAYER=2)


R, MLP = RESIDUAL, "hook_mlp_out"
FOLDERS = {  # -> the block, where it reads (None: not said), and the LM
    "google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82": (12, R, "gemma-2-2b"),
    "google/gemma-scope-9b-it-res/layer_9/width_16k/average_l0_88": (9, R, "gemma-2-9b-it"),
    "google/gemma-scope-2b-pt-mlp/layer_12/width_16k/average_l0_60": (12, MLP, "gemma-2-2b"),
    "google/gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6": (
        None,
        "embedding",
        "gemma-2-2b",
    ),
    "google/gemma-scope-2-1b-pt/resid_post/layer_3_width_16k_l0_medium": (3, R, "gemma-3-1b"),
    "google/gemma-scope-2-1b-it/mlp_out/layer_3_width_16k_l0_big": (3, MLP, "gemma-3-1b-it"),
    "x/y_width-2pow14/resid_post_layer_12/trainer_2": (12, R, None),
    "x/resid_post_mlp_v5_32k/autoencoders/6.pt": (6, R, None),
    "somewhere/of/mine": (None, None, None),
}


@pytest.mark.parametrize("where", FOLDERS)
def test_a_folders_name_says_where_an_sae_reads(where):
    layer, reads, model = FOLDERS[where]
    site = sites.of_path(where)
    assert site.layer == layer
    assert site.reads == reads
    found = sites.model_of_path(where)
    assert (found is None) == (model is None) and (not model or sites.same_model(found, model))


def test_names_of_lms_are_compared_as_a_person_would():
    same = [
        ("google/gemma-3-1b-pt", "gemma-v3-1b-pt"),
        ("meta-llama/Meta-Llama-3-8B", "Llama-3-8B"),
    ]
    same += [("gpt2-small", "openai/gpt2"), ("/some/folder/Tiny/", "who/tiny")]
    same += [("gemma-2-2b", "/hub/models--google--gemma-2-2b/snapshots/c5ebcd40d208330abc69752")]
    same += [("tiny-stories-1L-21M", "roneneldan/TinyStories-1Layer-21M")]
    same += [("tiny-stories-33M", "roneneldan/TinyStories-33M")]
    other = [("tiny-stories-2L-33M", "tiny-stories-33M"), ("gemma-3-1b-it", "gemma-3-1b-pt")]
    other += [("gemma-2-2b", "gemma-2b"), ("a-70m", "a-70m-v0")]
    assert all(sites.same_model(*pair) for pair in same)
    assert not any(sites.same_model(*pair) for pair in other)


def test_another_layer_or_model_is_refused_or_warned_of(at, capsys):
    written(at, "topk")
    for changes in ({"LAYER": 4}, {"MODEL": "a/big"}):
        refused(at, **changes)
        opened(at, CHECK_SAE=False, **changes)
        assert "warning" in capsys.readouterr().out
    opened(at, MODEL="/some/folder/Tiny/")  # names compare without folder and case
    assert capsys.readouterr().out == ""
    edited(at / "config.json", lambda c: c["buffer"].update(io="in"))
    assert "input" in refused(at)


def test_rows_off_norm_1_are_said_and_zero_rows_are_refused(at, capsys):
    w = written(at, "topk")
    w["W_dec_FD"][3] = 0
    save(at, build(source_of("topk"), w), source_of("topk"))
    sae, _ = opened(at)
    assert "norm 0 to 1" in capsys.readouterr().out
    with pytest.raises(UserError, match="zero"):
        checks.check_rows(sae)


LICENCES = {
    "---\nlicense: cc-by-4.0\n---\n": "cc-by-4.0",
    "---\nlicense:\n  - cc-by-4.0\n---\n": "cc-by-4.0",
    "license: mit\n": None,
}


@pytest.mark.parametrize("text", LICENCES)
def test_a_licence_is_read_from_the_front_matter(at, text):
    written(at, "topk")
    (at / "README.md").write_text(text, newline="", encoding="utf-8")
    assert reader.open_sae(str(at), "").licence == LICENCES[text]


# ---- bad files ---------------------------------------------------------------------------------


class Payload:
    def __reduce__(self):
        return os.system, ("touch canary",)


def one(name, change):
    return lambda t: t | {name: change(t[name])}


W = "encoder.weight"
BAD_TENSORS = {  # of a TopK in ae.pt
    "a payload beside tensors": lambda t: t | {"more": Payload()},
    "int tensors": one(W, lambda t: t.int()),
    "b_dec missing": lambda t: {n: v for n, v in t.items() if n != "b_dec"},
    "a further tensor": lambda t: t | {"scale": t["b_dec"]},
    "a transposed encoder": one(W, lambda t: t.T),
    "too large for float32": one(W, lambda t: t.double() * 1e300),
    "another k": one("k", lambda t: torch.tensor(K + 1)),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused_and_run_nothing(at, case):
    written(at, "topk")
    torch.save(BAD_TENSORS[case](torch.load(at / "ae.pt")), at / "ae.pt")
    refused(at)


@pytest.mark.parametrize("name", ["ae.pt", "sae_weights.safetensors", "params.npz"])
def test_damaged_bytes_are_read_or_refused_but_run_nothing(at, name, capsys):
    written(at, "jumprelu")
    if name == "params.npz":
        arrays = {n: t.numpy() for n, t in torch.load(at / "ae.pt").items()}
        np.savez(at / name, **arrays)
    for other in {"ae.pt", "sae_weights.safetensors"} - {name}:
        os.remove(at / other)
    good, rng = (at / name).read_bytes(), random.Random(0)
    ends = [i for i in range(len(good)) if i < 600 or i > len(good) - 1200]
    for bad in (b"", pickle.dumps(Payload()), good[: len(good) // 2]):
        (at / name).write_bytes(bad)
        refused(at)
    for _ in range(40):
        bad = bytearray(good)
        bad[rng.choice(ends)] = rng.randrange(256)
        (at / name).write_bytes(bad)
        with contextlib.suppress(UserError):
            opened(at)
    assert not os.path.exists("canary")


BAD_CONFIGS = {
    "no trainer": lambda c: c.pop("trainer"),
    "another dict_class": trainer(dict_class="AutoEncoder"),
    "dict_size of another": trainer(dict_size=F * 2),
    "k > F": trainer(k=F + 1),
    "k a text": trainer(k="6"),
    "another k": trainer(k=K + 1),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_config_is_refused(at, case):
    written(at, "topk")
    edited(at / "config.json", BAD_CONFIGS[case])
    refused(at)


@pytest.mark.parametrize("data", [b"", b'{"a": "\xff"}', b"[1]", b"[" * 100_000])
def test_a_config_that_is_no_json_is_refused(at, data):
    written(at, "topk")
    (at / "config.json").write_bytes(data)
    refused(at)


BAD_VALUES = (
    ("jumprelu", "threshold", torch.full((F,), -1.0)),
    ("matryoshka", "group_sizes", torch.tensor([6, 12, 31])),
)


@pytest.mark.parametrize(("architecture", "name", "value"), BAD_VALUES)
def test_bad_thresholds_and_groups_are_refused(at, architecture, name, value):
    written(at, architecture)
    torch.save(torch.load(at / "ae.pt") | {name: value}, at / "ae.pt")
    refused(at)


def test_a_place_that_is_none_is_refused_before_the_hub_is_asked(at, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked"))
    os.makedirs("run")
    (at / "run/run.json").write_text("{}")
    for where in ("runs/none", "./none", "/none", "none", "run", str(at)):
        refused(where)


# ---- what an SAE was trained on ----------------------------------------------------------------

SAID = (  # what its config says, the run, and the constant that a warning says to set
    ({"bos": True}, {"starts_with_bos": False}, "BOS=always"),
    ({"without_special": True}, {}, "KEEP=special"),
    ({"keep": "outliers"}, {}, "KEEP=outliers"),
    ({"context": 1024}, {}, "CONTEXT=1024"),
    ({"bos": True, "without_special": False, "context": 128}, {}, None),
    ({"without_special": True}, {"keep": "special"}, None),
    ({}, {}, None),
)


def test_other_contexts_are_warned_of_with_the_constant_to_set(capsys):
    for text, run, fix in SAID:
        source = reader.Source("x", "topk", 4, 8, text=text)
        given = {"starts_with_bos": True, "keep": "none", "context": 128} | run
        sources.check_text(source, **given)
        said = capsys.readouterr().out
        assert said.endswith(f" {fix}\n") if fix else said == ""


def test_the_keep_of_a_run_of_ours_counts_alone(at):
    """A buffer's remove_bos is of the run before that one."""
    source = source_of("topk", config={"buffer": {"remove_bos": True}, "trainer": {}})
    save(at, build(source, random_weights("topk")), source, KEEP="first", CONTEXT=64)
    found = {"keep": "first", "without_special": None, "context": 64}
    assert opened(at)[1].text == found
    os.remove(at / "ae.pt")
    lens = {"bos": True, "without_special": False, "context": 64}
    assert opened(at)[1].text == lens


def test_a_slip_in_a_folders_name_is_not_sent_to_the_hub(at):
    (at / "runs/demo-sae").mkdir(parents=True)
    with pytest.raises(UserError, match="not there") as e:
        reader.open_sae("run/demo-sae", "main")
    assert "did you mean runs/demo-sae?" in str(e.value)
