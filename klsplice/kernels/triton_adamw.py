"""The optimizer in Triton: projection, clipping, AdamW and unit rows in one reading of each tensor.

| kernel | a program has | bound by | its reference |
| --- | --- | --- | --- |
| projected_norm | a row of W_dec | reading gradients and W_dec | before_clip, clip_grad_norm_ |
| adamw | a row, or 2048 numbers | reading p g m v, writing p m v | AdamW, renormalise |

Sums are in float32 or wider and in a fixed order; nothing waits for the host.
"""

import torch
import triton
import triton.language as tl

from klsplice.kernels.triton_launch import block_size, launch


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
            tensors = (p.grad.contiguous(), p.detach(), square_F)
            block = {"BLOCK": block_size(p.shape[1]), "num_warps": 8}
            launch(_projected_square, (len(p),), *tensors, p.shape[1], **block)
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
    # as many tensors, for a single one would be read as a number, by the host
    torch._foreach_add_([optimizer.state[p]["step"] for p in params], [go] * len(params))
    step = optimizer.state[params[0]]["step"].double()
    lr, (beta1, beta2) = group["lr"], group["betas"]
    scale = (clip / (norm.double() + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_
    rate, spread = lr / (1 - beta1**step), (1 - beta2**step).rsqrt()
    numbers = torch.stack([go.double(), scale, rate, spread]).float()
    for p in params:
        rows, width = p.shape if p is unit_rows else (triton.cdiv(p.numel(), 2048), 2048)
        state = optimizer.state[p]
        launch(
            _adamw,
            (rows,),
            *(p.detach(), p.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"], numbers),
            *(p.numel(), width, 1 - beta1, 1 - beta2),
            *(group["eps"], lr * group["weight_decay"]),
            UNIT_ROWS=p is unit_rows,
            BLOCK=block_size(width),
            num_warps=16 if p is unit_rows else 8,
        )


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
