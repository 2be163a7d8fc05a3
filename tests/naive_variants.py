"""The variants of the method in their plainest form, as yardsticks beside tests/naive.py: other
activations, adapters, LoRA. Two full forward passes, full logits, dense products, torch's AdamW.

Shapes: B sequences, L positions, N tokens not kept, D residual width, F latents, R rank,
V vocabulary. Tensors are W_enc (F, D), b_enc (F), W_dec (F, D), b_dec (D) everywhere.
"""

import copy

import naive
import torch
from torch import nn

ATTENTION = {"llama": "q_proj k_proj v_proj o_proj", "gpt_neox": "query_key_value dense"}
MLP = {"llama": "gate_proj up_proj down_proj", "gpt_neox": "dense_h_to_4h dense_4h_to_h"}


class NaiveSAE(nn.Module):
    """x_ND -> (y_ND, z_NF); subclasses give `encode`, and what differs in the loss and the step."""

    unit_rows = False  # decoder gradient off its rows, rows renormalised

    def __init__(self, tensors):
        super().__init__()
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            self.register_parameter(name, nn.Parameter(tensors[name].detach().clone()))

    def forward(self, x_ND):
        z_NF = self.encode(x_ND)
        return z_NF @ self.W_dec + self.b_dec, z_NF

    def mse(self, x_ND, y_ND, z_NF):
        return (y_ND - x_ND).pow(2).mean()

    def addend(self, x_ND, y_ND, z_NF):
        """What is added to the loss of LOSS."""
        return 0.0

    def after_step(self, z_NF):
        pass


class TopK(NaiveSAE):
    """k latents a token; with auxk, dead ones learn what the others leave of the residual."""

    unit_rows = True

    def __init__(self, tensors, *, k, auxk=0.0, dead_after=0):
        super().__init__(tensors)
        self.k, self.auxk, self.dead_after = k, auxk, dead_after
        self.silent = [0] * len(self.b_enc)  # tokens since a latent fired
        self.dead_counts = []  # how many were dead, a step

    def pre(self, x_ND):
        return (x_ND - self.b_dec) @ self.W_enc.T + self.b_enc

    def encode(self, x_ND):
        acts_NF = torch.relu(self.pre(x_ND))
        values, indices = acts_NF.topk(self.k, dim=-1)
        return torch.zeros_like(acts_NF).scatter(-1, indices, values)

    def addend(self, x_ND, y_ND, z_NF):
        dead = [f for f, tokens in enumerate(self.silent) if tokens >= self.dead_after]
        self.dead_counts.append(len(dead))
        if not self.auxk or not dead:
            return 0.0
        e_ND = (x_ND - y_ND).detach()
        acts_ND = torch.relu(self.pre(x_ND)[:, dead])
        values, indices = acts_ND.topk(min(len(dead), x_ND.shape[1] // 2), dim=-1)
        acts_ND = torch.zeros_like(acts_ND).scatter(-1, indices, values)
        return self.auxk * (e_ND - acts_ND @ self.W_dec[dead]).pow(2).mean()

    def after_step(self, z_NF):
        fired = (z_NF > 0).any(0).tolist()
        self.silent = [0 if f else n + len(z_NF) for f, n in zip(fired, self.silent, strict=True)]


class BatchTopK(TopK):
    """The k N largest of N tokens while training, those over a running threshold otherwise."""

    threshold = None

    def encode(self, x_ND):
        acts_NF = torch.relu(self.pre(x_ND))
        if not self.training:
            return torch.where(acts_NF > self.threshold, acts_NF, 0.0)
        flat = acts_NF.flatten()
        values, indices = flat.topk(self.k * len(x_ND))
        smallest = values[values > 0].min().item()
        if self.threshold is None:
            self.threshold = smallest
        else:
            self.threshold = 0.99 * self.threshold + 0.01 * smallest
        return torch.zeros_like(flat).scatter(0, indices, values).view_as(acts_NF)


class Matryoshka(BatchTopK):
    """The MSE is the mean of those of the nested prefixes, each with b_dec."""

    def __init__(self, tensors, *, k, groups):
        super().__init__(tensors, k=k)
        self.groups = groups

    def mse(self, x_ND, y_ND, z_NF):
        ends = [sum(self.groups[: i + 1]) for i in range(len(self.groups))]
        parts = [z_NF[:, :end] @ self.W_dec[:end] + self.b_dec for end in ends]
        return sum((part_ND - x_ND).pow(2).mean() for part_ND in parts) / len(parts)


class JumpReLU(NaiveSAE):
    """relu(pre * (pre > threshold)); b_dec is not subtracted. width: None for frozen thresholds.

    The threshold's gradient, arXiv 2407.14435 eq. 11: -(threshold / eps) K((pre - threshold) / eps)
    with the rectangle K(u) = 1 where |u| < 1/2, and here eps = width * threshold.
    """

    def __init__(self, tensors, *, width=None):
        super().__init__(tensors)
        self.threshold = nn.Parameter(tensors["threshold"].clone(), requires_grad=width is not None)
        self.width = width

    def encode(self, x_ND):
        return self.jump(x_ND @ self.W_enc.T + self.b_enc)

    def jump(self, pre_NF):
        z_NF = torch.relu(pre_NF * (pre_NF > self.threshold))
        if self.width is None:
            return z_NF
        at_F = self.threshold.detach()
        eps_F = self.width * at_F
        inside_NF = ((pre_NF.detach() - at_F) / eps_F).abs() < 0.5
        return z_NF - inside_NF * (at_F / eps_F) * (self.threshold - at_F)  # the addend is zero


class ReLU(NaiveSAE):
    """Trains on x / scale, biases divided by it; L1 weighted by decoder norms, steered by L0."""

    def __init__(self, tensors, *, l1, scale, target_l0):
        super().__init__(tensors)
        with torch.no_grad():
            self.b_enc /= scale
            self.b_dec /= scale
        self.l1, self.scale, self.target_l0 = l1, scale, target_l0
        self.factors = []

    def forward(self, x_ND):
        z_NF = torch.relu((x_ND / self.scale - self.b_dec) @ self.W_enc.T + self.b_enc)
        return (z_NF @ self.W_dec + self.b_dec) * self.scale, z_NF

    def mse(self, x_ND, y_ND, z_NF):
        return (y_ND / self.scale - x_ND / self.scale).pow(2).sum(-1).mean()

    def addend(self, x_ND, y_ND, z_NF):
        norm_F = self.W_dec.pow(2).sum(1).sqrt()
        return self.l1 * (z_NF * norm_F).sum(-1).mean()

    def after_step(self, z_NF):
        l0 = (z_NF > 0).sum().item() / len(z_NF)
        self.factors.append(0.999 if l0 < self.target_l0 else 1.001)
        self.l1 *= self.factors[-1]

    def restore(self):
        with torch.no_grad():
            self.b_enc *= self.scale
            self.b_dec *= self.scale


class Adapter(nn.Module):
    """r + up(down(r)) on the reconstruction r of a frozen SAE; with biases and ReLU if there are.

    tensors: down (R, D), up (D, R) and, of an MLP, down_bias (R), up_bias (D).
    """

    unit_rows = False

    def __init__(self, sae, tensors):
        super().__init__()
        self.sae = sae.requires_grad_(False)
        for name, t in tensors.items():
            self.register_parameter(name, nn.Parameter(t.detach().clone()))

    def forward(self, x_ND):
        r_ND, z_NF = self.sae(x_ND)
        if hasattr(self, "down_bias"):
            hidden_NR = torch.relu(r_ND @ self.down.T + self.down_bias)
            return r_ND + hidden_NR @ self.up.T + self.up_bias, z_NF
        return r_ND + r_ND @ self.down.T @ self.up.T, z_NF

    mse, addend, after_step = NaiveSAE.mse, NaiveSAE.addend, NaiveSAE.after_step


class LowRankSAE(nn.Module):
    """A frozen SAE whose W_enc and W_dec^T get (alpha / r) B A.

    tensors: enc_A (R, D), enc_B (F, R), dec_A (R, F), dec_B (D, R).
    """

    unit_rows = False

    def __init__(self, sae, tensors, *, scaling):
        super().__init__()
        self.sae, self.scaling = sae.requires_grad_(False), scaling
        for name, t in tensors.items():
            self.register_parameter(name, nn.Parameter(t.detach().clone()))

    def forward(self, x_ND):
        sae = copy.copy(self.sae)  # its parameters swapped for tensors, which keep the gradient
        sae._parameters = dict(self.sae._parameters)
        W_enc = self.sae.W_enc + self.scaling * self.enc_B @ self.enc_A
        W_dec = self.sae.W_dec + self.scaling * (self.dec_B @ self.dec_A).T
        sae._parameters |= {"W_enc": W_enc, "W_dec": W_dec}
        return sae(x_ND)

    mse, addend, after_step = NaiveSAE.mse, NaiveSAE.addend, NaiveSAE.after_step


def train(lm, model, batches, *, layer, keep, loss_name, lr, schedule, weight_decay, clip):
    """Train `model` in place on batches of tokens_BL -> one dict of floats a step."""
    params = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(
        params, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay
    )
    log = []
    for step, tokens_BL in enumerate(batches):
        share = {"linear": 1 - step / len(batches), "constant": 1.0}[schedule]
        adamw.param_groups[0]["lr"] = lr * share
        active_BL = ~naive.keep_mask(keep, tokens_BL)
        with torch.no_grad():
            clean_BLV, x_BLD = naive.run_lm(lm, tokens_BL, layer)
        x_ND = x_BLD[active_BL]
        y_ND, z_NF = model(x_ND)
        spliced_BLV = spliced(lm, tokens_BL, {layer: (lambda _: y_ND, active_BL)})  # noqa: B023
        kl = naive.kl_per_token(clean_BLV, spliced_BLV)[active_BL].mean()
        mse = model.mse(x_ND, y_ND, z_NF)
        alpha = (mse / kl.clamp(min=1e-8)).detach()
        loss = {"kl+mse": 0.5 * (mse + alpha * kl), "mse": mse, "kl": kl}[loss_name]
        adamw.zero_grad()
        (loss + model.addend(x_ND, y_ND, z_NF)).backward()
        if model.unit_rows:
            rows_FD = nn.functional.normalize(model.W_dec.detach(), dim=1)
            grad_FD = model.W_dec.grad
            grad_FD -= (grad_FD * rows_FD).sum(1, keepdim=True) * rows_FD
        grad_norm = nn.utils.clip_grad_norm_(params, clip)
        adamw.step()
        if model.unit_rows:
            with torch.no_grad():
                model.W_dec /= model.W_dec.norm(dim=1, keepdim=True)
        model.after_step(z_NF)
        l0 = (z_NF > 0).sum() / len(z_NF)
        row = {"mse": mse, "kl": kl, "alpha": alpha, "l0": l0, "grad_norm": grad_norm}
        log.append({name: value.item() for name, value in row.items()})
    return log


def spliced(lm, tokens_BL, edits):
    """A full pass with x_ND -> y_ND at several layers -> logits. edits: layer: (f, active_BL)."""

    def hook_of(edit, active_BL):
        def hook(_module, _args, output):
            x_BLD = output[0] if isinstance(output, tuple) else output
            y_BLD = x_BLD.clone()
            y_BLD[active_BL] = edit(x_BLD[active_BL])
            return (y_BLD, *output[1:]) if isinstance(output, tuple) else y_BLD

        return hook

    blocks = lm.base_model.layers
    handles = [blocks[i].register_forward_hook(hook_of(*edit)) for i, edit in edits.items()]
    try:
        return lm(input_ids=tokens_BL, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


# ---- LoRA on the LM --------------------------------------------------------------------------


class LowRankLinear(nn.Module):
    """base(x) + scaling * B A x."""

    def __init__(self, base, A_RD, B_OR, scaling):
        super().__init__()
        self.base, self.scaling = base, scaling
        self.A, self.B = nn.Parameter(A_RD.clone()), nn.Parameter(B_OR.clone())

    def forward(self, x):
        return self.base(x) + self.scaling * (x @ self.A.T @ self.B.T)


def lora_places(family, *, blocks):
    """Names, below the decoder, of the linear layers that LoRA acts on."""
    family = "gpt_neox" if family == "gpt_neox" else "llama"  # the others have Llama's names
    attention = {"llama": "self_attn", "gpt_neox": "attention"}[family]
    names = [f"{attention}.{name}" for name in ATTENTION[family].split()]
    names += [f"mlp.{name}" for name in MLP[family].split()]
    return [f"layers.{i}.{name}" for i in blocks for name in names]


def with_lora(lm, A_of, *, scaling):
    """A copy of the LM with LoRA, B zero -> (lm, {place: LowRankLinear}). A_of: {place: A_RD}."""
    lm = copy.deepcopy(lm).requires_grad_(False)
    wrapped = {}
    for place, A_RD in A_of.items():
        parent, name = place.rsplit(".", 1)
        parent = lm.base_model.get_submodule(parent)
        base = getattr(parent, name)
        zero = torch.zeros(base.out_features, len(A_RD))
        wrapped[place] = LowRankLinear(base, A_RD, zero, scaling)
        setattr(parent, name, wrapped[place])
    return lm, wrapped


def train_lora(lm, lm_lora, saes_at, batches, *, layer, keep, lr, weight_decay, clip):
    """KL of `lm` || `lm_lora` with the SAEs at their layers; the latter's LoRA learns, constant lr.

    mse and l0 are of the SAE at `layer`, on the residual that it reads.
    """
    params = [p for p in lm_lora.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(
        params, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay
    )
    log = []
    for tokens_BL in batches:
        active_BL = ~naive.keep_mask(keep, tokens_BL)
        seen = {}

        def edit(i):
            def stand_in(x_ND):
                seen[i] = (x_ND, *saes_at[i](x_ND))  # noqa: B023
                return seen[i][1]  # noqa: B023

            return stand_in, active_BL  # noqa: B023

        with torch.no_grad():
            clean_BLV = lm(input_ids=tokens_BL, use_cache=False).logits
        spliced_BLV = spliced(lm_lora, tokens_BL, {i: edit(i) for i in saes_at})
        kl = naive.kl_per_token(clean_BLV, spliced_BLV)[active_BL].mean()
        adamw.zero_grad()
        kl.backward()
        grad_norm = nn.utils.clip_grad_norm_(params, clip)
        adamw.step()
        x_ND, y_ND, z_NF = seen[layer]
        mse, l0 = (y_ND - x_ND).pow(2).mean(), (z_NF > 0).sum() / len(z_NF)
        row = {"mse": mse, "kl": kl, "alpha": mse / kl, "l0": l0, "grad_norm": grad_norm}
        log.append({name: value.item() for name, value in row.items()})
    return log
