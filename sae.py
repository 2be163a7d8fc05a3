"""Sparse autoencoders, one small class an activation; each says what it is, ARCHITECTURES has them.

Shapes: N tokens, D residual width, F latents, K active latents a token. Weights are W_enc_FD,
b_enc_F, W_dec_FD, b_dec_D for all of them: a latent is one row of each.
"""

import torch
from einops import rearrange, reduce
from torch import nn

from klsplice import distributed
from klsplice.kernels import topk as kernels

ARCHITECTURES: dict[str, type["SAE"]] = {}  # by name; a class is entered as it is made

# Our tensor: a library's name of it, ".T" where it lies transposed.
LINEAR = {"W_enc_FD": "encoder.weight", "b_enc_F": "encoder.bias", "W_dec_FD": "decoder.weight.T"}
MATRIX = {"W_enc_FD": "W_enc.T", "b_enc_F": "b_enc", "W_dec_FD": "W_dec", "b_dec_D": "b_dec"}
THRESHOLD = {"k": "k", "threshold": "threshold"}


class Trainable(nn.Module):
    """Maps the residual x_ND to (reconstruction y_ND, latents z_NF), as an SAE or something around
    one does. These are what the training loop asks of it. o_ND is what y stands in for: x itself,
    or, of a transcoder, what the LM makes of it."""

    def error(self, o_ND, y_ND, z_NF) -> torch.Tensor:
        """The MSE of each token -> (N,): mean over D; a class may have another, as ReLU has."""
        return squared_error(o_ND, y_ND)

    def entry(self) -> float:
        """What a squared error of 1 in each entry counts in `error`."""
        return 1.0

    def extra(self, x_ND, o_ND, y_ND, z_NF) -> torch.Tensor | None:
        """What is added to each token's loss outside LOSS -> (N,), or None."""
        return None

    def begin(self, before: dict) -> None:
        """before: the evaluation before training (eval.py)."""

    def end(self, after: dict) -> None:
        """after: the evaluation after training."""

    def before_clip(self) -> None:
        """Change the gradients before their norm is taken."""

    def renormalise(self) -> None:
        """Put right what an update moved."""

    def after_step(self, l0: torch.Tensor, fired_F: torch.Tensor, tokens: int) -> None:
        """l0: mean of the step; fired_F: which latents did; tokens: how many the step had.

        What is learnt without a gradient changes here, from what `forward` has kept, as BatchTopK
        does: `forward` is also run where no step is made."""

    def problem(self) -> str | None:
        """What has gone wrong in training, if anything; asked when a step is logged."""
        return None


def squared_error(o_ND: torch.Tensor, y_ND: torch.Tensor) -> torch.Tensor:
    """(y - o)^2, mean over D -> (N,)."""
    return (y_ND - o_ND.float()).square().mean(-1)


class SAE(Trainable):
    """y = z W_dec + b_dec with z = activate((x - b_dec) W_enc^T + b_enc); subclasses give activate.

    weights: dict of float32 tensors W_enc_FD, b_enc_F, W_dec_FD, b_dec_D and what the class adds.
    Adapters and LoRA rely on encoder_product and decoder_product being the only products.
    """

    architecture: str  # its name here and in run.py's ARCHITECTURE
    # What libraries call it, None where one has no such class. Subclasses do not inherit these.
    dict_class: str  # in dictionary_learning's config.json, as trainer; else a name of its own
    trainer: str
    saelens: str | None = None
    saebench: str | None = None  # module and loader in sae_bench.custom_saes
    tensors: dict[str, str]  # what to_save returns: its names in dictionary_learning's ae.pt

    has_k = False  # a config says k
    fresh = True  # it can be trained from nothing, and finds the usual four weights alone then
    unit_norm = True  # decoder rows are kept at norm 1 while training: which k win depends on it
    centred = True  # the encoder reads x - b_dec
    is_transcoder = False  # set by `as_transcoder`
    adapts = True  # y = f(z) W_dec + b_dec, as a folded adapter and merged LoRA rely on
    # (topk, threshold, energy_F: see convert.from_topk) -> one with the same L0
    from_topk = None
    # Every buffer that its reconstruction depends on; to_save has them, too. CACHE knows an
    # evaluation by these and the parameters.
    decides: tuple[str, ...] = ()

    def __init_subclass__(cls):
        if "architecture" in vars(cls):
            ARCHITECTURES[cls.architecture] = cls
            own = {"dict_class": cls.__name__, "trainer": f"{cls.__name__}Trainer"}
            for name, value in (own | {"saelens": None, "saebench": None}).items():
                if name not in vars(cls):
                    setattr(cls, name, value)

    @classmethod
    def ours_alone(cls) -> bool:
        """Whether no library has such a class."""
        return cls.saelens is None and cls.saebench is None

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        for name in ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D"):
            setattr(self, name, nn.Parameter(weights[name].float().contiguous()))
        self.register_buffer("b_pre_D", None)  # of a frozen encoder: what it subtracts, not b_dec
        skip_DD = weights.get("W_skip_DD")
        self.W_skip_DD = None if skip_DD is None else nn.Parameter(skip_DD.float().contiguous())
        if skip_DD is not None:
            self.tensors = self.tensors | {"W_skip_DD": "W_skip"}

    @classmethod
    def of(cls, source, weights: dict) -> "SAE":
        """source: formats.source.Source, with k and l1."""
        return cls(weights)

    def as_transcoder(self) -> "SAE":
        """The same, of one whose y stands for something else than x: the encoder reads x itself,
        and decoder rows have the norm that they have."""
        self.is_transcoder, self.centred, self.unit_norm = True, False, False
        return self

    @property
    def d_sae(self) -> int:
        return len(self.W_dec_FD)

    def freeze(self, part: str) -> None:
        """Leave a part as it is. part: "encoder", "decoder" or "none".

        A frozen encoder that reads x - b_dec goes on subtracting the b_dec that it had, so that
        each latent fires on the tokens on which it did."""
        decoder = {"W_dec_FD", "b_dec_D", "W_skip_DD"}
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
        names = ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D", "W_skip_DD")
        there = {name: getattr(self, name) for name in names}
        weights = {name: _saved(t) for name, t in there.items() if t is not None}
        if self.b_pre_D is not None:
            moved_D = weights["b_dec_D"] - _saved(self.b_pre_D)
            weights["b_enc_F"] += weights["W_enc_FD"] @ moved_D
        return weights

    def forward(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-> reconstruction y_ND, latents z_NF."""
        y_ND, z_NF = self.code(x_ND)
        if self.W_skip_DD is not None:
            y_ND = y_ND + nn.functional.linear(x_ND.to(self.W_skip_DD.dtype), self.W_skip_DD)
        return y_ND, z_NF

    def code(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward` without a skip connection."""
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


def copied(sae: SAE) -> dict[str, torch.Tensor]:
    """Its parameters, by name."""
    return {name: t.detach().clone() for name, t in sae.named_parameters()}


def _saved(t: torch.Tensor) -> torch.Tensor:
    return t.detach().float().cpu().clone()


def unit_rows(weights: dict) -> dict:
    """Put the norms of the decoder's rows into the encoder, and into a threshold a latent."""
    norm_F = weights["W_dec_FD"].norm(dim=1).clamp(min=1e-12)
    weights["W_dec_FD"] /= norm_F[:, None]
    weights["W_enc_FD"] *= norm_F[:, None]
    weights["b_enc_F"] *= norm_F
    if "threshold" in weights and weights["threshold"].ndim:
        weights["threshold"] *= norm_F
    return weights


class KSparse(SAE):
    """What TopK and BatchTopK share: k, an auxiliary loss for dead latents, a threshold.

    auxk: weight of the error that the dead latents make on what the living ones leave; a latent is
    dead after `dead_after` tokens without firing (arXiv 2406.04093).
    """

    tensors = LINEAR | {"b_dec_D": "b_dec"} | THRESHOLD
    has_k = True

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

    def extra(self, x_ND, o_ND, y_ND, z_NF):
        dead_F = self.silent_F >= self.dead_after
        if not self.auxk or not dead_F.any():
            return None
        left_ND = (o_ND - y_ND).detach().float()
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
    dict_class, trainer = "AutoEncoderTopK", "TopKTrainer"
    saelens, saebench = "topk", "topk_sae.load_dictionary_learning_topk_sae"

    def code(self, x_ND):
        # the kernels do just this: no subclass, no auxiliary loss, which asks for dense latents
        kernel = type(self) is TopK and self.training and not self.auxk
        if not kernel or not kernels.sparse_pays(x_ND.is_cuda, self.k, self.d_sae):
            return super().code(x_ND)
        weights = (self.W_enc_FD, self.b_enc_F, self.W_dec_FD)
        if self.centred and self.b_pre_D is None:
            return kernels.sparse_topk(x_ND, *weights, self.b_dec_D, self.k)
        b_pre_D = self.b_pre_D if self.centred else torch.zeros_like(self.b_dec_D)
        y_ND, z_NF = kernels.sparse_topk(x_ND, *weights, b_pre_D, self.k)
        return y_ND + (self.b_dec_D - b_pre_D), z_NF

    def activate(self, pre_NF):
        return kernels.topk(pre_NF, self.k)

    def end(self, after):
        self.threshold.fill_(after["smallest_active"])


class BatchTopK(KSparse):
    """The k N largest of a micro-batch of N tokens while training, else those over `threshold`.

    arXiv 2412.06410. threshold: a running mean of the smallest activation kept in a micro-batch.
    """

    architecture = "batchtopk"
    dict_class, trainer = "BatchTopKSAE", "BatchTopKTrainer"
    saelens = "jumprelu"
    saebench = "batch_topk_sae.load_dictionary_learning_batch_topk_sae"
    decides = ("threshold",)

    def __init__(self, weights: dict, *, k: int):
        super().__init__(weights, k=k)
        self.smallest = []  # of the micro-batches since the last step

    @classmethod
    def from_topk(cls, topk: TopK, threshold, energy_F):
        return cls(copied(topk) | {"threshold": threshold}, k=topk.k)

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
    dict_class, trainer = "MatryoshkaBatchTopKSAE", "MatryoshkaBatchTopKTrainer"
    saelens = "jumprelu"
    saebench = "batch_topk_sae.load_dictionary_learning_matryoshka_batch_topk_sae"
    tensors = MATRIX | THRESHOLD | {"group_sizes": "group_sizes"}
    fresh = False

    def __init__(self, weights: dict, *, k: int, groups: list[int]):
        super().__init__(weights, k=k)
        self.groups = groups

    @classmethod
    def of(cls, source, weights):
        return cls(weights, k=source.k, groups=weights["group_sizes"].tolist())

    def to_save(self):
        return super().to_save() | {"group_sizes": torch.tensor(self.groups, dtype=torch.int64)}

    @classmethod
    def from_topk(cls, topk, threshold, energy_F):
        """Latents ordered by energy, in five groups: F/32, F/16, F/8, F/4 and the rest."""
        order_F = energy_F.argsort(descending=True)
        weights = copied(topk) | {"threshold": threshold}
        for name in ("W_enc_FD", "b_enc_F", "W_dec_FD"):
            weights[name] = weights[name][order_F]
        groups = [max(1, topk.d_sae // n) for n in (32, 16, 8, 4)]
        groups.append(topk.d_sae - sum(groups))
        return cls(weights, k=topk.k, groups=groups)

    def error(self, o_ND, y_ND, z_NF):
        errors, part_ND, start = [super().error(o_ND, y_ND, z_NF)], self.b_dec_D, 0
        for size in self.groups[:-1]:
            group = slice(start, start + size)
            start += size
            part_ND = part_ND + z_NF[:, group] @ self.W_dec_FD[group]
            errors.append(super().error(o_ND, part_ND.float(), z_NF))
        return torch.stack(errors).mean(0)


class JumpSTE(torch.autograd.Function):
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
    dict_class, trainer = "JumpReluAutoEncoder", "JumpReluTrainer"
    saelens = "jumprelu"
    saebench = "jumprelu_sae.load_dictionary_learning_jump_relu_sae"
    tensors = MATRIX | {"threshold": "threshold"}
    fresh = False
    unit_norm = False
    centred = False
    WIDTH = 0.1

    def __init__(self, weights: dict):
        super().__init__(weights)
        threshold_F = weights["threshold"].float().contiguous()
        self.threshold_F = nn.Parameter(threshold_F, requires_grad=False)

    @classmethod
    def from_topk(cls, topk, threshold, energy_F):
        """One threshold for all; b_dec, which this encoder does not subtract, is folded."""
        weights = copied(topk)
        weights["b_enc_F"] = weights["b_enc_F"] - weights["W_enc_FD"] @ weights["b_dec_D"]
        weights["threshold"] = threshold.clamp(min=0).expand(topk.d_sae).clone()
        return cls(weights)

    def to_save(self):
        weights = super().to_save() | {"threshold": _saved(self.threshold_F)}
        if not self.is_transcoder:
            unit_rows(weights)  # the scale of a latent is free, and libraries expect norm 1
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
    dict_class, trainer = "AutoEncoder", "StandardTrainerAprilUpdate"
    saelens, saebench = "standard", "relu_sae.load_dictionary_learning_relu_sae"
    tensors = LINEAR | {"b_dec_D": "bias"}
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
        if not self.is_transcoder:
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

    def error(self, o_ND, y_ND, z_NF):
        return ((y_ND - o_ND.float()) / self.scale).square().sum(-1)

    def entry(self):
        return len(self.b_dec_D) / self.scale.item() ** 2

    def extra(self, x_ND, o_ND, y_ND, z_NF):
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


def build(source, weights: dict) -> SAE:
    """The module of source.architecture (formats.source.Source) around `weights`."""
    sae = ARCHITECTURES[source.architecture].of(source, weights)
    return sae.as_transcoder() if source.site.is_transcoder else sae
