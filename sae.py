"""Sparse autoencoders, one small class an activation; ARCHITECTURES has their public names.

Shapes: N tokens, D residual width, F latents, K active latents a token. Weights are W_enc_FD,
b_enc_F, W_dec_FD, b_dec_D for all of them: a latent is one row of each.
"""

import torch
from einops import rearrange, reduce
from torch import nn

from klsplice import distributed
from klsplice.architectures import ARCHITECTURES
from klsplice.formats.folds import unit_rows
from klsplice.kernels import topk as kernels
from klsplice.kernels.jump import JumpSTE
from klsplice.trainable import Trainable


class SAE(Trainable):
    """y = z W_dec + b_dec with z = activate((x - b_dec) W_enc^T + b_enc); subclasses give activate.

    weights: dict of float32 tensors W_enc_FD, b_enc_F, W_dec_FD, b_dec_D and what the class adds.
    Adapters and LoRA rely on encoder_product and decoder_product being the only products.
    """

    architecture: str  # its row in ARCHITECTURES
    unit_norm = True  # decoder rows are kept at norm 1 while training
    centred = True  # the encoder reads x - b_dec
    # Every buffer that its reconstruction depends on; to_save has them, too. CACHE knows an
    # evaluation by these and the parameters.
    decides: tuple[str, ...] = ()

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        for name in ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D"):
            setattr(self, name, nn.Parameter(weights[name].float().contiguous()))
        self.register_buffer("b_pre_D", None)  # of a frozen encoder: what it subtracts, not b_dec

    @classmethod
    def of(cls, source, weights: dict) -> "SAE":
        """source: formats.read.Source, with k and l1."""
        return cls(weights)

    @property
    def d_sae(self) -> int:
        return len(self.W_dec_FD)

    def freeze(self, part: str) -> None:
        """Leave a part as it is. part: "encoder", "decoder" or "none".

        A frozen encoder that reads x - b_dec goes on subtracting the b_dec that it had, so that
        each latent fires on the tokens on which it did."""
        decoder = {"W_dec_FD", "b_dec_D"}
        for name, p in self.named_parameters():
            if part == ("decoder" if name in decoder else "encoder"):
                p.requires_grad_(False)
        if part == "encoder" and self.centred:
            self.b_pre_D = self.b_dec_D.detach().clone()
            self.decides = (*self.decides, "b_pre_D")

    @torch.no_grad()
    def to_save(self) -> dict[str, torch.Tensor]:
        """What a file holds of it, by our names, on the CPU.

        There the encoder subtracts b_dec: of a frozen one b_enc has the difference."""
        names = ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D")
        weights = {name: _saved(getattr(self, name)) for name in names}
        if self.b_pre_D is not None:
            moved_D = weights["b_dec_D"] - _saved(self.b_pre_D)
            weights["b_enc_F"] += weights["W_enc_FD"] @ moved_D
        return weights

    def forward(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-> reconstruction y_ND, latents z_NF."""
        z_NF = self.encode(x_ND)
        return self.decode(z_NF), z_NF

    def encode(self, x_ND: torch.Tensor) -> torch.Tensor:
        return self.activate(self.pre_activation(x_ND))

    def pre_activation(self, x_ND: torch.Tensor) -> torch.Tensor:
        if not self.centred:
            return self.encoder_product(x_ND.to(self.W_enc_FD.dtype))
        return self.encoder_product(x_ND - (self.b_dec_D if self.b_pre_D is None else self.b_pre_D))

    def encoder_product(self, x_ND: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x_ND, self.W_enc_FD, self.b_enc_F)

    def activate(self, pre_NF: torch.Tensor) -> torch.Tensor:
        """-> z_NF, 0 or more: L0, dead latents and AUXK count those over 0."""
        raise NotImplementedError

    def decode(self, z_NF: torch.Tensor) -> torch.Tensor:
        return self.decoder_product(z_NF) + self.b_dec_D

    def decoder_product(self, z_NF: torch.Tensor) -> torch.Tensor:
        return z_NF @ self.W_dec_FD

    @torch.no_grad()
    def before_clip(self) -> None:
        """Remove the part of the decoder's gradient that would only change the norm of its rows."""
        if self.unit_norm and self.W_dec_FD.grad is not None:
            g_FD, W_FD = self.W_dec_FD.grad, self.W_dec_FD
            g_FD -= reduce(g_FD * W_FD, "f d -> f 1", "sum") * W_FD

    @torch.no_grad()
    def renormalise(self) -> None:
        """Bring the decoder's rows, which an update moved, back to norm 1."""
        if self.unit_norm and self.W_dec_FD.requires_grad:
            self.W_dec_FD /= self.W_dec_FD.norm(dim=1, keepdim=True)


def _saved(t: torch.Tensor) -> torch.Tensor:
    return t.detach().float().cpu().clone()


class KSparse(SAE):
    """What TopK and BatchTopK share: k, an auxiliary loss for dead latents, a threshold.

    auxk: weight of the error that the dead latents make on what the living ones leave; a latent is
    dead after `dead_after` tokens without firing (arXiv 2406.04093).
    """

    def __init__(self, weights: dict, *, k: int):
        super().__init__(weights)
        self.k = k
        self.auxk, self.dead_after = 0.0, 0
        self.register_buffer("silent_F", torch.zeros(len(self.b_enc_F), dtype=torch.int64))
        threshold = torch.as_tensor(weights.get("threshold", -1.0), dtype=torch.float32)
        self.register_buffer("threshold", threshold.clone())

    @classmethod
    def of(cls, source, weights):
        return cls(weights, k=source.k)

    def to_save(self):
        further = {
            "k": torch.tensor(self.k, dtype=torch.int32),
            "threshold": _saved(self.threshold),
        }
        return super().to_save() | further

    def extra(self, x_ND, y_ND, z_NF):
        dead_F = self.silent_F >= self.dead_after
        if not self.auxk or not dead_F.any():
            return None
        left_ND = (x_ND - y_ND).detach().float()
        pre_NF = self.pre_activation(x_ND).masked_fill(~dead_F, float("-inf"))
        aux_NF = kernels.topk(pre_NF, min(x_ND.shape[1] // 2, len(dead_F)))
        return self.auxk * (self.decoder_product(aux_NF) - left_ND).square().mean(-1)

    @torch.no_grad()
    def after_step(self, l0, fired_F, tokens):
        self.silent_F += tokens
        self.silent_F.masked_fill_(fired_F, 0)


class TopK(KSparse):
    """The k largest pre-activations of each token (arXiv 2406.04093).

    Its threshold decides nothing here; libraries that read the file may use it.
    """

    architecture = "topk"

    def forward(self, x_ND):
        # the kernels do just this: no subclass, no auxiliary loss, which asks for dense latents
        kernel = type(self) is TopK and self.training and not self.auxk
        if not kernel or not kernels.sparse_pays(x_ND.is_cuda, self.k, self.d_sae):
            return super().forward(x_ND)
        weights = (self.W_enc_FD, self.b_enc_F, self.W_dec_FD)
        if self.b_pre_D is None:
            return kernels.sparse_topk(x_ND, *weights, self.b_dec_D, self.k)
        y_ND, z_NF = kernels.sparse_topk(x_ND, *weights, self.b_pre_D, self.k)
        return y_ND + (self.b_dec_D - self.b_pre_D), z_NF

    def activate(self, pre_NF):
        return kernels.topk(pre_NF, self.k)

    def end(self, after):
        self.threshold.fill_(after["smallest_active"])


class BatchTopK(KSparse):
    """The k N largest of a micro-batch of N tokens while training, else those over `threshold`.

    arXiv 2412.06410. threshold: a running mean of the smallest activation kept in a micro-batch.
    """

    architecture = "batchtopk"
    decides = ("threshold",)

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
        all_1E = rearrange(z_NF, "n f -> 1 (n f)")
        kept = kernels.topk(all_1E, self.k * len(z_NF)).view_as(z_NF)
        positive = kept.detach().masked_fill(kept <= 0, float("inf"))
        # of no token at all there is none: after_step passes over what is not finite
        smallest = positive.min() if len(z_NF) else positive.new_tensor(float("inf"))
        self.smallest.append(smallest.float())
        return kept

    @torch.no_grad()
    def after_step(self, l0, fired_F, tokens):
        super().after_step(l0, fired_F, tokens)
        if not self.W_enc_FD.requires_grad:  # a frozen encoder keeps its threshold
            self.smallest = []
        for smallest in distributed.all_gather(torch.stack(self.smallest)) if self.smallest else ():
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

    @classmethod
    def of(cls, source, weights):
        return cls(weights, k=source.k, groups=weights["group_sizes"].tolist())

    def to_save(self):
        return super().to_save() | {"group_sizes": torch.tensor(self.groups, dtype=torch.int64)}

    def error(self, x_ND, y_ND, z_NF):
        errors, part_ND, start = [super().error(x_ND, y_ND, z_NF)], self.b_dec_D, 0
        for size in self.groups[:-1]:
            group = slice(start, start + size)
            start += size
            part_ND = part_ND + z_NF[:, group] @ self.W_dec_FD[group]
            errors.append(super().error(x_ND, part_ND.float(), z_NF))
        return torch.stack(errors).mean(0)


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

    def to_save(self):
        weights = super().to_save() | {"threshold": _saved(self.threshold_F)}
        unit_rows(weights)  # the scale of a latent is free, and libraries expect rows of norm 1
        return weights

    def activate(self, pre_NF):
        return JumpSTE.apply(pre_NF, self.threshold_F, self.WIDTH)

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

    decides = ("scale",)

    def __init__(self, weights: dict, *, l1: float):
        super().__init__(weights)
        self.l1, self.wanted_l0 = l1, None  # of a fresh one; else the L0 before training
        for name, value in (("scale", 1.0), ("penalty", l1), ("target_l0", 0.0)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32))

    @classmethod
    def of(cls, source, weights):
        return cls(weights, l1=source.l1 or 0.0)

    def to_save(self):
        """In the folded form, which every library reads alike."""
        self.unscale()
        weights = super().to_save()
        unit_rows(weights)
        return weights

    def begin(self, before):
        target = before["l0"] if self.wanted_l0 is None else self.wanted_l0
        self.scale_by(before["mean_square_norm"] ** 0.5, target)

    @torch.no_grad()
    def scale_by(self, scale: float, target_l0: float) -> None:
        """From here on the weights are those for x / scale; `unscale` undoes it."""
        for bias in (self.b_enc_F, self.b_dec_D, self.b_pre_D):
            if bias is not None:
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
        if not self.W_enc_FD.requires_grad:  # frozen: L0 is what it was
            return None
        return self.penalty * (z_NF.float() * self.W_dec_FD.norm(dim=1)).sum(-1)

    @torch.no_grad()
    def after_step(self, l0, fired_F, tokens):
        self.penalty *= torch.where(l0 < self.target_l0, 0.999, 1.001)

    def problem(self):
        penalty = self.penalty.item()
        if self.l1 / 1000 <= penalty <= 1000 * self.l1:
            return None
        return f"the L1 penalty went from {self.l1:.3g} to {penalty:.3g} and L0 does not follow"


CLASSES = {"topk": TopK, "batchtopk": BatchTopK, "matryoshka": Matryoshka}
CLASSES |= {"jumprelu": JumpReLU, "relu": ReLU}
assert CLASSES.keys() == ARCHITECTURES.keys(), "each class has a row in klsplice/architectures.py"
assert all(c.architecture == name for name, c in CLASSES.items()), "architecture is its row's name"


def build(source, weights: dict) -> SAE:
    """The module of source.architecture (formats.read.Source) around `weights`."""
    return CLASSES[source.architecture].of(source, weights)
