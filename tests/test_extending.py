"""What a researcher adds: an architecture is a class and a row, a loss is a function and a row.

Each is added here as a reader of the program would add it, with its name among run.py's choices.
"""

import dataclasses
import importlib
import json
import shutil
from functools import partial
from types import SimpleNamespace

import hub
import naive
import pytest
import torch
from conftest import gradients
from test_method import CASES, LAYER, D, lm_of
from test_run import main

import eval as evaluation
import finetune
import sae as saes
from evals import common
from klsplice import architectures, machine, settings, turns
from klsplice.errors import UserError
from klsplice.formats import read
from klsplice.lm.splice import rows
from klsplice.trainable import squared_error
from learners import checks, convert
from report import plots


class ScaledTopK(saes.TopK):
    """A TopK whose latents have a learned scale."""

    architecture = "scaled"

    def __init__(self, weights, *, k):
        super().__init__(weights, k=k)
        scale_F = weights.get("scale_F", torch.ones(len(self.b_enc_F)))
        self.scale_F = torch.nn.Parameter(scale_F)

    def decode(self, z_NF):
        return super().decode(z_NF * self.scale_F)

    def to_save(self):
        return super().to_save() | {"scale_F": self.scale_F.detach().float().cpu().clone()}


PROGRAM = machine.HERE
ROW = architectures.Architecture(
    "ScaledTopK",
    "ScaledTrainer",
    architectures.LINEAR
    | {"b_dec_D": "b_dec"}
    | {name: name for name in ("k", "threshold", "scale_F")},
    saelens=None,
    saebench=None,
    has_k=True,
    fresh=True,
    unit_rows=True,
    adapts=False,
)


def next_block(part, spliced, splice, dtype):
    """The MSE of the residual after the next block -> (N,)."""
    block = splice.layer + 1
    clean_ND = rows(part.clean.after[block], part.active_N)
    return squared_error(clean_ND, rows(spliced.after[block], part.active_N).float())


LOSS = finetune.Loss(finetune.balanced, (next_block,), after=(1,))


@pytest.fixture
def box(tmp_path, monkeypatch):
    """A tiny LM and text, and run.py with the new names among its choices."""
    hub.make_gemma(tmp_path / "gem", seed=0)
    sae = {"d_in": 32, "d_sae": 64, "k": 4, "layer": 1, "lm_name": "gem", "seed": 0}
    hub.make_sae(tmp_path / "sae", **sae)
    texts = hub.make_pile(tmp_path / "pile", documents=120, seed=0)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    with open(settings.RUN_PY, encoding="utf-8") as f:
        program = f.read()
    edited = program.replace('Literal["", "topk"', 'Literal["", "scaled", "topk"')
    edited = edited.replace('Literal["kl+mse"', 'Literal["next", "kl+mse"')
    (tmp_path / "run.py").write_text(edited)
    monkeypatch.setattr(settings, "RUN_PY", str(tmp_path / "run.py"))
    monkeypatch.setitem(architectures.ARCHITECTURES, "scaled", ROW)
    monkeypatch.setitem(saes.CLASSES, "scaled", ScaledTopK)
    monkeypatch.setitem(finetune.LOSSES, "next", LOSS)
    paths = {"model": tmp_path / "gem", "sae": tmp_path / "sae", "text": tmp_path / "text.jsonl"}
    return SimpleNamespace(root=tmp_path, **paths)


FRESH = {"SAE": "fresh", "ARCHITECTURE": "scaled", "D_SAE": 64, "K": 4, "LR": 1e-2}


def test_an_architecture_is_a_class_and_a_row(box):
    runs = box.root / "runs"
    assert main(box, runs, **FRESH) == 0
    folder = runs / "x" / "sae"
    tensors = torch.load(folder / "ae.pt", weights_only=True)
    assert (tensors["scale_F"] - 1).abs().max() > 1e-3
    config = json.loads((folder / "config.json").read_text())
    assert config["trainer"]["dict_class"] == "ScaledTopK" and config["trainer"]["k"] == 4
    assert not (folder / "cfg.json").exists()  # SAELens has no such class, and its card says so
    card = (folder / "README.md").read_text()
    assert not any(name in card for name in ("saelens", "sae_lens", "sae_bench"))
    assert "load_dictionary" not in card and "No library has its class, ScaledTopK" in card
    assert main(box, runs, SAE=runs / "x", RUN_NAME="again") == 0
    assert (
        json.loads((runs / "again" / "run.json").read_text())["source"]["architecture"] == "scaled"
    )
    results = [json.loads((runs / name / "results.json").read_text()) for name in ("x", "again")]
    assert results[1]["ce_before"] == pytest.approx(results[0]["ce_after"], abs=1e-6)


@pytest.mark.parametrize("train", ["adapter", "sae_lora"])
def test_what_could_not_be_saved_is_refused_before_training(box, capsys, train):
    runs = box.root / "runs"
    assert main(box, runs, **FRESH) == 0
    assert main(box, runs, SAE=runs / "x", RUN_NAME="again", TRAIN=train, RANK=2) == 2
    assert f"TRAIN = {train}" in capsys.readouterr().err
    assert not (runs / "again").exists()


def test_a_loss_on_a_later_block_is_a_function_and_a_row(box, monkeypatch):
    runs, shown = box.root / "runs", []
    monkeypatch.setattr(turns.Bar, "show", lambda self, name, values: shown.append(values))
    assert main(box, runs, LOSS="next", LR=1e-3) == 0
    lines = [json.loads(x) for x in (runs / "x" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "train/next_block" in line]
    curve = [line["train/next_block"] for line in lines]
    assert len(curve) == 10 and curve[-1] < curve[0]
    for line in lines:
        assert line["train/alpha"] == pytest.approx(line["train/mse"] / line["train/next_block"])
    assert shown[-1].keys() == {"next_block", "mse", "lr"}  # on the bar
    panels = [axes.get_ylabel() for axes in plots.curves([str(runs / "x")]).axes]
    assert "next block" in panels and "kl" not in panels


def test_a_choice_without_a_row_is_named(box, monkeypatch, capsys):
    monkeypatch.delitem(finetune.LOSSES, "next")
    assert main(box, box.root / "runs", LOSS="next") == 2
    assert "LOSS = next has no row in LOSSES of finetune.py" in capsys.readouterr().err


def test_a_class_of_our_own_is_read_again_as_itself_whatever_other_class_has_its_name(
    box, monkeypatch
):
    """dictionary_learning's GatedAutoEncoder is otherwise read as a JumpReLU."""
    row = dataclasses.replace(ROW, dict_class="GatedAutoEncoder")
    monkeypatch.setitem(architectures.ARCHITECTURES, "scaled", row)
    assert main(box, box.root / "runs", **FRESH) == 0
    assert read.open_sae(str(box.root / "runs" / "x"), "").architecture == "scaled"


def test_an_edited_class_is_measured_anew(box, monkeypatch):
    """CACHE has evaluations, and knows a class by its code."""
    runs, found = box.root / "runs", []
    assert main(box, runs, **FRESH) == 0
    source = "import sae\nfrom test_extending import ScaledTopK\nclass Mine(ScaledTopK):\n"
    for name, scale in (("first", 1.0), ("edited", 0.5)):
        path = box.root / f"{name}.py"
        path.write_text(f"{source}    def encode(self, x): return {scale} * super().encode(x)\n")
        monkeypatch.syspath_prepend(box.root)
        monkeypatch.setitem(saes.CLASSES, "scaled", importlib.import_module(name).Mine)
        assert main(box, runs, SAE=runs / "x", RUN_NAME=name, TOKENS=0) == 0
        found.append(json.loads((runs / name / "results.json").read_text())["ce_before"])
    assert abs(found[1] - found[0]) > 1e-3


def test_an_edited_program_measures_anew(tmp_path, monkeypatch):
    for name in ("klsplice", "learners"):
        shutil.copytree(f"{PROGRAM}/{name}", tmp_path / name)
    for name in ("sae.py", "eval.py", "data.py"):
        shutil.copy(f"{PROGRAM}/{name}", tmp_path)
    monkeypatch.setattr(machine, "HERE", str(tmp_path))
    assert machine.code_digest.__wrapped__() == machine.code_digest()
    for name in ("eval.py", "klsplice/lm/head.py", "learners/base.py"):
        before = machine.code_digest.__wrapped__()
        (tmp_path / name).write_text((tmp_path / name).read_text() + "# edited\n")
        assert machine.code_digest.__wrapped__() != before
    shutil.copy(f"{PROGRAM}/finetune.py", tmp_path)
    assert machine.code_digest.__wrapped__() != machine.code_digest.__wrapped__("finetune")
    (tmp_path / "klsplice" / "gone.py").symlink_to(tmp_path / "nowhere.py")
    machine.code_digest.__wrapped__()


class MeanTopK(saes.TopK):
    """A TopK on what is left of a running mean, which is no parameter."""

    architecture = "scaled"
    decides = ("mean_D",)

    def __init__(self, weights, *, k):
        super().__init__(weights, k=k)
        self.register_buffer("mean_D", weights.get("mean_D", torch.zeros(len(self.b_dec_D))))
        self.seen_D = self.mean_D

    def forward(self, x_ND):
        self.seen_D = x_ND.detach().float().mean(0)
        y_ND, z_NF = super().forward(x_ND - self.mean_D)
        return y_ND + self.mean_D, z_NF

    def after_step(self, l0, fired_F, tokens):
        super().after_step(l0, fired_F, tokens)
        self.mean_D.lerp_(self.seen_D, 0.5)

    def to_save(self):
        return super().to_save() | {"mean_D": self.mean_D.cpu().clone()}


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

    def counted(self, learner, n, *poll):
        measured.append(n)
        return measure(self, learner, n, *poll)

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
    assert "is finished; nothing was changed\n" in said and "code" not in said
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
    ("weigh", "term", "said"),
    [
        (finetune.balanced, lambda *given: finetune.kl(*given).mean(), "no mean"),
        (lambda mse, term: (1.0,), finetune.kl, "returned (1.0,)"),
        (lambda mse, term: 0.5, finetune.kl, "returned 0.5"),
        (finetune.balanced, lambda *given: finetune.kl(*given).mean().item(), "no mean"),
    ],
)
def test_a_loss_of_the_wrong_shape_is_refused(box, monkeypatch, capsys, weigh, term, said):
    monkeypatch.setitem(finetune.LOSSES, "next", finetune.Loss(weigh, (term,)))
    assert main(box, box.root / "runs", LOSS="next") == 1
    assert said in capsys.readouterr().err


def test_a_term_with_an_option_is_a_partial(box, monkeypatch):
    def warm(part, spliced, splice, dtype, *, scale):
        return scale * finetune.kl(part, spliced, splice, dtype)

    found = {}
    for scale in (1.0, 3.0):
        loss = finetune.Loss(finetune.balanced, (partial(warm, scale=scale),))
        monkeypatch.setitem(finetune.LOSSES, "next", loss)
        assert main(box, box.root / "runs", LOSS="next", RUN_NAME=f"s{scale:g}") == 0
        lines = (box.root / "runs" / f"s{scale:g}" / "metrics.jsonl").read_text().splitlines()
        found[scale] = next(x["train/warm"] for x in map(json.loads, lines) if "train/warm" in x)
    assert found[3.0] == pytest.approx(3 * found[1.0], rel=1e-3)


def test_its_gradient_is_that_of_a_whole_pass(monkeypatch):
    """0.5 (MSE + alpha L) with L the MSE after the next block, from a plain hooked pass."""
    monkeypatch.setitem(finetune.LOSSES, "next", LOSS)
    lm = lm_of("gemma2")
    c, tokens, learner = CASES["topk gemma2"].learner(LOSS="next", KEEP="first")
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
