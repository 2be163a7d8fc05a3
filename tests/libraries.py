"""What we write loads unchanged in dictionary_learning, SAELens and SAEBench, with equal codes.

What they and sparsify write is the same function here.

Run by `make test-formats` with the real libraries, in an environment of their own.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import hub
import huggingface_hub
import pytest
import sparsify
import torch
from dictionary_learning import dictionary
from dictionary_learning.utils import load_dictionary
from sae_bench.custom_saes import batch_topk_sae, jumprelu_sae, relu_sae, topk_sae
from sae_lens import SAE, TrainingSAE
from sae_lens.loading import pretrained_sae_loaders as converters

from klsplice.formats import read as reader
from klsplice.formats import write as writer
from learners import lora
from learners.adapter import Adapter
from report import card, publish
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
    said = " ".join(card._notes(about["constants"], architecture, {}))
    if "SAEBench" in said:
        assert not [n for n in card.loading(about) if n.startswith("SAEBench")]
        with pytest.raises(ValueError, match="not normalized"):
            load(*words, layer=12)
    else:
        theirs = load(*words, layer=12)
        with torch.no_grad():
            assert torch.allclose(theirs.decode(theirs.encode(x_ND)), y_ND, atol=1e-5)
    assert ("SAEBench" in said) == (architecture in ("topk", "batchtopk", "matryoshka"))


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


# ---- from the Hub and to it --------------------------------------------------------------------

PROGRAM = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture
def hub_python(tmp_path):
    """Runs Python in a process of its own whose Hub is the folder tmp_path/hub/models."""
    with hub.Hub(tmp_path / "hub") as url:
        mine = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}

        def run(*words):
            env = os.environ | mine | {"PYTHONPATH": PROGRAM}
            pipes = {"capture_output": True, "text": True, "cwd": tmp_path}
            done = subprocess.run([sys.executable, *map(str, words)], env=env, **pipes)
            assert done.returncode == 0, done.stderr[-2000:]
            return done.stdout

        yield run


def published(tmp_path, monkeypatch, architecture):
    """What report.publish sends, in the stand-in of the Hub; and the card that came with it."""
    run, repo = tmp_path / "runs" / "x", tmp_path / "hub" / "models" / "me" / "sae"
    _, about = write(run / "sae", random_sae(architecture), architecture)
    code = "\n".join(card.loading(about).values())
    (run / "sae" / "README.md").write_text(code)
    (run / "results.json").write_text("{}")

    def upload_folder(self, *, folder_path, path_in_repo, **_):
        shutil.copytree(folder_path, repo / path_in_repo)

    def upload_file(self, *, path_or_fileobj, path_in_repo, **_):
        (repo / path_in_repo).write_bytes(path_or_fileobj)

    private = SimpleNamespace(private=True)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *a, **o: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *a, **o: private)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_file", upload_file)
    assert publish.main([str(run), "me/sae"]) == 0
    return (repo / "README.md").read_text()


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_what_is_published_loads_by_the_cards_call(architecture, tmp_path, monkeypatch, hub_python):
    said = published(tmp_path, monkeypatch, architecture)
    (call,) = re.findall(r"SAE\.from_pretrained\(.*?\)", said)
    assert "me/sae" in call
    code = f"from sae_lens import SAE\n{call}.save_model('again')"
    hub_python("-c", code)
    ours = SAE.load_from_disk(tmp_path / "runs/x/sae")
    reads(tmp_path / "again", ours)


def test_an_sae_of_saelens_is_brought_in_by_one_command(tmp_path, monkeypatch, hub_python):
    published(tmp_path, monkeypatch, "jumprelu")
    said = hub_python("-m", "klsplice.formats.from_saelens", "me/sae", "sae")
    assert f"a jumprelu SAE of {F} latents of layer 12" in said
    assert said.splitlines()[-1] == "SAE=saes/me/sae/sae"
    reads(tmp_path / "saes/me/sae/sae", SAE.load_from_disk(tmp_path / "runs/x/sae"))
