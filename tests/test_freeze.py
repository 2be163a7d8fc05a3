"""MSE_WEIGHT and FREEZE: what the loss weighs, and what may move."""

import naive
import pytest
import torch
from conftest import constants, gradients, make_tokens, quietly

import finetune
import sae as saes
from klsplice.lm.splice import Splice
from learners.base import SAELearner

D, F, K, LAYER, CONTEXT = 32, 48, 6, 1, 24
CLASSES = {
    "topk": lambda w: saes.TopK(w, k=K),
    "batchtopk": lambda w: saes.BatchTopK({"threshold": torch.tensor(0.5)} | w, k=K),
    "matryoshka": lambda w: saes.Matryoshka(
        {"threshold": torch.tensor(0.5)} | w, k=K, groups=[16, 32]
    ),
    "jumprelu": lambda w: saes.JumpReLU({"threshold": torch.full((F,), 0.5)} | w),
    "relu": lambda w: saes.ReLU(w, l1=0.01),
}


def weights() -> dict:
    rng = torch.Generator().manual_seed(0)
    W_dec_FD = torch.randn(F, D, generator=rng)
    W_dec_FD /= W_dec_FD.norm(dim=1, keepdim=True)
    W_enc_FD = W_dec_FD + 0.1 * torch.randn(F, D, generator=rng)
    b_enc_F, b_dec_D = (0.1 * torch.randn(n, generator=rng) for n in (F, D))
    return {"W_enc_FD": W_enc_FD, "b_enc_F": b_enc_F, "W_dec_FD": W_dec_FD, "b_dec_D": b_dec_D}


def setting(sae, **changes):
    sizes = {"LAYER": LAYER, "CONTEXT": CONTEXT, "BATCH": 2, "MICRO_BATCH": 2, "LR": 1e-2}
    c = constants(**sizes, **changes)
    lm = naive.build_lm("llama", seed=0, context=CONTEXT)
    learner = SAELearner(sae, Splice(lm, LAYER, head_chunk=10))
    return c, learner, make_tokens(c, vocabulary=97, sequences=10)


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_mse_weight_weighs_the_mse(weight):
    c, learner, tokens = setting(CLASSES["topk"](weights()), MSE_WEIGHT=weight)
    gradients(c, learner, finetune.batches_of(c, learner, tokens)(0))
    names = {"W_enc": "W_enc_FD", "b_enc": "b_enc_F", "W_dec": "W_dec_FD", "b_dec": "b_dec_D"}
    plain = naive.TopK({name: weights()[ours] for name, ours in names.items()}, K)
    keep_BL = torch.zeros(2, CONTEXT, dtype=torch.bool)
    found = naive.losses(learner.splice.lm, plain, tokens.batch(0), keep_BL, c)
    mse, kl = found["mse"], found["kl"]
    (0.5 * (weight * mse + (mse / kl).detach() * kl)).backward()
    for name, ours in names.items():
        wanted = getattr(plain, name).grad
        torch.testing.assert_close(getattr(learner.model, ours).grad, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("architecture", CLASSES)
def test_with_a_frozen_encoder_each_latent_fires_as_before(architecture):
    sae = CLASSES[architecture](weights())
    sae.freeze("encoder")
    x_ND = 2 * torch.randn(64, D, generator=torch.Generator().manual_seed(1))
    z_NF, rows_FD = sae.eval().encode(x_ND).detach(), sae.W_dec_FD.detach().clone()
    c, learner, tokens = setting(sae, FREEZE="encoder")
    learner.begin({"mean_square_norm": 4.0, "l0": 6.0})
    quietly(c, learner, tokens)
    if architecture == "relu":
        sae.unscale()
    torch.testing.assert_close(sae.eval().encode(x_ND), z_NF, rtol=1e-6, atol=1e-6)
    assert torch.equal(sae.encode(x_ND) > 0, z_NF > 0)
    assert not torch.allclose(sae.W_dec_FD, rows_FD)
    assert architecture == "jumprelu" or not torch.allclose(sae.b_dec_D, sae.b_pre_D)


@pytest.mark.parametrize("architecture", CLASSES)
def test_a_frozen_encoder_is_folded_when_saved(architecture):
    sae = CLASSES[architecture](weights())
    sae.freeze("encoder")
    c, learner, tokens = setting(sae, FREEZE="encoder")
    learner.begin({"mean_square_norm": 4.0, "l0": 6.0})
    quietly(c, learner, tokens)
    x_ND = 2 * torch.randn(64, D, generator=torch.Generator().manual_seed(1))
    saved = sae.to_save()
    again = CLASSES[architecture](weights() | saved).eval()
    torch.testing.assert_close(again(x_ND)[0], sae.eval()(x_ND)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", CLASSES)
def test_a_frozen_decoder_stays_and_the_encoder_learns(architecture):
    sae = CLASSES[architecture](weights())
    sae.freeze("decoder")
    c, learner, tokens = setting(sae, FREEZE="decoder")
    quietly(c, learner, tokens)
    assert torch.equal(sae.W_dec_FD, weights()["W_dec_FD"])
    assert torch.equal(sae.b_dec_D, weights()["b_dec_D"])
    assert not torch.allclose(sae.W_enc_FD, weights()["W_enc_FD"])


def test_a_frozen_topk_is_the_same_through_the_kernels(monkeypatch):
    x_ND, passes = torch.randn(16, D, generator=torch.Generator().manual_seed(1)), []
    for pays in (False, True):
        monkeypatch.setattr("klsplice.kernels.topk.sparse_pays", lambda *args, pays=pays: pays)
        sae = CLASSES["topk"](weights())
        sae.freeze("encoder")
        with torch.no_grad():
            sae.b_dec_D += 0.5
        y_ND, _ = sae.train()(x_ND)
        y_ND.square().sum().backward()
        passes.append((y_ND.detach(), sae.W_dec_FD.grad, sae.b_dec_D.grad))
    for plain, fused in zip(*passes):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
