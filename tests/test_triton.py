"""Each Triton kernel equals plain PyTorch and float64; without a GPU Triton interprets it.

Where there is a GPU the same claims are made of the compiled kernels, and those of real sizes too.
"""

import importlib
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import quietly
from test_method import CASES, NAMES, Case

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
    whole = t_NV, s_NV
    if shifts is not None:
        whole = t_NV + shifts[0][:, None], s_NV + shifts[1][:, None]
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


@pytest.mark.parametrize("softcap", [0.0, 30.0, 100.0])
@pytest.mark.parametrize("n, v", [(1, 7), (3, 4096), (2, 9001)])
def test_kl_and_its_gradient_agree_with_float64(n, v, softcap):
    assert kl_agrees(*pair(n, v), softcap)


@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_a_gradient_in_bfloat16_is_rounded_only_at_the_end(softcap):
    t_NV, s_NV = pair(3, 5000, dtype=torch.bfloat16)
    assert kl_agrees(t_NV, s_NV, softcap, g_dtype=torch.bfloat16, g_off=4e-3)


@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_a_large_vocabulary_is_right_to_3e_6_nats(softcap):
    t_NV, s_NV = pair(3, 256_000)
    t_NV[1, 255_999], s_NV[1, 255_999] = 60.0, 50.0
    t_NV[2, 0], s_NV[2, 0] = 40.0, 2.0
    assert kl_agrees(t_NV, s_NV, softcap)


def test_logits_in_the_hundreds_do_not_overflow():
    shifts = (torch.tensor([512.0, -512.0], device=DEVICE),) * 2
    assert kl_agrees(*pair(2, 5000, scale=10.0), 0.0, shifts=shifts, g_off=5e-5)
    far = [30 * z_NV for z_NV in pair(2, 5000, scale=10.0)]  # far into the softcap
    assert kl_agrees(*far, 30.0, g_off=1e-4)


def test_the_gradient_may_lie_over_rows_that_are_apart():
    t_NV, s_NV = pair(3, 5001)
    wide = torch.full((2, 3, 5100), math.nan, device=DEVICE)
    t, s = wide[0, :, :5001].copy_(t_NV), wide[1, :, :5001].copy_(s_NV)
    kl_N, _, _ = triton_kl.kl_sweep(t, s, s, softcap=30.0)
    wanted_N, wanted_NV, _, _ = exact_kl(t_NV, s_NV, 30.0)
    assert (kl_N - wanted_N).abs().max() < 3e-6 and off(s, wanted_NV) < 2e-5
    assert torch.equal(t, t_NV) and wide[1, :, 5001:].isnan().all()


@pytest.mark.parametrize("sweep", ["triton", "reference"])
@pytest.mark.parametrize("softcap", [0.0, 30.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_rows_lack_is_added_then_scaled_then_capped(softcap, sweep, dtype, monkeypatch):
    """And so is the gradient. Granite divides by a number, Cohere multiplies."""
    if sweep == "reference":
        monkeypatch.setattr(triton_kl, "kl_sweep", kl_kernel.kl_sweep_reference)
    shifts = 9 * draw(3, seed=2), 9 * draw(3, seed=3)
    assert kl_agrees(*pair(3, 5000, dtype=dtype), softcap, shifts=shifts, scale=0.3, g_off=2e-4)


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
    idle_F = ~fired.any(0)
    good = [fired[:, 1].all(), idle_F[[0, -1]].all(), off(y_ND, exact[0]) < 1e-6]
    good.append(torch.equal(fired, dense(w, x_ND, k, torch.float32, dy_ND)[1] > 0))
    for name, grad in grads.items():
        good += [grad.is_contiguous(), off(grad, exact[2][name]) < 2e-6]
        good.append(name == "b_dec_D" or grad[idle_F].abs().sum() == 0)
    return all(good)


@pytest.mark.parametrize(
    "n, d, f, k", [(1, 5, 9, 3), (37, 24, 50, 7), (5, 2304, 12, 5), (9, 16, 30, 30)]
)
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


def test_only_a_training_topk_without_auxk_takes_the_sparse_path(monkeypatch):
    pays = topk_kernel.sparse_pays
    assert pays(True, 80, 16_384) and not pays(True, 640, 65_536) and not pays(False, 1, 65_536)
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
    state = dict(learner.model.state_dict())
    for i, p in enumerate(learner.parameters()):
        state |= {f"{name} {i}": t for name, t in optimizer.adamw.state[p].items()}
    return {name: t.detach().clone() for name, t in state.items()}


def same_state(found, wanted):
    """Equal to 1e-6 of each tensor's largest number.

    On CUDA PyTorch takes 1 - beta2 from a float32 beta2: second moments are off by 1.3e-5."""

    def same(name):
        a, b = found[name], wanted[name]
        limit = 2e-5 if CUDA and name.startswith("exp_avg_sq") else 1e-6
        return a.dtype == b.dtype and (a - b).abs().max() <= limit * b.abs().max()

    return found.keys() == wanted.keys() and all(same(name) for name in wanted)


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


@pytest.mark.parametrize("fused", [True, False])
def test_after_a_gradient_not_finite_nothing_changes(fused):
    optimizer = optimizer_of(an_sae(), fused=fused)
    steps(optimizer, range(2))
    before = everything_of(optimizer)
    norm = steps(optimizer, [2], bad=2)
    assert not norm.isfinite().any() and optimizer.adamw.found_inf.item() == 1
    steps(optimizer, [3])
    assert same_state(everything_of(optimizer), before)


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


def test_a_training_through_all_kernels_ends_where_the_plain_one_does(monkeypatch):
    """The plain one is on a CPU."""
    case = Case(**vars(CASES["topk gemma2"]) | {"steps": 2})

    def trained(device):
        c, tokens, learner = case.learner(DEVICE=device, COMPILE=False, MICRO_BATCH=2)
        scalars = quietly(c, learner, tokens)
        return scalars, {n: getattr(learner.model, n).detach().cpu() for n in NAMES}

    rows, wanted = trained("cpu")
    calls, sweep, apply = [], triton_kl.kl_sweep, topk_kernel.sparse_topk
    step = finetune.Optimizer.step

    def fused(self, lr):
        self.fused = True
        return step(self, lr)

    monkeypatch.setattr(finetune.Optimizer, "step", fused)
    monkeypatch.setattr(topk_kernel, "sparse_pays", lambda cuda, k, d_sae: True)
    monkeypatch.setattr(topk_kernel, "sparse_topk", lambda *a: calls.append("sae") or apply(*a))
    monkeypatch.setattr(
        "klsplice.lm.head.kl_sweep", lambda *a, **o: calls.append("kl") or sweep(*a, **o)
    )
    found_rows, found = trained(DEVICE)
    assert calls.count("sae") == 2 and calls.count("kl") >= 2
    assert max((found[n] - wanted[n]).abs().max().item() for n in NAMES) < 1e-6
    for row, wanted_row in zip(found_rows, rows):
        assert row == pytest.approx(wanted_row, rel=1e-4)


# ---- real sizes ------------------------------------------------------------------------------


@gpu
def test_rows_beyond_two_billion_logits_are_reached():
    t_NV = torch.zeros(8500, 256_000, device=DEVICE, dtype=torch.bfloat16)
    s_NV = torch.zeros_like(t_NV)
    t_NV[-1], s_NV[-1] = (row[0] for row in pair(1, 256_000, dtype=torch.bfloat16))
    wanted_N, wanted_NV, _, _ = exact_kl(t_NV[-1:], s_NV[-1:], 30.0)
    kl_N, _, _ = triton_kl.kl_sweep(t_NV, s_NV, t_NV, softcap=30.0)
    assert (kl_N[-1] - wanted_N[0]).abs() < 3e-6 and off(t_NV[-1:], wanted_NV) < 4e-3


@gpu
def test_sparse_gradients_of_a_whole_step_are_repeatable():
    k = 80
    w, x_ND, dy_ND = everything(2048, 2304, 65_536, k)
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
