"""The arithmetic that a step spends its time in, each in plain PyTorch.

Shapes: B sequences, L positions, N = B*L tokens, D residual width, F latents, K active,
V vocabulary, H heads, E head width.
"""

import torch
from torch import nn


class Head:
    """The LM's output head: logits = cap tanh(h W^T / cap), or h W^T without a softcap.

    W_VD: unembedding. softcap: 0 for none. chunk: how many tokens' logits exist at a time.
    """

    def __init__(self, W_VD: torch.Tensor, *, softcap: float, chunk: int):
        self.W_VD, self.softcap, self.chunk = W_VD, softcap, chunk
        self._wide_W_VD = None

    def logits(self, h_ND: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """h_ND -> softcapped logits_NV in float32; `dtype` is what the product is rounded to.

        A bfloat16 product rounds a logit of 20 by 0.06, which is as large as what an SAE changes.
        """
        z_NV = self._product(h_ND, dtype).float()
        return self.softcap * torch.tanh(z_NV / self.softcap) if self.softcap else z_NV

    def _product(self, h_ND: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if h_ND.dtype == dtype or h_ND.dtype.itemsize > dtype.itemsize:
            return h_ND @ self.W_VD.T
        if h_ND.is_cuda:  # bfloat16 in, float32 out: the tensor cores add in float32 anyway
            return torch.mm(h_ND, self.W_VD.T, out_dtype=dtype)
        if self._wide_W_VD is None:
            self._wide_W_VD = self.W_VD.to(dtype)
        return h_ND.to(dtype) @ self._wide_W_VD.T


def divergence(t_NV: torch.Tensor, s_NV: torch.Tensor):
    """KL(p || q) of p = softmax(t), q = softmax(s) -> (kl_N, (p_NV, lse_N), (q_NV, lse_N)).

    sum p (t - s) - logsumexp(t) + logsumexp(s), nats: the big numbers, a few a row, are float64.
    """
    p_NV, t_lse_N = _softmax(t_NV)
    q_NV, s_lse_N = _softmax(s_NV)
    shift_N = (p_NV * (t_NV - s_NV)).sum(-1)
    return shift_N.double() + s_lse_N - t_lse_N, (p_NV, t_lse_N), (q_NV, s_lse_N)


def _softmax(z_NV: torch.Tensor):
    """-> softmax in z's dtype and its logsumexp_N in float64."""
    top_N1 = z_NV.amax(-1, keepdim=True)
    e_NV = (z_NV - top_N1).exp_()
    sum_N1 = e_NV.sum(-1, keepdim=True)
    return e_NV.div_(sum_N1), (top_N1.double() + sum_N1.double().log()).squeeze(-1)


class _KLHead(torch.autograd.Function):
    """KL(clean || spliced) a token; the gradient is made beside the value, so logits never stay."""

    @staticmethod
    def forward(ctx, h_spliced_ND, h_clean_ND, head, dtype):
        kl_N = torch.empty(len(h_spliced_ND), dtype=torch.float32, device=h_spliced_ND.device)
        grad_ND = torch.empty_like(h_spliced_ND) if ctx.needs_input_grad[0] else None
        for start in range(0, len(h_spliced_ND), head.chunk):
            rows = slice(start, start + head.chunk)
            s_NV = head.logits(h_spliced_ND[rows], dtype)
            kl_N[rows], (p_NV, _), (q_NV, _) = divergence(
                head.logits(h_clean_ND[rows], dtype), s_NV
            )
            if grad_ND is not None:
                g_NV = q_NV.sub_(p_NV)  # d KL / d capped logits
                if head.softcap:
                    g_NV *= 1 - (s_NV / head.softcap).square_()
                grad_ND[rows] = g_NV.to(head.W_VD.dtype) @ head.W_VD
        ctx.save_for_backward(grad_ND)
        return kl_N

    @staticmethod
    def backward(ctx, grad_kl_N):
        (grad_ND,) = ctx.saved_tensors
        return (grad_ND.float() * grad_kl_N[:, None]).to(grad_ND.dtype), None, None, None


def kl_head(
    h_clean_ND: torch.Tensor, h_spliced_ND: torch.Tensor, head: Head, dtype: torch.dtype
) -> torch.Tensor:
    """KL(clean || spliced) over the whole vocabulary -> kl_N float32, nats a token.

    h: hidden states after the final norm; differentiable in h_spliced_ND alone. dtype: see
    Head.logits. Never more than head.chunk tokens of logits at a time.
    """
    return _KLHead.apply(h_spliced_ND, h_clean_ND, head, dtype)


def kl_head_reference(h_clean_ND, h_spliced_ND, head, dtype):
    """kl_head without chunks or a gradient of its own: autograd's, through log_softmax."""
    p_log_NV = head.logits(h_clean_ND, dtype).log_softmax(-1)
    q_log_NV = head.logits(h_spliced_ND, dtype).log_softmax(-1)
    return (p_log_NV.exp() * (p_log_NV - q_log_NV)).sum(-1)


@torch.no_grad()
def score_head(h_clean_ND, h_other_ND, target_N, head: Head):
    """-> (kl_N, ce_clean_N, ce_other_N) float64, nats a token, from float32 logits.

    KL(clean || other); ce is the cross-entropy of target_N (token ids; any id where there is none).
    """
    parts = []
    for start in range(0, len(h_clean_ND), head.chunk):
        rows = slice(start, start + head.chunk)
        t_NV = head.logits(h_clean_ND[rows], torch.float32)
        s_NV = head.logits(h_other_ND[rows], torch.float32)
        kl_N, (_, t_lse_N), (_, s_lse_N) = divergence(t_NV, s_NV)
        at_N1 = target_N[rows, None]
        ce_clean_N = t_lse_N - t_NV.gather(-1, at_N1)[:, 0]
        parts.append((kl_N, ce_clean_N, s_lse_N - s_NV.gather(-1, at_N1)[:, 0]))
    return tuple(torch.cat(part) for part in zip(*parts))


@torch.no_grad()
def ce_head(h_ND, target_N, head: Head):
    """-> ce_N float64, the cross-entropy of target_N in nats, from float32 logits."""
    parts = []
    for start in range(0, len(h_ND), head.chunk):
        rows = slice(start, start + head.chunk)
        z_NV = head.logits(h_ND[rows], torch.float32)
        at_N = z_NV.gather(-1, target_N[rows, None])[:, 0]
        parts.append(_softmax(z_NV)[1] - at_N)
    return torch.cat(parts)


def attention(module, query, key, value, attention_mask, *, scaling, **options):
    """Causal attention for transformers: softcap, sliding window, grouped heads.

    query (B,H,L,E), key and value (B,H/groups,L,E) -> (B,L,H,E), None. Registered under a name
    of its own, it is handed no mask, so what one batch size captured fits any other.
    """
    if attention_mask is not None:
        raise ValueError("padding masks are not supported: contexts are packed, without padding")
    softcap, window = options.get("softcap"), options.get("sliding_window")
    length = query.shape[2]
    mask_LL = None
    if softcap or (window and length > window):
        i_L = torch.arange(length, device=query.device)
        distance_LL = i_L[:, None] - i_L[None, :]
        mask_LL = (distance_LL >= 0) & (distance_LL < (window or length))
    if softcap:
        out_BHLE = _softcapped(query, key, value, mask_LL, scaling, softcap)
    else:
        out_BHLE = nn.functional.scaled_dot_product_attention(
            query, key, value, mask_LL, is_causal=mask_LL is None, scale=scaling, enable_gqa=True
        )
    return out_BHLE.transpose(1, 2).contiguous(), None


def _softcapped(query, key, value, mask_LL, scaling, softcap):
    """softmax(cap tanh(q k / cap)) v with the softmax in float32, as Gemma-2 was trained."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    score_BHLL = query @ key.transpose(2, 3) * scaling
    score_BHLL = softcap * torch.tanh(score_BHLL / softcap)
    score_BHLL = score_BHLL.masked_fill(~mask_LL, float("-inf"))
    return score_BHLL.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


def topk(pre_NF: torch.Tensor, k: int) -> torch.Tensor:
    """relu, then all but the k largest of each row to zero -> z_NF."""
    value_NK, index_NK = pre_NF.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre_NF).scatter(-1, index_NK, value_NK.relu())
