"""TRAIN = sae_lora and lm_lora: low-rank updates, through peft, of an SAE or of the LM around it.

Source of LoRA on the LM: arXiv 2501.19406.
"""

import os
from contextlib import contextmanager

import torch
from torch import nn

import export
import formats
import sae as saes
from errors import UserError
from learner import OnFrozenLearner, OnFrozenSAE
from splice import put, rows


class LoRASAE(OnFrozenSAE):
    """Encoder and decoder of an SAE as linear layers, with peft's LoRA on both."""

    def __init__(self, sae: saes.SAE, options: dict):
        from peft import LoraConfig, inject_adapter_in_model

        super().__init__(sae)
        encoder, decoder = _linear(sae.W_enc_FD, sae.b_enc_F), _linear(sae.W_dec_FD.T)
        self.layers = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
        config = LoraConfig(target_modules=["encoder", "decoder"], **options)
        self.layers = inject_adapter_in_model(config, self.layers)

    def forward(self, x_ND):
        x_ND = x_ND - self.sae.b_dec_D if self.sae.centred else x_ND.float()
        z_NF = self.sae.activate(self.layers["encoder"](x_ND))
        return self.layers["decoder"](z_NF) + self.sae.b_dec_D, z_NF

    @torch.no_grad()
    def merged(self) -> saes.SAE:
        """One plain SAE with the low-rank updates added to its weights."""
        sae = formats.copy_of(self.sae)
        for weight, name, turned in (("W_enc_FD", "encoder", False), ("W_dec_FD", "decoder", True)):
            layer = self.layers[name]
            update = layer.get_delta_weight("default").cpu()
            getattr(sae, weight).add_(update.T if turned else update)
        return sae


def _linear(weight: torch.Tensor, bias: nn.Parameter | None = None) -> nn.Linear:
    """A frozen layer on the memory of those tensors."""
    layer = nn.Linear(*weight.T.shape, bias=False, device="meta")
    layer.weight, layer.bias = nn.Parameter(weight.detach(), requires_grad=False), bias
    return layer


class SAELoRALearner(OnFrozenLearner):
    """LoRA on encoder and decoder of a frozen SAE learns; merged on saving."""

    def wrap(self, c, sae):
        torch.manual_seed(c.SEED)
        return LoRASAE(sae, _lora_options(c))

    @property
    def sae(self):
        return self.model.merged()


class LMLoRALearner(OnFrozenLearner):
    """LoRA on the LM learns to work with one or several frozen SAEs; the clean pass is without it.

    Where LoRA acts on blocks up to LAYER, or several SAEs are spliced, the spliced pass cannot
    resume from LAYER: it is then a whole pass of its own, and says so.
    """

    def __init__(self, c, sae, splice):
        super().__init__(c, sae, splice)
        from peft import LoraConfig, inject_adapter_in_model

        torch.manual_seed(c.SEED)
        blocks = lora_blocks(c.LORA_BLOCKS, c.LAYER, len(splice.blocks))
        names = lora_targets(splice.decoder, blocks, c.LORA_MODULES)
        self.config = LoraConfig(target_modules=names, **_lora_options(c))
        inject_adapter_in_model(self.config, splice.decoder)
        for p in self.parameters():  # in bfloat16 a step of LR would be lost to rounding
            p.data = p.data.float()
        splice.decoder.eval()
        self.more = {}  # layer -> SAE
        for layer, where in further_saes(c.MORE_SAES):
            if layer in (c.LAYER, *self.more) or layer >= len(splice.blocks):
                what = f"MORE_SAES: there is no block {layer}, or it has an SAE already"
                raise UserError(what, "wanted one SAE a block, beside the one at LAYER")
            source = formats.open_sae(where, c.SAE_REVISION)
            formats.check_fits(
                source, sae.W_dec_FD.shape[1], model=c.MODEL, layer=layer, strict=c.CHECK_SAE
            )
            more = formats.build(source, formats.read_weights(source))
            self.more[layer] = more.to(self.device).eval().requires_grad_(False)
        self.whole = min(blocks) <= c.LAYER or bool(self.more)
        if self.whole:
            print(
                "note: this LoRA acts below LAYER or on several: the spliced pass is a whole pass"
            )

    def learning(self):
        named = self.splice.decoder.named_parameters()
        return {name: p for name, p in named if "lora_" in name}

    @contextmanager
    def _without_lora(self):
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [m for m in self.splice.decoder.modules() if isinstance(m, BaseTunerLayer)]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def clean(self, tokens_BL):
        with self._without_lora():
            return super().clean(tokens_BL)

    def zero_ablated(self, seen, active_N):
        with self._without_lora():
            return super().zero_ablated(seen, active_N)

    def spliced(self, seen, active_N):
        if not self.whole:
            return super().spliced(seen, active_N)
        here = {}

        def edit(layer, sae):
            def stand_in(x_BLD):
                x_ND = rows(x_BLD, active_N)
                with self.half_precision():
                    y_ND, z_NF = sae(x_ND)
                if sae is self.model:
                    here["xyz"] = x_ND.detach(), y_ND.detach(), z_NF.detach()
                return put(x_BLD, y_ND, active_N)

            return stand_in

        saes_at = {self.splice.layer: self.model} | self.more
        edits = {layer: edit(layer, sae) for layer, sae in saes_at.items()}
        return self.splice.full(seen.tokens_BL, edits), *here["xyz"]

    def train(self, on):
        """LoRA's dropout; the rest of the LM stays in evaluation mode."""
        for name, module in self.splice.decoder.named_modules():
            if "lora_dropout" in name:
                module.train(on)

    def end(self, after):
        pass

    def save_rest(self, folder):
        """lora/: adapter_model.safetensors and adapter_config.json, as peft reads them."""
        folder = os.path.join(folder, "lora")
        os.makedirs(folder, exist_ok=True)
        inside = self.splice.name.removesuffix(f"layers.{self.splice.layer}")  # of the whole LM
        prefix = f"base_model.model.{inside}"
        tensors = {prefix + n.replace(".default.", "."): t for n, t in self.state().items()}
        tensors = {n: t.cpu().contiguous() for n, t in tensors.items()}
        export.save_tensors(tensors, os.path.join(folder, "adapter_model.safetensors"))
        self.config.save_pretrained(folder)


def _lora_options(c) -> dict:
    return {"r": c.RANK, "lora_alpha": c.LORA_ALPHA or c.RANK, "lora_dropout": c.LORA_DROPOUT}


def lora_blocks(which: str, layer: int, n_blocks: int) -> list[int]:
    """LORA_BLOCKS -> indices of blocks. Raises UserError where there are none."""
    table = {
        "all": range(n_blocks),
        "after": range(layer + 1, n_blocks),
        "one": range(layer + 1, min(layer + 2, n_blocks)),
    }
    if not table[which]:
        what = f"LORA_BLOCKS = {which}: there is no block after LAYER = {layer}"
        raise UserError(what, "set LORA_BLOCKS=all, or a lower LAYER")
    return list(table[which])


def lora_targets(decoder: nn.Module, blocks: list[int], which: str) -> list[str]:
    """Names of the linear layers in those blocks: of attention, of the MLP, or all."""
    wanted = {
        "all": ("attn", "attention", "mlp"),
        "attention": ("attn", "attention"),
        "mlp": ("mlp",),
    }
    return [
        f"layers.{i}.{name}"
        for i in blocks
        for name, module in decoder.layers[i].named_modules()
        if isinstance(module, nn.Linear) and any(word in name for word in wanted[which])
    ]


def further_saes(text: str) -> list[tuple[int, str]]:
    """MORE_SAES "LAYER:folder,LAYER:folder" -> [(layer, where)]."""
    found = []
    for part in filter(None, text.split(",")):
        layer, colon, where = part.partition(":")
        if not colon or not layer.strip().isdigit() or not where:
            raise UserError(f"MORE_SAES: {part!r}", "wanted LAYER:folder,LAYER:folder")
        found.append((int(layer), where.strip()))
    return found
