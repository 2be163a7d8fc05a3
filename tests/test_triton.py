"""Each Triton kernel equals plain PyTorch and float64; without a GPU Triton interprets it.

Where there is a GPU the same claims are made of the compiled kernels, and those of real sizes too.
"""

import functools
import importlib
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import naive
import pytest
import torch
from conftest import HERE, quietly
from test_method import CONTEXT, OUR_NAMES, our_learner, setting

import finetune
import sae as saes
from klsplice.kernels import kl as kl_kernel
from klsplice.kernels import topk as topk_kernel
from klsplice.tracking import checkpoint

triton = pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
KERNELS = [
    importlib.import_module(f"klsplice.kernels.triton_{name}") for name in ("kl", "sae", "adamw")
]
triton_kl, triton_sae, _ = KERNELS
HALVES = [torch.bfloat16, torch.float16]


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not CUDA, reason="needs a GPU")(test))


@pytest.fixture(autouse=True)
def fresh_memory_is_not_a_number():
    """torch.empty is NaN in these tests, so that what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape, seed=0, dtype=torch.float32, scale=1.0):
    """The same numbers on every device, but where they are many: a GPU draws those itself."""
    device = DEVICE if math.prod(shape) > 10**6 else "cpu"
    rng = torch.Generator(device).manual_seed(seed)
    return (scale * torch.randn(*shape, generator=rng, device=device)).to(DEVICE, dtype)


def off(found, wanted):
    """Relative error of the whole tensor, inf where one is not finite."""
    error = ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()
    return error if math.isfinite(error) else math.inf


# ---- KL --------------------------------------------------------------------------------------


def exact_kl(t_NV, s_NV, softcap, scale=1.0):
    """-> kl_N, dKL / ds, lse_t_N, lse_s_N in float64, by autograd."""
    s_NV = s_NV.double().requires_grad_()
    t, s = (scale * z for z in (t_NV.double(), s_NV))
    if softcap:
        t, s = softcap * torch.tanh(t / softcap), softcap * torch.tanh(s / softcap)
    log_p, log_q = t.log_softmax(-1), s.log_softmax(-1)
    kl_N = (log_p.exp() * (log_p - log_q)).sum(-1)
    (g_NV,) = torch.autograd.grad(kl_N.sum(), s_NV)
    return kl_N.detach(), g_NV, t.logsumexp(-1), s.detach().logsumexp(-1)


def kl_agrees(t_NV, s_NV, softcap, *, g_dtype=torch.float32, g_off=None, shifts=None, scale=1.0):
    """A tanh made from e^x is off by an epsilon of 1, so a logit by one of the softcap."""
    g_off = g_off or 2e-6 + 5e-7 * softcap
    whole = (
        (t_NV, s_NV) if shifts is None else (z + x[:, None] for z, x in zip((t_NV, s_NV), shifts))
    )
    wanted_N, wanted_NV, lse_t_N, lse_s_N = exact_kl(*whole, softcap, scale)
    g_NV = torch.empty_like(t_NV, dtype=g_dtype)
    how = {"softcap": softcap, "shifts": shifts, "scale": scale}
    found = triton_kl.kl_sweep(t_NV, s_NV, g_NV, **how)
    apart = [(a - b).abs().max() for a, b in zip(found, (wanted_N, lse_t_N, lse_s_N))]
    limits = [3e-6, *[3e-6 + 1e-7 * softcap] * 2, g_off]
    return all(x < limit for x, limit in zip([*apart, off(g_NV, wanted_NV)], limits))


def pair(n, v, *, dtype=torch.float32, scale=3.0):
    t_NV = draw(n, v, scale=scale)
    return t_NV.to(dtype), (t_NV + draw(n, v, seed=1, scale=0.3)).to(dtype)


@pytest.mark.parametrize("softcap", [0.0, 3.0, 30.0, 100.0])
@pytest.mark.parametrize("n, v", [(1, 7), (3, 301), (1, 4096), (2, 9001)])
def test_kl_and_its_gradient_agree_with_float64(n, v, softcap):
    assert kl_agrees(*pair(n, v), softcap)


@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("dtype", HALVES)
def test_logits_in_half_precision_are_swept_in_float32(dtype, softcap):
    assert kl_agrees(*pair(3, 5000, dtype=dtype), softcap)
    assert kl_agrees(*pair(3, 5000, dtype=dtype), softcap, g_dtype=dtype, g_off=4e-3)


@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_a_vocabulary_of_256000_is_right_to_3e_6_nats_a_row_flat_or_peaked(softcap):
    t_NV, s_NV = pair(3, 256_000)
    t_NV[1, 255_999], s_NV[1, 255_999] = 60.0, 50.0
    t_NV[2, 0], s_NV[2, 0] = 40.0, 2.0
    assert kl_agrees(t_NV, s_NV, softcap)


def test_logits_in_the_hundreds_do_not_overflow():
    t_NV, s_NV = pair(2, 5000, scale=10.0)
    shift_N1 = torch.tensor([[512.0], [-512.0]], device=DEVICE)
    wanted_N, wanted_NV, _, _ = exact_kl(t_NV + shift_N1, s_NV + shift_N1, 0.0)
    g_NV = torch.empty_like(t_NV)
    found_N, _, _ = triton_kl.kl_sweep(t_NV + shift_N1, s_NV + shift_N1, g_NV)
    assert (found_N - wanted_N).abs().max() < 3e-6 and off(g_NV, wanted_NV) < 2e-5
    t_NV, s_NV = 30 * t_NV, 30 * s_NV  # far into the softcap
    assert kl_agrees(t_NV, s_NV, 30.0, g_off=1e-4)


def test_rows_may_be_apart_and_the_gradient_may_lie_over_the_logits():
    t_NV, s_NV = pair(3, 5001)
    wide = torch.full((2, 3, 5100), math.nan, device=DEVICE)
    t, s = wide[0, :, :5001].copy_(t_NV), wide[1, :, :5001].copy_(s_NV)
    kl_N, _, _ = triton_kl.kl_sweep(t, s, s, softcap=30.0)
    wanted_N, wanted_NV, _, _ = exact_kl(t_NV, s_NV, 30.0)
    assert (kl_N - wanted_N).abs().max() < 3e-6 and off(s, wanted_NV) < 2e-5
    assert torch.equal(t, t_NV) and wide[1, :, 5001:].isnan().all()


@pytest.mark.parametrize("sweep", ["triton", "reference"])
@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_what_rows_lack_is_added_before_the_softcap(softcap, sweep, monkeypatch):
    if sweep == "reference":
        monkeypatch.setattr(triton_kl, "kl_sweep", kl_kernel.kl_sweep_reference)
    shifts = 9 * draw(3, seed=2), 9 * draw(3, seed=3)
    assert kl_agrees(*pair(3, 5000), softcap, shifts=shifts, g_off=5e-5)
    assert kl_agrees(*pair(3, 5000, dtype=torch.bfloat16), softcap, shifts=shifts, g_off=5e-5)


def test_equal_logits_have_no_kl_and_no_gradient():
    t_NV, _ = pair(2, 5000)
    for softcap in (0.0, 30.0):
        g_NV = torch.empty_like(t_NV)
        kl_N, _, _ = triton_kl.kl_sweep(t_NV, t_NV, g_NV, softcap=softcap)
        # compiled, a b - c d is one rounding
        assert kl_N.abs().max() < 1e-15 and g_NV.abs().max() <= (1e-8 if CUDA else 0)


def test_without_a_gradient_the_values_are_the_same():
    t_NV, s_NV = pair(2, 5000)
    both = triton_kl.kl_sweep(t_NV, s_NV, torch.empty_like(t_NV), softcap=30.0)
    alone = triton_kl.kl_sweep(t_NV, s_NV, softcap=30.0)
    assert all(torch.equal(a, b) for a, b in zip(both, alone))


@pytest.mark.parametrize("softcap", [0.0, 30.0, 100.0])
def test_logits_are_scaled_after_what_rows_lack_and_before_the_softcap(softcap):
    """And so is the gradient. Granite divides by a number, Cohere multiplies."""
    shifts = draw(3, scale=9.0), draw(3, seed=1, scale=9.0)
    assert kl_agrees(*pair(3, 5000), softcap, shifts=shifts, scale=0.3, g_off=2e-4)


@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_the_sweep_equals_its_reference(softcap):
    t_NV, s_NV = pair(3, 5000)
    g_NV, wanted_NV = torch.empty_like(t_NV), torch.empty_like(t_NV)
    how = {"softcap": softcap, "scale": 0.3}
    found = triton_kl.kl_sweep(t_NV, s_NV, g_NV, **how)
    wanted = kl_kernel.kl_sweep_reference(t_NV, s_NV, wanted_NV, **how)
    assert all((a - b).abs().max() < 3e-6 for a, b in zip(found, wanted))
    assert off(g_NV, wanted_NV) < 5e-5


# ---- top-k -----------------------------------------------------------------------------------


def test_topk_gives_the_codes_of_its_reference():
    pre_NF = draw(2, 5001)
    pre_NF[1, 7:] = -1.0  # fewer than k are positive
    value_NK, index_NK = triton_sae.topk(pre_NF, 80)
    z_NF = torch.zeros_like(pre_NF).scatter(1, index_NK.long(), value_NK)
    assert torch.equal(z_NF, topk_kernel.topk(pre_NF, 80))
    assert index_NK.dtype == torch.int32 and not value_NK.signbit().any()


# ---- sparse decode and backward --------------------------------------------------------------


def sae_weights(d, f, *, seed=0):
    W_dec_FD = draw(f, d, seed=seed)
    W_dec_FD /= W_dec_FD.norm(dim=1, keepdim=True)
    W_enc_FD = W_dec_FD + 0.1 * draw(f, d, seed=seed + 1) / d**0.5
    b_enc_F, b_dec_D = 0.1 * draw(f, seed=seed + 2), 0.3 * draw(d, seed=seed + 3)
    names = ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D")
    return dict(zip(names, (W_enc_FD, b_enc_F, W_dec_FD, b_dec_D)))


SIZES = [(1, 5, 9, 3), (37, 24, 50, 7), (5, 2304, 12, 5), (9, 16, 30, 30)]


def decode_agrees(n, d, f, k):
    w = sae_weights(d, f)
    value_NK, index_NK = triton_sae.topk(draw(n, f, seed=5), k)
    z_NF = torch.zeros(n, f, device=DEVICE).scatter(1, index_NK.long(), value_NK)
    y_ND = triton_sae.decode(value_NK, index_NK, w["W_dec_FD"], w["b_dec_D"])
    return off(y_ND, z_NF.double() @ w["W_dec_FD"].double() + w["b_dec_D"].double()) < 1e-6


@pytest.mark.parametrize("n, d, f, k", SIZES)
def test_sparse_decode_agrees_with_float64(n, d, f, k):
    assert decode_agrees(n, d, f, k)


def sparse(w, x_ND, k, dtype, dy_ND):
    """-> y, z and the gradients of (y . dy).sum(), by SparseTopK."""
    w = {name: t.clone().requires_grad_() for name, t in w.items()}
    y_ND, z_NF = triton_sae.SparseTopK.apply(x_ND, *w.values(), k, dtype)
    assert y_ND.dtype == torch.float32 and z_NF.dtype == dtype and not z_NF.requires_grad
    y_ND.backward(dy_ND)
    return y_ND.detach(), z_NF, {name: t.grad for name, t in w.items()}


def dense(w, x_ND, k, dtype, dy_ND, *, fired_NF=None, wide=torch.float32):
    """The same by autograd: as sae.TopK, or, if fired_NF is given, in `wide` with those latents."""
    w = {name: t.to(wide, copy=True).requires_grad_() for name, t in w.items()}
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        if fired_NF is None:
            sae = saes.TopK(w, k=k).to(DEVICE).eval()  # eval: the plain path, on a GPU too
            w = dict(sae.named_parameters())
            y_ND, z_NF = sae(x_ND)
        else:
            pre_NF = (x_ND.to(wide) - w["b_dec_D"]) @ w["W_enc_FD"].T + w["b_enc_F"]
            z_NF = pre_NF * fired_NF
            y_ND = z_NF @ w["W_dec_FD"] + w["b_dec_D"]
    y_ND.backward(dy_ND.to(y_ND.dtype))
    return y_ND.detach(), z_NF.detach(), {name: t.grad for name, t in w.items()}


def everything(n, d, f, k):
    """SAE, x and dy: latent 1 fires for every token, latent 0 and the last one for none."""
    w = sae_weights(d, f)
    w["b_enc_F"][1] = 50.0
    w["b_enc_F"][[0, -1]] = -50.0
    return w, draw(n, d, seed=7), draw(n, d, seed=8)


def sparse_agrees(n, d, f, k):
    w, x_ND, dy_ND = everything(n, d, f, k)
    y_ND, z_NF, grads = sparse(w, x_ND, k, torch.float32, dy_ND)
    fired = z_NF > 0
    exact = dense(w, x_ND, k, torch.float32, dy_ND, fired_NF=fired, wide=torch.float64)
    plain = dense(w, x_ND, k, torch.float32, dy_ND)
    idle_F = ~fired.any(0)
    good = [
        fired[:, 1].all().item(),
        idle_F[[0, -1]].all().item(),
        torch.equal(fired, plain[1] > 0),
    ]
    good += [off(y_ND, exact[0]) < 1e-6, off(y_ND, plain[0]) < 1e-6]
    for name, grad in grads.items():
        good += [off(grad, exact[2][name]) < 2e-6, off(grad, plain[2][name]) < 5e-6]
        good += [grad.is_contiguous(), name == "b_dec_D" or grad[idle_F].abs().sum() == 0]
    return all(good)


@pytest.mark.parametrize("n, d, f, k", SIZES)
def test_sparse_gradients_agree_with_autograd_and_float64(n, d, f, k):
    assert sparse_agrees(n, d, f, k)


def test_in_bfloat16_it_is_nearer_float64_than_the_plain_path():
    w, x_ND, dy_ND = everything(24, 96, 100, 20)
    x_ND = x_ND.bfloat16()
    y_ND, z_NF, grads = sparse(w, x_ND, 20, torch.bfloat16, dy_ND)
    plain = dense(w, x_ND, 20, torch.bfloat16, dy_ND)
    assert torch.equal(z_NF.sort().values, plain[1].sort().values)  # of equal ones others may win
    none = torch.float32  # no autocast
    exact = dense(w, x_ND, 20, none, dy_ND, fired_NF=z_NF > 0, wide=torch.float64)
    theirs = dense(w, x_ND, 20, none, dy_ND, fired_NF=plain[1] > 0, wide=torch.float64)
    assert off(y_ND, exact[0]) < off(plain[0], theirs[0])
    for name, grad in grads.items():
        assert off(grad, exact[2][name]) < 0.7 * off(plain[2][name], theirs[2][name])


def test_a_gradient_in_bfloat16_is_summed_in_float32():
    w, x_ND, dy_ND = everything(9, 24, 50, 7)
    value_NK, index_NK = triton_sae.topk(draw(9, 50), 7)
    more = (x_ND, w["W_dec_FD"], w["b_dec_D"], value_NK, index_NK)
    half = triton_sae.sparse_gradients(dy_ND.bfloat16(), *more)
    same = triton_sae.sparse_gradients(dy_ND.bfloat16().float(), *more)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(half, same))


def test_where_nothing_fires_all_is_zero_but_the_bias():
    w, x_ND, dy_ND = everything(4, 24, 50, 7)
    w["b_enc_F"].fill_(-100.0)
    y_ND, z_NF, grads = sparse(w, x_ND, 7, torch.float32, dy_ND)
    assert torch.equal(y_ND, w["b_dec_D"].expand(4, -1)) and not z_NF.any()
    assert torch.allclose(grads.pop("b_dec_D"), dy_ND.sum(0), atol=1e-6)
    assert all(not grad.any() for grad in grads.values())


def test_the_residual_gets_its_gradient_where_it_wants_one():
    w, x_ND, dy_ND = everything(9, 24, 50, 7)
    found, wanted = x_ND.clone().requires_grad_(), x_ND.clone().requires_grad_()
    sparse(w, found, 7, torch.float32, dy_ND)
    dense(w, wanted, 7, torch.float32, dy_ND)
    assert off(found.grad, wanted.grad) < 2e-6


def test_only_a_training_topk_without_auxk_takes_the_sparse_path(monkeypatch):
    monkeypatch.setattr(topk_kernel, "sparse_pays", lambda cuda, k, d_sae: True)
    w, x_ND, _ = everything(3, 24, 50, 7)

    def is_sparse(sae, train=True, half=False):
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=half):
            y_ND, z_NF = sae.to(DEVICE).train(train)(x_ND)
        assert z_NF.dtype == (torch.bfloat16 if half else torch.float32)
        return "SparseTopK" in type(y_ND.grad_fn).__name__

    sae = saes.TopK(w, k=7)
    assert is_sparse(sae) and is_sparse(sae, half=True)
    assert not is_sparse(sae, train=False) and not is_sparse(saes.BatchTopK(w, k=7))
    sae.auxk = 1 / 32
    assert not is_sparse(sae)


def test_the_sparse_path_is_for_cuda_and_few_latents():
    assert topk_kernel.sparse_pays(True, 80, 65_536) and topk_kernel.sparse_pays(True, 80, 16_384)
    assert not topk_kernel.sparse_pays(True, 640, 65_536) and not topk_kernel.sparse_pays(
        False, 1, 65_536
    )


# ---- optimizer -------------------------------------------------------------------------------


def an_sae(d=24, f=10, *, unit_norm=True):
    w = sae_weights(d, f)
    if unit_norm:
        return saes.TopK(w, k=7).to(DEVICE)
    return saes.JumpReLU(w | {"threshold": torch.full((f,), 0.1)}).to(DEVICE)


def optimizer_of(sae, *, fused, clip=1.0):
    parameters = [p for p in sae.parameters() if p.requires_grad]
    learner = SimpleNamespace(
        model=sae,
        device=torch.device(DEVICE),
        parameters=lambda: parameters,
        state=sae.state_dict,
        load_state=sae.load_state_dict,
    )
    optimizer = finetune.Optimizer(learner, weight_decay=0.01, clip=clip)
    optimizer.fused = fused
    return optimizer


def steps(optimizer, numbers, *, bad=None):
    """Steps with gradients of their own, some of which are clipped -> norms."""
    norms = []
    for step in numbers:
        for i, p in enumerate(optimizer.learner.parameters()):
            p.grad = draw(*p.shape, seed=31 * step + i, scale=0.02 * (1 + step) / p.numel() ** 0.5)
            if step == bad and i == 2:
                p.grad.view(-1)[-1] = math.inf
        norms.append(optimizer.step(lr=1e-3 / (1 + step)))
        assert all(p.grad is None for p in optimizer.learner.parameters())
    return torch.stack(norms)


def everything_of(optimizer):
    learner = optimizer.learner
    state = {f"{n}": p for n, p in learner.model.state_dict().items()}
    for i, p in enumerate(learner.parameters()):
        state |= {f"{name} {i}": t for name, t in optimizer.adamw.state[p].items()}
    return {name: t.detach().clone() for name, t in state.items()}


def same_state(found, wanted, *, exactly=False):
    """Equal to 1e-6 of each tensor's largest number, or exactly.

    On CUDA PyTorch takes 1 - beta2 from a float32 beta2: second moments are off by 1.3e-5."""
    if found.keys() != wanted.keys():
        return False
    pairs = [(found[name], wanted[name]) for name in found]
    if any((a.dtype, a.shape, a.device) != (b.dtype, b.shape, b.device) for a, b in pairs):
        return False
    if exactly:
        return all(torch.equal(a, b) for a, b in pairs)
    off_by = {n: 2e-5 if CUDA and n.startswith("exp_avg_sq") else 1e-6 for n in found}
    return all(
        (found[n] - wanted[n]).abs().max() <= off_by[n] * wanted[n].abs().max() for n in found
    )


def updates_agree(d=24, f=10, unit_norm=True):
    both = []
    for fused in (True, False):
        optimizer = optimizer_of(an_sae(d, f, unit_norm=unit_norm), fused=fused, clip=0.1)
        norms = steps(optimizer, range(4))
        assert norms.min() < 0.1 < norms.max()
        both.append((everything_of(optimizer), norms))
    (found, norms), (wanted, wanted_norms) = both
    return same_state(found, wanted) and torch.allclose(norms, wanted_norms, rtol=1e-6)


@pytest.mark.parametrize("d, f", [(24, 10), (2304, 3)])
@pytest.mark.parametrize("unit_norm", [True, False])
def test_the_fused_step_updates_as_projection_clipping_adamw_and_renormalising(d, f, unit_norm):
    assert updates_agree(d, f, unit_norm)


def test_the_fused_step_is_as_near_float64_as_pytorchs():
    """Four steps from the definition in float64."""
    sae = an_sae()
    p_dec = {n: p.detach().double() for n, p in sae.named_parameters()}
    optimizer = optimizer_of(sae, fused=True, clip=0.1)
    moments = {n: [torch.zeros_like(p), torch.zeros_like(p)] for n, p in p_dec.items()}
    for t in range(4):
        g = {
            n: draw(*p.shape, seed=31 * t + i, scale=0.02 * (1 + t) / p.numel() ** 0.5).double()
            for i, (n, p) in enumerate(p_dec.items())
        }
        W = p_dec["W_dec_FD"]
        g["W_dec_FD"] -= (g["W_dec_FD"] * W).sum(1, keepdim=True) * W
        norm = sum(x.square().sum() for x in g.values()).sqrt()
        for n, p in p_dec.items():
            x, (m, v), lr = g[n] * min(1.0, 0.1 / (norm + 1e-6)), moments[n], 1e-3 / (1 + t)
            m.mul_(0.9).add_(0.1 * x)
            v.mul_(0.999).add_(0.001 * x * x)
            m_hat, v_hat = m / (1 - 0.9 ** (t + 1)), v / (1 - 0.999 ** (t + 1))
            p.mul_(1 - lr * 0.01).sub_(lr * m_hat / (v_hat.sqrt() + 1e-8))
        W /= W.norm(dim=1, keepdim=True)
        assert steps(optimizer, [t])[0].item() == pytest.approx(norm.item(), rel=1e-6)
    for n, p in sae.named_parameters():
        assert (p - p_dec[n]).abs().max() < 1e-6


@pytest.mark.parametrize("fused", [True, False])
def test_after_a_gradient_that_is_not_finite_nothing_changes_any_more(fused):
    optimizer = optimizer_of(an_sae(), fused=fused)
    steps(optimizer, range(2))
    before = everything_of(optimizer)
    norm = steps(optimizer, [2], bad=2)
    assert not norm.isfinite().any() and optimizer.adamw.found_inf.item() == 1
    steps(optimizer, [3])
    assert same_state(everything_of(optimizer), before, exactly=fused)


@pytest.mark.parametrize("first", [True, False])
def test_a_checkpoint_of_either_path_goes_on_in_the_other(first, tmp_path):
    whole = optimizer_of(an_sae(), fused=True)
    steps(whole, range(6))
    begun = optimizer_of(an_sae(), fused=first)
    steps(begun, range(3))
    checkpoint.save(str(tmp_path), begun.learner, begun, step=3, seconds=1.0, run="x")
    other = optimizer_of(an_sae(), fused=not first)
    assert checkpoint.load(str(tmp_path), other.learner, other, run="x") == (3, 1.0)
    steps(other, range(3, 6))
    assert same_state(everything_of(other), everything_of(whole))


def test_a_parameter_without_a_gradient_stays():
    sae = an_sae()
    optimizer = optimizer_of(sae, fused=True)
    sae.W_enc_FD.grad = draw(*sae.W_enc_FD.shape).t().contiguous().t()  # not contiguous
    before, wanted = sae.b_enc_F.detach().clone(), sae.W_enc_FD.grad.norm()
    assert optimizer.step(lr=1e-3).item() == pytest.approx(wanted.item(), rel=1e-6)
    assert torch.equal(sae.b_enc_F, before) and list(optimizer.adamw.state) == [sae.W_enc_FD]


def test_the_fused_step_is_for_an_sae_that_learns_on_cuda():
    def chosen(model, device):
        parameters = list(torch.nn.Linear(2, 2).parameters())
        learner = SimpleNamespace(model=model, device=torch.device(device))
        learner.parameters = lambda: parameters
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "zeros", lambda *shape, device: None)  # there may be no CUDA
            return finetune.Optimizer(learner, weight_decay=0.01, clip=1.0).fused

    sae = an_sae()
    assert chosen(sae, "cuda") and not chosen(sae, "cpu")
    assert not chosen(sae.requires_grad_(False), "cuda")
    assert not chosen(torch.nn.Linear(2, 2), "cuda")


def test_a_training_through_all_kernels_ends_where_the_plain_one_does(monkeypatch):
    """The plain one is on a CPU."""
    lm = naive.build_lm("gemma2", seed=0, context=CONTEXT)
    c, tokens = setting(steps=2)

    def trained(device):
        learner = our_learner(lm.to(device), c)
        scalars = quietly(c, learner, tokens)
        named = {n: getattr(learner.model, OUR_NAMES[n]) for n in OUR_NAMES}
        return scalars, {n: t.detach().cpu() for n, t in named.items()}

    rows, wanted = trained("cpu")
    calls = []
    begin, sweep = finetune.Optimizer.__init__, triton_kl.kl_sweep
    apply = topk_kernel.sparse_topk

    def with_kernels(self, *args, **options):
        begin(self, *args, **options)
        self.fused = True

    monkeypatch.setattr(finetune.Optimizer, "__init__", with_kernels)
    monkeypatch.setattr(topk_kernel, "sparse_pays", lambda cuda, k, d_sae: True)
    monkeypatch.setattr(topk_kernel, "sparse_topk", lambda *a: calls.append(1) or apply(*a))
    monkeypatch.setattr(
        "klsplice.lm.head.kl_sweep", lambda *a, **o: calls.append(2) or sweep(*a, **o)
    )
    found_rows, found = trained(DEVICE)
    assert calls.count(1) == 2 and calls.count(2) >= 2
    assert max((found[n] - wanted[n]).abs().max().item() for n in OUR_NAMES) < 1e-6
    for row, wanted_row in zip(found_rows, rows):
        assert row == pytest.approx(wanted_row, rel=1e-4)


# ---- planted bugs ----------------------------------------------------------------------------

CHECKS = {
    "_kl_sweep": lambda: (
        kl_agrees(*pair(3, 4100), 30.0, shifts=(draw(3, seed=2), draw(3, seed=3)))
        and kl_agrees(*pair(3, 4100), 0.0, scale=1.5)
    ),
    "_decode": lambda: decode_agrees(11, 24, 50, 7),
    "_dpre": lambda: sparse_agrees(9, 24, 20, 7),
    "_dweights": lambda: sparse_agrees(9, 24, 20, 7),
    "_projected_square": updates_agree,
    "_adamw": updates_agree,
}


def less(position):
    """That argument, one less."""
    return lambda a, o: (a[:position] + (a[position] - 1,) + a[position + 1 :], o)


def instead(position, make):
    return lambda a, o: (a[:position] + (make(a[position]),) + a[position + 1 :], o)


def flipped(name):
    return lambda a, o: (a, o | {name: not o[name]})


BUGS = {  # what is launched otherwise
    "the last word is forgotten": ("_kl_sweep", less(8)),
    "a row is read where the one before ends": ("_kl_sweep", less(9)),
    "no softcap": ("_kl_sweep", flipped("CAPPED")),
    "the clean rows' shift is forgotten": ("_kl_sweep", instead(3, torch.zeros_like)),
    "the spliced rows' shift is forgotten": ("_kl_sweep", instead(4, torch.zeros_like)),
    "the scale is forgotten": ("_kl_sweep", instead(12, lambda scale: 1.0)),
    "no maximum": ("_kl_sweep", lambda a, o: (a, o | {"CAPPED": True, "ONLINE": False})),
    "clean and spliced swapped": ("_kl_sweep", lambda a, o: ((a[1], a[0], *a[2:]), o)),
    "the last code is forgotten": ("_decode", less(5)),
    "no bias": ("_decode", instead(3, torch.zeros_like)),
    "half of the entries are forgotten": ("_dpre", instead(5, lambda e: e // 2)),
    "the last latent gets no gradient": ("_dpre", instead(6, lambda f: f // 2)),
    "the encoder is not centred": ("_dweights", instead(2, torch.zeros_like)),
    "values of 1": ("_dweights", instead(4, torch.ones_like)),
    "the gradient of the next latent": ("_dweights", instead(6, lambda s: s.roll(-1).clamp(s[1]))),
    "the norm without projection": ("_projected_square", instead(1, torch.zeros_like)),
    "no projection, no renormalising": ("_adamw", flipped("UNIT_ROWS")),
    "no weight decay": ("_adamw", instead(10, lambda decay: 1.0)),
    "eps": ("_adamw", instead(9, lambda eps: 1e-5)),
    "beta1": ("_adamw", instead(7, lambda rate: 0.2)),
    "no bias correction": ("_adamw", instead(4, lambda numbers: numbers.clamp(max=1.0))),
    "no clip": (
        "_adamw",
        instead(4, lambda x: torch.where(torch.arange(4, device=x.device) == 1, 1.0, x)),
    ),
}


def test_every_kernel_is_right_before_a_bug_is_planted():
    names = {n for m in KERNELS for n, k in vars(m).items() if hasattr(k, "arg_names")}
    names -= {"_logits", "_exp"}  # called by others
    assert names == CHECKS.keys() == {kernel for kernel, _ in BUGS.values()}
    assert all(check() for check in CHECKS.values())


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(bug, monkeypatch):
    name, change = BUGS[bug]
    (module,) = (m for m in KERNELS if hasattr(m, name))
    launch, kernel = module.launch, getattr(module, name)

    def wrong(launched, grid, *args, **constants):
        if launched is kernel:
            args, constants = change(args, constants)
        launch(launched, grid, *args, **constants)

    monkeypatch.setattr(module, "launch", wrong)
    assert not CHECKS[name]()


# ---- compiled --------------------------------------------------------------------------------


def compile_all():
    """Compile what is launched for an H100, which needs none; the kernels are not run."""
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    names = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16"}
    done = set()

    def kind(value):
        if isinstance(value, torch.Tensor):
            name = str(value.dtype).removeprefix("torch.")
            return "*" + names.get(name, name.replace("int", "i"))
        return "fp32" if isinstance(value, float) else "i32"

    def launch(kernel, grid, *args, num_warps, **constants):
        signature = dict(zip(kernel.arg_names, map(kind, args)))
        signature |= dict.fromkeys(constants, "constexpr")
        source = compiler.ASTSource(kernel, signature, constexprs=constants)
        made = triton.compile(source, target=target, options={"num_warps": num_warps})
        assert len(made.asm["cubin"]) > 0
        done.add(kernel.__name__)

    for module in KERNELS:
        module.launch = launch
    t_NV, s_NV = pair(2, 9000)
    triton_kl.kl_sweep(t_NV, s_NV, t_NV.bfloat16(), softcap=30.0)
    triton_kl.kl_sweep(t_NV.bfloat16(), s_NV.bfloat16(), t_NV.bfloat16())
    w, x_ND, dy_ND = everything(2, 2304, 50, 7)
    codes = (torch.ones(2, 7, dtype=torch.bfloat16), torch.zeros(2, 7, dtype=torch.int32))
    triton_sae.decode(*codes, w["W_dec_FD"], w["b_dec_D"])
    triton_sae.sparse_gradients(dy_ND, x_ND.bfloat16(), w["W_dec_FD"], w["b_dec_D"], *codes)
    steps(optimizer_of(an_sae(2304), fused=True), [0])
    print(*sorted(done))


def test_every_kernel_compiles_for_an_h100_without_one():
    script = "import test_triton; test_triton.compile_all()"
    env = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = os.pathsep.join([os.path.dirname(HERE), HERE])
    run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=300)
    done = run([sys.executable, "-c", script], env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == sorted(CHECKS)


# ---- real sizes ------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_kl_of_a_whole_step_on_a_gpu(softcap):
    t_NV, s_NV = pair(64, 256_000)
    t_NV[5, 255_999], s_NV[5, 255_999] = 60.0, 50.0
    assert kl_agrees(t_NV, s_NV, softcap)


@gpu
def test_rows_beyond_two_billion_logits_are_reached():
    t_NV = torch.zeros(8500, 256_000, device=DEVICE, dtype=torch.bfloat16)
    s_NV = torch.zeros_like(t_NV)
    t_NV[-1], s_NV[-1] = (row[0] for row in pair(1, 256_000, dtype=torch.bfloat16))
    wanted_N, wanted_NV, _, _ = exact_kl(t_NV[-1:], s_NV[-1:], 30.0)
    kl_N, _, _ = triton_kl.kl_sweep(t_NV, s_NV, t_NV, softcap=30.0)
    assert (kl_N[-1] - wanted_N[0]).abs() < 3e-6 and off(t_NV[-1:], wanted_NV) < 4e-3


@gpu
@pytest.mark.parametrize("f, k", [(65_536, 80), (16_384, 80)])
def test_sparse_gradients_of_a_whole_step_on_a_gpu_are_right_and_repeatable(f, k):
    w, x_ND, dy_ND = everything(2048, 2304, f, k)
    x_ND = x_ND.bfloat16()
    y_ND, z_NF, grads = sparse(w, x_ND, k, torch.bfloat16, dy_ND)
    fired = z_NF > 0
    wanted = dense(w, x_ND, k, torch.float32, dy_ND, fired_NF=fired, wide=torch.float32)
    assert off(y_ND, wanted[0]) < 1e-2
    assert all(off(grad, wanted[2][name]) < 1e-2 for name, grad in grads.items())
    again = sparse(w, x_ND, k, torch.bfloat16, dy_ND)
    assert torch.equal(y_ND, again[0])
    for name in ("W_enc_FD", "b_enc_F", "W_dec_FD"):
        assert torch.equal(grads[name], again[2][name])


@gpu
def test_an_update_of_a_real_sae_on_a_gpu():
    assert updates_agree(2304, 65_536)
