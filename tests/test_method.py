"""The finetune equals the plainest form of the method (tests/naive.py), in fp32."""

import naive
import pytest
import torch
from conftest import constants, gradients, make_tokens, open_learner, ours, quietly

import finetune
import sae as saes
from klsplice.errors import UserError
from klsplice.formats import read as reader
from klsplice.kernels import kl as kl_kernel
from klsplice.lm import head as heads
from klsplice.lm.splice import Splice
from learners import base

FAMILIES = ["gemma2", "gemma3", "llama", "gpt_neox", "qwen3"]
# K is a third of F: a latent that hardly ever fires has gradients near AdamW's eps, which blows up
# rounding errors (2e-3 in one of 15 runs with F 64 and K 8).
D, F, K, LAYER, CONTEXT, STEPS = 32, 48, 16, 1, 24, 50


def weights(seed=0):
    """An SAE whose rows point anywhere and whose biases are not zero."""
    rng = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(F, D, generator=rng)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    W_enc = W_dec + 0.1 * torch.randn(F, D, generator=rng)
    b = [0.1 * torch.randn(n, generator=rng) for n in (F, D)]
    return {"W_enc": W_enc, "b_enc": b[0], "W_dec": W_dec, "b_dec": b[1]}


OUR_NAMES = {"W_enc": "W_enc_FD", "b_enc": "b_enc_F", "W_dec": "W_dec_FD", "b_dec": "b_dec_D"}


def our_sae():
    return saes.TopK({OUR_NAMES[n]: t.clone() for n, t in weights().items()}, k=K)


ON_A_CPU = "on a CPU too"  # of COMPILE, which is for CUDA


def our_learner(lm, c):
    speed = {"compiled": c.COMPILE is ON_A_CPU, "checkpointed": c.LOW_MEMORY}
    splice = Splice(ours(lm), LAYER, head_chunk=10, **speed)
    return base.SAELearner(our_sae(), splice)


def setting(keep="none", loss="kl+mse", steps=STEPS, **more):
    c = constants(LAYER=LAYER, CONTEXT=CONTEXT, BATCH=2, MICRO_BATCH=2, KEEP=keep, LOSS=loss)
    vars(c).update({"LR": 1e-3, **more})
    return c, make_tokens(c, vocabulary=97, sequences=2 * steps)


def kept(tokens_BL, tokens):
    active = torch.zeros(tokens_BL.numel(), dtype=torch.bool)
    active[tokens.active(tokens_BL, None)] = True
    return ~active.view_as(tokens_BL)


def our_gradients(c, tokens, lm):
    learner = our_learner(lm, c)
    feed = finetune.batches_of(c, learner, tokens)
    found = gradients(c, learner, feed(0))
    return found, {n: getattr(learner.model, OUR_NAMES[n]).grad for n in OUR_NAMES}


def naive_gradients(c, tokens, lm):
    sae = naive.NaiveTopK(weights(), K)
    tokens_BL = tokens.batch(0)
    found = naive.losses(lm, sae, tokens_BL, LAYER, kept(tokens_BL, tokens), c.LOSS)
    found["loss"].backward()
    return found, {n: getattr(sae, n).grad for n in OUR_NAMES}


def same_gradients(c, tokens, lm):
    """Value and unclipped gradients within 1e-5 of the naive loop's, relative."""
    found, grads = our_gradients(c, tokens, lm)
    wanted, wanted_grads = naive_gradients(c, tokens, lm)
    names = {"kl+mse": ("mse", "kl"), "mse": ("mse",), "kl": ("kl",)}[c.LOSS]
    close = [torch.isclose(found[n], wanted[n], rtol=1e-5).item() for n in names]
    for n in OUR_NAMES:
        close.append(((grads[n] - wanted_grads[n]).norm() / wanted_grads[n].norm()).item() < 1e-5)
    return all(close)


def our_training(c, tokens, lm):
    learner = our_learner(lm, c)
    scalars = quietly(c, learner, tokens)
    return scalars, {n: getattr(learner.model, OUR_NAMES[n]).detach() for n in OUR_NAMES}


def naive_training(c, tokens, lm):
    sae = naive.NaiveTopK(weights(), K)
    batches = [tokens.batch(step) for step in range(tokens.steps)]
    found = naive.train(
        lm,
        sae,
        batches,
        layer=LAYER,
        keep=lambda tokens_BL: kept(tokens_BL, tokens),
        loss_name=c.LOSS,
        lr=c.LR,
        steps=tokens.steps,
        weight_decay=c.WEIGHT_DECAY,
        clip=c.CLIP,
    )
    return found, {n: getattr(sae, n).detach() for n in OUR_NAMES}


def same_training(c, tokens, lm, wanted=None):
    """Weights after the last step within 1e-6 of the naive loop's."""
    _, trained = our_training(c, tokens, lm)
    _, wanted = wanted or naive_training(c, tokens, lm)
    return max((trained[n] - wanted[n]).abs().max().item() for n in OUR_NAMES) < 1e-6


@pytest.mark.parametrize("loss", ["kl+mse", "mse", "kl"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_two_full_passes(family, loss):
    lm = naive.build_lm(family, seed=0, context=CONTEXT)
    assert same_gradients(*setting(loss=loss), lm)


@pytest.mark.parametrize("keep", ["first", "special"])
def test_kept_positions_stay_original_and_out_of_the_loss(keep):
    lm = naive.build_lm("gemma2", seed=0, context=CONTEXT)
    c, tokens = setting(keep=keep)
    tokens.train_SL[0, 3:5] = 1  # a special token in mid-context
    assert same_gradients(c, tokens, lm)


@pytest.mark.parametrize("family", FAMILIES)
def test_fifty_steps_give_the_same_weights(family):
    lm = naive.build_lm(family, seed=0, context=CONTEXT)
    assert same_training(*setting(), lm)


def test_micro_batches_give_the_gradients_of_the_whole_batch():
    """alpha and the means are the whole step's, also where micro-batches differ in size."""
    lm = naive.build_lm("gemma2", seed=0, context=CONTEXT)
    c, tokens = setting(keep="special", BATCH=4, MICRO_BATCH=1, steps=2)
    tokens.batch_size = 4
    tokens.train_SL[0, 3:9] = 1
    assert same_gradients(c, tokens, lm)


@pytest.mark.parametrize("clean_batch", [1, 2, 4, 6, 7, 16])
def test_a_clean_pass_of_any_size_gives_each_step_its_own_sequences(clean_batch):
    lm = naive.build_lm("gemma2", seed=0, context=CONTEXT)
    c, _ = setting(BATCH=4, MICRO_BATCH=1, CLEAN_BATCH=clean_batch)
    tokens = make_tokens(c, vocabulary=97, sequences=20)
    learner = our_learner(lm, c)
    feed, seen = finetune.batches_of(c, learner, tokens), []
    for step in (0, 1, 2, 4, 3):  # a resumed run may begin anywhere
        for part, tokens_L in zip(feed(step), tokens.batch(step), strict=True):
            wanted = learner.clean(tokens_L[None])
            assert torch.allclose(part.x_ND, wanted.x_BLD[0], atol=1e-5)
            kl_N = finetune.kl(part, wanted, learner.splice, torch.float32)
            assert torch.allclose(kl_N, torch.zeros(CONTEXT), atol=1e-5)
            seen.append(part.clean.tokens_BL)
    assert len(torch.cat(seen).unique(dim=0)) == 20


def test_blocks_that_keep_their_input_only_give_the_same_gradients():
    lm = naive.build_lm("gemma2", seed=0, context=CONTEXT)
    assert same_gradients(*setting(LOW_MEMORY=True), lm)


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_compiled_blocks_give_the_same_gradients_from_few_graphs(family, graphs):
    """A graph a block and a use: clean, spliced, and the layer types of the family."""
    lm = naive.build_lm(family, seed=0, context=CONTEXT)
    c, tokens = setting(COMPILE=ON_A_CPU)
    assert same_gradients(c, tokens, lm)
    assert 0 < graphs["stats"]["unique_graphs"] <= 6  # 4 blocks clean, 2 spliced
    learner = our_learner(lm, c)
    feed = finetune.batches_of(c, learner, tokens)
    for step in range(3):
        gradients(c, learner, feed(step))
        if step == 0:
            after_one = graphs["stats"]["unique_graphs"]
    assert graphs["stats"]["unique_graphs"] == after_one and not graphs["graph_break"]


SWEEP = kl_kernel.kl_sweep


PLANTED = {  # what breaks the gradients
    "no 0.5": ("finetune.LOSSES", lambda mse, kl: (1.0, mse / kl)),
    "alpha not detached": ("finetune.LOSSES", lambda mse, kl: (1.0, 0.0)),
    "reversed KL": (
        "klsplice.lm.head.kl_sweep",
        lambda t_NV, s_NV, *a, **o: SWEEP(s_NV, t_NV, *a, **o),
    ),
    "MSE summed over D": (
        "sae.Trainable.error",
        lambda self, x_ND, y_ND, z_NF: (y_ND - x_ND).square().sum(-1),
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_wrong_loss_is_noticed(bug, monkeypatch):
    lm = naive.build_lm("gemma2", seed=0, context=CONTEXT)
    where, wrong = PLANTED[bug]
    if where == "finetune.LOSSES":
        monkeypatch.setitem(finetune.LOSSES, "kl+mse", finetune.Loss(wrong, (finetune.kl,)))
    else:
        monkeypatch.setattr(where, wrong)
    assert not same_gradients(*setting(), lm)


def clip_before_projection(self, lr):
    norm = torch.nn.utils.clip_grad_norm_(self.learner.parameters(), self.clip)
    self.learner.model.before_clip()
    self.adamw.param_groups[0]["lr"] = lr
    self.adamw.step()
    self.learner.model.renormalise()
    self.adamw.zero_grad()
    return norm


def no_clip(self, lr):
    self.clip = float("inf")
    return STEP(self, lr)


STEP = finetune.Optimizer.step
PLANTED_STEPS = {  # what breaks the update
    "no weight decay": lambda mp: mp.setattr(
        "torch.optim.AdamW.__init__",
        lambda self, params, **o: torch.optim.Adam.__init__(self, params, lr=0.0, fused=True),
    ),
    "no clip": lambda mp: mp.setattr("finetune.Optimizer.step", no_clip),
    "clip before projection": lambda mp: mp.setattr(
        "finetune.Optimizer.step", clip_before_projection
    ),
    "no projection": lambda mp: mp.setattr("sae.SAE.before_clip", lambda self: None),
    "no renormalisation": lambda mp: mp.setattr("sae.SAE.renormalise", lambda self: None),
    "constant lr": lambda mp: mp.setattr("finetune.learning_rate", lambda step, steps, **o: 1e-3),
}


@pytest.fixture(scope="module")
def gemma_training():
    """The naive loop on Gemma-2, with a clip that bites at some steps and not at others."""
    lm = naive.build_lm("gemma2", seed=0, context=CONTEXT)
    c, tokens = setting(CLIP=5.5)
    return c, tokens, lm, naive_training(c, tokens, lm)


def test_clipping_agrees_where_it_bites_now_and_then(gemma_training):
    c, tokens, lm, wanted = gemma_training
    norms = [found["grad_norm"] for found in wanted[0]]
    assert min(norms) < c.CLIP < max(norms)
    assert same_training(c, tokens, lm, wanted)


@pytest.mark.parametrize("bug", PLANTED_STEPS)
def test_a_wrong_update_is_noticed(bug, monkeypatch, gemma_training):
    PLANTED_STEPS[bug](monkeypatch)
    c, tokens, lm, wanted = gemma_training
    assert not same_training(c, tokens, lm, wanted)


def test_the_same_seed_gives_the_same_bits():
    lm = naive.build_lm("gemma2", seed=0, context=CONTEXT)
    c, tokens = setting(steps=5)
    one, two = (our_training(c, tokens, lm)[1] for _ in range(2))
    assert all(torch.equal(one[n], two[n]) for n in OUR_NAMES)


def test_the_head_is_told_the_next_tokens(monkeypatch):
    """Where clean passes are batched, too, and where the first positions are left out."""
    lm = naive.build_lm("llama", seed=0, context=CONTEXT)
    c, tokens = setting(CLEAN_BATCH=4, MICRO_BATCH=1, LOGITS="bfloat16", KEEP="first")
    told = []
    whole = heads.kl_head
    monkeypatch.setattr("finetune.kl_head", lambda *a: told.append(a[2]) or whole(*a))
    feed = finetune.batches_of(c, learner := our_learner(lm, c), tokens)
    for step in range(3):
        told.clear()
        gradients(c, learner, feed(step))
        for row_L, found_N in zip(tokens.batch(step), told, strict=True):
            active_N = tokens.active(row_L[None], None)
            inside = active_N < len(row_L) - 1
            assert torch.equal(found_N[inside], row_L[active_N[inside] + 1])


def test_mse_alone_runs_no_upper_block_and_no_head(monkeypatch):
    lm = naive.build_lm("gemma2", seed=0, context=CONTEXT)
    c, tokens = setting(loss="mse", steps=2)
    learner = our_learner(lm, c)
    for block in learner.splice.blocks[LAYER + 1 :]:
        block.register_forward_pre_hook(lambda *a: pytest.fail("an upper block ran"))
    monkeypatch.setattr("finetune.kl_head", lambda *a: pytest.fail("the head ran"))
    quietly(c, learner, tokens)


def test_shuffled_residuals_are_those_of_the_pool_each_once():
    lm = naive.build_lm("llama", seed=0, context=CONTEXT)
    c, tokens = setting(loss="mse", steps=4, SHUFFLE=8)
    learner = our_learner(lm, c)
    shuffled, plain = finetune.batches_of(c, learner, tokens), None
    c.SHUFFLE = 0
    plain = finetune.batches_of(c, learner, tokens)
    dealt = torch.cat([shuffled(step)[0].x_ND for step in range(4)])
    in_order = torch.cat([plain(step)[0].x_ND for step in range(4)])
    assert not torch.equal(dealt, in_order)
    assert torch.equal(dealt.sort(0).values, in_order.sort(0).values)


def test_a_gradient_that_is_not_finite_is_refused_and_leaves_the_weights(monkeypatch):
    lm = naive.build_lm("gemma2", seed=0, context=CONTEXT)
    c, tokens = setting(steps=3)
    learner = our_learner(lm, c)
    before = {n: t.clone() for n, t in learner.model.named_parameters()}
    nan = finetune.Loss(lambda mse, kl: (float("nan"), 1.0), (finetune.kl,))
    monkeypatch.setitem(finetune.LOSSES, "kl+mse", nan)
    with pytest.raises(UserError, match="not finite") as error:
        quietly(c, learner, tokens)
    assert error.value.code == 1
    for n, t in learner.model.named_parameters():
        assert torch.allclose(t, before[n], atol=1e-6, rtol=0)


def test_the_schedule_is_linear_to_zero_after_a_warm_up():
    lr = [finetune.learning_rate(s, 10, lr=1.0, schedule="linear", warmup=0) for s in range(10)]
    assert lr == pytest.approx([1 - s / 10 for s in range(10)])
    lr = [finetune.learning_rate(s, 10, lr=1.0, schedule="constant", warmup=3) for s in range(5)]
    assert lr == pytest.approx([0.25, 0.5, 0.75, 1, 1])


def test_a_fresh_sae_is_tied_centred_and_decided_by_the_seed():
    lm = naive.build_lm("llama", seed=0, context=CONTEXT)
    c, tokens = setting(steps=4, SAE="fresh", D_SAE=F, K=K)
    source = reader.Source("fresh", "topk", D, F, k=K)
    one, two = (open_learner(c, source, ours(lm), tokens).sae for _ in range(2))
    assert torch.equal(one.W_enc_FD, one.W_dec_FD) and torch.equal(one.W_enc_FD, two.W_enc_FD)
    x_BLD = Splice(ours(lm), LAYER, head_chunk=64).residual(tokens.sequences(0, 8))
    assert torch.allclose(one.b_dec_D, x_BLD.mean((0, 1)), atol=1e-5)
    c.SEED = 1
    assert not torch.equal(one.W_enc_FD, open_learner(c, source, ours(lm), tokens).sae.W_enc_FD)
