"""The arithmetic that a step spends its time in, each in plain PyTorch; triton_ops.py for CUDA.

Shapes: B sequences, L positions, N = B*L tokens, D residual width, F latents, K active,
V vocabulary, H heads, E head width.
"""

from contextlib import contextmanager

import torch
from torch import nn

# On CUDA g W is made of this many products, each of a share of the vocabulary. 2,048 tokens and a
# width of 2,304 are 144 tiles of 128 by 256, for an H100's 132 processors: two rounds, the second
# all but empty; in 4 parts five rounds, the last a third full. Counted, not measured.
PARTS = 4


class Head:
    """The LM's output head: logits = cap tanh(h W^T / cap), or h W^T without a softcap.

    W_VD: unembedding. softcap: 0 for none. chunk: how many tokens' logits exist at a time.
    """

    def __init__(self, W_VD: torch.Tensor, *, softcap: float, chunk: int):
        self.W_VD, self.softcap, self.chunk = W_VD, softcap, chunk
        self._W1_VE = _beside_ones(W_VD) if W_VD.dtype.itemsize == 2 else None
        self._wide_W_VD, self._rooms = None, {}

    def logits(self, h_ND: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """h_ND -> logits_NV in float32; `dtype` is what the product is rounded to.

        A bfloat16 product rounds a logit of 20 by 0.06, which is as large as what an SAE changes;
        see shifted.
        """
        return self.cap(self.product(h_ND, dtype).float())

    def cap(self, z: torch.Tensor) -> torch.Tensor:
        return self.softcap * torch.tanh(z / self.softcap) if self.softcap else z

    def product(self, h_ND: torch.Tensor, dtype: torch.dtype, out=None) -> torch.Tensor:
        """h W^T in `dtype`, or in h's where that is wider. out: where to write it (see room)."""
        if h_ND.dtype.itemsize >= dtype.itemsize:
            return torch.mm(h_ND, self.W_VD.T, out=out)
        if h_ND.is_cuda:  # bfloat16 in, float32 out: the tensor cores add in float32 anyway
            return torch.mm(
                h_ND, self.W_VD.T, out_dtype=dtype, **({} if out is None else {"out": out})
            )
        if self._wide_W_VD is None:
            self._wide_W_VD = self.W_VD.to(dtype)
        with _bfloat16_inside(h_ND.dtype):
            return torch.mm(h_ND.to(dtype), self._wide_W_VD.T, out=out)

    def shifted(self, h_ND: torch.Tensor, target_N: torch.Tensor, dtype: torch.dtype, out=None):
        """h W^T less a number of each row's own -> z_NV in `dtype` or in h's, shift_N float32.

        In 16 bits that number is the logit of target_N, the next token: it is near the largest, so
        the logits that matter are small and hardly rounded. It is the product of one more column,
        of ones in W, so it is taken from the float32 sum. In a wider dtype there is none.
        """
        if torch.promote_types(dtype, h_ND.dtype).itemsize > 2:
            return self.product(h_ND, dtype, out=out), None
        shift_N = (h_ND.float() * self.W_VD[target_N].float()).sum(-1).to(h_ND.dtype)
        h1_NE = nn.functional.pad(h_ND, (0, self._W1_VE.shape[1] - h_ND.shape[1]))
        h1_NE[:, h_ND.shape[1]] = -shift_N
        return torch.mm(h1_NE, self._W1_VE.T, out=out), shift_N.float()

    def gradient(self, g_NV: torch.Tensor, out: torch.Tensor, parts: int = PARTS) -> torch.Tensor:
        """g W, of the logits' gradient that of the hidden states -> out (N, D). See PARTS."""
        if not g_NV.is_cuda or g_NV.dtype.itemsize > 2 or parts == 1 or g_NV.shape[1] % parts:
            return torch.mm(g_NV, self.W_VD, out=out)
        return out.copy_(self._in_parts(g_NV, parts).sum(0))

    def _in_parts(self, g_NV: torch.Tensor, parts: int) -> torch.Tensor:
        """-> (parts, N, D) float32, what each share of the vocabulary adds to g W."""
        g_PNS = g_NV.unflatten(1, (parts, -1)).transpose(0, 1)
        W_PSD = self.W_VD.unflatten(0, (parts, -1))
        return torch.bmm(g_PNS, W_PSD, out_dtype=torch.float32)

    def room(self, name: str, n: int, dtype: torch.dtype) -> torch.Tensor:
        """(n, V), uninitialised, the same memory at each call: fresh pages cost time."""
        room = self._rooms.get(name)
        if room is None or len(room) < n or room.dtype != dtype:
            room = torch.empty((n, len(self.W_VD)), dtype=dtype, device=self.W_VD.device)
            self._rooms[name] = room
        return room[:n]


def _beside_ones(W_VD: torch.Tensor) -> torch.Tensor:
    """-> W_VD, a column of ones and 7 of zeros, (V, D + 8). The LM's own W_VD becomes a view of it:
    a second unembedding would be a gigabyte."""
    v, d = W_VD.shape
    width = -(-(d + 8) // 64) * 64  # whole lines of a GPU's cache
    if W_VD.stride() != (width, 1):  # else an earlier Head did
        rows_VE = W_VD.new_zeros(v, width)
        rows_VE[:, :d], rows_VE[:, d] = W_VD, 1
        W_VD.data = rows_VE[:, :d]
    return W_VD.data.as_strided((v, d + 8), (width, 1))


@contextmanager
def _bfloat16_inside(dtype: torch.dtype):
    """A CPU's float32 products of bfloat16 values, with as good a sum; where it has AMX, faster."""
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    if dtype == torch.bfloat16:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def kl_sweep(t_NV, s_NV, g_NV=None, *, softcap: float = 0.0, shifts=None):
    """KL(p || q), p = softmax(cap(t)), q = softmax(cap(s)) -> kl_N, lse_t_N, lse_s_N in float64.

    t_NV, s_NV: clean and spliced logits before the softcap. shifts: what their rows lack, a pair of
    float32 (N,), or None. g_NV: where to write dKL / ds, or None; it may be s_NV.
    KL = sum p (t - s) - logsumexp(t) + logsumexp(s), nats; the big numbers in float64.
    """
    if t_NV.is_cuda:
        import triton_ops

        return triton_ops.kl_sweep(t_NV, s_NV, g_NV, softcap=softcap, shifts=shifts)
    return kl_sweep_reference(t_NV, s_NV, g_NV, softcap=softcap, shifts=shifts)


def kl_sweep_reference(t_NV, s_NV, g_NV=None, *, softcap: float = 0.0, shifts=None):
    """kl_sweep in plain PyTorch, in groups of rows that stay in a core's cache."""
    n, v = t_NV.shape
    kl_N, lse_t_N, lse_s_N = torch.empty((3, n), dtype=torch.float64, device=t_NV.device)
    for start in range(0, n, rows := max(1, 2**19 // v)):
        group = slice(start, start + rows)
        t, s = t_NV[group].float(), s_NV[group].float()
        if shifts is not None:
            t, s = (z + shift_N[group, None] for z, shift_N in zip((t, s), shifts))
        if softcap:
            t, s = softcap * torch.tanh(t / softcap), softcap * torch.tanh(s / softcap)
        p, sum_N, lse_t_N[group] = _softmax(t)
        q, _, lse_s_N[group] = _softmax(s)
        kl_N[group] = (t - s).mul_(p).sum(-1) / sum_N
        if g_NV is not None:
            g = q.sub_(p)
            g_NV[group] = g * (1 - (s / softcap).square()) if softcap else g
    return kl_N + lse_s_N - lse_t_N, lse_t_N, lse_s_N


def _softmax(z_NV: torch.Tensor):
    """-> softmax in z's dtype, what its rows sum to, which is 1 but for that sum's rounding, and
    its logsumexp_N in float64: of the largest, softmax is e^(z - logsumexp)."""
    p_NV = z_NV.softmax(-1)
    sum_N = p_NV.sum(-1).double()
    return p_NV, sum_N, z_NV.amax(-1) + (sum_N / p_NV.amax(-1)).log()


class _KLHead(torch.autograd.Function):
    """KL(clean || spliced) a token; the gradient is made beside the value, so logits never stay."""

    @staticmethod
    def forward(ctx, h_spliced_ND, h_clean_ND, target_N, head, dtype):
        kl_N = torch.empty(len(h_spliced_ND), dtype=torch.float32, device=h_spliced_ND.device)
        grad_ND = torch.empty_like(h_spliced_ND) if ctx.needs_input_grad[0] else None
        dtype = torch.promote_types(dtype, h_spliced_ND.dtype)
        for start in range(0, len(h_spliced_ND), head.chunk):
            rows = slice(start, start + head.chunk)
            n = len(h_spliced_ND[rows])
            t_NV, s_NV = head.room("clean", n, dtype), head.room("spliced", n, dtype)
            _, t_shift_N = head.shifted(h_clean_ND[rows], target_N[rows], dtype, out=t_NV)
            _, s_shift_N = head.shifted(h_spliced_ND[rows], target_N[rows], dtype, out=s_NV)
            shifts = None if t_shift_N is None else (t_shift_N, s_shift_N)
            if grad_ND is None:
                g_NV = None
            elif dtype == head.W_VD.dtype:
                g_NV = s_NV
            else:  # logits wider than the weights
                g_NV = head.room("gradient", n, head.W_VD.dtype)
            kl_N[rows], _, _ = kl_sweep(t_NV, s_NV, g_NV, softcap=head.softcap, shifts=shifts)
            if grad_ND is not None:
                head.gradient(g_NV, out=grad_ND[rows])
        ctx.save_for_backward(grad_ND)
        return kl_N

    @staticmethod
    def backward(ctx, grad_kl_N):
        (grad_ND,) = ctx.saved_tensors
        return (grad_ND.float() * grad_kl_N[:, None]).to(grad_ND.dtype), None, None, None, None


def kl_head(h_clean_ND, h_spliced_ND, target_N, head: Head, dtype: torch.dtype) -> torch.Tensor:
    """KL(clean || spliced) over the whole vocabulary -> kl_N float32, nats a token.

    h: hidden states after the final norm; differentiable in h_spliced_ND alone. target_N, dtype:
    see Head.shifted. Never more than head.chunk tokens of logits at a time.
    """
    return _KLHead.apply(h_spliced_ND, h_clean_ND, target_N, head, dtype)


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
        n, dtype = len(h_clean_ND[rows]), torch.promote_types(torch.float32, h_clean_ND.dtype)
        t_NV = head.product(h_clean_ND[rows], dtype, out=head.room("clean", n, dtype))
        s_NV = head.product(h_other_ND[rows], dtype, out=head.room("spliced", n, dtype))
        kl_N, t_lse_N, s_lse_N = kl_sweep(t_NV, s_NV, softcap=head.softcap)
        at_N1 = target_N[rows, None]
        ce_clean_N = t_lse_N - head.cap(t_NV.gather(-1, at_N1))[:, 0]
        parts.append((kl_N, ce_clean_N, s_lse_N - head.cap(s_NV.gather(-1, at_N1))[:, 0]))
    return tuple(torch.cat(part) for part in zip(*parts))


def attention(module, query, key, value, attention_mask, *, scaling, **options):
    """Causal attention for transformers: softcap, sliding window, grouped heads.

    query (B,H,L,E), key and value (B,H/groups,L,E) -> (B,L,H,E), None. Registered under a name
    of its own, it is handed no mask, so what one batch size captured fits any other.
    """
    if attention_mask is not None:
        raise ValueError("padding masks are not supported: contexts are packed, without padding")
    softcap, window = options.get("softcap"), options.get("sliding_window")
    length = query.shape[2]
    if softcap and torch.compiler.is_compiling() and (length, window) in _BLOCK_MASKS:
        out_BHLE = _flex(query, key, value, _BLOCK_MASKS[length, window], scaling, softcap)
        return out_BHLE.transpose(1, 2).contiguous(), None
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


_BLOCK_MASKS = {}  # (length, sliding window or None) -> flex attention's mask


def prepare_flex(length: int, windows, device) -> None:
    """Make the masks with which compiled blocks on CUDA use flex attention at this length."""
    from torch.nn.attention.flex_attention import create_block_mask

    for window in windows:
        if (length, window) not in _BLOCK_MASKS:
            _BLOCK_MASKS[length, window] = create_block_mask(
                _causal_within(window or length), None, None, length, length, device=device
            )


def _causal_within(reach: int):
    """A mask of flex attention. A closure: the compiler does not look at a default argument."""
    return lambda batch, head, q, k: (q >= k) & (q - k < reach)


def forget_flex() -> None:
    """Blocks compiled from here on use plain attention, until masks are made again."""
    _BLOCK_MASKS.clear()


def _flex(query, key, value, block_mask, scaling, softcap):
    """_softcapped without its (L, L) scores in memory; under torch.compile on CUDA."""
    from torch.nn.attention.flex_attention import flex_attention

    def capped(score, batch, head, q, k):  # tanh through exp, which has an instruction
        return softcap * (2 * torch.sigmoid(2 / softcap * score) - 1)

    return flex_attention(query, key, value, capped, block_mask, scale=scaling, enable_gqa=True)


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


# With fewer than F / SPARSE_UNDER latents a token, a TopK SAE's decoder and gradients are made from
# those alone; with more, dense products are faster. Counted from bytes and FLOPs, not measured.
SPARSE_UNDER = 160


def sparse_pays(cuda: bool, k: int, d_sae: int) -> bool:
    return cuda and k * SPARSE_UNDER <= d_sae


def sparse_topk(x_ND, W_enc_FD, b_enc_F, W_dec_FD, b_dec_D, k: int):
    """A TopK SAE: y_ND float32, z_NF without a gradient. Products in autocast's dtype."""
    import triton_ops

    device = x_ND.device.type
    half = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if half else torch.float32
    weights = (W_enc_FD, b_enc_F, W_dec_FD, b_dec_D)
    return triton_ops.SparseTopK.apply(x_ND, *weights, k, dtype)
