"""The method in its plainest form, as a yardstick for the tests: a TopK sparse autoencoder (SAE) is
spliced into a language model's residual stream and finetuned on KL + MSE. Two full forward passes,
full logits, dense decode, torch's AdamW; nothing here is fast.

Shapes: B sequences, L positions, D residual width, F latents, V vocabulary, N tokens not kept.
`keep_BL` is True where the residual stays original; those positions are out of MSE and training KL.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES = {  # family: (model type, has a sliding window, options of its own)
    "gemma2": ("gemma2", True, {"head_dim": 16, "query_pre_attn_scalar": 1, **MIXED}),
    "gemma3": ("gemma3_text", True, {"head_dim": 16, "query_pre_attn_scalar": 16, **MIXED}),
    "llama": ("llama", False, {}),
    "mistral": ("mistral", True, {}),
    "gpt_neox": ("gpt_neox", False, {}),
    "qwen2": ("qwen2", True, {"use_sliding_window": True, "max_window_layers": 0}),
    "qwen3": ("qwen3", True, {"head_dim": 16, "use_sliding_window": True, **MIXED}),
}


class NaiveTopK(torch.nn.Module):
    """W_enc (F, D), b_enc (F), W_dec (F, D), b_dec (D); x (..., D) -> reconstruction (..., D)."""

    def __init__(self, tensors, k):
        super().__init__()
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            self.register_parameter(name, torch.nn.Parameter(tensors[name].detach().clone()))
        self.k = k

    def encode(self, x):
        """x (..., D) -> z (..., F), zero outside the k largest."""
        acts = torch.relu((x - self.b_dec) @ self.W_enc.T + self.b_enc)
        values, indices = acts.topk(self.k, dim=-1)
        return torch.zeros_like(acts).scatter(-1, indices, values)

    def decode(self, z):
        """z (..., F) -> (..., D)."""
        return z @ self.W_dec + self.b_dec

    def forward(self, x):
        return self.decode(self.encode(x))


def build_lm(family, *, seed, context):
    """A tiny random frozen LM: 4 blocks, D 32, V 97, fp32, eager, window a third of context."""
    model_type, windowed, options = FAMILIES[family]
    if windowed:
        options = {**options, "sliding_window": context // 3}
    if family != "gpt_neox":
        options = {**options, "num_key_value_heads": 1}
    config = AutoConfig.for_model(
        model_type,
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
        x_BLD = output[0] if isinstance(output, tuple) else output
        seen["x"] = x_BLD
        if edit is None:
            return None
        edited_BLD = edit(x_BLD)
        return (edited_BLD, *output[1:]) if isinstance(output, tuple) else edited_BLD

    handle = lm.base_model.layers[layer].register_forward_hook(hook)
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


def losses(lm, sae, tokens_BL, layer, keep_BL, loss_name="kl+mse"):
    """mse, kl, alpha, loss: scalars over non-kept positions; x, y: residual, reconstruction BLD."""
    with torch.no_grad():
        clean_BLV, x_BLD = run_lm(lm, tokens_BL, layer)
    y_BLD = sae(x_BLD)
    keep_BL1 = keep_BL[..., None]
    spliced_BLV, _ = run_lm(lm, tokens_BL, layer, lambda h: torch.where(keep_BL1, h, y_BLD))
    mse = (y_BLD - x_BLD)[~keep_BL].pow(2).mean()
    kl = kl_per_token(clean_BLV, spliced_BLV)[~keep_BL].mean()
    alpha = (mse / kl.clamp(min=1e-8)).detach()
    loss = {"kl+mse": 0.5 * (mse + alpha * kl), "mse": mse, "kl": kl}[loss_name]
    return {"mse": mse, "kl": kl, "alpha": alpha, "loss": loss, "x": x_BLD, "y": y_BLD}


def keep_mask(keep, tokens_BL):
    """keep_BL from the name none or first, or from a function of the tokens."""
    if callable(keep):
        return keep(tokens_BL)
    keep_BL = torch.zeros_like(tokens_BL, dtype=torch.bool)
    keep_BL[:, 0] = {"none": False, "first": True}[keep]
    return keep_BL


def train(
    lm,
    sae,
    batches,
    *,
    layer,
    keep,
    loss_name="kl+mse",
    lr,
    steps,
    weight_decay=0.01,
    clip=1.0,
):
    """Train the SAE in place on `batches` of tokens_BL; returns one dict of floats per step.

    grad_norm is of the projected gradients, unclipped.
    """
    optimizer = torch.optim.AdamW(
        sae.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay
    )
    log = []
    for step, tokens_BL in zip(range(steps), batches, strict=False):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        out = losses(lm, sae, tokens_BL, layer, keep_mask(keep, tokens_BL), loss_name)
        out["loss"].backward()
        row = {name: out[name].item() for name in ("mse", "kl", "alpha", "loss")}
        rows_FD = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
        grad_FD = sae.W_dec.grad
        grad_FD -= (grad_FD * rows_FD).sum(1, keepdim=True) * rows_FD
        row["grad_norm"] = torch.nn.utils.clip_grad_norm_(sae.parameters(), clip).item()
        optimizer.step()
        with torch.no_grad():
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        log.append(row)
    return log


@torch.no_grad()
def evaluate(lm, sae, tokens_BL, layer, keep_BL):
    """CE clean, spliced and zero-ablated over B * (L - 1), KL over B * L; FVU, L0 over non-kept."""
    keep_BL1 = keep_BL[..., None]
    clean_BLV, x_BLD = run_lm(lm, tokens_BL, layer)
    spliced_BLV, _ = run_lm(lm, tokens_BL, layer, lambda h: torch.where(keep_BL1, h, sae(h)))
    zero_BLV, _ = run_lm(lm, tokens_BL, layer, lambda h: torch.where(keep_BL1, h, 0.0))

    def ce(logits_BLV):
        return torch.nn.functional.cross_entropy(
            logits_BLV[:, :-1].flatten(0, 1), tokens_BL[:, 1:].flatten()
        ).item()

    x_ND = x_BLD[~keep_BL]
    z_NF = sae.encode(x_ND)
    error = (sae.decode(z_NF) - x_ND).pow(2).sum()
    return {
        "ce_clean": ce(clean_BLV),
        "ce_spliced": ce(spliced_BLV),
        "ce_zero": ce(zero_BLV),
        "kl": kl_per_token(clean_BLV, spliced_BLV).mean().item(),
        "fvu": (error / (x_ND - x_ND.mean(0)).pow(2).sum()).item(),
        "l0": (z_NF != 0).sum(-1).float().mean().item(),
    }
