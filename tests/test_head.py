"""The KL head: KL(clean || spliced) in nats a token, its gradient, and never more than a chunk."""

import pytest
import torch

from klsplice.lm import head as heads

ANY = torch.zeros(64, dtype=torch.long)  # the next tokens: float32 logits do not use them


def hidden(*, n, d, v, softcap, spread=3.0, seed=0, dtype=torch.float32, chunk=4, scaled=False):
    rng = torch.Generator().manual_seed(seed)
    W_VD = torch.randn(v, d, generator=rng) * spread / d**0.5
    clean_ND = torch.randn(n, d, generator=rng)
    spliced_ND = clean_ND + 0.3 * torch.randn(n, d, generator=rng)
    more = {"bias_V": torch.randn(v, generator=rng).to(dtype), "scale": 0.3} if scaled else {}
    head = heads.Head(W_VD.to(dtype), softcap=softcap, chunk=chunk, **more)
    return clean_ND.to(dtype), spliced_ND.to(dtype), head


def exact(clean_ND, spliced_ND, head):
    """KL and its gradient at spliced_ND in float64, from the definition."""
    spliced_ND = spliced_ND.double().requires_grad_()
    logs = []
    for h_ND in (clean_ND.double(), spliced_ND):
        z_NV = h_ND @ head.W_VD.double().T + (0 if head.bias_V is None else head.bias_V.double())
        z_NV = head.scale * z_NV
        z_NV = head.softcap * torch.tanh(z_NV / head.softcap) if head.softcap else z_NV
        logs.append(z_NV - z_NV.logsumexp(-1, keepdim=True))
    kl_N = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    (grad_ND,) = torch.autograd.grad(kl_N.sum(), spliced_ND)
    return kl_N.detach(), grad_ND


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("n", [4, 11])
def test_value_and_gradient_agree_with_float64(softcap, n, scaled):
    clean_ND, spliced_ND, head = hidden(n=n, d=16, v=301, softcap=softcap, scaled=scaled)
    spliced_ND.requires_grad_()
    kl_N = heads.kl_head(clean_ND, spliced_ND, ANY, head, torch.float32)
    weight_N = torch.arange(1.0, n + 1)  # every row its own share
    (grad_ND,) = torch.autograd.grad((kl_N * weight_N).sum(), spliced_ND)
    wanted_N, wanted_ND = exact(clean_ND, spliced_ND.detach(), head)
    assert (kl_N - wanted_N).abs().max() < 3e-6
    assert (grad_ND - wanted_ND * weight_N[:, None]).norm() / grad_ND.norm() < 1e-5


def like_an_lm(softcap=0.0, scaled=False):
    """Logits of 20 or so, as LMs have them -> clean_ND, spliced_ND bfloat16, next tokens, head."""
    sizes = {"n": 64, "d": 64, "v": 2000, "softcap": softcap, "chunk": 48, "scaled": scaled}
    clean_ND, spliced_ND, head = hidden(**sizes, dtype=torch.bfloat16)
    clean_ND[:, 0] = spliced_ND[:, 0] = 1.0
    head.W_VD[:, 0] = 20.0
    return clean_ND, spliced_ND, head.logits(clean_ND, torch.float32).argmax(-1), head


def gradient_error(clean_ND, spliced_ND, target_N, head, dtype):
    leaf_ND = spliced_ND.clone().requires_grad_()
    kl_N = heads.kl_head(clean_ND, leaf_ND, target_N, head, dtype)
    (grad_ND,) = torch.autograd.grad(kl_N.sum(), leaf_ND)
    wanted_N, wanted_ND = exact(clean_ND, spliced_ND, head)
    return (grad_ND - wanted_ND).norm() / wanted_ND.norm(), (kl_N - wanted_N).abs().mean()


@pytest.mark.parametrize("softcap, scaled", [(0.0, False), (30.0, False), (30.0, True)])
def test_shifted_bfloat16_logits_give_as_good_a_gradient(softcap, scaled):
    """Which is rounded to bfloat16 in either; unshifted logits are 2 to 8 % off."""
    *pair, target_N, head = like_an_lm(softcap, scaled)
    wide, wide_kl = gradient_error(*pair, target_N, head, torch.float32)
    half, half_kl = gradient_error(*pair, target_N, head, torch.bfloat16)
    wrong, _ = gradient_error(*pair, target_N.roll(1), head, torch.bfloat16)
    assert wide < 1e-2 and wide_kl < 1e-6 < half_kl < 1e-3 and half < (2 if scaled else 1.5) * wide
    head.shifted = lambda h_ND, target_N, dtype, out: (head.product(h_ND, dtype, out=out), None)
    plain, _ = gradient_error(*pair, target_N, head, torch.bfloat16)
    assert plain > 3 * half and plain > 2 * wrong  # all logits are near 20: any token will do


def test_scores_are_the_cross_entropies_of_the_targets():
    clean_ND, spliced_ND, head = hidden(n=11, d=16, v=301, softcap=30.0)
    target_N = torch.arange(11) * 7
    kl_N, ce_clean_N, ce_N = heads.score_head(clean_ND, spliced_ND, target_N, head)
    for found, h_ND in ((ce_clean_N, clean_ND), (ce_N, spliced_ND)):
        logits_NV = 30 * torch.tanh(h_ND @ head.W_VD.T / 30)
        wanted = torch.nn.functional.cross_entropy(logits_NV, target_N, reduction="none")
        assert torch.allclose(found.float(), wanted, atol=1e-5)
    assert (kl_N - exact(clean_ND, spliced_ND, head)[0]).abs().max() < 3e-6


def test_the_memory_that_calls_share_does_not_mix_them():
    """The first call's gradient is asked for after a second call has used the same memory."""
    clean_ND, one_ND, head = hidden(n=11, d=16, v=301, softcap=30.0)
    two_ND = clean_ND + 1.0
    one_ND.requires_grad_()
    first_N = heads.kl_head(clean_ND, one_ND, ANY, head, torch.float32)
    value_N = first_N.detach().clone()
    heads.kl_head(clean_ND, two_ND.requires_grad_(), ANY, head, torch.float32)
    (grad_ND,) = torch.autograd.grad(first_N.sum(), one_ND)
    wanted_N, wanted_ND = exact(clean_ND, one_ND.detach(), head)
    assert torch.equal(first_N, value_N) and (value_N - wanted_N).abs().max() < 3e-6
    assert (grad_ND - wanted_ND).norm() / wanted_ND.norm() < 1e-5


def test_a_float32_product_of_bfloat16_values_is_exact():
    """A CPU may multiply in bfloat16 there, but only where nothing is lost by it."""
    clean_ND, _, head = hidden(n=40, d=64, v=2000, softcap=0.0, dtype=torch.bfloat16)
    wanted_NV = clean_ND.double() @ head.W_VD.double().T
    found_NV = head.product(clean_ND, torch.float32)
    assert (found_NV - wanted_NV).abs().max() < 1e-5 * wanted_NV.abs().max()
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(RuntimeError):
        head.product(clean_ND[:, :3], torch.float32)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_head_of_a_whole_step_on_a_gpu():
    """The products with a column of ones, the kernel, the gradient in parts, at Gemma's width."""
    rng = torch.Generator("cuda").manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=rng, device="cuda")  # noqa: E731
    clean_ND, W_VD = draw(32, 2304).bfloat16(), (draw(64_000, 2304) / 16).bfloat16()
    spliced_ND = (clean_ND + 0.1 * draw(32, 2304)).bfloat16()
    target_N = (clean_ND @ W_VD.T).argmax(-1)
    for softcap in (0.0, 30.0):
        head = heads.Head(W_VD, softcap=softcap, chunk=20)
        wide, wide_kl = gradient_error(clean_ND, spliced_ND, target_N, head, torch.float32)
        half, half_kl = gradient_error(clean_ND, spliced_ND, target_N, head, torch.bfloat16)
        assert wide < 5e-3 and half < 2.5e-2 and wide_kl < 3e-6 and half_kl < 1e-3
