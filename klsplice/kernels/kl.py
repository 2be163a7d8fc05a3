"""KL(clean || spliced) and its gradient from two sets of logits, and the sweep that makes them.

Shapes: N tokens, V vocabulary.
"""

import torch


def kl_sweep(t_NV, s_NV, g_NV=None, *, scale: float = 1.0, softcap: float = 0.0, shifts=None):
    """KL(p || q), p = softmax(cap(scale t)), q = softmax(cap(scale s)) -> kl_N, lse_t_N, lse_s_N in
    float64.

    t_NV, s_NV: clean and spliced products of the head, before scale and softcap. shifts: what their
    rows lack, a pair of float32 (N,), or None. g_NV: where to write dKL / ds, or None; it may be
    s_NV. KL = sum p (t - s) - logsumexp(t) + logsumexp(s), nats, of the logits t and s; the big
    numbers in float64.
    """
    sweep = kl_sweep_reference
    if t_NV.is_cuda:
        from klsplice.kernels.triton_kl import kl_sweep as sweep
    return sweep(t_NV, s_NV, g_NV, scale=scale, softcap=softcap, shifts=shifts)


def kl_sweep_reference(t_NV, s_NV, g_NV=None, *, scale=1.0, softcap=0.0, shifts=None):
    """kl_sweep in plain PyTorch, in groups of rows that stay in a core's cache."""
    n, v = t_NV.shape
    kl_N, lse_t_N, lse_s_N = torch.empty((3, n), dtype=torch.float64, device=t_NV.device)
    rows = max(1, 2**18 // v)
    for start in range(0, n, rows):
        group = slice(start, start + rows)
        t, s = t_NV[group].float(), s_NV[group].float()
        if shifts is not None:
            t, s = (z + shift_N[group, None] for z, shift_N in zip((t, s), shifts))
        if scale != 1:
            t, s = scale * t, scale * s
        if softcap:
            t, s = softcap * torch.tanh(t / softcap), softcap * torch.tanh(s / softcap)
        p, sum_N, lse_t_N[group] = _softmax(t)
        q, _, lse_s_N[group] = _softmax(s)
        kl_N[group] = (t - s).mul_(p).sum(-1) / sum_N
        if g_NV is not None:
            g = q.sub_(p)
            g = scale * g if scale != 1 else g
            g_NV[group] = g * (1 - (s / softcap).square()) if softcap else g
    return kl_N + lse_s_N - lse_t_N, lse_t_N, lse_s_N


def _softmax(z_NV: torch.Tensor):
    """-> softmax in z's dtype, what its rows sum to, which is 1 but for that sum's rounding, and
    its logsumexp_N in float64: of the largest, softmax is e^(z - logsumexp)."""
    p_NV = z_NV.softmax(-1)
    sum_N = p_NV.sum(-1).double()
    return p_NV, sum_N, z_NV.amax(-1) + (sum_N / p_NV.amax(-1)).log()
