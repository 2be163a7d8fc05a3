"""A step is one step, in however many micro-batches it is made: losses, penalties and gradients are
means over all of its active tokens. Sequences here have unequal numbers of those, so that a mean of
the micro-batches' means is another number.

A BatchTopK decides among the tokens of a micro-batch, so it is another model in smaller ones; it
equals the plain one that is asked micro-batch by micro-batch, and so does every architecture.
"""

import functools

import naive_variants as plain
import pytest
import tiny
import torch
from seams import patch

BATCH, CONTEXT = tiny.BATCH, tiny.CONTEXT
STEPS = 3
PARAMETERS = {"LORA_DROPOUT": 0.0, "RANK": 4}  # dropout is keyed by the micro-batch
FRESH = {"SAE": "fresh", "D_SAE": 64, "K": 4}
CASES = {  # name: changes, the values of LOSS
    "topk": ({"SAE": "topk"}, ("kl+mse", "mse", "kl")),
    "relu": ({"SAE": "relu"}, ("kl+mse", "mse", "kl")),
    "jumprelu": ({"SAE": "jumprelu"}, ("kl+mse", "mse")),
    "jumprelu ste": ({"SAE": "jumprelu", "JUMPRELU_THRESHOLD": "ste"}, ("kl+mse", "mse")),
    "fresh topk with auxk": (FRESH | {"AUXK": 0.5, "DEAD_AFTER": 40}, ("kl+mse", "mse")),
    "fresh relu": (FRESH | {"ARCHITECTURE": "relu"}, ("kl+mse",)),
    "linear adapter": ({"TRAIN": "adapter"}, ("kl+mse", "mse", "kl")),
    "mlp adapter": ({"TRAIN": "adapter", "ADAPTER": "mlp"}, ("kl+mse",)),
    "sae lora": ({"TRAIN": "sae_lora"}, ("kl+mse", "mse")),
    "adapter on a relu": ({"SAE": "relu", "TRAIN": "adapter"}, ("kl+mse",)),
    "lm lora after": ({"TRAIN": "lm_lora", "LORA_BLOCKS": "after"}, ("kl",)),
    "lm lora all": ({"TRAIN": "lm_lora", "LORA_BLOCKS": "all"}, ("kl",)),
}
# A gradient near zero is rounding, of which AdamW makes a whole step; LoRA in every block has some.
LIMITS = {"lm lora all": 3e-4}
EACH = [(name, loss) for name, (_, losses) in CASES.items() for loss in losses]
PLAIN = {  # name: changes, sizes of the micro-batches
    "topk": ({}, (1,)),
    "relu": ({}, (1,)),
    "jumprelu": ({}, (1,)),
    "jumprelu ste": ({"JUMPRELU_THRESHOLD": "ste"}, (1,)),
    "batchtopk": ({}, (1, 2, 4)),
    "matryoshka": ({}, (1, 2, 4)),
}
EACH_PLAIN = [
    (name, size, loss)
    for name, (_, sizes) in PLAIN.items()
    for size in sizes
    for loss in (("kl+mse", "mse", "kl") if size == 1 else ("kl+mse",))
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run_of(world, tmp_path_factory):
    """-> (changes, LOSS, MICRO_BATCH) -> the folder of that run."""
    with pytest.MonkeyPatch.context() as m:
        calls = patch(m, "figures", lambda *_: None)

        @functools.cache
        def folder(name, loss, size):
            changes = (CASES.get(name) or PLAIN.get(name))[0]
            sae = changes.get("SAE", name.split()[0])
            settings = {"VAL_TOKENS": 2 * CONTEXT, "LOSS": loss, "MICRO_BATCH": size}
            settings |= PARAMETERS | {"CLIP": 0.5} | changes
            settings["SAE"] = world.saes.get(sae, sae if sae == "fresh" else world.saes["topk"])
            found = tiny.finished(world, tmp_path_factory.mktemp("runs"), **settings)
            assert calls
            return found

        yield folder


def curve(folder):
    names = ("mse", "kl", "alpha", "l0", "grad_norm", "lr")
    return [{n: line[n] for n in names} for line in tiny.lines(folder, "train")]


def differences(found, wanted, limit):
    said = []
    for step, (a, b) in enumerate(zip(found, wanted, strict=True)):
        wanted = {n: pytest.approx(v, rel=limit) if v else v for n, v in b.items()}
        said += [(step, n, a[n], b[n]) for n in a if a[n] != wanted[n]]
    return said


def test_the_steps_have_unequal_numbers_of_active_tokens(world):
    _, train_SL = tiny.packed(world.root, 2)
    active = (~tiny.kept("special", train_SL[: STEPS * BATCH])).sum(1).view(STEPS, BATCH)
    assert all(len(step.unique()) > 1 for step in active)
    pairs = active.view(STEPS, 2, 2).sum(2)
    assert all(len(step.unique()) > 1 for step in pairs), active


@pytest.mark.parametrize("name, loss", EACH)
def test_a_step_in_micro_batches_is_the_same_step(run_of, name, loss):
    whole = run_of(name, loss, BATCH)
    start, wanted = curve(whole), tiny.tensors(whole)
    assert len(start) == STEPS and all(line["grad_norm"] > 1e-6 for line in start)
    for size in (1, 2):
        folder = run_of(name, loss, size)
        assert differences(curve(folder), start, 1e-4) == []
        found = tiny.tensors(folder)
        assert found.keys() == wanted.keys()
        for n, t in wanted.items():
            assert tiny.apart(found[n], t) < LIMITS.get(name, 1e-5), n


def test_dead_latents_and_penalties_had_a_part_in_it(run_of):
    """Positive controls: AuxK, L1 and straight-through gradients were not idle."""
    kl = curve(run_of("relu", "kl", BATCH))
    assert kl[0]["grad_norm"] > 0
    folders = [run_of(n, "kl+mse", BATCH) / "sae" for n in ("jumprelu", "jumprelu ste")]
    thresholds = [tiny.read_sae(folder).tensors for folder in folders]
    still, moved = (t["threshold"] / t["W_enc"].norm(dim=1) for t in thresholds)
    assert tiny.apart(moved, still) > 1e-4


class InParts:
    """A plain module that is asked about a step micro-batch by micro-batch."""

    def __init__(self, model, sizes):
        self.model, self.sizes = model, iter(sizes)
        self.unit_rows, self.mse, self.addend = model.unit_rows, model.mse, model.addend
        self.after_step, self.parameters = model.after_step, model.parameters
        self.W_dec = model.W_dec  # changed in place

    def __call__(self, x_ND):
        parts = [self.model(x_MD) for x_MD in x_ND.split(next(self.sizes))]
        return tuple(torch.cat(part) for part in zip(*parts))


def plain_module(world, architecture, folder):
    """The SAE that the run started from."""
    options = {}
    if architecture == "relu":
        before = tiny.read(folder / "before.json")
        options = {"scale": before["mean_square_norm"] ** 0.5, "target_l0": before["l0"]}
    if tiny.read(folder / "run.json")["constants"]["JUMPRELU_THRESHOLD"] == "ste":
        options = {"width": 0.1}
    return tiny.plain_sae(tiny.read_sae(world.saes[architecture]), **options)


def with_unit_rows(model):
    """Its tensors as they are saved: of a ReLU or a JumpReLU the scale of a latent is free."""
    found = {n: getattr(model, n).detach().clone() for n in tiny.WEIGHTS}
    if hasattr(model, "threshold"):
        found["threshold"] = torch.as_tensor(model.threshold).detach().clone()
    if not model.unit_rows:
        norm_F = found["W_dec"].norm(dim=1)
        found["W_dec"] /= norm_F[:, None]
        found["W_enc"] *= norm_F[:, None]
        found["b_enc"] *= norm_F
        if "threshold" in found:
            found["threshold"] *= norm_F
    return found


@pytest.mark.parametrize("name, size, loss", EACH_PLAIN)
def test_a_step_in_micro_batches_equals_the_plain_one(world, run_of, name, size, loss):
    architecture = name.split()[0]
    folder = run_of(name, loss, size)
    _, train_SL = tiny.packed(world.root, 2)
    batches = train_SL[: STEPS * BATCH].split(BATCH)
    keep = functools.partial(tiny.kept, "special")
    sizes = [[int((~keep(part)).sum()) for part in batch.split(size)] for batch in batches]
    model = plain_module(world, architecture, folder)
    wanted = plain.train(
        tiny.lm_of(world.model),
        InParts(model, sizes),
        batches,
        layer=tiny.LAYER,
        keep=keep,
        loss_name=loss,
        lr=1e-2,
        schedule="linear",
        weight_decay=0.01,
        clip=0.5,
    )
    found = curve(folder)
    for line in found:
        assert line.pop("lr") > 0
        if loss == "mse":
            assert line.pop("kl") is None and line.pop("alpha") is None
    assert differences(found, wanted, 2e-4) == []
    if name == "relu":
        model.restore()
    saved, trained = tiny.read_sae(folder / "sae").tensors, with_unit_rows(model)
    if architecture == "topk":
        saved.pop("threshold")
    assert saved.keys() == trained.keys()
    for n, t in trained.items():
        assert tiny.apart(saved[n], t) < 2e-5, n
    start = tiny.read_sae(world.saes[architecture]).tensors
    assert tiny.apart(saved["b_enc"], start["b_enc"]) > 1e-3
