"""Causal attention for LMs with softcaps and sliding windows, on CUDA through flex attention.

Shapes: B sequences, L positions, H heads, E head width.
"""

import torch
from einops import repeat
from torch import nn

NAME = "klsplice"  # under which transformers finds `attention`


def attention(module, query, key, value, attention_mask, *, scaling, **options):
    """Causal attention for transformers: softcap, sliding window, grouped heads.

    query (B, H, L, E), key and value (B, H / groups, L, E) -> (B, L, H, E), None. Registered under
    a name of its own it is handed no mask. Raises ValueError where there is a padding mask.
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


def flex_windows(lm) -> tuple:
    """The sliding windows (None for none) with which an LM on CUDA uses flex attention."""
    text = lm.config.get_text_config()
    if lm.device.type != "cuda" or not getattr(text, "attn_logit_softcapping", None):
        return ()
    return None, getattr(text, "sliding_window", None)


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
    key, value = (repeat(x, "b h l e -> b (h g) l e", g=groups) for x in (key, value))
    score_BHLL = query @ key.transpose(2, 3) * scaling
    score_BHLL = softcap * torch.tanh(score_BHLL / softcap)
    score_BHLL = score_BHLL.masked_fill(~mask_LL, float("-inf"))
    return score_BHLL.softmax(-1, dtype=torch.float32).to(query.dtype) @ value
