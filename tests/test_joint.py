"""Several SAEs and transcoders spliced at once: their step, their runs, and what is refused."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from conftest import constants, gradients, make_tokens
from safetensors.torch import load_file
from test_families import lm_of
from test_sites import FRESH, TRANSCODER, source_at

import eval as evaluation
import finetune
from finetune import batches_of
from klsplice import site
from klsplice.formats import read
from klsplice.formats import source as sources
from klsplice.lm.splice import Splice
from klsplice.tracking.loop import Loop
from learners import start
from learners.joint import Joint, JointLearner
from sae import build

MIXED = [("attn.hook_z", "jumprelu", 0), (TRANSCODER, "topk", 1), ("hook_resid_post", "topk", 2)]


def several(places, c, family="llama", threshold=None):
    """Random SAEs at those places -> their learner, its tokens and their source. threshold: of a
    BatchTopK."""
    parts = []
    for where, architecture, layer in places:
        part, weights = source_at(where, architecture)
        if architecture == "batchtopk":
            weights["threshold"].fill_(threshold)
        part.site, part.where = site.at(where, layer), f"of {layer}"
        parts.append(part)
    whole = sources.several("all", parts)
    lm, tokens = lm_of(family), make_tokens(c, vocabulary=97, sequences=20)
    splice = start.open_splice(c, lm, tokens, learns=True, source=whole)
    return start.open_learner(c, whole, splice, tokens), tokens, whole


def plainly(lm, saes, places, tokens_BL, on=None):
    """Logits with the SAEs in place, by hooks of one's own; and what each read and stood in for."""
    seen, handles = {}, []

    def with_y(m, x, o):
        y = saes[m](x.flatten(0, 1))[0].view_as(o) if on is None or on == m else o
        seen[m] = x, o
        return y

    for m, (where, _, layer) in enumerate(places):
        block = lm.model.layers[layer]
        if where == "attn.hook_z":
            hook = lambda _, args, m=m: (with_y(m, args[0], args[0]),)  # noqa: E731
            handles.append(block.self_attn.o_proj.register_forward_pre_hook(hook))
        elif ":" in where:
            hook = lambda _, args, o, m=m: with_y(m, args[0], o)  # noqa: E731
            handles.append(block.mlp.register_forward_hook(hook))
        else:
            hook = lambda _, args, o, m=m: with_y(m, o, o)  # noqa: E731
            handles.append(block.register_forward_hook(hook))
    try:
        return lm(tokens_BL, use_cache=False).logits.log_softmax(-1), seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("loss", ["kl+mse", "mse", "kl"])
def test_a_step_is_one_plain_backward_pass_with_alpha_held(loss):
    """Clean MSE of each over its variance, KL of all spliced, gradients through upper ones."""
    c = constants(**FRESH | {"LOSS": loss, "LAYER": 0, "SAE": "a,b,c", "MSE_WEIGHT": 1.0})
    learner, tokens, _ = several(MIXED, c)
    learner.model.variance_M.copy_(torch.tensor([0.5, 2.0, 3.0]))
    learner.train(True)
    scalars = gradients(c, learner, batches_of(c, learner, tokens)(0))
    params = [p for p in learner.model.parameters() if p.requires_grad]
    found = [p.grad.clone() for p in params]
    for p in params:
        p.grad = None
    lm, saes, tokens_BL = lm_of("llama"), learner.model.saes, tokens.batch(0)
    clean, seen = plainly(lm, saes, MIXED, tokens_BL, on=-1)  # of none
    mse = 0.0
    for m, (x, o) in seen.items():
        error = (saes[m](x.flatten(0, 1))[0] - o.flatten(0, 1)).square().mean()
        mse = mse + error / learner.model.variance_M[m] / 3
    spliced, _ = plainly(lm, saes, MIXED, tokens_BL)
    kl = (clean.exp() * (clean - spliced)).sum(-1).mean()
    weights = {"kl+mse": (0.5, 0.5 * (mse / kl).item()), "mse": (1.0, 0.0), "kl": (0.0, 1.0)}[loss]
    (weights[0] * mse + weights[1] * kl).backward()
    assert float(scalars["mse"]) == pytest.approx(mse.item(), rel=1e-5)
    assert loss == "mse" or float(scalars["kl"]) == pytest.approx(kl.item(), rel=1e-4)
    for p, g in zip(params, found):
        assert (g - p.grad).norm() <= 1e-5 * p.grad.norm() + 1e-9


def test_one_alone_leaves_the_others_as_they_are():
    c = constants(**FRESH | {"LAYER": 0, "SAE": "a,b,c"})
    learner, tokens, _ = several(MIXED, c)
    learner.train(False)
    tokens_BL, every_N = tokens.val(0, 2), torch.arange(40)
    clean = learner.splice.clean(tokens_BL)
    spliced, found = learner.spliced(clean, every_N)
    passes = {None: spliced}
    for m in range(3):
        ys = [y if i == m else None for i, (_, y, _) in enumerate(found)]
        passes[m] = learner.splice.spliced(clean, every_N, *ys)
    for on, spliced in passes.items():
        wanted, _ = plainly(lm_of("llama"), learner.model.saes, MIXED, tokens_BL, on=on)
        logits = learner.splice.head.logits(spliced.h_BLD.flatten(0, 1), torch.float32)
        assert torch.allclose(logits.log_softmax(-1), wanted.flatten(0, 1), atol=1e-3)


def test_a_batchtopk_without_a_threshold_is_fitted_to_what_it_reads():
    c = constants(**FRESH | {"LAYER": 0, "SAE": "a,b,c"})
    places = [MIXED[0], (TRANSCODER, "batchtopk", 1), MIXED[2]]
    fitted, _, whole = several(places, c, threshold=-1.0)
    assert fitted.model.saes[1].threshold > 0
    with torch.no_grad():
        sites = fitted.splice.clean(make_tokens(c, vocabulary=97, sequences=20).batch(0)).sites
        z_NF = fitted.model.saes[1].eval()(sites[1][0].flatten(0, 1))[1]
    assert (z_NF > 0).sum(1).float().mean() == pytest.approx(8, abs=2)


def test_the_ablation_of_other_sites_is_another(tmp_path):
    """CACHE keeps it: by the sites themselves, whatever the folders of the SAEs are called."""
    c = constants(**FRESH | {"SAE": "a,b", "CACHE": str(tmp_path)})
    tokens = make_tokens(c, vocabulary=97, sequences=4)
    pairs = ([site.at(TRANSCODER, i), site.at(TRANSCODER, 3)] for i in (1, 2))
    paths = {evaluation.Evaluation(c, tokens, "lm", sites).zero_path for sites in pairs}
    assert len(paths) == 2


def test_a_latent_counts_for_its_own_sae_alone():
    """Each gets the latents that fired and the L0 that are its own."""
    c = constants(**FRESH | {"LAYER": 0, "SAE": "a,b,c"})
    learner, _, _ = several(MIXED, c)
    got = []
    for sae in learner.model.saes:
        sae.after_step = lambda l0, fired_F, tokens: got.append((l0, fired_F.tolist(), tokens))
    fired_F = torch.arange(3 * 64) % 5 == 0
    learner.model.after_step([1.0, 2.0, 3.0], fired_F, 40)
    parts = fired_F.view(3, 64).tolist()
    assert got == [(1.0, parts[0], 40), (2.0, parts[1], 40), (3.0, parts[2], 40)]


# ---- runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tiny transcoders of blocks 1 and 2, trained on MSE."""
    world = tiny.make(tmp_path_factory.mktemp("joint"))
    world.runs = world.root / "runs"
    fresh = {"SAE": "fresh", "LOSS": "mse", "D_SAE": 64, "K": 6, "SITE": TRANSCODER, "LR": 1e-2}
    for layer in (1, 2):
        sizes = {"TOKENS": 640, "PASSES": 4, "LAYER": layer, "RUN_NAME": f"t{layer}"}
        tiny.finished(world, world.runs, **fresh | sizes)
    world.both = f"{world.runs}/t1,{world.runs}/t2"
    return world


def joint(world, **changes):
    given = {"SAE": world.both, "SITE": TRANSCODER, "LAYER": 1, "LR": 1e-3} | changes
    return tiny.finished(world, world.runs, **given)


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_a_run_of_two_says_what_each_does_alone(world):
    """As a run of that one alone measures it; and each is saved as it was read."""
    folder = joint(world, RUN_NAME="both", CHECK_SAE=True)
    found = tiny.read(folder / "before.json")
    for layer in (1, 2):
        one = {"SAE": world.runs / f"t{layer}", "LAYER": layer, "TOKENS": 0}
        alone = tiny.finished(world, world.runs, SITE=TRANSCODER, RUN_NAME=f"m{layer}", **one)
        wanted, name = tiny.read(alone / "before.json"), f"{layer}.hook_mlp_out"
        assert found[f"kl_alone_{name}"] == pytest.approx(wanted["kl"], rel=1e-4)
        assert found[f"ce_spliced_alone_{name}"] == pytest.approx(wanted["ce_spliced"], rel=1e-5)
        assert found[f"fvu_{name}"] == pytest.approx(wanted["fvu"], rel=1e-5)
        assert found[f"l0_{name}"] == wanted["l0"]
        saved = json.loads((folder / "sae" / name / "cfg.json").read_text())
        assert saved["transcode"] and saved["hook_point_in"] == f"blocks.{layer}.mlp.hook_in"
    names = sorted(path.name for path in (folder / "sae").iterdir())
    assert names == ["1.hook_mlp_out", "2.hook_mlp_out", "README.md"]
    results = tiny.read(folder / "results.json")
    assert results["kl_after"] < results["kl_before"]
    assert results["fvu_1.hook_mlp_out_after"] != results["fvu_1.hook_mlp_out_before"]
    card = (folder / "sae" / "README.md").read_text()
    assert "# 2 transcoders for" in card and "| 1.hook_mlp_out |" in card
    again = joint(
        world, RUN_NAME="again", TOKENS=0, SAE=f"{folder}/sae/{names[0]},{folder}/sae/{names[1]}"
    )
    assert tiny.read(again / "results.json")["kl_before"] == pytest.approx(
        results["kl_after"], rel=1e-4
    )


def test_the_cards_plain_code_splices_them(world):
    """Alone, the KL that the run measured, by code that knows nothing of klsplice."""
    folder = joint(world, RUN_NAME="carded", KEEP="none")
    card = (folder / "sae" / "README.md").read_text()
    code = card.split("PyTorch alone, spliced:\n```\n")[1].split("\n```")[0]
    code = code.replace("path/to/this/folder", str(folder / "sae"))
    lm, tokens_SL = tiny.lm_of(world.model), tiny.packed(world.root)[0]
    copied = copy.deepcopy(lm)
    exec(code, {"lm": copied})
    with torch.no_grad():
        clean, spliced = (m(tokens_SL).logits.log_softmax(-1) for m in (lm, copied))
    kl = (clean.exp() * (clean - spliced)).sum(-1).mean().item()
    assert tiny.read(folder / "results.json")["kl_after"] == pytest.approx(kl, rel=1e-3)


def test_further_evaluations_are_of_one_sae_of_the_residual(world, capsys):
    from evals import tokens

    for name, changes in (("of one", {"SAE": world.runs / "t1"}), ("of two", {})):
        folder = joint(world, RUN_NAME=name, **changes)
        assert tokens.main([str(folder)]) == 2
        assert "wanted one SAE at hook_resid_post" in capsys.readouterr().err


def test_a_stopped_run_goes_on_to_the_same_bits(world, monkeypatch):
    whole = joint(world, RUN_NAME="whole")
    step = finetune.training_step
    calls = []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(finetune, "training_step", dies)
        with pytest.raises(KeyboardInterrupt):
            joint(world, RUN_NAME="halves", SAVE_EVERY=1e-9)
    halves = joint(world, RUN_NAME="halves", SAVE_EVERY=1e-9)
    assert len(files_of(whole)) == 2 and files_of(whole) == files_of(halves)


def test_two_processes_are_one(world):
    """But for rounding: the sums of a gradient's parts are weighted before they are added up."""
    one = joint(world, RUN_NAME="one", MICRO_BATCH=1)
    given = {"SAE": world.both, "SITE": TRANSCODER, "LAYER": 1, "LR": 1e-3, "MICRO_BATCH": 1}
    words = tiny.words(world, world.runs, RUN_NAME="two", **given)
    program = Path(finetune.__file__).with_name("run.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, program, *words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for path in files_of(one):
        wanted, found = load_file(one / path), load_file(world.runs / "two" / path)
        assert all(tiny.apart(found[name], t) < 1e-5 for name, t in wanted.items())


def test_jointly_they_do_better_together_than_apart(world):
    """On the text that they learn on: the KL of both falls more than by finetuning each alone."""
    sizes = {"TOKENS": 640, "PASSES": 6, "LR": 3e-3}
    for layer in (1, 2):
        one = {"SAE": world.runs / f"t{layer}", "LAYER": layer, "SITE": TRANSCODER}
        tiny.finished(world, world.runs, RUN_NAME=f"a{layer}", **one | sizes)
    apart = joint(world, RUN_NAME="apart", TOKENS=0, SAE=f"{world.runs}/a1,{world.runs}/a2")
    together = joint(world, RUN_NAME="together", **sizes)
    kl = [tiny.read(f / "results.json") for f in (apart, together)]
    assert kl[1]["kl_after"] < kl[0]["kl_after"] < kl[1]["kl_before"]


def test_a_set_of_all_blocks_is_one_that_circuit_tracer_loads(world):
    """By the rules of its loader: these names and no others, all blocks, one size, hooks, k."""
    fresh = {"SAE": "fresh", "LOSS": "mse", "D_SAE": 64, "K": 6, "SITE": TRANSCODER}
    for layer in range(4):
        one = {"TOKENS": 640, "LAYER": layer, "RUN_NAME": f"all{layer}"}
        tiny.finished(world, world.runs, **fresh | one)
    parts = ",".join(f"{world.runs}/all{layer}" for layer in range(4))
    folder = joint(world, RUN_NAME="set", SAE=parts, LAYER=0) / "sae"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    wanted = {"model_name": "gem", "model_kind": "transcoder_set", "scan": "set"} | hooks
    assert config == wanted | {"activation": "topk", "k": 6}
    x_ND = torch.randn(20, 32)
    for layer in range(4):
        tensors = load_file(folder / f"layer_{layer}.safetensors")
        assert {n: tuple(t.shape) for n, t in tensors.items()} == {
            **{"W_enc": (64, 32), "b_enc": (64,), "W_dec": (64, 32), "b_dec": (32,)}
        }
        pre_NF = x_ND @ tensors["W_enc"].T + tensors["b_enc"]
        z_NF = torch.zeros_like(pre_NF).scatter(1, *reversed(pre_NF.relu().topk(6)))
        y_ND = z_NF @ tensors["W_dec"] + tensors["b_dec"]
        again = read.open_sae(str(folder / f"layer_{layer}.safetensors"), "")
        assert again.site == site.at(TRANSCODER, layer)
        with torch.no_grad():
            found_ND, _ = build(again, again.read_weights()).eval()(x_ND)
        assert torch.allclose(found_ND, y_ND, atol=1e-5)


def test_a_set_has_one_k(world):
    sites = [site.at(TRANSCODER, layer) for layer in range(4)]
    tokens_k = [6, 6, 6, 9]
    parts = []
    for layer, k in enumerate(tokens_k):
        made, _ = source_at(TRANSCODER, "topk")
        made.site, made.k, made.where = sites[layer], k, f"of {layer}"
        parts.append(made)
    saes = [build(part, part.weights()) for part in parts]
    splice = Splice(lm_of("llama"), 0, sites=sites, head_chunk=64)
    learner = JointLearner(Joint(saes, [s.short for s in sites]), splice)
    whole, c = sources.several("all", parts), constants(SITE=TRANSCODER, LAYER=0).constants()
    learner.save(str(world.root / "unlike"), whole, c, bos=False)
    assert not (world.root / "unlike" / "config.yaml").exists()
    parts[3].k = saes[3].k = 6
    learner.save(str(world.root / "alike"), whole, c, bos=False)
    assert (world.root / "alike" / "config.yaml").exists()


def test_saes_of_the_residual_are_of_their_own_blocks(world):
    """hf_hook_name is each one's own; and the card names all that the run started from."""
    fresh = {"SAE": "fresh", "LOSS": "mse", "D_SAE": 64, "K": 6, "SITE": "hook_resid_post"}
    for layer in (1, 2):
        tiny.finished(world, world.runs, **fresh | {"LAYER": layer, "RUN_NAME": f"r{layer}"})
    both = f"{world.runs}/r1,{world.runs}/r2"
    folder = joint(world, RUN_NAME="residuals", SAE=both, SITE="hook_resid_post")
    for layer in (1, 2):
        about = json.loads((folder / "sae" / str(layer) / "cfg.json").read_text())["metadata"]
        assert about["hf_hook_name"] == f"model.layers.{layer}"
        assert about["hook_name"] == f"blocks.{layer}.hook_resid_post"
    card = (folder / "sae" / "README.md").read_text()
    assert "Started from: r1,r2." in card and str(world.root) not in card


def test_a_card_of_two_kinds_has_the_command_that_takes_both(world):
    fresh = {"SAE": "fresh", "LOSS": "mse", "D_SAE": 64, "K": 6, "LAYER": 1}
    tiny.finished(world, world.runs, **fresh | {"SITE": "attn.hook_z", "RUN_NAME": "z1"})
    both = f"{TRANSCODER},attn.hook_z"
    folder = joint(world, RUN_NAME="kinds", SAE=f"{world.runs}/t1,{world.runs}/z1", SITE=both)
    card = (folder / "sae" / "README.md").read_text()
    (line,) = (line for line in card.splitlines() if line.startswith("python run.py MODEL"))
    words = dict(word.partition("=")[::2] for word in line.split()[2:])
    words["SAE"] = words["SAE"].replace("path/to/this/folder", str(folder / "sae"))
    given = {"SAE": words["SAE"], "SITE": words["SITE"], "RUN_NAME": "kinds again", "TOKENS": 0}
    again = tiny.read(joint(world, **given) / "results.json")
    kl = tiny.read(folder / "results.json")["kl_after"]
    assert again["kl_before"] == pytest.approx(kl, rel=1e-4)
    assert "SparseCoder" not in card and "# 2 SAEs for" in card


def test_zero_within_a_block_is_no_measure_of_what_a_run_is_worth():
    """The CE with the SAE may be over that with zero there, and the run goes on."""
    numbers, ended = {"ce_spliced": 3.0, "ce_zero": 2.9, "ce_clean": 2.0}, []
    for at_residual in (True, False):
        learner = SimpleNamespace(splice=SimpleNamespace(at_residual=at_residual))
        run = SimpleNamespace(evaluations={"before": {"ce_spliced": 2.5}})
        loop = SimpleNamespace(learner=learner, run=run, stop_on=lambda *a: ended.append(a[1]))
        Loop.check_worth(loop, numbers, 7 + at_residual)
    assert ended == [7]


BAD = [
    ({"LAYER": 2, "CHECK_SAE": False}, "LAYER = 2, the SAE is of layer 1"),
    ({"SAE": "{0}/t1,{0}/t1"}, "two of the SAEs write hook_mlp_out of block 1"),
    ({"LAYER": 2}, "LAYER = 2, the SAE is of layer 1"),
    ({"SITE": "hook_mlp_out"}, "reads mlp.hook_in and writes hook_mlp_out, SITE = hook_mlp_out"),
    ({"TRAIN": "adapter", "RANK": 2}, "several SAEs learn as they are"),
    ({"SHUFFLE": 4, "LOSS": "mse"}, "they go on whole contexts"),
    ({"SITE": f"{TRANSCODER},{TRANSCODER},{TRANSCODER}"}, "wanted one site, or one each"),
    ({"ARCHITECTURE": "jumprelu"}, "several are not converted"),
]


@pytest.mark.parametrize(
    "changes, says", BAD, ids=[f"{i} {says}" for i, (_, says) in enumerate(BAD)]
)
def test_what_cannot_be_is_a_line_before_the_lm_is_loaded(
    world, changes, says, capsys, monkeypatch
):
    import run

    monkeypatch.setattr("klsplice.lm.load.load_lm", None)  # would be an error of another kind
    given = {
        "SAE": world.both,
        "SITE": TRANSCODER,
        "LAYER": 1,
        "CHECK_SAE": True,
        "RUN_NAME": "bad",
    }
    given |= {name: v.format(world.runs) if name == "SAE" else v for name, v in changes.items()}
    assert run.main(tiny.words(world, world.runs, **given)) == 2
    assert says in capsys.readouterr().err


def test_the_splice_begins_below_the_lowest_site():
    sites = [site.at("hook_mlp_out", 2), site.at("hook_resid_post", 3)]
    splice = Splice(lm_of("llama"), 2, sites=sites, head_chunk=64)
    tokens_BL = make_tokens(constants(**FRESH), vocabulary=97, sequences=4).val(0, 2)
    ran, clean = [], splice.clean(tokens_BL)
    handles = [
        block.input_layernorm.register_forward_hook(lambda *a, i=i: ran.append(i))
        for i, block in enumerate(splice.blocks)
    ]
    ys = [o.flatten(0, 1) for _, o in clean.sites]
    same = splice.spliced(clean, torch.arange(40), *ys)
    for handle in handles:
        handle.remove()
    assert ran == [2, 3] and torch.equal(same.h_BLD, clean.h_BLD)
