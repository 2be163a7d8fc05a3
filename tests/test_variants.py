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


def differences(found, wanted, scalars=("mse", "kl", "l0", "grad_norm")):
    """Where two trainings part: scalars of a step by over 1e-5 relative, weights by over 1e-6."""
    said = []
    for name in scalars:
        apart = [abs(a[name] / b[name] - 1) for a, b in zip(found[0], wanted[0], strict=True)]
        if not max(apart) <= 1e-5:
            step = next(i for i, x in enumerate(apart) if not x <= 1e-5)
            said.append(f"{name} from step {step}, {max(apart):.1e}")
    for name, t in wanted[1].items():
        apart = (found[1][name] - t).abs().max().item()
        if not apart <= 1e-6:
            said.append(f"{name}, {apart:.1e}")
    return said


def scalars_of(loss):
    """What our loop logs of a loss: the MSE alone never runs the upper blocks."""
    return ("mse", "l0", "grad_norm") + (() if loss == "mse" else ("kl",))


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


RELU = {"l0": 23.5, "mean_square_norm": 300.0}  # L0 goes to and fro over the target
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
        lambda w, _: plain.TopK(w, k=K, auxk=0.5, dead_after=48),
        None,
        {"AUXK": 0.5, "DEAD_AFTER": 48},
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
    assert differences(found, wanted, scalars_of(CASES[name].constants.get("LOSS"))) == []
