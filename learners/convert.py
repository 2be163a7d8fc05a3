"""A TopK SAE as another architecture with the same L0, and the weights of a fresh SAE.

Shapes as in sae.py.
"""

import torch

from sae import BatchTopK, JumpReLU, KSparse, Matryoshka, TopK


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


@torch.no_grad()
def fit_threshold(sae: BatchTopK, x_ND: torch.Tensor) -> None:
    """Of an SAE that was saved without one: L0 on x_ND is k then."""
    sae.threshold.copy_(_fitted(sae, x_ND)[0])


@torch.no_grad()
def _fitted(sae: KSparse, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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


@torch.no_grad()
def jumprelu_from_topk(sae: TopK, x_ND: torch.Tensor) -> JumpReLU:
    """One threshold for all; b_dec, which a JumpReLU encoder does not subtract, is folded."""
    threshold, _ = _fitted(sae, x_ND)
    weights = dict(sae.named_parameters())
    weights["b_enc_F"] = sae.b_enc_F - sae.W_enc_FD @ sae.b_dec_D
    weights["threshold"] = threshold.clamp(min=0).expand(sae.d_sae).clone()
    return JumpReLU({name: t.detach().clone() for name, t in weights.items()})


@torch.no_grad()
def batchtopk_from_topk(sae: TopK, x_ND: torch.Tensor) -> BatchTopK:
    threshold, _ = _fitted(sae, x_ND)
    weights = {name: t.detach().clone() for name, t in sae.named_parameters()}
    return BatchTopK(weights | {"threshold": threshold}, k=sae.k)


@torch.no_grad()
def matryoshka_from_topk(sae: TopK, x_ND: torch.Tensor) -> Matryoshka:
    """Latents ordered by energy, in five groups that double: F/32, F/16, F/8, F/4 and the rest."""
    threshold, energy_F = _fitted(sae, x_ND)
    order_F = energy_F.argsort(descending=True)
    weights = {n: t.detach().clone() for n, t in sae.named_parameters()}
    for name in ("W_enc_FD", "b_enc_F", "W_dec_FD"):
        weights[name] = weights[name][order_F]
    groups = [max(1, sae.d_sae // n) for n in (32, 16, 8, 4)]
    groups.append(sae.d_sae - sum(groups))
    return Matryoshka(weights | {"threshold": threshold}, k=sae.k, groups=groups)


FROM_TOPK = {
    "jumprelu": jumprelu_from_topk,
    "batchtopk": batchtopk_from_topk,
    "matryoshka": matryoshka_from_topk,
}
