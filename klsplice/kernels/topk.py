"""The k largest latents of each token, and a TopK SAE that works on those alone.

Shapes: N tokens, D residual width, F latents, K active latents a token.
"""

import torch


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
    from klsplice.kernels.triton_sae import SparseTopK

    device, dtype = x_ND.device.type, torch.float32
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return SparseTopK.apply(x_ND, W_enc_FD, b_enc_F, W_dec_FD, b_dec_D, k, dtype)
