"""The two loops that the bench compares, ours and the one usually written, and what they run on."""

import copy

import torch
import transformers

import finetune
from klsplice.errors import UserError
from klsplice.lm import attention
from klsplice.lm.splice import Splice, rows
from klsplice.settings import Config, defaults
from learners.base import SAELearner
from learners.convert import fresh_weights
from sae import TopK

# Random weights of these shapes: nothing is downloaded.
SHAPES = {
    "cuda": {
        "name": "Gemma-2-2B",
        "config": lambda: transformers.Gemma2Config(),
        "layer": 12,
        "batch": 2,
        "context": 1024,
        "clean_batch": 8,
        "saes": [(65_536, 80), (16_384, 80), (65_536, 20), (65_536, 320), (65_536, 640)],
        "quick": [(65_536, 80), (16_384, 80)],
        "product": 8192,
    },
    "cpu": {
        "name": "SmolLM2-135M",
        "config": lambda: transformers.LlamaConfig(
            vocab_size=49_152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
            rope_theta=100_000.0,
        ),
        "layer": 15,
        "batch": 4,
        "context": 256,
        "clean_batch": 4,
        "saes": [(4096, 32)],
        "quick": [(4096, 32)],
        "product": 2048,
    },
}


def build_lm(shape: dict, device: str):
    """A random LM whose logits spread by about 3, so that a softcap and the KL have work."""
    if "lm" in shape:
        return shape["lm"]
    transformers.AttentionInterface.register(attention.NAME, attention.attention)
    torch.manual_seed(0)
    with torch.device(device):
        config = shape["config"]()
        kind = {"attn_implementation": attention.implementation(config, device)}
        lm = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **kind)
    lm = lm.to(device).eval().requires_grad_(False)
    W_VD = lm.get_output_embeddings().weight
    with torch.no_grad():
        W_VD.normal_(0, 3 / W_VD.shape[1] ** 0.5)
    return lm


def build_sae(shape: dict, d_sae: int, k: int, device: str) -> TopK:
    """Unit rows; log-normal biases make some latents fire for most tokens and most for few."""
    if "sae" in shape:
        return copy.deepcopy(shape["sae"])
    generator = torch.Generator().manual_seed(0)
    d_in = shape["config"]().hidden_size
    mean_D = 0.1 * torch.randn(d_in, generator=generator)
    weights = fresh_weights(d_in=d_in, d_sae=d_sae, mean_D=mean_D, generator=generator)
    weights["b_enc_F"] = torch.randn(d_sae, generator=generator).exp() * 0.5
    return TopK(weights, k=k).to(device)


def of_run(folder: str, device: str) -> dict:
    """What a finished run of a TopK SAE has, in place of random weights and tokens."""
    from evals.finished import Finished  # with what reads and tokenises text

    finished = Finished(folder, device)
    cfg, sae, lm, tokens = finished.cfg, finished.after().sae, finished.lm, finished.tokens
    if not isinstance(sae, TopK) or cfg.TRAIN != "sae" or cfg.KEEP == "special":
        hint = "wanted TRAIN = sae and a TopK, like runs/demo-sae"
        raise UserError(f"{folder} is not what the naive loop trains", hint)
    config, sizes = lm.config.get_text_config(), [(sae.d_sae, sae.k)]
    text = {"text_SL": tokens.sequences(0, min(256, len(tokens.order_S)))}
    text |= {
        "batch": cfg.BATCH,
        "context": cfg.CONTEXT,
        "clean_batch": max(cfg.CLEAN_BATCH, cfg.BATCH),
    }
    text |= {"kept": int(cfg.KEEP == "first"), "layer": cfg.LAYER, "saes": sizes, "quick": sizes}
    return text | {
        "name": f"{cfg.MODEL} and {folder}",
        "config": lambda: config,
        "lm": lm,
        "sae": sae.requires_grad_().train(),
        "product": SHAPES["cuda" if lm.device.type == "cuda" else "cpu"]["product"],
    }


class Tokens:
    """What finetune.py asks of data.Tokens: a shape's text_SL, or random ones.

    kept: how many first positions of a context stay as they are.
    """

    def __init__(self, shape: dict):
        self.batch_size = self.share = shape["batch"]
        self.context, self.kept = shape["context"], shape.get("kept", 0)
        self.text_SL, self.vocabulary = shape.get("text_SL"), shape["config"]().vocab_size

    def batch(self, step: int) -> torch.Tensor:
        if self.text_SL is not None:
            which_B = torch.arange(self.first(step), self.first(step + 1)) % len(self.text_SL)
            return self.text_SL[which_B, : self.context]
        generator = torch.Generator().manual_seed(step)
        return torch.randint(self.vocabulary, (self.batch_size, self.context), generator=generator)

    def first(self, step: int) -> int:
        return step * self.batch_size

    def active(self, tokens_BL: torch.Tensor, x_BLD: torch.Tensor) -> torch.Tensor:
        index_BL = torch.arange(tokens_BL.numel()).view_as(tokens_BL)
        return index_BL[:, self.kept :].flatten()


class Ours:
    """One step of finetune.py, with run.py's constants."""

    def __init__(self, lm, shape: dict, device: str, sae, *, compiled: bool, **changes):
        sizes = {"DEVICE": device, "BATCH": shape["batch"], "MICRO_BATCH": shape["batch"]}
        sizes |= {"CLEAN_BATCH": shape["clean_batch"]}
        sizes |= {"DTYPE": str(lm.dtype).removeprefix("torch.")}
        self.cfg = cfg = Config(**defaults() | sizes | changes)
        speed = {"compiled": compiled, "checkpointed": cfg.LOW_MEMORY}
        splice = Splice(lm, shape["layer"], head_chunk=cfg.HEAD_CHUNK, **speed)
        self.tokens, self.learner = Tokens(shape), SAELearner(sae, splice)
        keep = {"weight_decay": cfg.WEIGHT_DECAY, "clip": cfg.CLIP}
        self.optimizer = finetune.Optimizer(self.learner, **keep)
        self.batches = finetune.batches_of(cfg, self.learner, self.tokens)
        self.loss, self.logits = finetune.LOSSES[cfg.LOSS], getattr(torch, cfg.LOGITS)
        self.step_no, self.period = 0, max(1, cfg.CLEAN_BATCH // cfg.BATCH)

    def close(self) -> None:
        pass

    def kl_at(self, y_BLD, step: int):
        """The KL with y_BLD in the residual's place, of the step's only micro-batch."""
        (part,) = self.batches(step)
        y_ND = rows(y_BLD, part.active_N)
        spliced = self.learner.resumed(part.clean, y_ND, part.active_N)
        return finetune.kl(part, spliced, self.learner.splice, self.logits).mean()

    def gradients(self) -> dict:
        """Those of the next step, left in .grad -> its mse and kl."""
        self.step_no += 1
        batch = self.batches(self.step_no)
        return finetune.gradients(self.learner, batch, self.loss, self.logits).means()

    def step(self) -> dict:
        self.step_no += 1
        how = {"lr": self.cfg.LR, "logits_dtype": self.logits}
        batch = self.batches(self.step_no)
        return finetune.training_step(self.learner, self.optimizer, batch, self.loss, **how)


class Several:
    """A step of n SAEs on the same tokens, as runs of a sweep make it; its time is for each."""

    def __init__(self, lm, shape: dict, device: str, sae, *, n: int, compiled: bool):
        first = Ours(lm, shape, device, sae, compiled=compiled)
        self.first, self.period, self.n = first, first.period, n
        splice, losses = first.learner.splice, [first.cfg.LOSS] * n
        saes = [copy.deepcopy(sae) for _ in range(n - 1)]
        self.learners = [first.learner, *(SAELearner(one, splice) for one in saes)]
        keep = {"weight_decay": first.cfg.WEIGHT_DECAY, "clip": first.cfg.CLIP}
        self.optimizers = [finetune.Optimizer(learner, **keep) for learner in self.learners]
        first.batches = finetune.batches_of(first.cfg, first.learner, first.tokens, losses)

    def close(self) -> None:
        self.first.close()

    def step(self) -> None:
        self.first.step_no += 1
        how = {"lr": self.first.cfg.LR, "logits_dtype": self.first.logits}
        batch = self.first.batches(self.first.step_no)
        for learner, optimizer in zip(self.learners, self.optimizers):
            finetune.training_step(learner, optimizer, batch, self.first.loss, **how)


class Naive:
    """The loop as it is usually written; compiled: its blocks, SAE and KL through torch.compile."""

    period = 1  # steps that share a clean pass

    def __init__(self, lm, shape: dict, device: str, sae, *, compiled: bool = False):
        self.lm, self.sae, self.device = lm, sae, device
        self.tokens = Tokens(shape)
        self.kept = self.tokens.kept
        self.blocks, self.layer = lm.get_decoder().layers, shape["layer"]
        self.options = {}
        if compiled:
            self.options["use_cache"] = False  # with a cache each block is compiled by itself
            self.kl = torch.compile(self.kl, dynamic=False)
            self.reconstruct = torch.compile(self.reconstruct, dynamic=False)
            torch._dynamo.config.recompile_limit = 8 * len(self.blocks)  # blocks share their code
            for block in self.blocks:
                block.forward = torch.compile(block.forward, dynamic=False)
        self.cfg = Config(**defaults())
        self.adamw = torch.optim.AdamW(sae.parameters(), lr=self.cfg.LR, fused=compiled or None)
        self.step_no, self.y_BLD = 0, None

    def close(self) -> None:
        for block in self.blocks:
            vars(block).pop("forward", None)

    def on_residual(self, module, args, output):
        whole = torch.is_tensor(output)
        if self.y_BLD is None:
            self.x_BLD = output if whole else output[0]
            return None
        return self.y_BLD if whole else (self.y_BLD, *output[1:])

    def reconstruct(self, x_BLD):
        sae = self.sae
        pre_BLF = torch.relu(
            torch.nn.functional.linear(x_BLD - sae.b_dec_D, sae.W_enc_FD, sae.b_enc_F)
        )
        value, index = pre_BLF.topk(sae.k, dim=-1)
        return torch.zeros_like(pre_BLF).scatter(-1, index, value) @ sae.W_dec_FD + sae.b_dec_D

    def kl(self, clean_BLV, spliced_BLV):
        clean_BLV, spliced_BLV = clean_BLV[:, self.kept :], spliced_BLV[:, self.kept :]
        log_q, log_p = spliced_BLV.log_softmax(-1), clean_BLV.log_softmax(-1)
        kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
        return kl / log_q[..., 0].numel()

    def logits(self, tokens_BL):
        hook = self.blocks[self.layer].register_forward_hook(self.on_residual)
        try:
            return self.lm(tokens_BL, **self.options).logits
        finally:
            hook.remove()

    @torch.no_grad()
    def clean(self, tokens_BL):
        """-> logits; the residual is kept."""
        self.y_BLD = None
        return self.logits(tokens_BL)

    def kl_at(self, y_BLD, clean_BLV, tokens_BL):
        """The KL with y_BLD in the residual's place."""
        if self.kept:
            y_BLD = torch.cat([self.x_BLD[:, : self.kept], y_BLD[:, self.kept :]], 1)
        self.y_BLD = y_BLD
        return self.kl(clean_BLV, self.logits(tokens_BL))

    def loss(self, tokens_BL, *, autocast: bool = True):
        clean_BLV = self.clean(tokens_BL)
        half = autocast and self.lm.dtype == torch.bfloat16
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=half):
            y_BLD = self.reconstruct(self.x_BLD)
        mse = (y_BLD - self.x_BLD.to(y_BLD.dtype))[:, self.kept :].square().mean()
        kl = self.kl_at(y_BLD.to(self.x_BLD.dtype), clean_BLV, tokens_BL)
        alpha = (mse / kl.clamp(min=1e-8)).detach()
        return 0.5 * (mse + alpha * kl), mse, kl

    def step(self) -> dict:
        self.step_no += 1
        loss, mse, kl = self.loss(self.tokens.batch(self.step_no).to(self.device))
        self.adamw.zero_grad()
        loss.backward()
        with torch.no_grad():
            W_FD = self.sae.W_dec_FD
            W_FD.grad -= (W_FD.grad * W_FD).sum(1, keepdim=True) * W_FD
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.cfg.CLIP)
        self.adamw.step()
        with torch.no_grad():
            W_FD /= W_FD.norm(dim=1, keepdim=True)
        return {"mse": mse.item(), "kl": kl.item()}
