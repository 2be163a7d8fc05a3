"""What we write loads unchanged in dictionary_learning, SAELens and SAEBench, with equal codes.

Run by `make test-formats` with the real libraries, in an environment of their own.
"""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import pytest
import torch
from dictionary_learning.utils import load_dictionary
from sae_bench.custom_saes import batch_topk_sae, jumprelu_sae, relu_sae, topk_sae
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as converters

from klsplice.formats import read as reader
from klsplice.formats import write as writer
from learners import lora
from learners.adapter import Adapter
from report import card
from sae import build

D, F, K = 32, 64, 8
ARCHITECTURES = ["topk", "batchtopk", "matryoshka", "relu", "jumprelu"]
BENCH = {
    "topk": topk_sae.load_dictionary_learning_topk_sae,
    "batchtopk": batch_topk_sae.load_dictionary_learning_batch_topk_sae,
    "matryoshka": batch_topk_sae.load_dictionary_learning_matryoshka_batch_topk_sae,
    "relu": relu_sae.load_dictionary_learning_relu_sae,
    "jumprelu": jumprelu_sae.load_dictionary_learning_jump_relu_sae,
}


def random_sae(architecture):
    rng = torch.Generator().manual_seed(0)
    W_FD = torch.randn(F, D, generator=rng)
    weights = {
        "W_enc_FD": torch.randn(F, D, generator=rng),
        "b_enc_F": 0.1 * torch.randn(F, generator=rng),
        "W_dec_FD": W_FD / W_FD.norm(dim=1, keepdim=True),
        "b_dec_D": torch.randn(D, generator=rng),
    }
    if architecture == "relu":  # as the April update leaves them on disk
        weights["W_dec_FD"] *= torch.rand(F, 1, generator=rng) + 0.5
    if architecture == "jumprelu":
        weights["threshold"] = torch.rand(F, generator=rng)
    if architecture in ("batchtopk", "matryoshka"):
        weights["threshold"] = torch.tensor(0.7)
    if architecture == "matryoshka":
        weights["group_sizes"] = torch.tensor([8, 16, 40])
    return build(reader.Source("test", architecture, D, F, k=K, l1=0.1), weights).eval()


CONSTANTS = {
    "MODEL": "google/gemma-2-2b",
    "LAYER": 12,
    "CONTEXT": 1024,
    "DATASET": "monology/pile-uncopyrighted",
    "SAE": "fresh",
    "ARCHITECTURE": "",
    "TRAIN": "sae",
    "LOSS": "kl+mse",
    "LR": 5e-5,
    "TOKENS": 1000,
    "PASSES": 1,
    "KEEP": "none",
    "SEED": 0,
    "ADAPTER": "linear",
    "FOLD": True,
}


def write(folder, sae, architecture, **changes):
    """-> x_ND, codes_NF scaled by the decoder's norms, y_ND of `sae`, and what run.json says."""
    c = CONSTANTS | changes
    source = reader.Source("fresh", architecture, D, F, k=K, l1=0.1)
    writer.save(str(folder), sae, source, c, bos=True)
    x_ND = torch.randn(100, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y_ND, z_NF = sae(x_ND)
        codes_NF = z_NF * sae.W_dec_FD.norm(dim=1)
    about = {"constants": c, "source": {"architecture": architecture}}
    return (x_ND, codes_NF, y_ND), about


@pytest.fixture(params=ARCHITECTURES)
def written(request, tmp_path):
    """-> architecture, folder, our SAE, tokens, its codes (scaled by decoder norms) and output."""
    seen, _ = write(tmp_path, random_sae(request.param), request.param)
    return request.param, str(tmp_path), *seen


@torch.no_grad()
def agrees(theirs, x_ND, codes_NF, y_ND):
    codes = theirs.encode(x_ND)
    assert torch.allclose(codes, codes_NF, atol=1e-5), (codes - codes_NF).abs().max()
    assert torch.allclose(theirs.decode(codes), y_ND, atol=1e-5)
    assert (codes > 0).any()


def local_hub(monkeypatch, module, folder):
    """The module's downloads come from `folder`."""
    monkeypatch.setattr(
        module,
        "hf_hub_download",
        lambda *a, repo_id=None, filename=None, **o: os.path.join(
            folder, os.path.basename(filename)
        ),
    )


def test_dictionary_learning_agrees(written):
    architecture, folder, *rest = written
    theirs, config = load_dictionary(folder, device="cpu")
    assert config["trainer"]["layer"] == 12 and config["trainer"]["activation_dim"] == D
    agrees(theirs, *rest)


def test_saelens_agrees(written):
    architecture, folder, *rest = written
    agrees(SAE.load_from_disk(folder), *rest)


def test_saelens_converter_agrees(written, monkeypatch):
    architecture, folder, *rest = written
    local_hub(monkeypatch, converters, folder)
    config, tensors, _ = converters.dictionary_learning_sae_huggingface_loader_1("me/sae", "x")
    theirs = SAE.from_dict(converters.handle_pre_6_0_config(config))
    theirs.load_state_dict(tensors)
    agrees(theirs, *rest)


def test_saebench_agrees(written, monkeypatch):
    architecture, folder, *rest = written
    load = BENCH[architecture]
    local_hub(monkeypatch, sys.modules[load.__module__], folder)
    theirs = load("me/sae", "x/ae.pt", "gemma-2-2b", torch.device("cpu"), torch.float32, layer=12)
    agrees(theirs, *rest)


# ---- the card --------------------------------------------------------------------------------


def snippet(about, library, folder):
    """What the card's code for that library leaves in `sae`, run as it stands there."""
    (code,) = (x for n, x in card.loading(about).items() if n.startswith(library))
    found = {}
    exec(code.replace("path/to/this/folder", str(folder)), found)
    return found["sae"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_cards_code_loads_the_sae(architecture, tmp_path, monkeypatch):
    seen, about = write(tmp_path, random_sae(architecture), architecture)
    local_hub(monkeypatch, sys.modules[BENCH[architecture].__module__], str(tmp_path))
    for library in ("dictionary_learning", "SAELens", "SAEBench"):
        agrees(snippet(about, library, tmp_path), *seen)


def with_adapter(sae):
    adapter = Adapter(sae, kind="linear", rank=4, seed=0)
    torch.nn.init.normal_(adapter.up.weight, std=0.3, generator=torch.Generator().manual_seed(2))
    return adapter.eval(), adapter.folded()


def with_lora(sae):
    model = lora.LoRASAE(sae, {"r": 4, "lora_alpha": 4, "lora_dropout": 0.0})
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(2))
    return model.eval(), model.merged()


@pytest.mark.parametrize("train, changed", [("adapter", with_adapter), ("sae_lora", with_lora)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saebench_refuses_rows_off_unit_norm_where_the_card_says_so(
    architecture, train, changed, tmp_path, monkeypatch
):
    model, sae = changed(random_sae(architecture))
    seen, about = write(tmp_path, sae.eval(), architecture, TRAIN=train)
    x_ND, _, y_ND = seen
    with torch.no_grad():
        assert torch.allclose(model(x_ND)[0], y_ND, atol=1e-4)
    for library in ("dictionary_learning", "SAELens"):
        theirs = snippet(about, library, tmp_path)
        with torch.no_grad():
            assert torch.allclose(theirs.decode(theirs.encode(x_ND)), y_ND, atol=1e-5)
    load = BENCH[architecture]
    local_hub(monkeypatch, sys.modules[load.__module__], str(tmp_path))
    words = ("me/sae", "ae.pt", "gemma-2-2b", torch.device("cpu"), torch.float32)
    said = " ".join(card._notes(about["constants"], architecture))
    if "SAEBench" in said:
        assert not [n for n in card.loading(about) if n.startswith("SAEBench")]
        with pytest.raises(ValueError, match="not normalized"):
            load(*words, layer=12)
    else:
        theirs = load(*words, layer=12)
        with torch.no_grad():
            assert torch.allclose(theirs.decode(theirs.encode(x_ND)), y_ND, atol=1e-5)
    assert ("SAEBench" in said) == (architecture in ("topk", "batchtopk", "matryoshka"))
