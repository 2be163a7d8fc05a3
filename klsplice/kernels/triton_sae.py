"""A TopK SAE in Triton: decode, and gradients, from the active latents alone.

| kernel | a program has | bound by | its reference |
| --- | --- | --- | --- |
| decode | a token, a slice of D | gathering N K rows of W_dec | sae.SAE.decode |
| SparseTopK's backward | 8 entries; a latent | writing (F, D) twice | sae.SAE, autograd |

All sums are in float32 or wider and in a fixed order. No kernel waits for the host. Shapes: N
tokens, D residual width, F latents, K active, and E = N*K entries: the tokens' active latents, in
the order of latents.
"""

import torch
import triton
import triton.language as tl
from torch import nn

from klsplice.kernels.triton_launch import block_size, launch


def topk(pre_NF, k: int):
    """The k largest of relu(pre) -> value_NK in pre's dtype, index_NK int32, in no order."""
    value_NK, index_NK = pre_NF.topk(k, dim=-1, sorted=False)
    return value_NK.relu(), index_NK.int()


def decode(value_NK, index_NK, W_dec_FD, b_dec_D):
    """z W_dec + b_dec from the k active latents -> y_ND float32."""
    (n, k), d = value_NK.shape, W_dec_FD.shape[1]
    assert value_NK.is_contiguous() and index_NK.is_contiguous() and W_dec_FD.is_contiguous()
    y_ND = torch.empty((n, d), dtype=torch.float32, device=value_NK.device)
    width = block_size(d, 512)
    launch(
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
    launch(
        _dpre,
        (triton.cdiv(n * k, 8),),
        *(dy_ND, W_dec_FD, token_E, latent_E, dpre_E, n * k, f, d),
        ROWS=8,
        WIDTH=block_size(d, 256),
        num_warps=4,
    )
    dW_enc_FD, dW_dec_FD = torch.empty((f, d), **like), torch.empty((f, d), **like)
    db_enc_F = torch.empty(f, **like)
    width = block_size(d, 1024)
    launch(
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
