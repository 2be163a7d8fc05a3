"""What a researcher adds: an architecture is a class, a loss is a function and a row.

Each is added here as a reader of the program would add it, with its name among run.py's choices.
"""

import importlib
import json
import shutil
from typing import Literal, get_args

import naive
import pytest
import test_families as families
import test_sites as sites
import tiny
import torch
from conftest import constants, gradients, make_tokens, open_learner
from test_method import LAYER, Case, D, given, lm_of
from torch.nn.functional import normalize

import finetune
import run
import sae as saes
from evals import common
from klsplice import machine
from klsplice.errors import UserError
from klsplice.formats import read
from klsplice.lm.splice import rows


class Scaled(saes.TopK):
    """A TopK whose latents have a learned scale."""

    tensors = saes.TopK.tensors | {"scale_F": "scale_F"}
    adapts = False

    def __init__(self, weights, *, k):
        super().__init__(weights, k=k)
        scale_F = weights.get("scale_F", torch.ones(len(self.b_enc_F)))
        self.scale_F = torch.nn.Parameter(scale_F)

    def decode(self, z_NF):
        return super().decode(z_NF * self.scale_F)

    def to_save(self):
        return super().to_save() | {"scale_F": self.scale_F.detach().float().cpu().clone()}


class MeanTopK(saes.TopK):
    """A TopK on what is left of a running mean, which is no parameter."""

    tensors = saes.TopK.tensors | {"mean_D": "running_mean"}
    decides = ("mean_D",)

    def __init__(self, weights, *, k):
        super().__init__(weights, k=k)
        self.register_buffer("mean_D", weights.get("mean_D", torch.zeros(len(self.b_dec_D))))

    def forward(self, x_ND):
        y_ND, z_NF = super().forward(x_ND - self.mean_D)
        return y_ND + self.mean_D, z_NF

    def to_save(self):
        return super().to_save() | {"mean_D": self.mean_D.cpu().clone()}


def next_block(part, spliced, splice, dtype):
    """The MSE of the residual after the next block -> (N,)."""
    clean_ND = rows(part.clean.after[1], part.active_N)
    return saes.squared_error(clean_ND, rows(spliced.after[1], part.active_N).float())


LOSS = finetune.Loss(finetune.balanced, (next_block,), after=(1,))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("world"))


@pytest.fixture
def add(tmp_path, monkeypatch):
    """add(class) enters it as the architecture "own"; run.py has it, and LOSS "own", as choices."""
    for name in ("ARCHITECTURE", "LOSS"):
        choices = *get_args(run.__annotations__[name]), "own"
        monkeypatch.setitem(run.__annotations__, name, Literal[choices])
    monkeypatch.setitem(saes.ARCHITECTURES, "own", None)  # what comes is taken out after the test
    del saes.ARCHITECTURES["own"]
    monkeypatch.setitem(finetune.LOSSES, "own", LOSS)
    return lambda kind, **more: type(kind.__name__, (kind,), {"architecture": "own"} | more)


FRESH = {"SAE": "fresh", "ARCHITECTURE": "own", "D_SAE": 64, "K": 4, "LR": 1e-2}


def results(folder, name="results.json") -> dict:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("kind", [Scaled, MeanTopK])
def test_an_architecture_is_a_class(world, add, tmp_path, kind):
    add(kind)
    runs = tmp_path / "runs"
    folder = tiny.finished(world, runs, **FRESH)
    tensors = torch.load(folder / "sae" / "ae.pt", weights_only=True)
    assert tensors.keys() == {name.removesuffix(".T") for name in kind.tensors.values()}
    trainer = results(folder / "sae", "config.json")["trainer"]
    assert (trainer["dict_class"], trainer["k"]) == (kind.__name__, 4)
    assert not (folder / "sae" / "cfg.json").exists()  # SAELens has no such class
    card = (folder / "sae" / "README.md").read_text()
    assert "load_dictionary" not in card and "sae_bench" not in card
    again = tiny.finished(world, runs, SAE=folder, RUN_NAME="again", TOKENS=0)
    assert results(again, "run.json")["source"]["architecture"] == "own"
    wanted = results(folder)["ce_after"]
    assert results(again)["ce_before"] == pytest.approx(wanted, abs=1e-6)
    if not kind.adapts:  # what could not be saved is refused before training
        given = {"SAE": folder, "RUN_NAME": "adapted", "TRAIN": "adapter", "RANK": 2}
        assert tiny.main(world, runs, **given) == 2 and not (runs / "adapted").exists()


def test_a_choice_without_a_class_or_row_is_refused(world, add, tmp_path, monkeypatch):
    monkeypatch.delitem(finetune.LOSSES, "own")
    assert tiny.main(world, tmp_path / "runs", ARCHITECTURE="own") == 2
    assert tiny.main(world, tmp_path / "runs", LOSS="own") == 2
    assert not (tmp_path / "runs" / "x").exists()


def an_sae(kind, **more):
    """-> an SAE, and its Source."""
    generator = torch.Generator().manual_seed(0)
    W_FD = normalize(torch.randn(64, 32, generator=generator), dim=1)
    w = {"W_enc_FD": W_FD, "b_enc_F": torch.zeros(64), "W_dec_FD": W_FD.clone()}
    w |= {"b_dec_D": torch.randn(32, generator=generator), "group_sizes": torch.tensor([16, 48])}
    w["threshold"] = (
        torch.full((64,), 0.5) if kind.architecture == "jumprelu" else torch.tensor(0.5)
    )
    source = read.Source("x", kind.architecture, 32, 64, k=4, l1=0.1)
    return kind.of(source, w | more), source


CLASSES = [*saes.ARCHITECTURES.values(), Scaled, MeanTopK]


@pytest.mark.parametrize("kind", CASES := [c.__name__ for c in CLASSES])
@torch.no_grad()
def test_a_file_holds_all_that_a_class_reconstructs_by(add, kind):
    """Each tensor is changed in turn: the SAE that is saved and built again follows, and no buffer
    that `decides` does not name changes y."""
    kind = CLASSES[CASES.index(kind)]
    kind = kind if kind in saes.ARCHITECTURES.values() else add(kind)
    x_ND = 3 * torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    names = [n for n, t in an_sae(kind)[0].state_dict().items() if t.is_floating_point()]
    for name in names:
        (sae, source), before = an_sae(kind), an_sae(kind)[0].eval()(x_ND)[0]
        t = sae.state_dict()[name]
        t.mul_(1.2).add_(0.05 * torch.linspace(0, 1, t.numel()).view(t.shape))
        y_ND = sae.eval()(x_ND)[0]
        if name not in dict(sae.named_parameters()) and name not in sae.decides:
            assert torch.equal(y_ND, before), name
        again = saes.build(source, sae.to_save()).eval()
        torch.testing.assert_close(again(x_ND)[0], y_ND, rtol=1e-4, atol=1e-4)


def test_what_a_class_forgets_is_refused_before_training(world, add, tmp_path):
    class Forgetful(Scaled):
        """It starts with another scale than one that is read does."""

        def __init__(self, weights, *, k):
            super().__init__(weights | {"scale_F": 1 + torch.rand(64)}, k=k)

    add(Forgetful)
    assert tiny.main(world, tmp_path / "runs", **FRESH) == 2
    add(Scaled, to_save=saes.TopK.to_save)
    assert tiny.main(world, tmp_path / "runs", **FRESH) == 2
    assert not (tmp_path / "runs" / "x").exists()


def test_an_edited_class_is_measured_anew(world, add, tmp_path, monkeypatch):
    """CACHE has evaluations, and knows a class by its code."""
    add(Scaled)
    runs, measured = tmp_path / "runs", []
    folder = tiny.finished(world, runs, **FRESH)
    source = "from test_extending import Scaled\nclass Mine(Scaled):\n    architecture = 'own'\n"
    source += "    dict_class = 'Scaled'\n"
    for name, scale in (("first", 1.0), ("edited", 0.5)):
        code = f"{source}    def encode(self, x): return {scale} * super().encode(x)\n"
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.import_module(name)
        again = tiny.finished(world, runs, SAE=folder, RUN_NAME=name, TOKENS=0)
        measured.append(results(again)["ce_before"])
    assert abs(measured[1] - measured[0]) > 1e-3


def test_an_edited_program_measures_anew(tmp_path, monkeypatch):
    for name in ("klsplice", "learners"):
        shutil.copytree(f"{machine.HERE}/{name}", tmp_path / name)
    for name in ("sae.py", "eval.py", "data.py"):
        shutil.copy(f"{machine.HERE}/{name}", tmp_path)
    monkeypatch.setattr(machine, "HERE", str(tmp_path))
    digest = machine.code_digest.__wrapped__
    assert digest() == machine.code_digest()
    for name in ("eval.py", "klsplice/lm/head.py", "learners/base.py"):
        before = digest()
        (tmp_path / name).write_text((tmp_path / name).read_text() + "# edited\n")
        assert digest() != before


# ---- losses ----------------------------------------------------------------------------------


def test_a_loss_is_a_function_and_a_row(world, add, tmp_path):
    folder = tiny.finished(world, tmp_path / "runs", LOSS="own", LR=1e-3)
    lines = tiny.lines(folder, "train")
    assert lines[-1]["next_block"] < lines[0]["next_block"]
    for line in lines:
        assert line["alpha"] == pytest.approx(line["mse"] / line["next_block"])


def test_its_gradient_is_that_of_a_whole_pass(monkeypatch):
    """0.5 (MSE + alpha L) with L the MSE after the next block, from a plain hooked pass."""
    monkeypatch.setitem(finetune.LOSSES, "own", LOSS)
    case, lm = Case("topk", None, given(), {"LOSS": "own", "KEEP": "first"}), lm_of("gemma2")
    c, tokens, learner = case.learner()
    found = gradients(c, learner, finetune.batches_of(c, learner, tokens)(0))
    grads = [p.grad.clone() for p in learner.model.parameters()]

    tokens_BL, residual = tokens.batch(0), {}
    note = lambda m, a, out: residual.update(after=out)  # noqa: E731
    hook = lm.base_model.layers[LAYER + 1].register_forward_hook(note)
    _, x_BLD = naive.run_lm(lm, tokens_BL, LAYER)
    clean_BLD = residual["after"]
    model = case.learner()[2].model
    y_BLD = model(x_BLD.reshape(-1, D))[0].view_as(x_BLD)
    keep = lambda x: torch.cat([x[:, :1], y_BLD[:, 1:]], 1)  # noqa: E731
    naive.run_lm(lm, tokens_BL, LAYER, keep)
    hook.remove()
    term = (residual["after"] - clean_BLD)[:, 1:].square().mean()
    mse = (y_BLD - x_BLD)[:, 1:].square().mean()
    (0.5 * (mse + (mse / term).detach() * term)).backward()
    assert found["next_block"].item() == pytest.approx(term.item(), rel=1e-5)
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert (p.grad - grad).norm() <= 1e-5 * p.grad.norm()


def test_an_evaluation_of_ones_own_needs_no_figure(world, tmp_path, capsys):
    folder = str(tiny.finished(world, tmp_path / "runs"))
    found = {"numbers": {"a": 1.0}, "table": [["", "a"], ["all", "1"]]}
    how = "mine", "A question?", common.one_run, lambda a: common.open_run(a.runs) and found
    assert common.command([folder], *how) == 0
    with open(f"{folder}/evals/mine.json") as f:
        assert json.load(f)["numbers"] == {"a": 1.0}


def test_later_terms_are_the_error_of_the_residual_above():
    """Of blocks 4 and 8 above, over their mean square, by plain hooks; and each an equal share."""
    lm = families.lm_of("llama", num_hidden_layers=12)
    c = constants(**sites.FRESH | {"LAYER": 1, "SAE": "made", "LOSS": "kl+mse+later"})
    source, _ = sites.source_at("hook_resid_post", "topk")
    tokens = make_tokens(c, vocabulary=97, sequences=20)
    learner = open_learner(c, source, lm, tokens)
    scalars = gradients(c, learner, finetune.batches_of(c, learner, tokens)(0))
    seen = {}

    def residuals(edit):
        hooks = [
            block.register_forward_hook(lambda _, args, o, i=i: seen.__setitem__(i, o))
            for i, block in enumerate(lm.model.layers)
        ]
        hooks.append(lm.model.layers[1].register_forward_hook(lambda _, args, o: edit(o)))
        lm(tokens.batch(0))
        for hook in hooks:
            hook.remove()
        return {i: seen[1 + i] for i in (4, 8)}

    clean = residuals(lambda o: o)
    found = residuals(lambda o: learner.sae(o.flatten(0, 1))[0].view_as(o))
    terms = []
    for i in (4, 8):
        share = (found[i] - clean[i]).square().mean() / clean[i].square().mean()
        assert float(scalars[f"later_{i}"]) == pytest.approx(share.item(), rel=1e-4)
        terms.append(share)
    weights = finetune.loss_of(c).weights(torch.tensor(2.0), torch.tensor(0.5), *terms)
    assert weights[0] == 0.25 and float(weights[1]) == 1.0
    assert float(weights[2] * terms[0]) == pytest.approx(0.5)
    with pytest.raises(UserError, match="8 blocks above LAYER = 1"):
        short = open_learner(c, source, families.lm_of("llama"), tokens)
        finetune.batches_of(c, short, tokens)
