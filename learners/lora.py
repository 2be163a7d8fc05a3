"""TRAIN = sae_lora and lm_lora: low-rank updates, through peft, of an SAE or of the LM around it.

Source of LoRA on the LM: arXiv 2501.19406.
"""

import copy
import os
from contextlib import contextmanager

import torch
from torch import nn

from klsplice.errors import UserError
from klsplice.lm.splice import put, rows
from klsplice.storage import read_json, save_tensors, write_json
from learners.base import OnFrozenLearner, OnFrozenSAE
from sae import SAE


class LoRASAE(OnFrozenSAE):
    """An SAE whose two products, of the encoder and the decoder, go through peft's LoRA."""

    def __init__(self, sae: SAE, options: dict):
        from peft import LoraConfig, inject_adapter_in_model

        super().__init__(sae)
        encoder, decoder = _linear(sae.W_enc_FD, sae.b_enc_F), _linear(sae.W_dec_FD.T)
        self.layers = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
        config = LoraConfig(target_modules=["encoder", "decoder"], **options)
        self.layers = inject_adapter_in_model(config, self.layers)

    def forward(self, x_ND):
        own = vars(self.sae)
        own["encoder_product"] = self.layers["encoder"]
        own["decoder_product"] = self.layers["decoder"]
        try:
            return self.sae(x_ND)
        finally:
            del own["encoder_product"], own["decoder_product"]

    @torch.no_grad()
    def merged(self) -> SAE:
        """One plain SAE with the low-rank updates added to its weights."""
        sae = copy.deepcopy(self.sae).cpu()
        sae.W_enc_FD += self.layers["encoder"].get_delta_weight("default").cpu()
        sae.W_dec_FD += self.layers["decoder"].get_delta_weight("default").cpu().T
        return sae


def _linear(weight: torch.Tensor, bias: nn.Parameter | None = None) -> nn.Linear:
    """A frozen layer on the memory of those tensors."""
    layer = nn.Linear(*weight.T.shape, bias=False, device="meta")
    layer.weight, layer.bias = nn.Parameter(weight.detach(), requires_grad=False), bias
    return layer


class SAELoRALearner(OnFrozenLearner):
    """LoRA on encoder and decoder of a frozen SAE learns; merged on saving."""

    def __init__(self, sae, splice, *, rank, lora_alpha, lora_dropout, seed):
        # on its device before peft wraps its weights, which would otherwise be held twice
        sae = sae.to(splice.head.W_VD.device)
        torch.manual_seed(seed)
        super().__init__(LoRASAE(sae, _options(rank, lora_alpha, lora_dropout)), splice)

    @property
    def sae(self):
        return self.model.merged()


class LMLoRALearner(OnFrozenLearner):
    """LoRA on the LM learns to work with a frozen SAE; the clean pass is without it.

    Where LoRA acts on blocks up to LAYER, the spliced pass has to be a whole pass of its own."""

    in_lm = True

    def __init__(self, sae, splice, *, rank, lora_alpha, lora_dropout, lora_blocks, seed):
        super().__init__(OnFrozenSAE(sae).eval(), splice)
        from peft import LoraConfig, inject_adapter_in_model

        torch.manual_seed(seed)
        blocks = chosen_blocks(lora_blocks, splice.layer, len(splice.blocks))
        names = linear_layers(splice, blocks)
        options = _options(rank, lora_alpha, lora_dropout)
        # into the list of blocks: in a whole LM peft takes experts for layers of the same name
        inject_adapter_in_model(LoraConfig(target_modules=names, **options), splice.blocks)
        stack = next(n for n, module in splice.decoder.named_modules() if module is splice.blocks)
        # as others will read it
        self.config = LoraConfig(target_modules=[f"{stack}.{name}" for name in names], **options)
        for p in self.parameters():  # in bfloat16 a step of LR would be lost to rounding
            p.data = p.data.float()
        splice.decoder.eval()
        splice.as_it_is = self._without_lora
        self.whole = min(blocks) <= splice.layer

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

    def spliced(self, clean, active_N):
        if not self.whole:
            return super().spliced(clean, active_N)
        found = []

        def stand_in(x_BLD):
            x_ND = rows(x_BLD, active_N)
            y_ND, z_NF = self.reconstruct(x_ND)
            found.append(tuple(t.detach() for t in (x_ND, y_ND, z_NF)))
            return put(x_BLD, y_ND, active_N)

        return self.splice.edited(clean.tokens_BL, {self.splice.points[0][1]: stand_in}), found

    def train(self, on):
        """LoRA's dropout; the rest of the LM stays in evaluation mode."""
        for name, module in self.splice.decoder.named_modules():
            if "lora_dropout" in name:
                module.train(on)

    def end(self, after):
        pass  # the SAE is the given one

    def save_rest(self, folder):
        """lora/: adapter_model.safetensors and adapter_config.json, as peft reads them."""
        folder = os.path.join(folder, "lora")
        os.makedirs(folder, exist_ok=True)
        modules = self.splice.lm.named_modules()
        inside = next(n for n, module in modules if module is self.splice.decoder)
        prefix = ".".join(filter(None, ("base_model.model", inside)))
        tensors = {f"{prefix}.{n.replace('.default.', '.')}": t for n, t in self.state().items()}
        tensors = {n: t.cpu().contiguous() for n, t in tensors.items()}
        save_tensors(tensors, os.path.join(folder, "adapter_model.safetensors"))
        self.config.save_pretrained(folder)
        path = os.path.join(folder, "adapter_config.json")
        config = read_json(path)  # peft writes a set as it comes
        write_json(path, config | {"target_modules": sorted(config["target_modules"])})


def _options(rank: int, alpha: int, dropout: float) -> dict:
    return {"r": rank, "lora_alpha": alpha or rank, "lora_dropout": dropout}


def chosen_blocks(which: str, layer: int, n_blocks: int) -> list[int]:
    """LORA_BLOCKS -> indices of blocks. Raises UserError where there are none."""
    blocks = list(range(n_blocks))
    chosen = {"all": blocks, "after": blocks[layer + 1 :], "one": blocks[layer + 1 : layer + 2]}
    if not chosen[which]:
        what = f"LORA_BLOCKS = {which}: there is no block after LAYER = {layer}"
        raise UserError(what, "set LORA_BLOCKS=all, or a lower LAYER")
    return chosen[which]


def linear_layers(splice, blocks: list[int]) -> list[str]:
    """Names in the list of blocks of the linear layers in those blocks. Says which weights are in
    none (experts that are one tensor, convolutions). Raises UserError where there is none."""
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

    layers, left = [], set()
    for i in blocks:
        for name, p in splice.blocks[i].named_parameters():
            module = name.rpartition(".")[0]
            linear = isinstance(splice.blocks[i].get_submodule(module), (nn.Linear, Conv1D))
            if p.ndim >= 2 and linear:
                layers.append(f"{i}.{module}")
            elif p.ndim >= 2:
                left.add(name)
    if not layers:
        what = f"TRAIN = lm_lora: blocks {blocks[0]} to {blocks[-1]} have no linear layer"
        raise UserError(what, f"their weights are {', '.join(sorted(left)) or 'elsewhere'}")
    if left:
        print(f"note: LoRA leaves out what is no linear layer: {', '.join(sorted(left))}")
    return layers
