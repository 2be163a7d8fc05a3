"""The method and its variants in their plainest form, as a yardstick for the tests.

Two full forward passes, full logits, dense products, torch's AdamW; nothing here is fast.

Shapes: B sequences, L positions, N tokens not kept, D residual width, F latents, R rank,
V vocabulary. Tensors are W_enc (F, D), b_enc (F), W_dec (F, D), b_dec (D) everywhere.
"""

import copy

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

LINEAR = {  # linear layers of a block
    "llama": [f"self_attn.{name}_proj" for name in "qkvo"]
    + [f"mlp.{name}_proj" for name in ("gate", "up", "down")],
    "gpt_neox": ["attention.query_key_value", "attention.dense"]
    + ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
}


def build_lm(family, *, seed, context):
    """A tiny random frozen LM: 4 blocks, D 32, V 97, fp32, eager; gemma2, llama or gpt_neox.

    Gemma-2's window is a third of the context."""
    options = {} if family == "gpt_neox" else {"num_key_value_heads": 1}
    if family == "gemma2":
        options |= {"head_dim": 16, "query_pre_attn_scalar": 1, "sliding_window": context // 3}
        options["layer_types"] = ["sliding_attention", "full_attention"] * 2
    config = AutoConfig.for_model(
        family,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=context,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,  # a padding row would be embedded as zeros
        **options,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", dtype=torch.float32
        )
        for param in lm.parameters():
            if param.ndim == 1:  # norm weights and biases start at 0 or 1
                param.add_(0.1 * torch.randn_like(param))
        base = lm.base_model
        final_norm = base.final_layer_norm if family == "gpt_neox" else base.norm
        final_norm.weight.add_(1.0)  # doubles the logits, so that a final cap of 30 shows
    return lm.eval().requires_grad_(False)


def run_lm(lm, tokens_BL, layer, edit=None):
    """A full forward pass -> (logits BLV, residual x BLD after block `layer`, before the edit)."""
    seen = {}

    def hook(_module, _args, output):
        bare = torch.is_tensor(output)
        seen["x"] = output if bare else output[0]
        if edit is None:
            return None
        edited_BLD = edit(seen["x"])
        return edited_BLD if bare else type(output)([edited_BLD, *output[1:]])

    lists = (m for m in lm.modules() if isinstance(m, nn.ModuleList))
    blocks = next(m for m in lists if len(m) == lm.config.num_hidden_layers)
    handle = blocks[layer].register_forward_hook(hook)
    try:
        logits_BLV = lm(input_ids=tokens_BL, use_cache=False).logits
    finally:
        handle.remove()
    return logits_BLV, seen["x"]


def kl_per_token(clean_BLV, spliced_BLV):
    """KL(clean || spliced) in nats at every position -> (B, L)."""
    logp_BLV = clean_BLV.log_softmax(-1)
    logq_BLV = spliced_BLV.log_softmax(-1)
    return (logp_BLV.exp() * (logp_BLV - logq_BLV)).sum(-1)


# ---- training --------------------------------------------------------------------------------


def losses(lm, model, tokens_BL, keep_BL, c, lm_spliced=None):
    """mse, kl, alpha, loss: scalars over the tokens not kept; x_ND, y_ND, z_NF of those.

    c: the run's constants. lm_spliced: the LM with LoRA. The SAE sees c.MICRO_BATCH sequences at a
    time, which to a BatchTopK makes a difference."""
    seen = {}

    def edit(x_BLD):
        seen["x"] = x_BLD[~keep_BL]
        sizes = [int(part_BL.sum()) for part_BL in (~keep_BL).split(c.MICRO_BATCH)]
        parts = [model(part_ND) for part_ND in seen["x"].split(sizes)]
        seen["y"], seen["z"] = (torch.cat(part) for part in zip(*parts, strict=True))
        y_BLD = x_BLD.clone()
        y_BLD[~keep_BL] = seen["y"]
        return y_BLD

    with torch.no_grad():
        clean_BLV, _ = run_lm(lm, tokens_BL, c.LAYER)
    spliced_BLV, _ = run_lm(lm_spliced or lm, tokens_BL, c.LAYER, edit)
    kl = kl_per_token(clean_BLV, spliced_BLV)[~keep_BL].mean()
    mse = model.mse(seen["x"], seen["y"], seen["z"])
    alpha = (mse / kl.clamp(min=1e-8)).detach()
    loss = {"kl+mse": 0.5 * (mse + alpha * kl), "mse": mse, "kl": kl}[c.LOSS]
    loss = loss + model.addend(seen["x"], seen["y"], seen["z"])
    return {"mse": mse, "kl": kl, "alpha": alpha, "loss": loss, **seen}


def train(lm, model, batches, keep_of, c, lm_spliced=None):
    """Train `model`, or the LoRA in lm_spliced, in place -> one dict of floats a step.

    keep_of: tokens_BL -> keep_BL. grad_norm is of the projected gradients, unclipped."""
    learning = [*model.parameters(), *(lm_spliced.parameters() if lm_spliced else ())]
    params = [p for p in learning if p.requires_grad]
    adamw = torch.optim.AdamW(
        params, lr=c.LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=c.WEIGHT_DECAY
    )
    unit_rows = model.unit_rows and model.W_dec.requires_grad
    log = []
    for step, tokens_BL in enumerate(batches):
        decay = {"linear": 1 - step / len(batches), "constant": 1.0}[c.SCHEDULE]
        lr = c.LR * decay * min(1, (step + 1) / (c.WARMUP + 1))
        adamw.param_groups[0]["lr"] = lr
        out = losses(lm, model, tokens_BL, keep_of(tokens_BL), c, lm_spliced)
        adamw.zero_grad()
        out["loss"].backward()
        if unit_rows:
            rows_FD = nn.functional.normalize(model.W_dec.detach(), dim=1)
            grad_FD = model.W_dec.grad
            grad_FD -= (grad_FD * rows_FD).sum(1, keepdim=True) * rows_FD
        grad_norm = nn.utils.clip_grad_norm_(params, c.CLIP).item()
        adamw.step()
        if unit_rows:
            with torch.no_grad():
                model.W_dec /= model.W_dec.norm(dim=1, keepdim=True)
        model.after_step(out["z"])
        l0 = (out["z"] > 0).sum().item() / len(out["z"])
        row = {name: out[name].item() for name in ("mse", "kl", "alpha")}
        log.append(row | {"l0": l0, "grad_norm": grad_norm, "lr": lr})
    return log


# ---- architectures ---------------------------------------------------------------------------


class Plain(nn.Module):
    """x_ND -> y_ND, z_NF, and what differs in the loss and the step."""

    unit_rows = False  # decoder gradient off its rows, rows renormalised

    def __init__(self, tensors):
        super().__init__()
        for name, t in tensors.items():
            self.register_parameter(name, nn.Parameter(t.detach().clone()))

    def mse(self, x_ND, y_ND, z_NF):
        return (y_ND - x_ND).pow(2).mean()

    def addend(self, x_ND, y_ND, z_NF):
        """What is added to the loss of LOSS."""
        return 0.0

    def after_step(self, z_NF):
        pass


class NaiveSAE(Plain):
    """Subclasses give `encode`."""

    def __init__(self, tensors):
        super().__init__({name: tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")})

    def forward(self, x_ND):
        z_NF = self.encode(x_ND)
        return z_NF @ self.W_dec + self.b_dec, z_NF


class TopK(NaiveSAE):
    """k latents a token; with auxk, dead ones learn what the others leave of the residual."""

    unit_rows = True

    def __init__(self, tensors, k, *, auxk=0.0, dead_after=0):
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

    def __init__(self, tensors, k, *, groups):
        super().__init__(tensors, k)
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


class Adapter(Plain):
    """r + up(down(r)) on the reconstruction r of a frozen SAE; with biases and ReLU if there are.

    tensors: down (R, D), up (D, R) and, of an MLP, down_bias (R), up_bias (D).
    """

    def __init__(self, sae, tensors):
        super().__init__(tensors)
        self.sae = sae.requires_grad_(False)

    def forward(self, x_ND):
        r_ND, z_NF = self.sae(x_ND)
        if not hasattr(self, "down_bias"):
            return r_ND + r_ND @ self.down.T @ self.up.T, z_NF
        hidden_NR = torch.relu(r_ND @ self.down.T + self.down_bias)
        return r_ND + hidden_NR @ self.up.T + self.up_bias, z_NF


class LowRankSAE(Plain):
    """A frozen SAE whose W_enc and W_dec^T get (alpha / r) B A.

    tensors: enc_A (R, D), enc_B (F, R), dec_A (R, F), dec_B (D, R).
    """

    def __init__(self, sae, tensors, *, scaling):
        super().__init__(tensors)
        self.sae, self.scaling = sae.requires_grad_(False), scaling

    def forward(self, x_ND):
        W_enc = self.sae.W_enc + self.scaling * self.enc_B @ self.enc_A
        W_dec = self.sae.W_dec + self.scaling * (self.dec_B @ self.dec_A).T
        return torch.func.functional_call(self.sae, {"W_enc": W_enc, "W_dec": W_dec}, x_ND)


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
    of_block = LINEAR["gpt_neox" if family == "gpt_neox" else "llama"]
    return [f"layers.{i}.{name}" for i in blocks for name in of_block]


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
