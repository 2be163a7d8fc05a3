"""What we write loads unchanged in dictionary_learning, SAELens and SAEBench, with equal codes.

What they and sparsify write is the same function here.

Run by `make test-formats` with the real libraries, in an environment of their own.
"""

import json
import os
import re
import subprocess
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import hub
import pytest
import sparsify
import torch
from dictionary_learning import dictionary
from sae_bench.custom_saes import batch_topk_sae, jumprelu_sae, relu_sae, topk_sae
from sae_lens import SAE, TrainingSAE
from sae_lens.loading import pretrained_sae_loaders as converters

from klsplice import site
from klsplice.formats import read as reader
from klsplice.formats import write as writer
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
    "SITE": "hook_resid_post",
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saelens_converter_agrees(architecture, tmp_path, monkeypatch):
    seen, _ = write(tmp_path, random_sae(architecture), architecture)
    local_hub(monkeypatch, converters, str(tmp_path))
    config, tensors, _ = converters.dictionary_learning_sae_huggingface_loader_1("me/sae", "x")
    theirs = SAE.from_dict(converters.handle_pre_6_0_config(config))
    theirs.load_state_dict(tensors)
    agrees(theirs, *seen)


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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saebench_refuses_rows_off_unit_norm_where_the_card_says_so(
    architecture, tmp_path, monkeypatch
):
    adapter = Adapter(random_sae(architecture), kind="linear", rank=4, seed=0)
    torch.nn.init.normal_(adapter.up.weight, std=0.3, generator=torch.Generator().manual_seed(2))
    sae = adapter.folded().eval()
    (x_ND, _, y_ND), about = write(tmp_path, sae, architecture, TRAIN="adapter")
    with torch.no_grad():
        assert torch.allclose(adapter.eval()(x_ND)[0], y_ND, atol=1e-4)
    local_hub(monkeypatch, sys.modules[BENCH[architecture].__module__], str(tmp_path))
    refused = architecture in ("topk", "batchtopk", "matryoshka")
    assert refused != any(name.startswith("SAEBench") for name in card.loading(about))
    for library in ("dictionary_learning", "SAELens", *([] if refused else ["SAEBench"])):
        theirs = snippet(about, library, tmp_path)
        with torch.no_grad():
            assert torch.allclose(theirs.decode(theirs.encode(x_ND)), y_ND, atol=1e-5)
    if refused:
        words = ("me/sae", "ae.pt", "gemma-2-2b", torch.device("cpu"), torch.float32)
        with pytest.raises(ValueError, match="not normalized"):
            BENCH[architecture](*words, layer=12)


# ---- and what they write is read here ----------------------------------------------------------


@torch.no_grad()
def reads(where, theirs):
    """The SAE in `where` is the function that their own object computes."""
    source = reader.open_sae(str(where), "")
    sae = build(source, source.read_weights()).eval()
    x_ND = 2 * torch.randn(200, D, generator=torch.Generator().manual_seed(1))
    wanted_ND = theirs(x_ND)
    assert (sae(x_ND)[0] - wanted_ND).abs().max() < 1e-5 * wanted_ND.abs().max()
    return source


@torch.no_grad()
def randomised(module):
    rng = torch.Generator().manual_seed(3)
    for name, p in module.named_parameters():
        p.copy_(torch.randn(p.shape, generator=rng) * (0.3 if "r_mag" in name else 1))
    return module.eval()


def test_a_sparsify_folder_is_read(tmp_path):
    config = sparsify.SparseCoderConfig(k=K, expansion_factor=F // D)
    theirs = randomised(sparsify.SparseCoder(D, config))
    theirs.set_decoder_norm_to_unit_norm()
    theirs.save_to_disk(tmp_path / "layers.12")
    source = reads(tmp_path / "layers.12", lambda x_ND: theirs(x_ND).sae_out)
    assert (source.site.layer, source.k) == (12, K)


@pytest.mark.parametrize("dict_class", ["GatedAutoEncoder", "AutoEncoderNew"])
def test_other_classes_of_dictionary_learning_are_read(tmp_path, dict_class):
    theirs = randomised(getattr(dictionary, dict_class)(D, F))
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    about = {"dict_class": dict_class, "activation_dim": D, "dict_size": F, "layer": 12}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": about}))
    reads(tmp_path, theirs)


def test_a_gated_sae_of_saelens_is_read(tmp_path):
    theirs = randomised(SAE.from_dict({"architecture": "gated", "d_in": D, "d_sae": F}))
    theirs.save_model(tmp_path)
    reads(tmp_path, theirs)


@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_an_sae_as_saelens_trains_it_is_read(tmp_path, architecture, rescaled):
    """Their own inference of it is a JumpReLU; ours goes on as a BatchTopK."""
    config = {"architecture": architecture, "d_in": D, "d_sae": F, "k": float(K)}
    config |= {"rescale_acts_by_decoder_norm": rescaled}
    config |= {"matryoshka_widths": [8, 24, F]} if "matryoshka" in architecture else {}
    theirs = randomised(TrainingSAE.from_dict(config))
    theirs.topk_threshold.fill_(2.0)
    theirs.save_model(tmp_path / "trained")
    theirs.save_inference_model(tmp_path / "for_use")
    source = reads(tmp_path / "trained", SAE.load_from_disk(tmp_path / "for_use"))
    assert source.architecture == architecture.removesuffix("_batchtopk") and source.k == K


# ---- from the Hub ------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_an_sae_on_the_hub_loads_by_the_cards_call_and_comes_in(architecture, tmp_path):
    """SAELens' from_pretrained in the card, and klsplice.formats.from_saelens."""
    folder = tmp_path / "hub" / "models" / "me" / "sae" / "sae"
    _, about = write(folder, random_sae(architecture), architecture)
    code = card.loading(about)["SAELens"]
    (call,) = re.findall(r"SAE\.from_pretrained\(.*?\)", code)
    call = call.replace("user/repo", "me/sae")
    script = f"from sae_lens import SAE\n{call}.save_model('again')"
    program = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with hub.Hub(tmp_path / "hub") as url:
        env = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home")}
        env |= {"HF_HUB_OFFLINE": "0", "PYTHONPATH": program}
        for words in (["-c", script], ["-m", "klsplice.formats.from_saelens", "me/sae", "sae"]):
            subprocess.run([sys.executable, *words], env=env, cwd=tmp_path, check=True)
    ours = SAE.load_from_disk(folder)
    reads(tmp_path / "again", ours)
    assert reads(tmp_path / "saes/me/sae/sae", ours).site.layer == 12


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "topk"])
@torch.no_grad()
def test_a_transcoder_is_the_same_function_there(architecture, skip, tmp_path):
    """In SAELens; a TopK, which it has not, in sparsify. And read here again."""
    rng, where = torch.Generator().manual_seed(0), "mlp.hook_in:hook_mlp_out"
    weights = {"W_enc_FD": torch.randn(F, D, generator=rng), "b_enc_F": torch.randn(F)}
    weights |= {"W_dec_FD": torch.randn(F, D, generator=rng), "b_dec_D": torch.randn(D)}
    if architecture == "jumprelu":
        weights["threshold"] = torch.rand(F, generator=rng)
    if skip:
        weights["W_skip_DD"] = torch.randn(D, D, generator=rng)
    source = reader.Source("test", architecture, D, F, k=K, l1=0.1, site=site.at(where, 12))
    sae = build(source, weights).eval()
    (x_ND, _, y_ND), _ = write(tmp_path, sae, architecture, SITE=where)
    if architecture == "topk":
        found_ND = sparsify.SparseCoder.load_from_disk(tmp_path, device="cpu")(x_ND).sae_out
    else:
        theirs = SAE.load_from_disk(str(tmp_path), device="cpu")
        assert theirs.cfg.metadata.hook_name_out == "blocks.12.hook_mlp_out"
        found_ND = theirs(x_ND)
    assert torch.allclose(found_ND, y_ND, atol=1e-4)
    again = reader.open_sae(str(tmp_path), "")
    assert again.site == source.site
    assert torch.allclose(build(again, again.read_weights()).eval()(x_ND)[0], y_ND, atol=1e-4)
