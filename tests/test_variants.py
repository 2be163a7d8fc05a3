"""Every variant equals its plainest form (tests/naive_variants.py), step by step, in fp32."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import hub
import naive
import naive_variants as plain
import pytest
import torch
from conftest import QuietRun, constants, make_tokens, ours

import adapters
import checkpoint
import finetune
import formats
import lora
import sae as saes
from errors import UserError
from learner import OnFrozenSAE

# F and K as in test_method.py: every latent fires often, so no gradient is near AdamW's eps.
D, F, K, LAYER, CONTEXT, STEPS = 32, 48, 16, 1, 24, 40
RANK = 4
NAMES = {"W_enc_FD": "W_enc", "b_enc_F": "b_enc", "W_dec_FD": "W_dec", "b_dec_D": "b_dec"}
GROUPS = [6, 6, 12, 24]
FAMILIES = ["gemma2", "gemma3", "llama", "gpt_neox", "qwen3"]


@functools.cache
def lm_of(family):
    return naive.build_lm(family, seed=0, context=CONTEXT)


def given(seed=0, norm=1.0, **further):
    """An SAE under the plain names; biases are not zero, decoder rows have norm 1 to `norm`."""
    rng = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(F, D, generator=rng)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    W_enc = W_dec + 0.1 * torch.randn(F, D, generator=rng)
    b = [0.1 * torch.randn(n, generator=rng) for n in (F, D)]
    W_dec *= 1 + (norm - 1) * torch.rand(F, 1, generator=rng)
    return {"W_enc": W_enc, "b_enc": b[0], "W_dec": W_dec, "b_dec": b[1]} | further


def source_of(architecture, weights, **more):
    """What formats.open_source makes of these tensors; None: of a fresh SAE."""
    if weights is None:
        return formats.Source("fresh", architecture, D, F, k=K, l1=0.1)
    ours_of = {theirs: ours for ours, theirs in NAMES.items()}
    more = {"k": K, "l1": 0.1} | more
    read = lambda: {ours_of.get(n, n): t.clone() for n, t in weights.items()}  # noqa: E731
    return formats.Source("given", architecture, D, F, weights=read, **more)


def built(architecture, weights, **more):
    source = source_of(architecture, weights, **more)
    return formats.build(source, source.weights())


@dataclass
class Case:
    """One variant: our source and constants, and the plain module of the same.

    make: (weights, learner) -> plain module; random initial weights are taken from the learner,
    which is not trained yet. pairs: our parameter: the plain one.
    """

    architecture: str
    make: Callable
    weights: dict | None  # None: fresh
    constants: dict = field(default_factory=dict)
    before: dict | None = None  # the evaluation before training
    pairs: dict = field(default_factory=lambda: NAMES)
    family: str = "gemma2"
    steps: int = STEPS

    def setting(self, **more):
        changes = {"LAYER": LAYER, "CONTEXT": CONTEXT, "BATCH": 2, "MICRO_BATCH": 2, "LR": 1e-3}
        changes |= {"RANK": RANK, "LORA_DROPOUT": 0.0, "D_SAE": F, "K": K}
        c = constants(**changes | self.constants | more)
        return c, make_tokens(c, vocabulary=97, sequences=c.BATCH * self.steps)

    def learner(self, **more):
        c, tokens = self.setting(**more)
        source = source_of(self.architecture, self.weights)
        c.SAE = source.where
        return c, tokens, adapters.build(c, source, ours(lm_of(self.family)), tokens)


def our_training(case, **more):
    """-> a row of scalars a step, the trained tensors under the plain names, the learner."""
    c, tokens, learner = case.learner(**more)
    if case.before is not None:
        learner.begin(c, case.before)
    run = QuietRun()
    finetune.finetune(c, learner, tokens, run, None)
    if isinstance(learner.model, saes.ReLU):
        learner.model.unscale()
    trained = dict(learner.model.named_parameters())
    return run.scalars, {case.pairs[n]: trained[n].detach() for n in case.pairs}, learner


@functools.cache
def plain_training(name):
    """The same of the plain loop; the last one is the plain module."""
    case = CASES[name]
    c, tokens, learner = case.learner()
    model = case.make(case.weights or weights_of(learner.model), learner)
    rows = plain.train(
        lm_of(case.family),
        model,
        [tokens.batch(step) for step in range(tokens.steps)],
        layer=LAYER,
        keep=c.KEEP,
        loss_name=c.LOSS,
        lr=c.LR,
        schedule=c.SCHEDULE,
        weight_decay=c.WEIGHT_DECAY,
        clip=c.CLIP,
    )
    if isinstance(model, plain.ReLU):
        model.restore()
    return rows, {n: getattr(model, n).detach() for n in case.pairs.values()}, model


def weights_of(sae):
    return {theirs: getattr(sae, n).detach() for n, theirs in NAMES.items()}


def differences(found, wanted, loss="kl+mse"):
    """Where two trainings part: losses of a step by over 1e-5 relative, weights by over 1e-6."""
    said = []
    # The MSE alone never runs the upper blocks. A norm of gradients adds up their rounding errors.
    limits = {"mse": 1e-5, "l0": 1e-5, "grad_norm": 1e-4} | ({"kl": 1e-5} if loss != "mse" else {})
    for name, limit in limits.items():
        apart = [abs(a[name] / b[name] - 1) for a, b in zip(found[0], wanted[0], strict=True)]
        if not max(apart) <= limit:
            step = next(i for i, x in enumerate(apart) if not x <= limit)
            said.append(f"{name} from step {step}, {max(apart):.1e}")
    for name, t in wanted[1].items():
        apart = (found[1][name] - t).abs().max().item()
        if not apart <= 1e-6:
            said.append(f"{name}, {apart:.1e}")
    return said


CONSTANT = {"SCHEDULE": "constant"}
FROZEN = {"architecture": "topk", "weights": given()}
LINEAR = {"down.weight": "down", "up.weight": "up"}
MLP = LINEAR | {"down.bias": "down_bias", "up.bias": "up_bias"}
SAE_LORA = {
    f"layers.{layer}.lora_{side}.default.weight": f"{layer[:3]}_{side}"
    for layer in ("encoder", "decoder")
    for side in "AB"
}


def initial(learner, pairs):
    named = dict(learner.model.named_parameters())
    return {theirs: named[n] for n, theirs in pairs.items()}


def relu(target_l0):
    scale = RELU["mean_square_norm"] ** 0.5
    return lambda w, _: plain.ReLU(w, l1=0.1, scale=scale, target_l0=target_l0)


def on_top_k(make, pairs, **options):
    """An adapter or LoRA on a frozen TopK."""
    return lambda w, learner: make(plain.TopK(w, k=K), initial(learner, pairs), **options)


# A scale of 5: what rounding leaves in the biases is multiplied by it at the end.
RELU = {"l0": 23.8, "mean_square_norm": 25.0}
THRESHOLD = torch.linspace(0.1, 0.6, F)
CASES = {
    "relu": Case(
        "relu", relu(RELU["l0"]), given(norm=1.5), CONSTANT | {"KEEP": "first"}, RELU
    ),
    "jumprelu": Case(
        "jumprelu", lambda w, _: plain.JumpReLU(w), given(norm=1.5, threshold=THRESHOLD)
    ),
    "jumprelu ste": Case(
        "jumprelu",
        lambda w, _: plain.JumpReLU(w, width=0.1),
        given(norm=1.5, threshold=THRESHOLD),
        {"JUMPRELU_THRESHOLD": "ste"},
        pairs=NAMES | {"threshold_F": "threshold"},
    ),
    "batchtopk": Case(
        "batchtopk", lambda w, _: plain.BatchTopK(w, k=K), given(), {"KEEP": "first"}
    ),
    "matryoshka": Case(
        "matryoshka",
        lambda w, _: plain.Matryoshka(w, k=K, groups=GROUPS),
        given(group_sizes=torch.tensor(GROUPS)),
    ),
    "auxk": Case(
        "topk",
        lambda w, _: plain.TopK(w, k=4, auxk=0.5, dead_after=48),
        None,
        {"AUXK": 0.5, "DEAD_AFTER": 48, "K": 4},  # some are silent for a step
        family="llama",
    ),
    "linear adapter": Case(
        make=on_top_k(plain.Adapter, LINEAR),
        constants=CONSTANT | {"TRAIN": "adapter", "ADAPTER": "linear"},
        pairs=LINEAR,
        **FROZEN,
    ),
    "mlp adapter": Case(
        make=on_top_k(plain.Adapter, MLP),
        constants=CONSTANT | {"TRAIN": "adapter", "ADAPTER": "mlp"},
        pairs=MLP,
        family="llama",
        **FROZEN,
    ),
    "sae lora": Case(
        make=on_top_k(plain.LowRankSAE, SAE_LORA, scaling=2.0),
        constants=CONSTANT | {"TRAIN": "sae_lora", "LORA_ALPHA": 2 * RANK},
        pairs=SAE_LORA,
        **FROZEN,
    ),
}
FRESH = {
    "topk": lambda w, _: plain.TopK(w, k=K),
    "batchtopk": lambda w, _: plain.BatchTopK(w, k=K),
    "relu": relu(K),
}
for architecture, make in FRESH.items():
    for loss in ("kl", "mse", "kl+mse"):
        CASES[f"fresh {architecture} {loss}"] = Case(
            architecture,
            make,
            None,
            {"LOSS": loss, "SCHEDULE": "constant" if architecture == "relu" else "linear"},
            RELU if architecture == "relu" else None,
            family="llama",
            steps=20,
        )


@pytest.mark.parametrize("name", CASES)
def test_a_variant_trains_as_its_plainest_form(name):
    found, wanted = our_training(CASES[name]), plain_training(name)
    assert differences(found, wanted, CASES[name].constants.get("LOSS")) == []


def test_the_penalty_goes_down_and_up_with_l0():
    learner, (_, _, model) = our_training(CASES["relu"])[2], plain_training("relu")
    assert {0.999, 1.001} == set(model.factors)
    assert learner.model.penalty.item() == pytest.approx(model.l1, rel=1e-6)


def test_the_threshold_of_batchtopk_runs_along_and_decides_at_inference():
    _, _, learner = our_training(CASES["batchtopk"])
    _, _, model = plain_training("batchtopk")
    assert learner.model.threshold.item() == pytest.approx(model.threshold, rel=1e-6)
    x_ND = 3 * torch.randn(64, D, generator=torch.Generator().manual_seed(0))
    learner.train(False)
    with torch.no_grad():
        y_ND, z_NF = learner.reconstruct(x_ND)
        wanted_ND, wanted_NF = model.eval()(x_ND)
    model.train()
    assert len((wanted_NF > 0).sum(1).unique()) > 1  # not k a token
    assert torch.equal(z_NF > 0, wanted_NF > 0)
    assert torch.allclose(y_ND, wanted_ND, atol=1e-5)
    assert learner.model.threshold.item() == pytest.approx(model.threshold, rel=1e-6)  # unmoved


def test_frozen_thresholds_stay_and_straight_through_ones_move():
    frozen, moved = (our_training(CASES[n])[2].model for n in ("jumprelu", "jumprelu ste"))
    assert torch.equal(frozen.threshold_F, THRESHOLD)
    assert ((moved.threshold_F - THRESHOLD).abs() > 1e-3).float().mean() > 0.9


def test_the_straight_through_gradient_is_that_of_equation_11():
    """Of either side of the threshold; a latent's own pre-activation passes only over it."""
    sae = saes.JumpReLU(
        {"W_enc_FD": torch.eye(2), "b_enc_F": torch.zeros(2), "W_dec_FD": torch.eye(2)}
        | {"b_dec_D": torch.zeros(2), "threshold": torch.tensor([0.5, 2.0])}
    )
    sae.threshold_F.requires_grad_()
    pre_NF = torch.tensor([[0.49, 1.95], [0.51, 2.05], [0.47, 1.8], [0.53, 2.2], [-0.5, 1.99]])
    pre_NF.requires_grad_()
    g_NF = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0], [8.0, 80.0], [16.0, 160.0]])
    sae.activate(pre_NF).backward(g_NF)
    # eps = 0.1 threshold: inside are 0.475 to 0.525 and 1.9 to 2.1; -threshold / eps = -10.
    assert sae.threshold_F.grad.tolist() == pytest.approx([-10 * (1 + 2), -10 * (10 + 20 + 160)])
    assert torch.equal(pre_NF.grad, g_NF * torch.tensor([[0, 0], [1, 1], [0, 0], [1, 1], [0, 0]]))


def test_a_threshold_is_never_trained_below_zero():
    learner = CASES["jumprelu ste"].learner()[2]
    with torch.no_grad():
        learner.model.threshold_F[:3] = -0.1
    learner.model.after_step(None, None, 0)
    assert learner.model.threshold_F[:3].tolist() == [0, 0, 0]
    assert torch.equal(learner.model.threshold_F[3:], THRESHOLD[3:])


@pytest.mark.parametrize("n_dead", [1, 15, 40, F])
def test_auxk_lets_half_as_many_dead_latents_as_dimensions_learn_the_rest(n_dead):
    """The gradient too: what they learn from is no target that moves."""
    weights = given()
    sae = built("topk", weights)
    sae.auxk, sae.dead_after = 0.25, 10
    sae.silent_F[F - n_dead :] = 10
    model = plain.TopK(weights, k=K, auxk=0.25, dead_after=10)
    model.silent[F - n_dead :] = [10] * n_dead
    x_ND = 3 * torch.randn(64, D, generator=torch.Generator().manual_seed(0))
    y_ND, z_NF = sae(x_ND)
    loss = sae.extra(x_ND, y_ND, z_NF).mean()
    wanted = model.addend(x_ND, *model(x_ND))
    loss.backward(), wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for ours_name, name in NAMES.items():
        grad, wanted_grad = getattr(sae, ours_name).grad, getattr(model, name).grad
        assert torch.allclose(grad, wanted_grad, atol=1e-6 * wanted_grad.abs().max())
