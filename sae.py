"""Sparse autoencoders, one small class an activation.

Shapes: N tokens, D residual width, F latents, K active latents a token. Weights are W_enc_FD,
b_enc_F, W_dec_FD, b_dec_D for all of them: a latent is one row of each.
"""

import torch
from torch import nn

import distributed
import ops


class Model(nn.Module):
    """What maps x_ND to (y_ND, z_NF) and may learn; what training asks of it."""

    def error(self, x_ND, y_ND, z_NF) -> torch.Tensor:
        """The MSE of each token -> (N,): mean over D."""
        return squared_error(x_ND, y_ND)

    def extra(self, x_ND, y_ND, z_NF) -> torch.Tensor | None:
        """What is added to each token's loss outside LOSS -> (N,), or None."""
        return None

    def before_clip(self) -> None:
        """Change the gradients before their norm is taken."""

    def renormalise(self) -> None:
        """Put right what an update moved."""

    def after_step(self, l0: torch.Tensor, fired_F: torch.Tensor, tokens: int) -> None:
        """l0: mean of the step; fired_F: which latents did; tokens: how many the step had."""

    def problem(self) -> str | None:
        """What has gone wrong in training, if anything; asked when a step is logged."""
        return None


class SAE(Model):
    """y = z W_dec + b_dec with z = activate((x - b_dec) W_enc^T + b_enc); subclasses give activate.

    weights: dict of float32 tensors W_enc_FD, b_enc_F, W_dec_FD, b_dec_D and what the class adds.
    """

    architecture: str  # its name in ARCHITECTURE
    unit_norm = True  # decoder rows are kept at norm 1 while training
    centred = True  # the encoder reads x - b_dec

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        for name in ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D"):
            setattr(self, name, nn.Parameter(weights[name].float().contiguous()))

    @property
    def d_sae(self) -> int:
        return len(self.W_dec_FD)

    def forward(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-> reconstruction y_ND, latents z_NF."""
        z_NF = self.encode(x_ND)
        return self.decode(z_NF), z_NF

    def encode(self, x_ND: torch.Tensor) -> torch.Tensor:
        return self.activate(self.pre_activation(x_ND))

    def pre_activation(self, x_ND: torch.Tensor) -> torch.Tensor:
        x_ND = x_ND - self.b_dec_D if self.centred else x_ND.to(self.W_enc_FD.dtype)
        return nn.functional.linear(x_ND, self.W_enc_FD, self.b_enc_F)

    def activate(self, pre_NF: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def decode(self, z_NF: torch.Tensor) -> torch.Tensor:
        return z_NF @ self.W_dec_FD + self.b_dec_D

    @torch.no_grad()
    def before_clip(self) -> None:
        """Take the part of the decoder's gradient that would only change the norm of its rows."""
        if self.unit_norm and self.W_dec_FD.grad is not None:
            g_FD, W_FD = self.W_dec_FD.grad, self.W_dec_FD
            g_FD -= (g_FD * W_FD).sum(1, keepdim=True) * W_FD

    @torch.no_grad()
    def renormalise(self) -> None:
        """Bring the decoder's rows, which an update moved, back to norm 1."""
        if self.unit_norm and self.W_dec_FD.requires_grad:
            self.W_dec_FD /= self.W_dec_FD.norm(dim=1, keepdim=True)


def squared_error(x_ND: torch.Tensor, y_ND: torch.Tensor) -> torch.Tensor:
    """(y - x)^2, mean over D -> (N,)."""
    return (y_ND - x_ND.float()).square().mean(-1)


class TopK(SAE):
    """The k largest pre-activations of each token (arXiv 2406.04093).

    auxk: weight of the error that the dead latents make on what the living ones leave; a latent is
    dead after `dead_after` tokens without firing.
    """

    architecture = "topk"

    def __init__(self, weights: dict, *, k: int):
        super().__init__(weights)
        self.k = k
        self.auxk, self.dead_after = 0.0, 0
        self.register_buffer("silent_F", torch.zeros(len(self.b_enc_F), dtype=torch.int64))
        threshold = torch.as_tensor(weights.get("threshold", -1.0), dtype=torch.float32)
        self.register_buffer("threshold", threshold.clone())

    def forward(self, x_ND):
        plain = type(self) is not TopK or self.auxk or not self.training
        if plain or not ops.sparse_pays(x_ND.is_cuda, self.k, self.d_sae):
            return super().forward(x_ND)
        weights = (self.W_enc_FD, self.b_enc_F, self.W_dec_FD, self.b_dec_D)
        return ops.sparse_topk(x_ND, *weights, self.k)

    def activate(self, pre_NF):
        return ops.topk(pre_NF, self.k)

    def extra(self, x_ND, y_ND, z_NF):
        dead_F = self.silent_F >= self.dead_after
        if not self.auxk or not dead_F.any():
            return None
        left_ND = (x_ND - y_ND).detach().float()
        pre_NF = self.pre_activation(x_ND).masked_fill(~dead_F, float("-inf"))
        aux_NF = ops.topk(pre_NF, min(x_ND.shape[1] // 2, len(dead_F)))
        return self.auxk * (aux_NF @ self.W_dec_FD - left_ND).square().mean(-1)

    @torch.no_grad()
    def after_step(self, l0, fired_F, tokens):
        self.silent_F += tokens
        self.silent_F.masked_fill_(fired_F, 0)


class BatchTopK(TopK):
    """The k N largest of a micro-batch of N tokens while training, else those over `threshold`.

    arXiv 2412.06410. threshold: a running mean of the smallest activation kept in a micro-batch.
    """

    architecture = "batchtopk"

    def __init__(self, weights: dict, *, k: int):
        super().__init__(weights, k=k)
        self.smallest = []  # of the micro-batches since the last step

    def train(self, mode: bool = True):
        self.smallest = []
        return super().train(mode)

    def activate(self, pre_NF):
        z_NF = pre_NF.relu()
        if not self.training:
            return z_NF * (z_NF > self.threshold)
        kept = ops.topk(z_NF.flatten()[None], self.k * len(z_NF)).view_as(z_NF)
        positive = kept.detach().masked_fill(kept <= 0, float("inf"))
        self.smallest.append(positive.min().float())
        return kept

    @torch.no_grad()
    def after_step(self, l0, fired_F, tokens):
        super().after_step(l0, fired_F, tokens)
        for smallest in distributed.gathered(torch.stack(self.smallest)):
            old = self.threshold
            fresh = torch.where(old < 0, smallest, 0.99 * old + 0.01 * smallest)
            self.threshold.copy_(torch.where(smallest.isfinite(), fresh, old))
        self.smallest = []


class Matryoshka(BatchTopK):
    """BatchTopK whose first latents alone must reconstruct too (arXiv 2503.17547).

    groups: sizes of the nested groups, summing to F; the MSE is the mean over the nested prefixes.
    """

    architecture = "matryoshka"

    def __init__(self, weights: dict, *, k: int, groups: list[int]):
        super().__init__(weights, k=k)
        self.groups = groups

    def error(self, x_ND, y_ND, z_NF):
        errors, part_ND, start = [super().error(x_ND, y_ND, z_NF)], self.b_dec_D, 0
        for size in self.groups[:-1]:
            rows = slice(start, start := start + size)
            part_ND = part_ND + z_NF[:, rows] @ self.W_dec_FD[rows]
            errors.append(super().error(x_ND, part_ND.float(), z_NF))
        return torch.stack(errors).mean(0)


class _JumpSTE(torch.autograd.Function):
    """z = relu(pre (pre > threshold)); the threshold's gradient as in arXiv 2407.14435, eq. 11.

    The relu is in here: after it, the gradient would miss what lies just under the threshold.
    """

    @staticmethod
    def forward(ctx, pre_NF, threshold_F, width):
        ctx.save_for_backward(pre_NF, threshold_F)
        ctx.width = width
        return pre_NF * (pre_NF > threshold_F.clamp(min=0))

    @staticmethod
    def backward(ctx, g_NF):
        pre_NF, threshold_F = ctx.saved_tensors
        g_pre_NF, g_threshold_F = g_NF * (pre_NF > threshold_F.clamp(min=0)), None
        if ctx.needs_input_grad[1]:
            band_F = ctx.width * threshold_F.clamp(min=1e-6)
            near_NF = (pre_NF - threshold_F).abs() < band_F / 2
            g_threshold_F = (-g_NF * near_NF).sum(0) * threshold_F / band_F
            g_threshold_F = g_threshold_F.to(threshold_F.dtype)
        return g_pre_NF, g_threshold_F, None


class JumpReLU(SAE):
    """What is over a latent's own threshold passes (arXiv 2407.14435). The encoder reads x itself.

    Thresholds are frozen unless they require a gradient; then it is straight-through, with a
    rectangle kernel as wide as WIDTH times the threshold.
    """

    architecture = "jumprelu"
    unit_norm = False
    centred = False
    WIDTH = 0.1

    def __init__(self, weights: dict):
        super().__init__(weights)
        threshold_F = weights["threshold"].float().contiguous()
        self.threshold_F = nn.Parameter(threshold_F, requires_grad=False)

    def activate(self, pre_NF):
        return _JumpSTE.apply(pre_NF, self.threshold_F, self.WIDTH)

    @torch.no_grad()
    def after_step(self, l0, fired_F, tokens):
        self.threshold_F.clamp_(min=0)  # a file with a negative one is refused


class ReLU(SAE):
    """relu, with an L1 penalty steered so that L0 stays what it was.

    In training (after `scale_by`) it works on x / scale: the MSE is summed over D and the L1 is
    weighted by decoder norms, both in that space, and after each step the penalty is multiplied by
    0.999 if the batch's L0 is under the target and by 1.001 otherwise.
    """

    architecture = "relu"
    unit_norm = False

    def __init__(self, weights: dict, *, l1: float):
        super().__init__(weights)
        self.l1 = l1
        for name, value in (("scale", 1.0), ("penalty", l1), ("target_l0", 0.0)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32))

    @torch.no_grad()
    def scale_by(self, scale: float, target_l0: float) -> None:
        """From here on the weights are those for x / scale; `unscale` gives them back."""
        for bias in (self.b_enc_F, self.b_dec_D):
            bias /= scale / self.scale
        self.scale.fill_(scale)
        self.target_l0.fill_(target_l0)

    def unscale(self) -> None:
        self.scale_by(1.0, self.target_l0.item())

    def pre_activation(self, x_ND):
        return super().pre_activation(x_ND.float() / self.scale)

    def activate(self, pre_NF):
        return pre_NF.relu()

    def decode(self, z_NF):
        return super().decode(z_NF) * self.scale

    def error(self, x_ND, y_ND, z_NF):
        return ((y_ND - x_ND.float()) / self.scale).square().sum(-1)

    def extra(self, x_ND, y_ND, z_NF):
        return self.penalty * (z_NF.float() * self.W_dec_FD.norm(dim=1)).sum(-1)

    @torch.no_grad()
    def after_step(self, l0, fired_F, tokens):
        self.penalty *= torch.where(l0 < self.target_l0, 0.999, 1.001)

    def problem(self):
        penalty = self.penalty.item()
        if self.l1 / 1000 <= penalty <= 1000 * self.l1:
            return None
        return f"the L1 penalty went from {self.l1:.3g} to {penalty:.3g} and L0 does not follow"


@torch.no_grad()
def _fitted(sae: TopK, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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
