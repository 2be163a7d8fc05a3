"""The LM's output head: logits, the KL of two hidden states with its gradient, cross-entropies.

Shapes: N tokens, D residual width, V vocabulary, E = D and a column of ones.
"""

from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from klsplice.errors import UserError
from klsplice.kernels.kl import kl_sweep

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # in configs


class Head:
    """The LM's output head: logits = cap(scale (h W^T + b)), cap(z) = softcap tanh(z / softcap).

    W_VD, bias_V: the unembedding, and its bias or None. scale: 1 in most LMs. softcap: 0 for none.
    chunk: how many tokens' logits exist at a time.
    """

    def __init__(self, W_VD: torch.Tensor, *, softcap: float, chunk: int, bias_V=None, scale=1.0):
        self.W_VD, self.bias_V, self.scale, self.softcap = W_VD, bias_V, scale, softcap
        self.chunk = chunk
        self._W1_VE = _widen_in_place(W_VD, bias_V) if W_VD.dtype.itemsize == 2 else None
        self._wide_W_VD, self._rooms = None, {}

    @classmethod
    @torch.no_grad()
    def of(cls, lm, h_ND: torch.Tensor, logits_NV: torch.Tensor, *, chunk: int) -> "Head":
        """The head of a causal LM of transformers.

        h_ND, logits_NV: hidden states and what the LM makes of them, from which the scale is found:
        it has another name in each family. Raises UserError where they do not fit together.
        """
        layer, text = lm.get_output_embeddings(), lm.config.get_text_config()
        softcap = next((cap for name in SOFTCAPS if (cap := getattr(text, name, None))), 0.0)
        if layer is None or logits_NV.shape[1] != len(layer.weight):
            what = f"{type(lm).__name__} has no output embeddings of all its words"
            raise UserError(what, "wanted a causal LM whose head is one product")
        bias_V = getattr(layer, "bias", None)
        head = cls(layer.weight, bias_V=bias_V, softcap=softcap, chunk=chunk)
        head.scale = _scale(head.product(h_ND, torch.float32), logits_NV, softcap, text.to_dict())
        return head

    @property
    def after_product(self) -> dict:
        """What stands between the product and the logits, for kl_sweep."""
        return {"scale": self.scale, "softcap": self.softcap}

    def logits(self, h_ND: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """h_ND -> logits_NV in float32; `dtype` is what the product is rounded to.

        A bfloat16 product rounds a logit of 20 by 0.06, which is as large as what an SAE changes;
        see shifted.
        """
        return self.finished(self.product(h_ND, dtype).float())

    def finished(self, z: torch.Tensor) -> torch.Tensor:
        """The logits of what `product` gives: scaled, then capped."""
        z = self.scale * z if self.scale != 1 else z
        return self.softcap * torch.tanh(z / self.softcap) if self.softcap else z

    def product(self, h_ND: torch.Tensor, dtype: torch.dtype, out=None) -> torch.Tensor:
        """h W^T + b in `dtype`, or in h's where that is wider. out: the memory for it; see room."""
        z_NV = self._product(h_ND, dtype, out)
        return z_NV if self.bias_V is None else z_NV.add_(self.bias_V)

    def _product(self, h_ND, dtype, out):
        if h_ND.dtype.itemsize >= dtype.itemsize:
            return torch.mm(h_ND, self.W_VD.T, out=out)
        if h_ND.is_cuda:  # bfloat16 in, float32 out: the tensor cores add in float32 anyway
            into = {} if out is None else {"out": out}
            return torch.mm(h_ND, self.W_VD.T, out_dtype=dtype, **into)
        if self._wide_W_VD is None:
            self._wide_W_VD = self.W_VD.to(dtype)
        with _bfloat16_inside(h_ND.dtype):
            return torch.mm(h_ND.to(dtype), self._wide_W_VD.T, out=out)

    def shifted(self, h_ND: torch.Tensor, target_N: torch.Tensor, dtype: torch.dtype, out=None):
        """h W^T + b minus one number a row -> z_NV in `dtype` or in h's; and that number, shift_N.

        In 16 bits that number is the one of target_N, the next token. It is near the largest, so
        those that matter become small and are hardly rounded. One more column of the product, of
        ones in W, subtracts it from the float32 sum before that is rounded; the next one adds b. In
        a wider dtype nothing is subtracted and shift_N is None.
        """
        if torch.promote_types(dtype, h_ND.dtype).itemsize > 2:
            return self.product(h_ND, dtype, out=out), None
        shift_N = (h_ND.float() * self.W_VD[target_N].float()).sum(-1)
        if self.bias_V is not None:
            shift_N += self.bias_V[target_N]
        shift_N, d = shift_N.to(h_ND.dtype), h_ND.shape[1]
        h1_NE = nn.functional.pad(h_ND, (0, self._W1_VE.shape[1] - d))
        h1_NE[:, d], h1_NE[:, d + 1] = -shift_N, 1
        return torch.mm(h1_NE, self._W1_VE.T, out=out), shift_N.float()

    def room(self, name: str, n: int, dtype: torch.dtype) -> torch.Tensor:
        """(n, V), uninitialised, the same memory at each call: fresh pages cost time."""
        room = self._rooms.get(name)
        if room is None or len(room) < n or room.dtype != dtype:
            room = torch.empty((n, len(self.W_VD)), dtype=dtype, device=self.W_VD.device)
            self._rooms[name] = room
        return room[:n]


def _widen_in_place(W_VD: torch.Tensor, bias_V: torch.Tensor | None) -> torch.Tensor:
    """-> W_VD with a column of ones, the bias and 6 columns of zeros beside it, (V, D + 8).

    The LM's own W_VD becomes a view of it, since a second unembedding would take a gigabyte."""
    v, d = W_VD.shape
    width = -(-(d + 8) // 64) * 64  # whole lines of a GPU's cache
    if W_VD.stride() != (width, 1):  # else an earlier Head did
        rows_VE = W_VD.new_zeros(v, width)
        rows_VE[:, :d], rows_VE[:, d] = W_VD, 1
        if bias_V is not None:
            rows_VE[:, d + 1] = bias_V
        W_VD.data = rows_VE[:, :d]
    return W_VD.data.as_strided((v, d + 8), (width, 1))


def _scale(z_NV, logits_NV, softcap: float, config: dict) -> float:
    """What the head's product is multiplied by: 1, a number of the config or its inverse, or else
    what fits best."""
    z_NV, logits_NV = z_NV.double(), logits_NV.double()
    if softcap:
        logits_NV = softcap * torch.atanh((logits_NV / softcap).clamp(-1 + 1e-9, 1 - 1e-9))
    best = ((logits_NV * z_NV).sum() / z_NV.square().sum()).item()
    numbers = [v for v in config.values() if isinstance(v, (int, float)) and v]
    known = [1.0, *numbers, *(1 / v for v in numbers)]
    near = min(known, key=lambda v: abs(v - best))
    return near if abs(near - best) < 2e-3 * abs(best) else best


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


def _clean_chunk(kept: dict | None, start: int, n: int, dtype, head: Head, make):
    """make(memory), or what it made before where the clean side is kept."""
    if kept is None:
        return make(out=head.room("clean", n, dtype))
    if start not in kept:
        kept[start] = make(out=None)
    return kept[start]


class _KLHead(torch.autograd.Function):
    """KL(clean || spliced) a token; the gradient is made beside the value, so logits never stay."""

    @staticmethod
    def forward(ctx, h_spliced_ND, h_clean_ND, target_N, head, dtype, kept):
        kl_N = torch.empty(len(h_spliced_ND), dtype=torch.float32, device=h_spliced_ND.device)
        grad_ND = torch.empty_like(h_spliced_ND) if ctx.needs_input_grad[0] else None
        dtype = torch.promote_types(dtype, h_spliced_ND.dtype)
        for start in range(0, len(h_spliced_ND), head.chunk):
            rows = slice(start, start + head.chunk)
            n = len(h_spliced_ND[rows])
            s_NV = head.room("spliced", n, dtype)
            clean = partial(head.shifted, h_clean_ND[rows], target_N[rows], dtype)
            t_NV, t_shift_N = _clean_chunk(kept, start, n, dtype, head, clean)
            _, s_shift_N = head.shifted(h_spliced_ND[rows], target_N[rows], dtype, out=s_NV)
            shifts = None if t_shift_N is None else (t_shift_N, s_shift_N)
            g_NV = s_NV if grad_ND is not None else None
            if grad_ND is not None and dtype != head.W_VD.dtype:  # logits wider than the weights
                g_NV = head.room("gradient", n, head.W_VD.dtype)
            kl_N[rows], _, _ = kl_sweep(t_NV, s_NV, g_NV, shifts=shifts, **head.after_product)
            if grad_ND is not None:
                torch.mm(g_NV, head.W_VD, out=grad_ND[rows])
        ctx.save_for_backward(grad_ND)
        return kl_N

    @staticmethod
    def backward(ctx, grad_kl_N):
        (grad_ND,) = ctx.saved_tensors
        return (grad_ND.float() * grad_kl_N[:, None]).to(grad_ND.dtype), *[None] * 5


def kl_head(
    h_clean_ND, h_spliced_ND, target_N, head: Head, dtype: torch.dtype, kept: dict | None = None
) -> torch.Tensor:
    """KL(clean || spliced) over the whole vocabulary -> kl_N float32, nats a token.

    h: hidden states after the final norm; differentiable in h_spliced_ND alone. target_N, dtype:
    see Head.shifted. kept: {} for the first that is held against just this h_clean_ND; it fills it
    with the products of its chunks. Without it never more than head.chunk tokens of logits at a
    time.
    """
    return _KLHead.apply(h_spliced_ND, h_clean_ND, target_N, head, dtype, kept)


@torch.no_grad()
def score_head(h_clean_ND, h_other_ND, target_N, head: Head, kept: dict | None = None):
    """-> (kl_N, ce_clean_N, ce_other_N) float64, nats a token, from float32 logits.

    KL(clean || other); ce is the cross-entropy of target_N (token ids; any id where there is none).
    kept: see kl_head.
    """
    parts = []
    for start in range(0, len(h_clean_ND), head.chunk):
        rows = slice(start, start + head.chunk)
        n, dtype = len(h_clean_ND[rows]), torch.promote_types(torch.float32, h_clean_ND.dtype)
        clean = partial(head.product, h_clean_ND[rows], dtype)
        t_NV = _clean_chunk(kept, start, n, dtype, head, clean)
        s_NV = head.product(h_other_ND[rows], dtype, out=head.room("spliced", n, dtype))
        kl_N, t_lse_N, s_lse_N = kl_sweep(t_NV, s_NV, **head.after_product)
        at_N1 = target_N[rows, None]
        ce_clean_N = t_lse_N - head.finished(t_NV.gather(-1, at_N1))[:, 0]
        parts.append((kl_N, ce_clean_N, s_lse_N - head.finished(s_NV.gather(-1, at_N1))[:, 0]))
    return tuple(torch.cat(part) for part in zip(*parts))
