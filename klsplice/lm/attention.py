"""Causal attention with softcaps and sliding windows, on CUDA through flex attention.

Where an LM has no softcap, or is on a CPU, its own attention is used.
Shapes: B sequences, L positions, H heads, E head width.
"""

import torch
from einops import repeat

NAME = "klsplice"  # under which transformers finds `attention`
KNOWN = {"dropout", "is_causal", "position_ids", "cache_position", "use_cache"}  # change nothing

# Contexts up to which attention with a backward pass is plain: Gemma-2-2B's at 2 x 1,024 takes
# 0.23 ms on an H100, in flex attention 0.36 to 0.47. Its (L, L) scores are kept for the gradient.
SHORT = 1024
FLEX_OPTIONS = {  # 0.36 instead of 0.47
    **{"bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 64},
    **{"bwd_num_warps": 8, "bwd_num_stages": 2},
}


def implementation(config, device: str) -> str | None:
    """Which attention to load an LM with: NAME where ours is exact and pays, None for its own."""
    softcap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return NAME if softcap and torch.device(device).type == "cuda" else None


def attention(
    module, query, key, value, attention_mask, *, scaling, softcap, sliding_window=None, **more
):
    """Causal attention for transformers: softcap, sliding window, grouped heads.

    query (B, H, L, E), key and value (B, H / groups, L, E) -> (B, L, H, E), None. Registered under
    a name of its own it is handed no mask. Raises ValueError where there is a padding mask, or a
    keyword that may ask for something else.
    """
    if attention_mask is not None:
        raise ValueError("padding masks are not supported: contexts are packed, without padding")
    if unknown := sorted(n for n, v in more.items() if v is not None and n not in KNOWN):
        raise ValueError(f"attention with {', '.join(unknown)} is not supported")
    length = query.shape[2]
    pays = torch.compiler.is_compiling() and (length > SHORT or not torch.is_grad_enabled())
    if pays and (length, sliding_window) in _BLOCK_MASKS:
        mask = _BLOCK_MASKS[length, sliding_window]
        out_BHLE = _flex(query, key, value, mask, scaling, softcap)
    else:
        i_L = torch.arange(length, device=query.device)
        distance_LL = i_L[:, None] - i_L[None, :]
        mask_LL = (distance_LL >= 0) & (distance_LL < (sliding_window or length))
        out_BHLE = _softcapped(query, key, value, mask_LL, scaling, softcap)
    return out_BHLE.transpose(1, 2).contiguous(), None


_BLOCK_MASKS = {}  # (length, sliding window or None) -> flex attention's mask


def flex_windows(lm) -> tuple:
    """The sliding windows (None for none) with which an LM on CUDA uses flex attention."""
    if lm.config._attn_implementation != NAME or lm.device.type != "cuda":
        return ()
    return None, getattr(lm.config.get_text_config(), "sliding_window", None)


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


def _flex(query, key, value, block_mask, scaling, softcap):
    """_softcapped without its (L, L) scores in memory; under torch.compile on CUDA."""
    from torch.nn.attention.flex_attention import flex_attention

    def capped(score, batch, head, q, k):  # tanh through exp, which has an instruction
        return softcap * (2 * torch.sigmoid(2 / softcap * score) - 1)

    how = {"scale": scaling, "enable_gqa": True, "kernel_options": FLEX_OPTIONS}
    return flex_attention(query, key, value, capped, block_mask, **how)


def _softcapped(query, key, value, mask_LL, scaling, softcap):
    """softmax(cap tanh(q k / cap)) v with the softmax in float32, as Gemma-2 was trained."""
    groups = query.shape[1] // key.shape[1]
    key, value = (repeat(x, "b h l e -> b (h g) l e", g=groups) for x in (key, value))
    score_BHLL = query @ key.transpose(2, 3) * scaling
    score_BHLL = softcap * torch.tanh(score_BHLL / softcap)
    score_BHLL = score_BHLL.masked_fill(~mask_LL, float("-inf"))
    return score_BHLL.softmax(-1, dtype=torch.float32).to(query.dtype) @ value
