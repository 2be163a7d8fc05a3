"""The CUDA kernels, in Triton; each computes what plain PyTorch computes elsewhere, more directly.

| kernel | a program has | bound by | its reference |
| --- | --- | --- | --- |
| kl_sweep | a row of (N,V) | reading t and s twice, writing g | ops.kl_sweep_reference |
| topk | a row of (N,F) | 16 or 32 readings of a row, from L2 | ops.topk |
| decode | a token, a slice of D | gathering N K rows of W_dec | sae.SAE.decode |
| SparseTopK's backward | 8 entries; a latent | writing (F,D) twice | sae.SAE, autograd |
| projected_norm | a row of W_dec | reading gradients and W_dec | SAE.before_clip, clip_grad_norm_ |
| adamw | a row, or 2048 numbers | reading p g m v, writing p m v | AdamW, SAE.renormalise |

All sums are in float32 or wider and in a fixed order. No kernel synchronises with the host. Shapes
as in ops.py, and E = N*K entries: the tokens' active latents, in the order of latents.
"""

import torch
import triton
import triton.language as tl
from torch import nn


def _launch(kernel, grid, *tensors_and_numbers, **constants):
    with torch.cuda.device_of(tensors_and_numbers[0]):
        kernel[grid](*tensors_and_numbers, **constants)


def _block(size: int, largest: int | None = None) -> int:
    """How many columns a program has before it at a time: a power of 2."""
    power = triton.next_power_of_2(size)
    return power if largest is None else min(power, largest)


# ---- KL --------------------------------------------------------------------------------------

# The largest softcap under which a sum of e^logit over a vocabulary needs no maximum subtracted.
# An exponent of 60 is rounded by 2e-6, so that the sum is right to 2e-6 of itself at worst.
BOUNDED = 60.0


def kl_sweep(t_NV, s_NV, g_NV=None, *, softcap: float = 0.0, shifts=None):
    """See ops.kl_sweep. Rows must be contiguous; g_NV may be t_NV or s_NV itself."""
    n, v = t_NV.shape
    assert s_NV.shape == t_NV.shape and t_NV.stride(1) == s_NV.stride(1) == 1
    assert g_NV is None or (g_NV.shape == t_NV.shape and g_NV.stride(1) == 1)
    kl_N, lse_t_N, lse_s_N = torch.empty((3, n), dtype=torch.float64, device=t_NV.device)
    to_NV = t_NV if g_NV is None else g_NV  # a pointer is needed even where nothing is written
    t_shift_N, s_shift_N = shifts or torch.zeros((2, n), device=t_NV.device)
    _launch(
        _kl_sweep,
        (n,),
        *(t_NV, s_NV, to_NV, t_shift_N, s_shift_N, kl_N, lse_t_N, lse_s_N),
        *(v, t_NV.stride(0), s_NV.stride(0), to_NV.stride(0), float(softcap)),
        CAPPED=softcap > 0,
        ONLINE=not 0 < softcap <= BOUNDED,
        GRADIENT=g_NV is not None,
        BLOCK=_block(v, 4096),
        num_warps=8,
    )
    return kl_N, lse_t_N, lse_s_N


@triton.jit
def _logits(pointer, column, inside, shift, softcap, CAPPED: tl.constexpr):
    """softcap tanh(z / softcap), from the exponential, for which there is an instruction."""
    z = tl.load(pointer + column, mask=inside, other=0.0).to(tl.float32) + shift
    if CAPPED:
        z = softcap - 2 * softcap / (tl.exp(2 * z / softcap) + 1)
    return z


@triton.jit
def _kl_sweep(
    t_ptr,
    s_ptr,
    g_ptr,
    t_shift_ptr,
    s_shift_ptr,
    kl_ptr,
    lse_t_ptr,
    lse_s_ptr,
    V,
    t_stride,
    s_stride,
    g_stride,
    softcap,
    CAPPED: tl.constexpr,
    ONLINE: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    t_ptr += row * t_stride
    s_ptr += row * s_stride
    g_ptr += row * g_stride
    t_shift = tl.load(t_shift_ptr + row)
    s_shift = tl.load(s_shift_ptr + row)
    block = tl.arange(0, BLOCK)
    lowest: tl.constexpr = float("-inf") if ONLINE else 0.0
    top_t = tl.full([], lowest, tl.float32)  # what is subtracted before the exponential
    top_s = tl.full([], lowest, tl.float32)
    sum_t = tl.full([BLOCK], 0.0, tl.float32)  # each lane sums its own columns: no barrier a block
    sum_s = tl.full([BLOCK], 0.0, tl.float32)
    cross = tl.full([BLOCK], 0.0, tl.float32)  # sum of e^t (t - s)
    for start in range(0, V, BLOCK):
        column = start + block
        inside = column < V
        t = _logits(t_ptr, column, inside, t_shift, softcap, CAPPED)
        s = _logits(s_ptr, column, inside, s_shift, softcap, CAPPED)
        if ONLINE:
            new_t = tl.maximum(top_t, tl.max(tl.where(inside, t, float("-inf")), 0))
            new_s = tl.maximum(top_s, tl.max(tl.where(inside, s, float("-inf")), 0))
            fade_t = tl.exp(top_t - new_t)
            sum_t *= fade_t
            cross *= fade_t
            sum_s *= tl.exp(top_s - new_s)
            top_t = new_t
            top_s = new_s
        e_t = tl.where(inside, tl.exp(t - top_t), 0.0)
        sum_t += e_t
        cross += e_t * (t - s)
        sum_s += tl.where(inside, tl.exp(s - top_s), 0.0)
    all_t = tl.sum(sum_t.to(tl.float64), 0)
    all_s = tl.sum(sum_s.to(tl.float64), 0)
    lse_t = tl.log(all_t) + top_t.to(tl.float64)
    lse_s = tl.log(all_s) + top_s.to(tl.float64)
    tl.store(kl_ptr + row, tl.sum(cross.to(tl.float64), 0) / all_t - lse_t + lse_s)
    tl.store(lse_t_ptr + row, lse_t)
    tl.store(lse_s_ptr + row, lse_s)
    if GRADIENT:
        one_t = (1.0 / all_t).to(tl.float32)
        one_s = (1.0 / all_s).to(tl.float32)
        for start in range(0, V, BLOCK):
            column = start + block
            inside = column < V
            t = _logits(t_ptr, column, inside, t_shift, softcap, CAPPED)
            s = _logits(s_ptr, column, inside, s_shift, softcap, CAPPED)
            g = tl.exp(s - top_s) * one_s - tl.exp(t - top_t) * one_t
            if CAPPED:
                g *= 1 - (s / softcap) * (s / softcap)
            tl.store(g_ptr + column, g.to(g_ptr.dtype.element_ty), mask=inside)


# ---- SAE -------------------------------------------------------------------------------------


def topk(pre_NF, k: int):
    """The k largest of relu(pre) -> value_NK in pre's dtype, index_NK int32, by index.

    Of equal ones the lowest indices are taken; a row with fewer than k positive ones is filled up
    with zeros. NaN is larger than any number, as in torch.topk.
    """
    n, f = pre_NF.shape
    assert pre_NF.is_contiguous() and 0 < k <= f
    value_NK = torch.empty((n, k), dtype=pre_NF.dtype, device=pre_NF.device)
    index_NK = torch.empty((n, k), dtype=torch.int32, device=pre_NF.device)
    wide = pre_NF.dtype == torch.float32
    _launch(
        _topk,
        (n,),
        *(pre_NF, value_NK, index_NK, f, k),
        BITS=31 if wide else 15,
        KEY=tl.int32 if wide else tl.int16,
        BLOCK=_block(f, 4096),
        num_warps=16,
    )
    return value_NK, index_NK


@triton.jit
def _keys(pre_ptr, column, F, BITS: tl.constexpr, KEY: tl.constexpr):
    """-> relu(pre) and integers in its order: the bits of a positive float, 0, or -1 outside."""
    x = tl.load(pre_ptr + column, mask=column < F, other=0.0)
    wide = x.to(tl.float32)
    largest: tl.constexpr = 2**BITS - 1
    key = tl.where(wide > 0, x.to(KEY, bitcast=True).to(tl.int32), 0)
    key = tl.where(wide != wide, largest, key)
    return tl.where(wide <= 0, 0.0, wide), tl.where(column < F, key, -1)


@triton.jit
def _topk(
    pre_ptr, value_ptr, index_ptr, F, K, BITS: tl.constexpr, KEY: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    pre_ptr += row * F
    value_ptr += row * K
    index_ptr += row * K
    block = tl.arange(0, BLOCK)
    kth = tl.full([], 0, tl.int32)  # the largest key that K columns reach, from its highest bit on
    above = tl.full([], 0, tl.int32)  # how many are larger; the last refused trial is kth + 1
    bit = tl.full([], 2 ** (BITS - 1), tl.int32)
    for _ in range(BITS):
        trial = kth + bit
        reached = tl.full([BLOCK], 0, tl.int32)
        for start in range(0, F, BLOCK):
            _x, key = _keys(pre_ptr, start + block, F, BITS, KEY)
            reached += (key >= trial).to(tl.int32)
        count = tl.sum(reached, 0)
        above = tl.where(count >= K, above, count)
        kth = tl.where(count >= K, trial, kth)
        bit = bit // 2
    kept = tl.full([], 0, tl.int32)
    tied = tl.full([], 0, tl.int32)
    for start in range(0, F, BLOCK):
        column = start + block
        x, key = _keys(pre_ptr, column, F, BITS, KEY)
        tie = (key == kth).to(tl.int32)
        first = tied + tl.cumsum(tie, 0) <= K - above
        keep = (key > kth) | ((key == kth) & first)
        slot = kept + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(value_ptr + slot, x.to(value_ptr.dtype.element_ty), mask=keep)
        tl.store(index_ptr + slot, column, mask=keep)
        kept += tl.sum(keep.to(tl.int32), 0)
        tied += tl.sum(tie, 0)


def decode(value_NK, index_NK, W_dec_FD, b_dec_D):
    """z W_dec + b_dec from the k active latents -> y_ND float32."""
    (n, k), d = value_NK.shape, W_dec_FD.shape[1]
    assert value_NK.is_contiguous() and index_NK.is_contiguous() and W_dec_FD.is_contiguous()
    y_ND = torch.empty((n, d), dtype=torch.float32, device=value_NK.device)
    width = _block(d, 512)
    _launch(
        _decode,
        (n, triton.cdiv(d, width)),
        *(value_NK, index_NK, W_dec_FD, b_dec_D, y_ND, k, d),
        ROWS=8,
        WIDTH=width,
        num_warps=4,
    )
    return y_ND


@triton.jit
def _decode(
    value_ptr, index_ptr, W_ptr, b_ptr, y_ptr, K, D, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < D
    y = tl.load(b_ptr + column, mask=inside, other=0.0).to(tl.float32)
    for start in range(0, K, ROWS):
        slot = start + tl.arange(0, ROWS)
        value = tl.load(value_ptr + token * K + slot, mask=slot < K, other=0.0).to(tl.float32)
        latent = tl.load(index_ptr + token * K + slot, mask=slot < K, other=0).to(tl.int64)
        there = (value != 0)[:, None] & inside[None, :]
        W = tl.load(W_ptr + latent[:, None] * D + column[None, :], mask=there, other=0.0)
        y += tl.sum(value[:, None] * W.to(tl.float32), 0)
    tl.store(y_ptr + token * D + column, y, mask=inside)


class SparseTopK(torch.autograd.Function):
    """A TopK SAE on a step's tokens, from the encoder's dense product on without (N,F) by (F,D).

    (x_ND, W_enc_FD, b_enc_F, W_dec_FD, b_dec_D, k, dtype) -> y_ND float32, z_NF. dtype: of the
    encoder's product and the codes. z_NF is for statistics: no gradient goes through it.
    """

    @staticmethod
    def forward(ctx, x_ND, W_enc_FD, b_enc_F, W_dec_FD, b_dec_D, k, dtype):
        inputs = (t.to(dtype) for t in (x_ND - b_dec_D, W_enc_FD, b_enc_F))
        pre_NF = nn.functional.linear(*inputs)
        value_NK, index_NK = topk(pre_NF, k)
        y_ND = decode(value_NK, index_NK, W_dec_FD, b_dec_D)
        z_NF = torch.zeros_like(pre_NF).scatter_(1, index_NK.long(), value_NK)
        ctx.save_for_backward(x_ND, W_enc_FD, W_dec_FD, b_dec_D, value_NK, index_NK)
        ctx.mark_non_differentiable(z_NF)
        ctx.set_materialize_grads(False)
        return y_ND, z_NF

    @staticmethod
    def backward(ctx, dy_ND, _):
        x_ND, W_enc_FD, W_dec_FD, b_dec_D, value_NK, index_NK = ctx.saved_tensors
        with torch.autocast(dy_ND.device.type, enabled=False):
            dpre_NK, dW_enc_FD, db_enc_F, dW_dec_FD = sparse_gradients(
                dy_ND.contiguous(), x_ND.contiguous(), W_dec_FD, b_dec_D, value_NK, index_NK
            )
            db_dec_D = dy_ND.sum(0, dtype=torch.float32) - db_enc_F @ W_enc_FD
            dx_ND = None
            if ctx.needs_input_grad[0]:
                zero_D = torch.zeros_like(b_dec_D)
                dx_ND = decode(dpre_NK, index_NK, W_enc_FD, zero_D).to(x_ND.dtype)
        return dx_ND, dW_enc_FD, db_enc_F, dW_dec_FD, db_dec_D, None, None


def sparse_gradients(dy_ND, x_ND, W_dec_FD, b_dec_D, value_NK, index_NK):
    """The gradients that dy_ND makes -> dpre_NK, dW_enc_FD, db_enc_F, dW_dec_FD, all float32.

    Entries are sorted by latent, so that a latent's rows are summed by one program, without
    atomics, and the rows of latents that did not fire are written as zeros.
    """
    (n, k), (f, d) = value_NK.shape, W_dec_FD.shape
    like = {"dtype": torch.float32, "device": dy_ND.device}
    # those that did not fire come last, as latent F; searchsorted, for bincount waits for the host
    latent_E, order_E = torch.where(value_NK > 0, index_NK, f).flatten().sort(stable=True)
    border_F1 = torch.arange(f + 1, dtype=latent_E.dtype, device=latent_E.device)
    start_F1 = torch.searchsorted(latent_E, border_F1, out_int32=True)
    token_E, value_E = (order_E // k).int(), value_NK.flatten()[order_E]
    dpre_E = torch.empty(n * k, **like)
    _launch(
        _dpre,
        (triton.cdiv(n * k, 8),),
        *(dy_ND, W_dec_FD, token_E, latent_E, dpre_E, n * k, f, d),
        ROWS=8,
        WIDTH=_block(d, 256),
        num_warps=4,
    )
    dW_enc_FD, dW_dec_FD = torch.empty((f, d), **like), torch.empty((f, d), **like)
    db_enc_F = torch.empty(f, **like)
    width = _block(d, 1024)
    _launch(
        _dweights,
        (f, triton.cdiv(d, width)),
        *(dy_ND, x_ND, b_dec_D, token_E, value_E, dpre_E, start_F1),
        *(dW_enc_FD, db_enc_F, dW_dec_FD, d),
        ROWS=4,
        WIDTH=width,
        num_warps=4,
    )
    dpre_NK = torch.empty_like(dpre_E).scatter_(0, order_E, dpre_E).view(n, k)
    return dpre_NK, dW_enc_FD, db_enc_F, dW_dec_FD


@triton.jit
def _dpre(
    dy_ptr, W_ptr, token_ptr, latent_ptr, dpre_ptr, E, F, D, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """dy_token . W_latent of each entry; 0 where the latent did not fire."""
    entry = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    latent = tl.load(latent_ptr + entry, mask=entry < E, other=F).to(tl.int64)
    token = tl.load(token_ptr + entry, mask=entry < E, other=0).to(tl.int64)
    product = tl.full([ROWS, WIDTH], 0.0, tl.float32)
    for start in range(0, D, WIDTH):
        column = start + tl.arange(0, WIDTH)
        there = (latent < F)[:, None] & (column < D)[None, :]
        dy = tl.load(dy_ptr + token[:, None] * D + column[None, :], mask=there, other=0.0)
        W = tl.load(W_ptr + latent[:, None] * D + column[None, :], mask=there, other=0.0)
        product += dy.to(tl.float32) * W.to(tl.float32)
    tl.store(dpre_ptr + entry, tl.sum(product, 1), mask=entry < E)


@triton.jit
def _dweights(
    dy_ptr,
    x_ptr,
    b_dec_ptr,
    token_ptr,
    value_ptr,
    dpre_ptr,
    start_ptr,
    dW_enc_ptr,
    db_enc_ptr,
    dW_dec_ptr,
    D,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One latent's gradients: sums over the tokens for which it fired."""
    latent = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < D
    b_dec = tl.load(b_dec_ptr + column, mask=inside, other=0.0)
    dW_enc = tl.full([WIDTH], 0.0, tl.float32)
    dW_dec = tl.full([WIDTH], 0.0, tl.float32)
    db_enc = tl.full([], 0.0, tl.float32)
    end = tl.load(start_ptr + latent + 1)
    for first in range(tl.load(start_ptr + latent), end, ROWS):
        entry = first + tl.arange(0, ROWS)
        token = tl.load(token_ptr + entry, mask=entry < end, other=0).to(tl.int64)
        value = tl.load(value_ptr + entry, mask=entry < end, other=0.0).to(tl.float32)
        dpre = tl.load(dpre_ptr + entry, mask=entry < end, other=0.0)
        there = (entry < end)[:, None] & inside[None, :]
        at = token[:, None] * D + column[None, :]
        dy = tl.load(dy_ptr + at, mask=there, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32) - b_dec[None, :]
        dW_dec += tl.sum(value[:, None] * dy, 0)
        dW_enc += tl.sum(dpre[:, None] * x, 0)
        db_enc += tl.sum(dpre, 0)
    tl.store(dW_enc_ptr + latent * D + column, dW_enc, mask=inside)
    tl.store(dW_dec_ptr + latent * D + column, dW_dec, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(db_enc_ptr + latent, db_enc)


# ---- optimizer -------------------------------------------------------------------------------


def projected_norm(params, unit_rows=None):
    """The norm of all gradients, that of `unit_rows` without its part along each of its rows.

    params: float32; those without a gradient are left out. unit_rows: one of them, (F,D) with rows
    of norm 1, or None. -> 0-d float32, on the device.
    """
    squares = []
    for p in params:
        if p.grad is None:
            continue
        if p is unit_rows:
            square_F = torch.empty(len(p), dtype=torch.float32, device=p.device)
            tensors = (_contiguous(p.grad), p.detach(), square_F)
            block = {"BLOCK": _block(p.shape[1]), "num_warps": 8}
            _launch(_projected_square, (len(p),), *tensors, p.shape[1], **block)
            squares.append(square_F.sum(dtype=torch.float64))
        else:
            squares.append(torch.linalg.vector_norm(p.grad).double().square())
    return torch.stack(squares).sum().sqrt().float()


@triton.jit
def _projected_square(g_ptr, p_ptr, square_ptr, D, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    g = tl.load(g_ptr + row * D + column, mask=column < D, other=0.0)
    p = tl.load(p_ptr + row * D + column, mask=column < D, other=0.0)
    g -= tl.sum(g * p, 0) * p
    tl.store(square_ptr + row, tl.sum(g * g, 0))


@torch.no_grad()
def adamw(optimizer: torch.optim.AdamW, norm, clip: float, unit_rows=None) -> None:
    """optimizer.step() on gradients clipped to `clip`, those of unit_rows projected, its rows
    renormalised; nothing changes where optimizer.found_inf is not 0.

    norm: projected_norm's. The state is optimizer.state, as torch.optim.AdamW(fused=True) keeps it.
    """
    group = optimizer.param_groups[0]
    params = [p for p in group["params"] if p.grad is not None]
    for p in params:
        if not optimizer.state[p]:
            step = torch.zeros((), dtype=torch.float32, device=p.device)
            state = {"step": step, "exp_avg": torch.zeros_like(p)}
            optimizer.state[p] = state | {"exp_avg_sq": torch.zeros_like(p)}
    go = (optimizer.found_inf == 0).float()
    torch._foreach_add_([optimizer.state[p]["step"] for p in params], go)
    step = optimizer.state[params[0]]["step"].double()
    lr, (beta1, beta2) = group["lr"], group["betas"]
    scale = (clip / (norm.double() + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_
    rate, spread = lr / (1 - beta1**step), (1 - beta2**step).rsqrt()
    numbers = torch.stack([go.double(), scale, rate, spread]).float()
    for p in params:
        rows, width = p.shape if p is unit_rows else (triton.cdiv(p.numel(), 2048), 2048)
        state = optimizer.state[p]
        _launch(
            _adamw,
            (rows,),
            *(p.detach(), _contiguous(p.grad), state["exp_avg"], state["exp_avg_sq"], numbers),
            *(p.numel(), width, 1 - beta1, 1 - beta2),
            *(group["eps"], lr * group["weight_decay"]),
            UNIT_ROWS=p is unit_rows,
            BLOCK=_block(width),
            num_warps=16 if p is unit_rows else 8,
        )


def _contiguous(grad):
    return grad if grad.is_contiguous() else grad.contiguous()


@triton.jit
def _adamw(
    p_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    numbers_ptr,
    size,
    width,
    rate1,
    rate2,
    eps,
    decay,
    UNIT_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * width + column
    size = tl.where(tl.load(numbers_ptr) != 0, size, 0)
    live = (column < width) & (at < size)
    p = tl.load(p_ptr + at, mask=live, other=0.0)
    g = tl.load(g_ptr + at, mask=live, other=0.0)
    m = tl.load(m_ptr + at, mask=live, other=0.0)
    v = tl.load(v_ptr + at, mask=live, other=0.0)
    if UNIT_ROWS:
        g -= tl.sum(g * p, 0) * p
    g *= tl.load(numbers_ptr + 1)
    m += rate1 * (g - m)
    v += rate2 * (g * g - v)
    p -= decay * p  # 1 - decay would lose digits of a small decay
    p -= tl.load(numbers_ptr + 2) * m / (tl.sqrt(v) * tl.load(numbers_ptr + 3) + eps)
    if UNIT_ROWS:
        p = p / tl.sqrt(tl.sum(p * p, 0))
    tl.store(p_ptr + at, p, mask=live)
    tl.store(m_ptr + at, m, mask=live)
    tl.store(v_ptr + at, v, mask=live)
