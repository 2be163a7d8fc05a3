"""The step as it is usually written, and the random LM, SAE and tokens that the bench runs on.

Shapes: B sequences, L positions, D residual width, F latents, V vocabulary.
"""

import numpy as np
import torch
import transformers

import data
from klsplice.lm import attention
from klsplice.settings import Config, defaults
from learners.convert import fresh_weights
from sae import TopK

SMOLLM2 = transformers.LlamaConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
    rope_theta=100_000.0,
)
# What is measured on which device. saes: (latents, k); --quick takes the first two.
SHAPES = {
    "cuda": {
        "name": "Gemma-2-2B",
        "config": transformers.Gemma2Config(),
        "layer": 12,
        "saes": [(65_536, 80), (16_384, 80), (65_536, 20), (65_536, 320), (65_536, 640)],
        "constants": {"CONTEXT": 1024, "BATCH": 2, "MICRO_BATCH": 2, "CLEAN_BATCH": 8},
    },
    "cpu": {
        "name": "SmolLM2-135M",
        "config": SMOLLM2,
        "layer": 15,
        "saes": [(4096, 32)],
        "constants": {"CONTEXT": 256, "BATCH": 4, "MICRO_BATCH": 4, "CLEAN_BATCH": 4},
    },
}


def build_lm(shape: dict, device: str, dtype: torch.dtype):
    """A random LM whose logits spread by about 3, so that a softcap and the KL have work."""
    transformers.AttentionInterface.register(attention.NAME, attention.attention)
    kind = attention.implementation(shape["config"], device)
    torch.manual_seed(0)
    with torch.device(device):
        lm = transformers.AutoModelForCausalLM.from_config(
            shape["config"], dtype=dtype, attn_implementation=kind
        )
    lm = lm.to(device).eval().requires_grad_(False)
    W_VD = lm.get_output_embeddings().weight
    with torch.no_grad():
        W_VD.normal_(0, 3 / W_VD.shape[1] ** 0.5)
    return lm


def build_sae(shape: dict, d_sae: int, k: int, device) -> TopK:
    """Unit rows; log-normal biases make some latents fire for most tokens and most for few."""
    generator = torch.Generator().manual_seed(0)
    d_in = shape["config"].hidden_size
    mean_D = 0.1 * torch.randn(d_in, generator=generator)
    weights = fresh_weights(d_in=d_in, d_sae=d_sae, mean_D=mean_D, generator=generator)
    weights["b_enc_F"] = torch.randn(d_sae, generator=generator).exp() * 0.5
    return TopK(weights, k=k).to(device)


class Loop:
    """What both loops have. changes: of run.py's constants, beside the shape's."""

    def __init__(self, lm, shape: dict, sae, **changes):
        own = {"DEVICE": lm.device.type, "DTYPE": str(lm.dtype).removeprefix("torch.")}
        self.cfg = cfg = Config(
            **defaults() | {"KEEP": "none"} | shape["constants"] | own | changes
        )
        self.lm, self.sae, self.layer, self.step_no = lm, sae, shape["layer"], 0
        vocabulary, rng = shape["config"].vocab_size, np.random.default_rng(0)
        tokens_SL = rng.integers(vocabulary, size=(256, cfg.CONTEXT))
        self.tokens = data.Tokens(tokens_SL[:1], tokens_SL, np.arange(256), cfg, [], False, "")
        self.steps_a_pass = max(1, cfg.CLEAN_BATCH // cfg.BATCH)  # share a clean pass

    def some_steps(self) -> None:
        """Those that share a clean pass, which are timed as one."""
        for _ in range(self.steps_a_pass):
            self.step()

    def kl_gradient(self, y_BLD: torch.Tensor, step: int) -> torch.Tensor:
        """dKL/dy of that step, at y_BLD in the residual's place."""
        leaf_BLD = y_BLD.clone().requires_grad_()
        return torch.autograd.grad(self.kl_at(leaf_BLD, step), leaf_BLD)[0]


class Naive(Loop):
    """The loop as it is usually written: two whole passes, an SAE under autocast with a dense
    decode, AdamW, .item() a step. compiled: its blocks, SAE and KL through torch.compile."""

    def __init__(self, lm, shape: dict, sae, *, compiled: bool = False):
        super().__init__(lm, shape, sae)
        self.blocks = lm.get_decoder().layers
        self.options, self.forwards = {}, []
        if compiled:
            self.options = {"use_cache": False}  # with a cache each block is compiled by itself
            self.kl = torch.compile(self.kl, dynamic=False)
            self.reconstruct = torch.compile(self.reconstruct, dynamic=False)
            torch._dynamo.config.recompile_limit = 8 * len(self.blocks)  # blocks share their code
            self.forwards = [torch.compile(block.forward, dynamic=False) for block in self.blocks]
        self.adamw = torch.optim.AdamW(sae.parameters(), lr=self.cfg.LR, fused=compiled or None)
        self.x_BLD = None

    def logits(self, tokens_BL: torch.Tensor, y_BLD: torch.Tensor | None = None) -> torch.Tensor:
        """With y_BLD in the residual's place; without it the residual is kept as x_BLD."""

        def on_residual(module, args, output):
            whole = torch.is_tensor(output)
            if y_BLD is None:
                self.x_BLD = output if whole else output[0]
                return None
            return y_BLD if whole else (y_BLD, *output[1:])

        hook = self.blocks[self.layer].register_forward_hook(on_residual)
        for block, forward in zip(self.blocks, self.forwards):
            block.forward = forward
        try:
            return self.lm(tokens_BL, **self.options).logits
        finally:
            hook.remove()
            for block in self.blocks:
                vars(block).pop("forward", None)

    def clean(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """-> tokens_BL of that step, their logits."""
        tokens_BL = self.tokens.batch(step).to(self.lm.device)
        with torch.no_grad():
            return tokens_BL, self.logits(tokens_BL)

    def reconstruct(self, x_BLD):
        sae = self.sae
        pre_BLF = torch.relu((x_BLD - sae.b_dec_D) @ sae.W_enc_FD.T + sae.b_enc_F)
        value, index = pre_BLF.topk(sae.k, dim=-1)
        return torch.zeros_like(pre_BLF).scatter(-1, index, value) @ sae.W_dec_FD + sae.b_dec_D

    def kl(self, clean_BLV, spliced_BLV):
        log_q, log_p = spliced_BLV.log_softmax(-1), clean_BLV.log_softmax(-1)
        kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
        return kl / log_q[..., 0].numel()

    def kl_at(self, y_BLD: torch.Tensor, step: int) -> torch.Tensor:
        tokens_BL, clean_BLV = self.clean(step)
        return self.kl(clean_BLV, self.logits(tokens_BL, y_BLD))

    def step(self) -> dict:
        self.step_no += 1
        tokens_BL, clean_BLV = self.clean(self.step_no)
        half = self.lm.dtype == torch.bfloat16
        with torch.autocast(self.lm.device.type, torch.bfloat16, enabled=half):
            y_BLD = self.reconstruct(self.x_BLD)
        mse = (y_BLD - self.x_BLD.to(y_BLD.dtype)).square().mean()
        kl = self.kl(clean_BLV, self.logits(tokens_BL, y_BLD.to(self.x_BLD.dtype)))
        alpha = (mse / kl.clamp(min=1e-8)).detach()
        self.adamw.zero_grad()
        (0.5 * (mse + alpha * kl)).backward()
        W_FD = self.sae.W_dec_FD
        with torch.no_grad():
            W_FD.grad -= (W_FD.grad * W_FD).sum(1, keepdim=True) * W_FD
            torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.cfg.CLIP)
            self.adamw.step()
            W_FD /= W_FD.norm(dim=1, keepdim=True)
        return {"mse": mse.item(), "kl": kl.item()}
