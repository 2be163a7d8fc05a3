"""The kernels and products of a step, each held against float64, and timed in variants.

`parts` is bench.parts.Parts. Shapes: N tokens, D residual width, F latents, K active, V vocabulary,
L positions.
"""

from types import SimpleNamespace
from unittest import mock

import torch

from bench.clock import fresh_memory
from finetune import Optimizer
from klsplice.kernels import triton_adamw, triton_kl, triton_sae
from klsplice.lm import attention
from klsplice.lm.head import Head
from sae import TopK

CUDA = torch.cuda.is_available()
HALF, WIDE = torch.bfloat16, torch.float32


# ---- is it right? ----------------------------------------------------------------------------


def checks(parts) -> None:
    _head_checks(parts)
    for softcap in (0.0, 30.0):
        for dtype in (WIDE, HALF):
            name = f"KL sweep, softcap {softcap:g}, {dtype}"
            parts.right(name, 5e-5, lambda c=softcap, t=dtype: _kl(parts, c, t))
    for dtype in (WIDE, HALF):
        parts.right(f"top-k, {dtype}", 0, lambda t=dtype: _topk(parts, t))
    parts.right("TopK SAE: y and gradients", 1e-4, lambda: _sparse(parts))
    parts.right("AdamW, fused, beside PyTorch's", 2e-6, lambda: _adamw(parts))


def _head_checks(parts) -> None:
    s, draw = parts.size, parts.draw
    few = slice(min(64, s.n))
    W_VD, h_ND = draw(s.v, s.d, dtype=HALF, scale=3 / s.d**0.5), draw(s.n, s.d, dtype=HALF)
    head = Head(W_VD, softcap=30.0, chunk=s.n)
    z_NV = h_ND[few].double() @ W_VD.double().T
    target_N = torch.randint(s.v, (s.n,), device=parts.device, generator=parts.generator)
    room = head.room("clean", s.n, WIDE)
    wide = lambda: head.product(h_ND, WIDE, out=room)[few]  # noqa: E731
    parts.right("head: product in float32", 1e-5, lambda: [(wide(), z_NV)])

    def shifted():
        z_NV_, shift_N = head.shifted(h_ND, target_N, HALF)
        return [((z_NV_.float() + shift_N[:, None])[few], z_NV)]

    parts.right("head: shifted product in bfloat16", 5e-3, shifted)
    g_NV = draw(s.n, s.v, dtype=HALF)
    wanted_ND = g_NV[few].double() @ W_VD.double()
    parts.right("head: gradient", 5e-3, lambda: [((g_NV @ head.W_VD)[few], wanted_ND)])


def _kl(parts, softcap: float, dtype):
    """KL, its gradient and both log-sum-exps beside float64's, by autograd."""
    n, v, draw = min(24, parts.size.n), parts.size.v, parts.draw
    t_NV = draw(n, v, scale=3)
    t_NV, s_NV = t_NV.to(dtype), (t_NV + draw(n, v, scale=0.3)).to(dtype)
    shifts = draw(n, scale=9), draw(n, scale=9)
    t, s = ((z.float() + x[:, None]).double() for z, x in zip((t_NV, s_NV), shifts))
    s.requires_grad_()
    p, q = (softcap * torch.tanh(z / softcap) if softcap else z for z in (t, s))
    kl_N = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    (wanted_NV,) = torch.autograd.grad(kl_N.sum(), s)
    g_NV = torch.full_like(t_NV, float("nan"), dtype=WIDE)
    found = triton_kl.kl_sweep(t_NV, s_NV, g_NV, softcap=softcap, shifts=shifts)
    wanted = kl_N.detach(), p.logsumexp(-1), q.logsumexp(-1).detach()
    return [*zip(found, wanted), (g_NV, wanted_NV)]


def _topk(parts, dtype):
    s = parts.size
    pre_NF = parts.draw(s.rows, s.f, dtype=dtype)
    value_NK, index_NK = triton_sae.topk(pre_NF, s.k)
    at_NK = pre_NF.gather(1, index_NK.long())
    best_NK = pre_NF.topk(s.k).values.relu()
    return [(value_NK.sort(-1, descending=True).values, best_NK), (at_NK, value_NK)]


def _sae(parts) -> TopK:
    s, draw = parts.size, parts.draw
    W_FD = torch.nn.functional.normalize(draw(s.f, s.d), dim=1)
    weights = {"W_enc_FD": draw(s.f, s.d, scale=s.d**-0.5), "b_enc_F": draw(s.f, scale=0.1)}
    return TopK(weights | {"W_dec_FD": W_FD, "b_dec_D": draw(s.d, scale=0.1)}, k=s.k).to(
        W_FD.device
    )


def _sparse(parts):
    """The kernels' y and gradients beside autograd's in float64, with the same latents active."""
    s, sae = parts.size, _sae(parts)
    x_ND, dy_ND = parts.draw(s.rows, s.d), parts.draw(s.rows, s.d)
    names = ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D")
    W = [getattr(sae, name) for name in names]
    y_ND, z_NF = triton_sae.SparseTopK.apply(x_ND, *W, s.k, WIDE)
    y_ND.backward(dy_ND)
    E, b, D, c = exact = [w.detach().double().requires_grad_() for w in W]
    wanted_ND = (((x_ND.double() - c) @ E.T + b) * (z_NF > 0)) @ D + c
    wanted_ND.backward(dy_ND.double())
    return [(y_ND.detach(), wanted_ND.detach())] + [(a.grad, e.grad) for a, e in zip(W, exact)]


def _adamw(parts):
    ends = []
    for fused in (True, False):
        parts.generator.manual_seed(1)
        sae = _sae(parts)
        learner = SimpleNamespace(model=sae, device=sae.b_dec_D.device)
        learner.parameters = lambda sae=sae: [p for p in sae.parameters() if p.requires_grad]
        optimizer = Optimizer(learner, weight_decay=0.01, clip=0.1)
        optimizer.fused = fused
        for step in range(3):
            for p in learner.parameters():
                p.grad = parts.draw(*p.shape, scale=10.0 ** -(step + 3))
            norm = optimizer.step(1e-3)
        ends.append([p.detach() for p in learner.parameters()] + [norm])
    return list(zip(*ends))


# ---- attention -------------------------------------------------------------------------------

PLAIN = "compiled, no flex"
BLOCKS = ("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2")
TRIED = [(32, 64, 64, 32, 8), (32, 32, 32, 32, 4), (64, 128, 128, 64, 8)]  # and warps
OPTIONS = {"flex": attention.FLEX_OPTIONS, "flex, PyTorch's choice": {}} | {
    f"flex, backward {blocks}, {warps} warps": dict(zip(BLOCKS, blocks)) | {"bwd_num_warps": warps}
    for *blocks, warps in TRIED
}


def attentions(parts) -> None:
    """Softcapped attention as a block calls it: forward at many sequences, backward at a step's."""
    s = parts.size
    heads = s.heads // s.head
    query, key = (parts.draw(s.batch, n, s.length, s.head, dtype=HALF) for n in (heads, heads // 2))
    value, g = torch.randn_like(key), torch.randn_like(query)
    i_L = torch.arange(s.length, device=parts.device)
    mask_LL = i_L[:, None] >= i_L[None, :]
    how = s.head**-0.5, 50.0

    def gradients(call, *qkv):
        leaves = [t.detach().clone().requires_grad_() for t in qkv]
        out = call(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, g.to(out.dtype))]

    plain = lambda q, k, v: attention._softcapped(q, k, v, mask_LL, *how)  # noqa: E731
    exact = gradients(plain, *(t.double() for t in (query, key, value)))
    calls = {"eager": plain}
    if CUDA:
        attention.prepare_flex(s.length, [None], parts.device)
        mask = attention._BLOCK_MASKS[s.length, None]
        calls[PLAIN] = torch.compile(plain, dynamic=False)
        for name, options in OPTIONS.items():

            def flex(q, k, v, options=options):
                with mock.patch.object(attention, "FLEX_OPTIONS", options):
                    return attention._flex(q, k, v, mask, *how)

            calls[name] = torch.compile(flex, dynamic=False)
    many = [t.repeat(s.many // s.n, 1, 1, 1) for t in (query, key, value)]
    for name, call in calls.items():
        torch._dynamo.reset()
        own = lambda call=call: zip(gradients(call, query, key, value), exact)  # noqa: E731
        parts.right(f"attention, {name}: output and gradients", 1e-2, own)
        leaves = [t.detach().requires_grad_() for t in (query, key, value)]
        both = lambda call=call: torch.autograd.grad(call(*leaves), leaves, g)  # noqa: B023, E731
        parts.time(f"attention, {name}: forward and backward", both)
        with torch.no_grad():
            parts.time(f"attention, {name}: forward of many", lambda call=call: call(*many))
    attention.forget_flex()


# ---- what does it cost? ----------------------------------------------------------------------


def times(parts) -> None:
    _head_times(parts)
    fresh_memory(CUDA)
    _sae_times(parts)
    fresh_memory(CUDA)
    s, draw = parts.size, parts.draw
    for rows in (s.n, s.many):
        for name, d_in, d_out in (
            ("q", s.d, s.heads),
            ("k and v", s.d, s.heads),
            ("q, k and v", s.d, 2 * s.heads),
            ("o", s.heads, s.d),
            ("gate", s.d, s.mlp),
            ("gate and up", s.d, 2 * s.mlp),
            ("down", s.mlp, s.d),
            ("gate and up, backward", 2 * s.mlp, s.d),
        ):
            x, W = draw(rows, d_in, dtype=HALF), draw(d_out, d_in, dtype=HALF)
            work = {"flops": 2 * rows * d_in * d_out}
            parts.time(f"block: {name}, {rows} rows", lambda x=x, W=W: x @ W.T, **work)


def _head_times(parts) -> None:
    s, draw = parts.size, parts.draw
    work = {"flops": 2 * s.n * s.d * s.v}
    t_NV, s_NV = (draw(s.n, s.v, dtype=HALF, scale=3) for _ in range(2))
    shifts, moved = (draw(s.n), draw(s.n)), 5.0 * t_NV.nbytes
    sweep = lambda: triton_kl.kl_sweep(t_NV, s_NV, s_NV, softcap=30.0, shifts=shifts)  # noqa: E731
    parts.time("KL sweep and gradient", sweep, moved=moved)
    for block, warps in ((1024, 4), (1024, 8), (2048, 4), (2048, 16), (4096, 8), (4096, 16)):
        with mock.patch.multiple(triton_kl, LARGEST_BLOCK=block, WARPS=warps):
            parts.time(f"KL sweep, blocks of {block}, {warps} warps", sweep, moved=moved)
    for extra in (0, 8, 64):  # columns beside W's: a stride that is no whole line, and none
        x, W = draw(s.n, s.d + extra, dtype=HALF), draw(s.v, s.d + extra, dtype=HALF)
        product = lambda x=x, W=W: torch.mm(x, W.T, out=s_NV)  # noqa: E731
        parts.time(f"head: product, width + {extra}", product, **work)
    W_VD = draw(s.v, s.d, dtype=HALF)
    parts.time("head: gradient, rows side by side", lambda: s_NV @ W_VD, **work)
    Head(W_VD, softcap=0.0, chunk=s.n)  # puts columns beside W_VD
    parts.time("head: gradient", lambda: s_NV @ W_VD, **work)


def _sae_times(parts) -> None:
    s, draw, sae = parts.size, parts.draw, _sae(parts)
    E, D, c = (t.detach() for t in (sae.W_enc_FD, sae.W_dec_FD, sae.b_dec_D))
    x_ND, dy_ND, pre_NF = draw(s.n, s.d, dtype=HALF), draw(s.n, s.d), draw(s.n, s.f, dtype=HALF)
    half_FD = E.to(HALF)
    dense = {"flops": 2 * s.n * s.d * s.f}
    parts.time("SAE: W_enc to bfloat16", lambda: E.to(HALF), moved=1.5 * E.nbytes)
    parts.time("SAE: encoder's product", lambda: x_ND @ half_FD.T, **dense)
    parts.time("SAE: top-k", lambda: triton_sae.topk(pre_NF, s.k), moved=pre_NF.nbytes)
    value_NK, index_NK = triton_sae.topk(pre_NF, s.k)
    rows = 4.0 * s.n * s.k * s.d
    parts.time("SAE: decode", lambda: triton_sae.decode(value_NK, index_NK, D, c), moved=rows)
    codes = value_NK, index_NK
    own = lambda: triton_sae.sparse_gradients(dy_ND, x_ND, D, c, *codes)  # noqa: E731
    parts.time("SAE: sparse gradients", own, moved=2 * E.nbytes + 2.5 * rows)
    entry = torch.where(value_NK > 0, index_NK, s.f).flatten()
    parts.time("SAE: sort of the entries", lambda: entry.sort(stable=True))
    db_F, nothing_D = draw(s.f), torch.zeros_like(c)
    parts.time("SAE: db_enc @ W_enc", lambda: db_F @ E, moved=E.nbytes)
    parts.time("SAE: the same, W_enc^T first", lambda: torch.mv(E.T, db_F), moved=E.nbytes)
    gathered = lambda: triton_sae.decode(value_NK.float(), index_NK, E, nothing_D).sum(0)  # noqa: E731
    parts.time("SAE: the same, of the active rows", gathered, moved=rows)

    def statistics():
        z_NF = torch.zeros_like(pre_NF).scatter_(1, index_NK.long(), value_NK)
        return (z_NF > 0).sum(0)

    def from_indices():
        fired_F = torch.zeros(s.f, dtype=torch.int32, device=parts.device)
        fired_F.scatter_add_(0, index_NK.flatten().long(), (value_NK > 0).flatten().int())
        return fired_F

    parts.time("SAE: dense latents and their statistics", statistics)
    parts.time("SAE: the same, from the indices", from_indices)
    adamw = torch.optim.AdamW(sae.parameters(), lr=0.0, weight_decay=0.01)
    adamw.found_inf = torch.zeros((), device=parts.device)
    params = [p for p in sae.parameters() if p.requires_grad]
    for p in params:
        p.grad = torch.randn_like(p)
    norm = lambda: triton_adamw.projected_norm(params, sae.W_dec_FD)  # noqa: E731
    parts.time("optimizer: norm", norm, moved=3 * E.nbytes)
    n = norm()
    update = lambda: triton_adamw.adamw(adamw, n, 1.0, sae.W_dec_FD)  # noqa: E731
    parts.time("optimizer: update", update, moved=14 * E.nbytes)
