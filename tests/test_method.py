"""The finetune equals its plainest form (tests/naive.py), step by step, in fp32.

A step is one step, in however many micro-batches it is made: sequences here have unequal numbers of
active tokens, so that a mean of the micro-batches' means is another number.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import naive
import pytest
import test_families
import torch
import transformers
from conftest import constants, gradients, make_tokens, open_learner, ours, quietly, residual
from peft import PeftModel
from safetensors.torch import load_file

import finetune
import sae as saes
from klsplice.formats import read as reader
from klsplice.lm.splice import Splice
from learners import start

# K is a third of F: a latent that hardly ever fires has gradients near AdamW's eps, which blows up
# rounding errors.
D, F, K, LAYER, CONTEXT, STEPS, RANK = 32, 48, 16, 1, 24, 20, 4
GROUPS = [6, 6, 12, 24]
THRESHOLD = torch.linspace(0.1, 0.6, F)
NAMES = {"W_enc_FD": "W_enc", "b_enc_F": "b_enc", "W_dec_FD": "W_dec", "b_dec_D": "b_dec"}
SPECIAL = (1, 2)


@functools.cache
def lm_of(family):
    return naive.build_lm(family, seed=0, context=CONTEXT)


def given(seed=0, norm=1.0, **further):
    """An SAE under the plain names; biases are not zero, decoder rows have norm 1 to `norm`."""
    rng = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(F, D, generator=rng)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    W_enc = W_dec + 0.1 * torch.randn(F, D, generator=rng)
    b_enc, b_dec = (0.1 * torch.randn(n, generator=rng) for n in (F, D))
    W_dec *= 1 + (norm - 1) * torch.rand(F, 1, generator=rng)
    return {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec} | further


def source_of(architecture, weights, k=K):
    """What reading makes of these tensors; None: of a fresh SAE."""
    if weights is None:
        return reader.Source("fresh", architecture, D, F, k=k, l1=0.1)
    ours_of = {theirs: ours for ours, theirs in NAMES.items()}
    read = lambda: {ours_of.get(n, n): t.clone() for n, t in weights.items()}  # noqa: E731
    return reader.Source("given", architecture, D, F, k=k, l1=0.1, weights=read)


def built(architecture, weights):
    source = source_of(architecture, weights)
    return saes.build(source, source.weights())


def kept(keep, tokens_BL):
    """True where KEEP leaves the residual as it is."""
    kept_BL = torch.zeros_like(tokens_BL, dtype=torch.bool)
    if keep == "special":
        kept_BL = torch.isin(tokens_BL, torch.tensor(SPECIAL))
    kept_BL[:, 0] |= keep == "first"
    return kept_BL


@dataclass
class Case:
    """One variant: our source and constants, and the plain module of the same.

    make: (weights, learner) -> plain module; random initial weights are taken from the learner,
    which is not trained yet. pairs: our parameter: the plain one; of LoRA on the LM none.
    """

    architecture: str
    make: Callable | None
    weights: dict | None  # None: fresh
    constants: dict = field(default_factory=dict)
    before: dict | None = None  # the evaluation before training
    pairs: dict = field(default_factory=lambda: NAMES)
    family: str = "gemma2"
    steps: int = STEPS

    def setting(self, **more):
        changes = {"LAYER": LAYER, "CONTEXT": CONTEXT, "BATCH": 2, "MICRO_BATCH": 1, "LR": 1e-3}
        changes |= {"KEEP": "special", "RANK": RANK, "LORA_DROPOUT": 0.0, "D_SAE": F, "K": K}
        c = constants(**changes | self.constants | more)
        sequences = c.BATCH * self.steps
        tokens = make_tokens(c, vocabulary=97, sequences=sequences, special=SPECIAL)
        for s in range(sequences):
            tokens.train_SL[s, 3 : 3 + 5 * s % 7] = SPECIAL[s % 2]
        return c, tokens

    def learner(self, **more):
        c, tokens = self.setting(**more)
        source = source_of(self.architecture, self.weights, c.K)
        c.SAE = source.where
        lm = ours(lm_of(self.family)).to(c.DEVICE, getattr(torch, c.DTYPE))
        return c, tokens, open_learner(c, source, lm, tokens)

    def tensors(self, learner):
        """What learns, under the plain names."""
        if self.pairs is LORA:
            return lora_tensors(learner)
        named = dict(learner.model.named_parameters())
        return {theirs: named[n].detach() for n, theirs in self.pairs.items()}


def lora_tensors(learner):
    """{(place, A or B): tensor} of LoRA on the LM."""
    found = {}
    for name, t in learner.state().items():
        place, side = name.removesuffix(".default.weight").rsplit(".lora_", 1)
        found[place, side] = t.clone()
    return found


def our_training(case, **more):
    """-> a row of scalars a step, the trained tensors under the plain names, the learner."""
    c, tokens, learner = case.learner(**more)
    if case.before is not None:
        learner.begin(case.before)
    scalars = quietly(c, learner, tokens)
    if isinstance(learner.model, saes.ReLU):
        learner.model.unscale()
    return scalars, case.tensors(learner), learner


@functools.cache
def trained(name):
    return our_training(CASES[name])


@functools.cache
def plain_training(name):
    """The same of the plain loop; the last ones are the plain module and the LM with LoRA."""
    case = CASES[name]
    c, tokens, learner = case.learner()
    lm, lm_spliced, wrapped = lm_of(case.family), None, {}
    weights = case.weights or {n: getattr(learner.model, o).detach() for o, n in NAMES.items()}
    if case.pairs is LORA:
        start_of = lora_tensors(learner)
        places = naive.lora_places(case.family, blocks=BLOCKS[c.LORA_BLOCKS])
        assert {place for place, _ in start_of} == set(places)
        A_of = {place: start_of[place, "A"] for place in places}
        lm_spliced, wrapped = naive.with_lora(lm, A_of, scaling=(c.LORA_ALPHA or RANK) / RANK)
        model = naive.TopK(weights, K).requires_grad_(False)
    else:
        model = case.make(weights, learner)
    if case.weights and isinstance(learner.model, saes.BatchTopK):  # fitted: see its own test
        model.threshold = learner.model.threshold.item()
    rows = naive.train(
        lm,
        model,
        [tokens.batch(step) for step in range(tokens.steps)],
        functools.partial(kept, c.KEEP),
        c,
        lm_spliced,
    )
    if isinstance(model, naive.ReLU):
        model.restore()
    found = {(place, side): getattr(w, side) for place, w in wrapped.items() for side in "AB"}
    found = found or {n: getattr(model, n) for n in case.pairs.values()}
    return rows, {n: t.detach() for n, t in found.items()}, model, lm_spliced


def differences(found, wanted, loss="kl+mse"):
    """Where two trainings part: losses of a step by over 1e-5 relative, weights by over 1e-6.

    Of weights the root mean square: of a gradient near zero, which is rounding, AdamW makes a whole
    step."""
    apart_at = []
    # A norm of gradients adds up their rounding errors.
    limits = {"mse": 1e-5, "kl": 1e-5, "alpha": 2e-5, "l0": 1e-5, "grad_norm": 1e-4, "lr": 1e-9}
    if loss == "mse":  # which never runs the upper blocks
        del limits["kl"], limits["alpha"]
    for name, limit in limits.items():
        apart = max(abs(a[name] / b[name] - 1) for a, b in zip(found[0], wanted[0], strict=True))
        if not apart <= limit:
            apart_at.append(f"{name}, {apart:.1e}")
    for name, t in wanted[1].items():
        apart = (found[1][name] - t).square().mean().sqrt().item()
        if not apart <= 1e-6:
            apart_at.append(f"{name}, {apart:.1e}")
    return apart_at


# ---- the cases -------------------------------------------------------------------------------

LINEAR = {"down.weight": "down", "up.weight": "up"}
MLP = LINEAR | {"down.bias": "down_bias", "up.bias": "up_bias"}
SAE_LORA = {
    f"layers.{layer}.lora_{side}.default.weight": f"{layer[:3]}_{side}"
    for layer in ("encoder", "decoder")
    for side in "AB"
}
LORA = {}
BLOCKS = {"all": [0, 1, 2, 3], "after": [2, 3], "one": [2]}
WHOLE = {"MICRO_BATCH": 2}
# A scale of 5: what rounding leaves in the biases is multiplied by it at the end.
RELU = {"l0": 23.8, "mean_square_norm": 25.0}
JUMP = {"architecture": "jumprelu", "weights": given(norm=1.5, threshold=THRESHOLD)}


def top_k(weights, learner):
    return naive.TopK(weights, K)


def relu(target_l0):
    scale = RELU["mean_square_norm"] ** 0.5
    return lambda w, _: naive.ReLU(w, l1=0.1, scale=scale, target_l0=target_l0)


def on_top_k(make, pairs, changes, **options):
    """An adapter or LoRA on a frozen TopK."""

    def plain(weights, learner):
        named = dict(learner.model.named_parameters())
        initial = {theirs: named[n] for n, theirs in pairs.items()}
        return make(naive.TopK(weights, K), initial, **options)

    return Case("topk", plain, given(), changes | {"SCHEDULE": "constant"}, pairs=pairs)


def lm_lora(family, blocks, **more):
    changes = {"LOSS": "kl", "SCHEDULE": "constant", "TRAIN": "lm_lora", "LORA_BLOCKS": blocks}
    return Case("topk", None, given(), changes | more, pairs=LORA, family=family)


FAMILIES = ("gemma2", "llama", "gpt_neox")
CASES = {f"topk {family}": Case("topk", top_k, given(), family=family) for family in FAMILIES}
CASES |= {
    "topk clipped": Case("topk", top_k, given(), WHOLE | {"CLIP": 5.5, "KEEP": "none"}),
    "topk mse": Case("topk", top_k, given(), {"LOSS": "mse", "WARMUP": 5}),
    "topk kl": Case("topk", top_k, given(), {"LOSS": "kl", "KEEP": "first", "WEIGHT_DECAY": 0.1}),
    "relu": Case("relu", relu(RELU["l0"]), given(norm=1.5), {"SCHEDULE": "constant"}, RELU),
    "jumprelu": Case(make=lambda w, _: naive.JumpReLU(w), **JUMP),
    "jumprelu ste": Case(
        make=lambda w, _: naive.JumpReLU(w, width=0.1),
        constants={"JUMPRELU_THRESHOLD": "ste"},
        pairs=NAMES | {"threshold_F": "threshold"},
        **JUMP,
    ),
    "batchtopk": Case("batchtopk", lambda w, _: naive.BatchTopK(w, K), given()),
    "matryoshka": Case(
        "matryoshka",
        lambda w, _: naive.Matryoshka(w, K, groups=GROUPS),
        given(group_sizes=torch.tensor(GROUPS)),
        WHOLE,
    ),
    "auxk": Case(
        "topk",
        lambda w, _: naive.TopK(w, 2, auxk=0.5, dead_after=24),
        None,
        {"AUXK": 0.5, "DEAD_AFTER": 24, "K": 2},  # some are silent for a step
        family="llama",
    ),
    "fresh topk": Case("topk", top_k, None, {"LOSS": "kl"}, family="llama"),
    "fresh batchtopk": Case("batchtopk", lambda w, _: naive.BatchTopK(w, K), None, WHOLE),
    "fresh relu": Case("relu", relu(K), None, {"LOSS": "mse"}, RELU, family="llama"),
    "linear adapter": on_top_k(naive.Adapter, LINEAR, {"TRAIN": "adapter"}),
    "mlp adapter": on_top_k(naive.Adapter, MLP, {"TRAIN": "adapter", "ADAPTER": "mlp"}),
    "sae lora": on_top_k(
        naive.LowRankSAE, SAE_LORA, {"TRAIN": "sae_lora", "LORA_ALPHA": 2 * RANK}, scaling=2.0
    ),
    "lora all": lm_lora("gpt_neox", "all", KEEP="first", LORA_ALPHA=2 * RANK, **WHOLE),
    "lora after": lm_lora("gemma2", "after"),
    "lora one": lm_lora("llama", "one", KEEP="none"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_variant_trains_as_its_plainest_form(name):
    found, wanted = trained(name), plain_training(name)
    assert differences(found, wanted, CASES[name].constants.get("LOSS")) == []


def test_the_cases_go_where_a_bug_would_show():
    """The clip bites now and then, L0 steers both ways, latents die, micro-batches are unequal."""
    norms = [row["grad_norm"] for row in plain_training("topk clipped")[0]]
    assert min(norms) < 5.5 < max(norms)
    assert {0.999, 1.001} == set(plain_training("relu")[2].factors)
    dead = plain_training("auxk")[2].dead_counts[1:]
    assert 0 < min(dead) < D // 2 < max(dead) < F
    c, tokens = CASES["relu"].setting()
    counts = [(~kept(c.KEEP, tokens.batch(step))).sum(1) for step in range(STEPS)]
    assert sum(len(step.unique()) > 1 for step in counts) > STEPS / 2


# ---- the step --------------------------------------------------------------------------------


def gradients_of(case, **more):
    """Those of the first step, of a learner in training, by name."""
    c, tokens, learner = case.learner(**more)
    learner.train(True)
    gradients(c, learner, finetune.batches_of(c, learner, tokens)(0))
    named = dict(learner.model.named_parameters()) | dict(learner.splice.decoder.named_parameters())
    return {n: p.grad for n, p in named.items() if p.grad is not None}


@pytest.mark.parametrize("clean_batch", [1, 6, 16])
def test_of_any_clean_pass_each_step_gets_its_own_sequences(clean_batch):
    c, tokens, learner = Case("topk", None, given(), steps=5).learner(
        BATCH=4, KEEP="none", CLEAN_BATCH=clean_batch
    )
    feed, seen = finetune.batches_of(c, learner, tokens), []
    for step in (0, 1, 2, 4, 3):  # a resumed run may begin anywhere
        for part, tokens_L in zip(feed(step), tokens.batch(step), strict=True):
            wanted = learner.splice.clean(tokens_L[None])
            assert torch.allclose(part.x_ND, wanted.x_BLD[0], atol=1e-5)
            kl_N = finetune.kl(part, wanted, learner.splice, torch.float32)
            assert torch.allclose(kl_N, torch.zeros(CONTEXT), atol=1e-5)
            seen.append(part.clean.tokens_BL)
    assert len(torch.cat(seen).unique(dim=0)) == 20


@pytest.mark.parametrize("name", ["topk gemma2", "lora all", "lora after"])
def test_low_memory_keeps_less_and_gives_the_same_gradients(name):
    """With dropout, too, whose draws are made again."""
    sizes, grads = {False: [], True: []}, {}
    for low in sizes:
        keep = lambda t, low=low: sizes[low].append(t.numel()) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            grads[low] = gradients_of(CASES[name], LOW_MEMORY=low, LORA_DROPOUT=0.3)
    assert grads[True].keys() == grads[False].keys()
    assert all(torch.allclose(g, grads[True][n], atol=1e-7) for n, g in grads[False].items())
    assert sum(sizes[True]) < 0.5 * sum(sizes[False])


@pytest.mark.parametrize("name", ["topk llama", "lora after"])
def test_compiled_blocks_make_their_graphs_in_the_first_step(name, graphs):
    """A graph a block and a use: clean, spliced; LoRA goes off and on again in each step."""
    case = CASES[name]
    plain = gradients_of(case)
    c, tokens, learner = case.learner()
    splice = Splice(learner.splice.lm, LAYER, head_chunk=64, compiled=True)
    learner.splice = splice
    feed, made = finetune.batches_of(c, learner, tokens), []
    learner.train(True)
    for step in range(3):
        gradients(c, learner, feed(step))
        if step == 0:
            for n, p in [*learner.model.named_parameters(), *splice.decoder.named_parameters()]:
                if p.grad is not None:
                    assert torch.allclose(p.grad, plain[n], atol=1e-6), n
        made.append(graphs["stats"]["unique_graphs"])
    assert 0 < made[0] == made[-1] <= 6 and not graphs["graph_break"]


def test_the_head_is_told_the_next_tokens(monkeypatch):
    """Where clean passes are batched, too, and where some positions are left out."""
    c, tokens, learner = CASES["topk llama"].learner(CLEAN_BATCH=4, LOGITS="bfloat16")
    told, whole = [], finetune.kl_head
    monkeypatch.setattr("finetune.kl_head", lambda *a: told.append(a[2]) or whole(*a))
    feed = finetune.batches_of(c, learner, tokens)
    for step in range(3):
        told.clear()
        gradients(c, learner, feed(step))
        for row_L, found_N in zip(tokens.batch(step), told, strict=True):
            active_N = (~kept("special", row_L[None])[0]).nonzero()[:, 0]
            inside = active_N < CONTEXT - 1
            assert torch.equal(found_N[inside], row_L[active_N[inside] + 1])


# ---- what an architecture does ---------------------------------------------------------------


def some_residuals(n=256):
    return 3 * torch.randn(n, D, generator=torch.Generator().manual_seed(1))


def test_the_threshold_of_batchtopk_runs_along_and_decides_at_inference():
    _, _, learner = trained("batchtopk")
    model = plain_training("batchtopk")[2]
    assert learner.model.threshold.item() == pytest.approx(model.threshold, rel=1e-6)
    learner.train(False)
    with torch.no_grad():
        y_ND, z_NF = learner.reconstruct(some_residuals())
        wanted_ND, wanted_NF = model.eval()(some_residuals())
    model.train()
    assert len((wanted_NF > 0).sum(1).unique()) > 1  # not k a token
    assert torch.equal(z_NF > 0, wanted_NF > 0) and torch.allclose(y_ND, wanted_ND, atol=1e-5)
    assert learner.model.threshold.item() == pytest.approx(model.threshold, rel=1e-6)  # unmoved


def test_a_micro_batch_without_active_tokens_changes_no_threshold():
    thresholds = []
    for sizes in ((0, 5), (5,)):
        sae = built("batchtopk", given())
        sae.train()
        for n in sizes:
            sae(some_residuals(n))
        sae.after_step(torch.tensor(float(K)), torch.ones(F, dtype=torch.bool), 5)
        thresholds.append(sae.threshold)
    assert torch.equal(*thresholds) and thresholds[0] > 0


def test_a_batchtopk_without_a_threshold_gets_its_ks():
    c, tokens, learner = CASES["batchtopk"].learner(KEEP="none")
    x_BLD = residual(learner.splice, tokens.sequences(0, 40))
    learner.train(False)
    _, z_NF = learner.reconstruct(x_BLD.flatten(0, 1))
    assert (z_NF > 0).sum(1).double().mean() == pytest.approx(K, abs=0.05)


def test_frozen_thresholds_stay_and_straight_through_ones_move():
    frozen, moved = (trained(n)[2].model for n in ("jumprelu", "jumprelu ste"))
    assert torch.equal(frozen.threshold_F, THRESHOLD)
    assert ((moved.threshold_F - THRESHOLD).abs() > 1e-5).all()
    with torch.no_grad():
        moved.threshold_F[:3] = -0.1
    moved.after_step(None, None, 0)
    assert moved.threshold_F[:3].tolist() == [0, 0, 0]  # never below zero
    trained.cache_clear()


def test_a_fresh_sae_is_tied_centred_and_seeded():
    saes_of = {}
    for seed in (0, 1):
        _, tokens, learner = CASES["fresh topk"].learner(SEED=seed, KEEP="none")
        saes_of[seed] = learner.sae
        assert torch.equal(learner.sae.W_enc_FD, learner.sae.W_dec_FD)
    assert not torch.equal(saes_of[0].W_enc_FD, saes_of[1].W_enc_FD)
    x_BLD = residual(learner.splice, tokens.sequences(0, 2 * STEPS))
    assert torch.allclose(learner.sae.b_dec_D, x_BLD.mean((0, 1)), atol=1e-5)


@pytest.mark.parametrize("architecture", ["jumprelu", "batchtopk", "matryoshka"])
@torch.no_grad()
def test_a_converted_topk_keeps_its_l0_and_reconstructs_alike(architecture):
    case = Case("topk", None, given(), {"ARCHITECTURE": architecture, "KEEP": "none"}, steps=32)
    c, tokens, learner = case.learner()
    learner.train(False)
    x_ND = residual(learner.splice, tokens.sequences(0, 64)).flatten(0, 1)
    top_k, sae = built("topk", given()), learner.model
    y_ND, z_NF = sae(x_ND)
    assert (z_NF > 0).sum(1).float().mean().item() == pytest.approx(K, rel=0.02)
    error, wanted = ((y - x_ND).square().sum().item() for y in (y_ND, top_k(x_ND)[0]))
    assert error < 1.1 * wanted
    pre_NF = (x_ND - top_k.b_dec_D) @ top_k.W_enc_FD.T + top_k.b_enc_F
    cut = pre_NF.flatten().sort(descending=True).values[K * len(x_ND)]  # the first to be left out
    wanted_NF = pre_NF * (pre_NF > cut + 1e-5)
    if architecture == "matryoshka":  # in order of energy
        order_F = wanted_NF.square().sum(0).argsort(descending=True)
        assert torch.equal(sae.W_enc_FD, top_k.W_enc_FD[order_F])
        assert sum(sae.groups) == F and sae.groups == sorted(sae.groups)
        wanted_NF = wanted_NF[:, order_F]
    assert ((z_NF > 0) != (wanted_NF > 0)).float().mean() < 1e-3
    assert torch.allclose(z_NF[wanted_NF > 0], wanted_NF[wanted_NF > 0], atol=1e-4)


# ---- around a frozen SAE ---------------------------------------------------------------------


FROZEN = {  # architecture: further tensors
    "topk": {},
    "batchtopk": {"threshold": torch.tensor(1.5)},
    "matryoshka": {"threshold": torch.tensor(1.5), "group_sizes": torch.tensor(GROUPS)},
    "relu": {},
    "jumprelu": {"threshold": THRESHOLD},
}


def around(architecture, **changes):
    norm = 1.5 if architecture in ("relu", "jumprelu") else 1.0
    return Case(architecture, None, given(norm=norm, **FROZEN[architecture]), changes, steps=4)


def randomised(learner, std=0.2):
    """What learns, of which some starts at zero, is random."""
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in learner.parameters():
            p.copy_(std * torch.randn(p.shape, generator=rng))
    learner.train(False)
    return learner


@torch.no_grad()
def same_function(one, two, x_ND):
    """Whether two modules x -> (y, z) agree to 1e-5 of the largest value."""
    pairs = zip(one(x_ND), two(x_ND), strict=True)
    return all(torch.allclose(a, b, rtol=0, atol=1e-5 * b.abs().max().item()) for a, b in pairs)


@pytest.mark.parametrize("architecture", FROZEN)
@pytest.mark.parametrize("train", ["adapter", "sae_lora"])
def test_a_folded_adapter_and_merged_lora_are_one_plain_sae(train, architecture):
    case = around(architecture, TRAIN=train, LORA_ALPHA=3 * RANK, LORA_DROPOUT=0.1)
    learner = randomised(case.learner()[2])
    sae, before = learner.sae.eval(), learner.model.sae
    assert same_function(sae, learner.model, some_residuals())
    assert not same_function(before, learner.model, some_residuals())
    assert type(sae) is type(before) and sae is not before


@pytest.mark.parametrize("train", ["adapter", "sae_lora", "lm_lora"])
@pytest.mark.parametrize("architecture", ["batchtopk", "relu"])
def test_a_frozen_sae_stays_while_something_learns_around_it(train, architecture):
    """A BatchTopK's threshold decides, not the batch; a ReLU's penalty is not steered."""
    c, tokens, learner = around(architecture, TRAIN=train, LOSS="kl").learner()
    frozen = learner.model.sae
    before = {name: t.clone() for name, t in frozen.state_dict().items()}
    quietly(c, learner, tokens)
    after = frozen.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    if architecture == "batchtopk":
        learner.train(True)
        _, z_NF = learner.reconstruct(some_residuals())
        assert z_NF[z_NF > 0].min() > 1.5 and (z_NF > 0).sum() != K * len(z_NF)


def test_an_mlp_adapter_is_kept_beside_its_sae(tmp_path):
    learner = randomised(CASES["mlp adapter"].learner()[2])
    (tmp_path / "sae").mkdir()
    learner.save_rest(tmp_path)
    tensors = load_file(tmp_path / "sae" / "adapter.safetensors")
    assert tensors.keys() == MLP.keys()
    assert all(torch.equal(t, learner.model.state_dict()[n]) for n, t in tensors.items())
    assert torch.equal(learner.sae.W_dec_FD, given()["W_dec"])


# ---- LoRA on the LM --------------------------------------------------------------------------

QKVO = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
OPT = "self_attn.k_proj self_attn.v_proj self_attn.q_proj self_attn.out_proj fc1 fc2"
LINEAR_LAYERS = {
    "opt": OPT,
    "gpt2": "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj",
    "mamba": "mixer.in_proj mixer.x_proj mixer.dt_proj mixer.out_proj",
    "qwen3_moe": QKVO,  # its experts are one tensor
}


def lora_around(lm):
    case = lm_lora("gemma3", "after")
    c, tokens = case.setting()
    splice = Splice(copy.deepcopy(lm), LAYER, head_chunk=64)
    return start.open_learner(c, source_of("topk", given()), splice, tokens)


@pytest.mark.parametrize("family", LINEAR_LAYERS)
def test_lora_takes_every_linear_layer(family):
    learner = lora_around(test_families.lm_of(family))
    found = {place.partition(".2.")[2] for place, _ in lora_tensors(learner) if ".2." in place}
    assert found == set(LINEAR_LAYERS[family].split())


def multimodal_lm():
    """A Gemma 3 with a vision tower: its decoder lies deeper than in the others."""
    text = {"vocab_size": 97, "hidden_size": D, "intermediate_size": 64, "num_hidden_layers": 4}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def plain_lm():
    return naive.build_lm("gpt_neox", seed=0, context=CONTEXT)


@pytest.mark.parametrize("make", [plain_lm, multimodal_lm])
def test_the_saved_lora_is_what_peft_reads(tmp_path, make):
    """peft says nothing of weights whose names it does not find."""
    learner = randomised(lora_around(make()), std=0.3)
    learner.save_rest(tmp_path)
    lm = PeftModel.from_pretrained(make(), tmp_path / "lora")
    tokens_BL = torch.randint(3, 97, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
    splice = learner.splice
    with torch.no_grad():
        h_ND = splice.edited(tokens_BL, {}).h_BLD.flatten(0, 1)
        wanted_NV = splice.head.logits(h_ND, torch.float32)
        assert torch.allclose(lm(tokens_BL).logits.flatten(0, 1), wanted_NV, atol=1e-4)
        assert (make()(tokens_BL).logits.flatten(0, 1) - wanted_NV).abs().max() > 1e-2


# ---- half precision ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["topk gemma2", "relu", "batchtopk", "mlp adapter", "lora after"])
def test_under_bfloat16_what_learns_is_float32_and_trains_alike(name):
    moved = {}
    for dtype in ("bfloat16", "float32"):
        c, tokens, learner = Case(**vars(CASES[name]) | {"steps": 8}).learner(DTYPE=dtype)
        if CASES[name].before is not None:
            learner.begin(CASES[name].before)
        assert {p.dtype for p in learner.parameters()} == {torch.float32}
        before = torch.cat([p.detach().flatten() for p in learner.parameters()])
        quietly(c, learner, tokens)
        moved[dtype] = torch.cat([p.detach().flatten() for p in learner.parameters()]) - before
    assert torch.cosine_similarity(*moved.values(), dim=0) > 0.7  # other latents may win
    assert moved["bfloat16"].norm() / moved["float32"].norm() == pytest.approx(1, abs=0.1)
