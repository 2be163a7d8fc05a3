"""The KL sweep in Triton: a program has one row of (N, V).

It is bound by reading t and s twice and writing g. Capped logits are in bits, logits / ln 2, since
a power of 2 is an instruction and e^x is not; those without a softcap can be large, and would lose
digits. Sums are in float32 or wider and in a fixed order; nothing waits for the host. Its reference
is kl.kl_sweep_reference.
"""

import math

import torch
import triton
import triton.language as tl

from klsplice.kernels.triton_launch import block_size, launch

# The largest softcap under which a sum of e^logit over a vocabulary needs no maximum subtracted.
# An exponent of 60 is rounded by 2e-6, so that the sum is right to 2e-6 of itself at worst.
BOUNDED = 60.0
LARGEST_BLOCK, WARPS = 2048, 8  # 1.88 ms for 2,048 rows of 256,000 on an H100; 4096: 1.98


def kl_sweep(t_NV, s_NV, g_NV=None, *, scale: float = 1.0, softcap: float = 0.0, shifts=None):
    """See kl.kl_sweep. Rows must be contiguous; g_NV may be t_NV or s_NV itself."""
    n, v = t_NV.shape
    assert s_NV.shape == t_NV.shape and t_NV.stride(1) == s_NV.stride(1) == 1
    assert g_NV is None or (g_NV.shape == t_NV.shape and g_NV.stride(1) == 1)
    kl_N, lse_t_N, lse_s_N = torch.empty((3, n), dtype=torch.float64, device=t_NV.device)
    to_NV = t_NV if g_NV is None else g_NV  # a pointer is needed even where nothing is written
    t_shift_N, s_shift_N = shifts or torch.zeros((2, n), device=t_NV.device)
    bit = math.log(2)
    rate, cap = (2 * scale / softcap / bit, softcap / bit) if softcap else (scale, 0.0)
    launch(
        _kl_sweep,
        (n,),
        *(t_NV, s_NV, to_NV, t_shift_N, s_shift_N, kl_N, lse_t_N, lse_s_N),
        *(v, t_NV.stride(0), s_NV.stride(0), to_NV.stride(0)),
        *(float(scale), float(rate), float(cap)),
        CAPPED=softcap > 0,
        ONLINE=not 0 < softcap <= BOUNDED,
        GRADIENT=g_NV is not None,
        BLOCK=block_size(v, LARGEST_BLOCK),
        num_warps=WARPS,
    )
    return kl_N, lse_t_N, lse_s_N


@triton.jit
def _logits(pointer, column, inside, shift, rate, cap, CAPPED: tl.constexpr):
    """Logits, and of capped ones r: cap tanh(y) = cap (1 - 2 r) with r = 1 / (e^2y + 1), and its
    derivative is cap 4 r (1 - r)."""
    z = rate * (tl.load(pointer + column, mask=inside, other=0.0).to(tl.float32) + shift)
    r = z
    if CAPPED:
        r = 1 / (tl.exp2(z) + 1)
        z = cap - 2 * cap * r
    return z, r


@triton.jit
def _exp(z, CAPPED: tl.constexpr):
    """e^logit of logits less the largest."""
    if CAPPED:
        return tl.exp2(z)
    else:
        return tl.exp(z)


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
    scale,
    rate,
    cap,
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
    unit: tl.constexpr = 0.6931471805599453 if CAPPED else 1.0  # of the logits here, in nats
    lowest: tl.constexpr = float("-inf") if ONLINE else 0.0
    top_t = tl.full([], lowest, tl.float32)  # what is subtracted before the exponential
    top_s = tl.full([], lowest, tl.float32)
    sum_t = tl.full([BLOCK], 0.0, tl.float32)  # each lane sums its own columns: no barrier a block
    sum_s = tl.full([BLOCK], 0.0, tl.float32)
    cross = tl.full([BLOCK], 0.0, tl.float32)  # sum of e^t (t - s)
    for start in range(0, V, BLOCK):
        column = start + block
        inside = column < V
        t, _r = _logits(t_ptr, column, inside, t_shift, rate, cap, CAPPED)
        s, _r = _logits(s_ptr, column, inside, s_shift, rate, cap, CAPPED)
        if ONLINE:
            new_t = tl.maximum(top_t, tl.max(tl.where(inside, t, float("-inf")), 0))
            new_s = tl.maximum(top_s, tl.max(tl.where(inside, s, float("-inf")), 0))
            fade_t = _exp(top_t - new_t, CAPPED)
            sum_t *= fade_t
            cross *= fade_t
            sum_s *= _exp(top_s - new_s, CAPPED)
            top_t = new_t
            top_s = new_s
        e_t = tl.where(inside, _exp(t - top_t, CAPPED), 0.0)
        sum_t += e_t
        cross += e_t * (t - s)
        sum_s += tl.where(inside, _exp(s - top_s, CAPPED), 0.0)
    all_t = tl.sum(sum_t.to(tl.float64), 0)
    all_s = tl.sum(sum_s.to(tl.float64), 0)
    lse_t = tl.log(all_t) + top_t.to(tl.float64) * unit
    lse_s = tl.log(all_s) + top_s.to(tl.float64) * unit
    kl = tl.sum(cross.to(tl.float64), 0) / all_t * unit - lse_t + lse_s
    tl.store(kl_ptr + row, kl)
    tl.store(lse_t_ptr + row, lse_t)
    tl.store(lse_s_ptr + row, lse_s)
    if GRADIENT:
        one_t = (1.0 / all_t).to(tl.float32)
        one_s = (1.0 / all_s).to(tl.float32)
        for start in range(0, V, BLOCK):
            column = start + block
            inside = column < V
            t, _r = _logits(t_ptr, column, inside, t_shift, rate, cap, CAPPED)
            s, r = _logits(s_ptr, column, inside, s_shift, rate, cap, CAPPED)
            g = scale * (_exp(s - top_s, CAPPED) * one_s - _exp(t - top_t, CAPPED) * one_t)
            if CAPPED:
                g *= 4 * r * (1 - r)
            tl.store(g_ptr + column, g.to(g_ptr.dtype.element_ty), mask=inside)
