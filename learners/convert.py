"""A TopK SAE as another architecture with the same L0, and the weights of a fresh SAE.

Shapes as in sae.py.
"""

import torch

from sae import SAE, BatchTopK, KSparse, TopK


def fresh_weights(
    *, d_in: int, d_sae: int, mean_D: torch.Tensor, generator: torch.Generator
) -> dict:
    """Tied random unit rows, zero encoder bias, decoder bias at the mean residual."""
    W_FD = torch.randn(d_sae, d_in, generator=generator)
    W_FD /= W_FD.norm(dim=1, keepdim=True)
    zero_F = torch.zeros(d_sae)
    return {
        "W_enc_FD": W_FD.clone(),
        "b_enc_F": zero_F,
        "W_dec_FD": W_FD,
        "b_dec_D": mean_D.clone(),
    }


def transcoder_of(weights: dict, *, mean_out_D: torch.Tensor) -> dict:
    """Fresh weights whose decoder starts at zero, with the mean of what it stands in for."""
    zero_FD = torch.zeros_like(weights["W_dec_FD"])
    b_enc_F = -weights["W_enc_FD"] @ weights["b_dec_D"]  # it subtracts the mean that it reads
    return weights | {"b_enc_F": b_enc_F, "W_dec_FD": zero_FD, "b_dec_D": mean_out_D.clone()}


@torch.no_grad()
def from_topk(kind: type[SAE], topk: TopK, x_ND: torch.Tensor) -> SAE:
    """An SAE of the class `kind`, which has a `from_topk`, whose L0 on x_ND is k."""
    return kind.from_topk(topk, *threshold_and_energy(topk, x_ND))


@torch.no_grad()
def fit_threshold(sae: BatchTopK, x_ND: torch.Tensor) -> None:
    """Of an SAE that was saved without one: L0 on x_ND is k then."""
    sae.threshold.copy_(threshold_and_energy(sae, x_ND)[0])


@torch.no_grad()
def threshold_and_energy(sae: KSparse, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> the threshold over which k pre-activations a token lie, and the latents' energy_F.

    Only the largest are kept: 64 contexts of 1024 tokens have 17 GB of pre-activations at F 65k.
    """
    wanted = sae.k * len(x_ND) + 1  # the last is the threshold
    top, latent = torch.empty(0), torch.empty(0, dtype=torch.int64)
    for part_ND in x_ND.split(1024):
        pre = sae.pre_activation(part_ND).flatten()
        value, index = pre.topk(min(wanted, len(pre)), sorted=False)
        top, latent = torch.cat([top, value]), torch.cat([latent, index % sae.d_sae])
        top, index = top.topk(min(wanted, len(top)), sorted=False)
        latent = latent[index]
    threshold = top.min()
    energy = top.square() * (top > threshold)
    return threshold, torch.zeros(sae.d_sae).index_add(0, latent, energy)
