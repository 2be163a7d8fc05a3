"""What a researcher adds: an architecture is a class, a loss is a function and a row.

Each is added here as a reader of the program would add it, with its name among run.py's choices.
"""

import importlib
import json
import shutil
from functools import partial

import naive
import pytest
import tiny
import torch
from conftest import gradients
from test_method import CONTEXT, LAYER, D, our_learner, setting
from torch.nn.functional import normalize

import finetune
import run
import sae as saes
from evals import common
from klsplice import machine, settings
from klsplice.formats import read
from klsplice.lm.splice import rows
from learners import checks


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
    block = splice.layer + 1
    clean_ND = rows(part.clean.after[block], part.active_N)
    return saes.squared_error(clean_ND, rows(spliced.after[block], part.active_N).float())


LOSS = finetune.Loss(finetune.balanced, (next_block,), after=(1,))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("world"))


@pytest.fixture
def add(tmp_path, monkeypatch):
    """add(class) enters it as the architecture "own"; run.py has it, and LOSS "own", as choices."""
    with open(settings.RUN_PY, encoding="utf-8") as f:
        program = f.read()
    program = program.replace('Literal["", "topk"', 'Literal["", "own", "topk"')
    program = program.replace('Literal["kl+mse"', 'Literal["own", "kl+mse"')
    (tmp_path / "run.py").write_text(program)
    monkeypatch.setattr(settings, "RUN_PY", str(tmp_path / "run.py"))
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


def test_our_own_class_is_read_first(world, add, tmp_path):
    """dictionary_learning's GatedAutoEncoder is otherwise read as a JumpReLU."""
    add(Scaled, dict_class="GatedAutoEncoder")
    folder = tiny.finished(world, tmp_path / "runs", **FRESH)
    assert read.open_sae(str(folder), "").architecture == "own"


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


@pytest.mark.parametrize("case", ["dead", "zero rows", "tiny"])
@pytest.mark.parametrize("kind", saes.ARCHITECTURES.values())
def test_no_odd_sae_of_ours_is_refused(kind, case):
    sae, source = an_sae(kind)
    with torch.no_grad():
        if case == "dead":
            sae.b_enc_F -= 1e9
        elif case == "zero rows":
            sae.W_dec_FD[::2] = 0
        else:
            sae.W_enc_FD *= 1e-6
    checks.check_saves(sae, source)


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


MEAN = {n: name for n, name in ROW.tensors.items() if n != "scale_F"} | {"mean_D": "running_mean"}
MEAN = dataclasses.replace(ROW, dict_class="MeanTopK", tensors=MEAN)


def test_a_buffer_that_decides_is_saved_and_read_again(box, monkeypatch):
    monkeypatch.setitem(saes.CLASSES, "scaled", MeanTopK)
    monkeypatch.setitem(architectures.ARCHITECTURES, "scaled", MEAN)
    assert main(box, box.root / "runs", **FRESH) == 0
    folder = box.root / "runs" / "x"
    assert torch.load(folder / "sae" / "ae.pt", weights_only=True)["running_mean"].abs().max() > 0.1
    again = {"SAE": folder, "RUN_NAME": "again", "TOKENS": 0, "CACHE": box.root / "none"}
    assert main(box, box.root / "runs", **again) == 0
    results = json.loads((box.root / "runs" / "again" / "results.json").read_text())
    wanted = json.loads((folder / "results.json").read_text())["ce_after"]
    assert results["ce_before"] == pytest.approx(wanted, abs=1e-6)


FORGOTTEN = {  # what a class, or its row, lacks -> what is said before anything is trained
    "in decides": ({"decides": ()}, {}, "depends on its buffer mean_D"),
    "in decides, misspelt": ({"decides": ("mean_F",)}, {}, "names mean_F, which it does not have"),
    "in to_save": ({"to_save": saes.TopK.to_save}, {}, "to_save() leaves out mean_D"),
    "in the row": ({}, {"mean_D"}, "returns mean_D, which its row does not have"),
    "in both": ({"to_save": saes.TopK.to_save}, {"mean_D"}, "not reconstruct as the SAE did (mean"),
}


@pytest.mark.parametrize("case", FORGOTTEN)
def test_a_buffer_that_is_forgotten_is_named_before_training(box, monkeypatch, capsys, case):
    changed, left_out, said = FORGOTTEN[case]
    tensors = {n: name for n, name in MEAN.tensors.items() if n not in left_out}
    monkeypatch.setitem(saes.CLASSES, "scaled", type("MeanTopK", (MeanTopK,), changed))
    row = dataclasses.replace(MEAN, tensors=tensors)
    monkeypatch.setitem(architectures.ARCHITECTURES, "scaled", row)
    assert main(box, box.root / "runs", **FRESH) == 2
    assert said in capsys.readouterr().err and not (box.root / "runs" / "x").exists()


class Masked(saes.TopK):
    """Latents that a mask prunes."""

    def __init__(self, weights, *, k):
        super().__init__(weights, k=k)
        self.register_buffer("kept_F", torch.ones(len(self.b_enc_F), dtype=torch.bool))

    def activate(self, pre_NF):
        return super().activate(pre_NF) * self.kept_F


class Balanced(saes.TopK):
    """A bias that only decides which k win."""

    def __init__(self, weights, *, k):
        super().__init__(weights, k=k)
        self.register_buffer("bias_F", torch.zeros(len(self.b_enc_F)))

    def activate(self, pre_NF):
        chosen_NK = (pre_NF + self.bias_F).topk(self.k).indices
        return torch.zeros_like(pre_NF).scatter(1, chosen_NK, pre_NF.gather(1, chosen_NK).relu())


class Shifted(saes.TopK):
    """A shift in a buffer that no state_dict has, or in a plain tensor."""

    persistent: bool | None = False

    def __init__(self, weights, *, k):
        super().__init__(weights, k=k)
        shift_D = torch.zeros(len(self.b_dec_D))
        if self.persistent is None:
            self.shift_D = shift_D
        else:
            self.register_buffer("shift_D", shift_D, persistent=self.persistent)

    def decode(self, z_NF):
        return super().decode(z_NF) + self.shift_D


class Plain(Shifted):
    persistent = None


class LogScaled(ScaledTopK):
    """Saved under another name, with a part that is of training alone and an index that is not."""

    def __init__(self, weights, *, k):
        saes.TopK.__init__(self, weights, k=k)
        scale_F = weights.get("scale_F", torch.ones(len(self.b_enc_F)))
        self.log_scale_F = torch.nn.Parameter(scale_F.log())
        self.training_only = torch.nn.Parameter(torch.zeros(3))
        self.register_buffer("order_F", torch.arange(len(self.b_enc_F)), persistent=False)

    def decode(self, z_NF):
        return saes.TopK.decode(self, (z_NF * self.log_scale_F.exp()))

    def to_save(self):
        return saes.TopK.to_save(self) | {"scale_F": self.log_scale_F.exp().detach()}


def some_sae(kind):
    generator = torch.Generator().manual_seed(0)
    W_FD = torch.nn.functional.normalize(torch.randn(64, 32, generator=generator), dim=1)
    weights = {"W_enc_FD": W_FD, "b_enc_F": torch.zeros(64), "W_dec_FD": W_FD.clone()}
    return kind(weights | {"b_dec_D": 30 * torch.randn(32, generator=generator)}, k=4)


@pytest.mark.parametrize("kind", [Masked, Balanced, Shifted, Plain])
def test_whatever_a_class_decides_by_has_to_be_saved(kind):
    source = read.Source("x", "topk", 32, 64, k=4)
    name = {"Masked": "kept_F", "Balanced": "bias_F"}.get(kind.__name__, "shift_D")
    with pytest.raises(UserError, match=f"{kind.__name__} depends on its buffer {name}"):
        checks.check_saves(some_sae(kind), source)
    known = type(kind.__name__, (kind,), {"decides": (name,)})
    with pytest.raises(UserError, match=f"does not reconstruct as the SAE did .{name}"):
        checks.check_saves(some_sae(known), source)


def test_a_class_that_changes_as_it_is_saved_is_refused():
    class Scaling(saes.TopK):
        @torch.no_grad()
        def to_save(self):
            self.W_dec_FD /= 2
            return super().to_save()

    with pytest.raises(UserError, match="to_save.. changes the SAE itself"):
        checks.check_saves(some_sae(Scaling), read.Source("x", "topk", 32, 64, k=4))


def test_what_is_saved_under_another_name_is_saved(monkeypatch):
    monkeypatch.setitem(architectures.ARCHITECTURES, "scaled", ROW)
    monkeypatch.setitem(saes.CLASSES, "scaled", LogScaled)
    checks.check_saves(some_sae(LogScaled), read.Source("x", "scaled", 32, 64, k=4))


@pytest.mark.parametrize("kind", [saes.TopK, saes.BatchTopK, saes.JumpReLU, saes.ReLU])
@pytest.mark.parametrize("case", ["as it is", "dead", "zero rows", "tiny", "large", "one latent"])
def test_no_sae_of_ours_is_refused(kind, case):
    generator = torch.Generator().manual_seed(1)
    F = 1 if case == "one latent" else 64
    W_FD = torch.nn.functional.normalize(torch.randn(F, 32, generator=generator), dim=1)
    size = {"tiny": 1e-6, "large": 1e6}.get(case, 1.0)
    weights = {"W_enc_FD": size * W_FD, "b_enc_F": torch.zeros(F), "W_dec_FD": W_FD.clone()}
    weights["b_dec_D"] = 30 * torch.randn(32, generator=generator)
    if case == "dead":
        weights["b_enc_F"] -= 1e9
    if case == "zero rows":
        weights["W_dec_FD"][::2] = 0
    jump = kind is saes.JumpReLU
    weights["threshold"] = torch.full((F,), 0.5) if jump else torch.tensor(-1.0)
    options = {"l1": 1.0} if kind is saes.ReLU else {} if jump else {"k": 1}
    source = read.Source("x", kind.architecture, 32, F, k=1, l1=1.0)
    checks.check_saves(kind(weights, **options), source)


def test_the_evaluation_of_other_code_is_another(box, monkeypatch):
    measured, measure = [], evaluation.Evaluation.measure

    def counted(self, learners, n, *poll):
        measured.extend(learners)
        return measure(self, learners, n, *poll)

    monkeypatch.setattr(evaluation.Evaluation, "measure", counted)
    for name, code, wanted in (("a", "1", True), ("b", "1", False), ("c", "2", True)):
        measured.clear()
        monkeypatch.setattr(evaluation, "code_digest", lambda code=code: code)
        assert main(box, box.root / "runs", RUN_NAME=name, TOKENS=0) == 0
        assert bool(measured) == wanted


def test_two_terms_of_one_function_are_told_apart(box, monkeypatch):
    terms = (finetune.kl, partial(finetune.kl))
    monkeypatch.setitem(finetune.LOSSES, "next", finetune.Loss(finetune.balanced, terms))
    assert main(box, box.root / "runs", LOSS="next") == 0
    lines = [json.loads(x) for x in (box.root / "runs/x/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/kl" in line]
    assert steps and all(x["train/kl"] == pytest.approx(x["train/kl_2"]) for x in steps)


def test_what_is_finished_says_that_the_code_is_another(box, monkeypatch, capsys):
    assert main(box, box.root / "runs") == 0 and main(box, box.root / "runs") == 0
    said = capsys.readouterr().out
    assert "is finished; nothing was changed\n" in said
    monkeypatch.setattr(machine, "code_digest", lambda *further: "of an edited sae.py")
    assert main(box, box.root / "runs") == 0
    said = capsys.readouterr().out
    assert "nothing was changed; the program's code has changed since it began" in said
    assert "another RUN_NAME makes it anew" in said


def test_a_row_that_does_not_say_so_is_not_converted(box, monkeypatch, capsys):
    monkeypatch.setitem(convert.FROM_TOPK, "scaled", convert.batchtopk_from_topk)
    assert main(box, box.root / "runs", ARCHITECTURE="scaled") == 2
    assert "converted, to batchtopk, matryoshka, jumprelu" in capsys.readouterr().err
    monkeypatch.delitem(convert.FROM_TOPK, "scaled")
    row = dataclasses.replace(ROW, converts=True)
    monkeypatch.setitem(architectures.ARCHITECTURES, "scaled", row)
    assert main(box, box.root / "runs", ARCHITECTURE="scaled") == 2
    assert "scaled has no row in FROM_TOPK of learners/convert.py" in capsys.readouterr().err
    monkeypatch.delitem(architectures.ARCHITECTURES, "scaled")
    assert main(box, box.root / "runs", ARCHITECTURE="scaled") == 2
    assert "scaled has no row in klsplice/architectures.py" in capsys.readouterr().err


def test_an_evaluation_of_ones_own_needs_no_figure(box, capsys):
    assert main(box, box.root / "runs") == 0
    folder = str(box.root / "runs" / "x")
    found = {"numbers": {"a": 1.0}, "table": [["", "a"], ["all", "1"]]}
    how = "mine", "A question?", common.one_run, lambda a: common.open_run(a.runs) and found
    assert common.command([folder], *how) == 0
    said = capsys.readouterr().out
    assert f"{folder}/evals/mine.json" in said and "mine.png" not in said
    assert json.loads((box.root / "runs/x/evals/mine.json").read_text())["numbers"] == {"a": 1.0}
    assert "code" not in said
    about = json.loads((box.root / "runs/x/run.json").read_text())
    (box.root / "runs/x/run.json").write_text(json.dumps(about | {"code": "another"}))
    assert common.command([folder], *how) == 0
    assert "note: the program's code has changed since" in capsys.readouterr().out


def test_a_parameter_that_would_not_be_saved_is_refused_before_training(box, monkeypatch, capsys):
    tensors = {ours: theirs for ours, theirs in ROW.tensors.items() if ours != "scale_F"}
    row = dataclasses.replace(ROW, tensors=tensors)
    monkeypatch.setitem(architectures.ARCHITECTURES, "scaled", row)
    assert main(box, box.root / "runs", **FRESH) == 2
    assert "to_save() returns scale_F, which its row does not have" in capsys.readouterr().err
    monkeypatch.setitem(architectures.ARCHITECTURES, "scaled", ROW)
    monkeypatch.setattr(ScaledTopK, "to_save", saes.TopK.to_save)
    assert main(box, box.root / "runs", **FRESH) == 2
    assert "ScaledTopK.to_save() leaves out scale_F" in capsys.readouterr().err
    assert not (box.root / "runs" / "x").exists()


@pytest.mark.parametrize(
    ("weigh", "term"),
    [
        (finetune.balanced, lambda *given: finetune.kl(*given).mean()),
        (lambda mse, term: (1.0,), finetune.kl),
    ],
)
def test_a_loss_of_the_wrong_shape_is_refused(world, add, tmp_path, monkeypatch, weigh, term):
    monkeypatch.setitem(finetune.LOSSES, "own", finetune.Loss(weigh, (term,)))
    assert tiny.main(world, tmp_path / "runs", LOSS="own") == 1


def test_a_term_with_an_option_is_a_partial(world, add, tmp_path, monkeypatch):
    def warm(part, spliced, splice, dtype, *, scale):
        return scale * finetune.kl(part, spliced, splice, dtype)

    first = []
    for scale in (1.0, 3.0):
        loss = finetune.Loss(finetune.balanced, (partial(warm, scale=scale),))
        monkeypatch.setitem(finetune.LOSSES, "own", loss)
        folder = tiny.finished(world, tmp_path / "runs", LOSS="own", RUN_NAME=f"s{scale:g}")
        first.append(tiny.lines(folder, "train")[0]["warm"])
    assert first[1] == pytest.approx(3 * first[0], rel=1e-3)


def test_its_gradient_is_that_of_a_whole_pass(monkeypatch):
    """0.5 (MSE + alpha L) with L the MSE after the next block, from a plain hooked pass."""
    monkeypatch.setitem(finetune.LOSSES, "own", LOSS)
    lm = naive.build_lm("gemma2", seed=0, context=CONTEXT)
    c, tokens = setting(loss="own", keep="first", BATCH=2, MICRO_BATCH=1)
    learner = our_learner(lm, c)
    found = gradients(c, learner, finetune.batches_of(c, learner, tokens)(0))
    grads = [p.grad.clone() for p in learner.model.parameters()]

    tokens_BL, residual = tokens.batch(0), {}
    note = lambda m, a, out: residual.update(after=out)  # noqa: E731
    hook = lm.base_model.layers[LAYER + 1].register_forward_hook(note)
    _, x_BLD = naive.run_lm(lm, tokens_BL, LAYER)
    clean_BLD = residual["after"]
    _, _, again = CASES["topk gemma2"].learner(LOSS="next", KEEP="first")
    model = again.model
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
