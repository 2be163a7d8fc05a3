"""What learns (TRAIN): the SAE itself, an adapter on its output, LoRA on the SAE, LoRA on the LM.

A learner says how the clean and the spliced pass are made and which parameters move; finetune.py
and eval.py know nothing else of it. The table LEARNERS is at the end. Sources: adapters, arXiv
2503.17272; LoRA on the LM, arXiv 2501.19406.
"""

import os

import torch
from safetensors.torch import save_file
from torch import nn

import formats
import sae as saes
from errors import UserError
from splice import Splice, put, rows


class SAELearner:
    """The SAE (or whatever stands in `model`) learns; the LM is frozen.

    model: maps x_ND to (y_ND, z_NF) and has sae.SAE's training methods.
    """

    def __init__(self, c, sae: saes.SAE, splice: Splice):
        self.device, self.dtype = torch.device(c.DEVICE), getattr(torch, c.DTYPE)
        self.splice, self.model = splice, self.wrap(c, sae).to(self.device)

    def wrap(self, c, sae: saes.SAE) -> nn.Module:
        norm_F = sae.W_dec_FD.norm(dim=1)
        if sae.unit_norm and ((norm_F - 1).abs() > 1e-3).any():
            what = "the decoder rows of this SAE are not of unit norm (an adapter folded into it?)"
            raise UserError(what, "training would rescale them; use TRAIN=adapter or the original")
        return sae

    @property
    def sae(self) -> saes.SAE:
        """The SAE to save."""
        return self.model

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def clean(self, tokens_BL):
        """See Splice.clean."""
        return self.splice.clean(tokens_BL)

    def zero_ablated(self, seen, active_N) -> torch.Tensor:
        """-> h_BLD of the clean LM with the active positions' residual at zero."""
        nothing_ND = torch.zeros_like(rows(seen.x_BLD, active_N))
        return self.splice.resume(put(seen.x_BLD, nothing_ND, active_N), seen.calls)

    def reconstruct(self, x_ND) -> tuple[torch.Tensor, torch.Tensor]:
        """-> y_ND, z_NF; products in the LM's dtype, weights and sums in float32."""
        half = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=half):
            return self.model(x_ND)

    def spliced(self, seen, active_N):
        """-> h_BLD of the spliced pass, and x_ND, y_ND, z_NF at the active positions."""
        x_ND = rows(seen.x_BLD, active_N)
        y_ND, z_NF = self.reconstruct(x_ND)
        h_BLD = self.splice.resume(put(seen.x_BLD, y_ND, active_N), seen.calls)
        return h_BLD, x_ND, y_ND, z_NF

    def train(self, on: bool) -> None:
        self.model.train(on)

    def state(self) -> dict:
        """Every tensor that training changes."""
        return self.model.state_dict()

    def load_state(self, state: dict) -> None:
        self.model.load_state_dict(state)

    def begin(self, c, before: dict) -> None:
        """before: the evaluation before training."""
        if isinstance(self.model, saes.ReLU):
            target = c.K if c.SAE == "fresh" else before["l0"]
            self.model.scale_by(before["mean_square_norm"] ** 0.5, target)

    def end(self, after: dict) -> None:
        """after: the evaluation after training."""
        if type(self.model) is saes.TopK:
            self.model.threshold.fill_(after["smallest_active"])

    def save_rest(self, folder: str) -> None:
        """Write what no SAE file holds; called after the SAE was saved to folder/sae."""


class _OnFrozenSAE(nn.Module):
    """What AdapterLearner and SAELoRALearner train: an SAE that stays, and something on it."""

    def __init__(self, sae: saes.SAE):
        super().__init__()
        self.sae = sae.requires_grad_(False)

    @property
    def d_sae(self) -> int:
        return self.sae.d_sae

    def train(self, mode: bool = True):
        super().train(mode)
        self.sae.eval()  # a BatchTopK keeps its threshold
        return self

    def error(self, x_ND, y_ND, z_NF) -> torch.Tensor:
        return saes.squared_error(x_ND, y_ND)

    def extra(self, x_ND, y_ND, z_NF) -> None:
        return None

    def before_clip(self) -> None:
        pass

    def after_step(self, l0, fired_F, tokens) -> None:
        pass

    def problem(self) -> None:
        return None


class Adapter(_OnFrozenSAE):
    """y + up(down(y)) on the reconstruction y; up starts at zero; the MLP has ReLU and biases."""

    def __init__(self, sae: saes.SAE, *, kind: str, rank: int, seed: int):
        super().__init__(sae)
        width, mlp = sae.W_dec_FD.shape[1], kind == "mlp"
        self.down, self.up = nn.Linear(width, rank, bias=mlp), nn.Linear(rank, width, bias=mlp)
        self.between = nn.ReLU() if mlp else nn.Identity()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.down.parameters():  # as nn.Linear does, from a generator of its own
                p.uniform_(-(width**-0.5), width**-0.5, generator=generator)
            for p in self.up.parameters():
                p.zero_()

    def forward(self, x_ND):
        with torch.no_grad():
            r_ND, z_NF = self.sae(x_ND)
        return r_ND + self.up(self.between(self.down(r_ND))), z_NF

    @torch.no_grad()
    def folded(self) -> saes.SAE:
        """One plain SAE that equals SAE and linear adapter: W' = W (I + A)^T, b' = (I + A) b."""
        sae = formats.copy_of(self.sae)
        A_DD = self.up.weight @ self.down.weight
        b_old_D = sae.b_dec_D.clone()
        sae.W_dec_FD += sae.W_dec_FD @ A_DD.T
        sae.b_dec_D += A_DD @ b_old_D
        if sae.centred:  # the encoder still has to read x - b_old
            sae.b_enc_F += sae.W_enc_FD @ (sae.b_dec_D - b_old_D)
        return sae


class AdapterLearner(SAELearner):
    """An adapter on the output of a frozen SAE learns."""

    def wrap(self, c, sae):
        if sae.W_dec_FD.shape[1] < c.RANK:
            what = f"RANK = {c.RANK} is more than the residual's width {sae.W_dec_FD.shape[1]}"
            raise UserError(what, "an adapter has at most that rank")
        self.folds = c.ADAPTER == "linear" and c.FOLD
        return Adapter(sae, kind=c.ADAPTER, rank=c.RANK, seed=c.SEED)

    @property
    def sae(self):
        return self.model.folded() if self.folds else self.model.sae

    def begin(self, c, before):
        pass

    def end(self, after):
        pass

    def save_rest(self, folder):
        if not self.folds:
            tensors = {n: t for n, t in self.model.state_dict().items() if not n.startswith("sae.")}
            save_file(tensors, os.path.join(folder, "sae", "adapter.safetensors"))


class LoRASAE(_OnFrozenSAE):
    """Encoder and decoder of an SAE as linear layers, with peft's LoRA on both."""

    def __init__(self, sae: saes.SAE, options: dict):
        from peft import LoraConfig, inject_adapter_in_model

        super().__init__(sae)
        F, D = sae.W_dec_FD.shape
        self.layers = nn.ModuleDict(
            {"encoder": nn.Linear(D, F), "decoder": nn.Linear(F, D, bias=False)}
        )
        with torch.no_grad():
            self.layers["encoder"].weight.copy_(sae.W_enc_FD)
            self.layers["encoder"].bias.copy_(sae.b_enc_F)
            self.layers["decoder"].weight.copy_(sae.W_dec_FD.T)
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
            update = layer.get_delta_weight("default")
            getattr(sae, weight).add_(update.T if turned else update)
        return sae


class SAELoRALearner(AdapterLearner):
    """LoRA on encoder and decoder of a frozen SAE learns; merged on saving."""

    folds = True

    def wrap(self, c, sae):
        torch.manual_seed(c.SEED)
        return LoRASAE(sae, _lora_options(c))

    @property
    def sae(self):
        return self.model.merged()


class LMLoRALearner(SAELearner):
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
        splice.decoder.eval()
        self.more = {}  # layer -> SAE
        for layer, where in further_saes(c.MORE_SAES):
            source = formats.open_sae(where, c.SAE_REVISION)
            formats.check_fits(
                source, sae.W_dec_FD.shape[1], model=c.MODEL, layer=layer, strict=True
            )
            more = formats.build(source, formats.read_weights(source))
            self.more[layer] = more.to(self.device).eval().requires_grad_(False)
        self.whole = min(blocks) <= c.LAYER or bool(self.more)
        if self.whole:
            print(
                "note: this LoRA acts below LAYER or on several: the spliced pass is a whole pass"
            )

    def wrap(self, c, sae):
        return sae.eval().requires_grad_(False)

    def _lora(self) -> dict[str, nn.Parameter]:
        named = self.splice.decoder.named_parameters()
        return {name: p for name, p in named if "lora_" in name}

    def parameters(self):
        return list(self._lora().values())

    def _switch(self, on: bool) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        for module in self.splice.decoder.modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(on)

    def clean(self, tokens_BL):
        self._switch(False)
        try:
            return super().clean(tokens_BL)
        finally:
            self._switch(True)

    def zero_ablated(self, seen, active_N):
        self._switch(False)
        try:
            return super().zero_ablated(seen, active_N)
        finally:
            self._switch(True)

    def spliced(self, seen, active_N):
        if not self.whole:
            return super().spliced(seen, active_N)
        here = {}

        def edit(layer, sae):
            def stand_in(x_BLD):
                x_ND = rows(x_BLD, active_N)
                with torch.autocast(
                    self.device.type, self.dtype, enabled=self.dtype != torch.float32
                ):
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

    def state(self):
        return {name: p.detach() for name, p in self._lora().items()}

    def load_state(self, state):
        mine = self._lora()
        with torch.no_grad():
            for name, t in state.items():
                mine[name].copy_(t)

    def begin(self, c, before):
        pass

    def end(self, after):
        pass

    def save_rest(self, folder):
        """lora/: adapter_model.safetensors and adapter_config.json, for PeftModel.from_pretrained."""
        folder = os.path.join(folder, "lora")
        os.makedirs(folder, exist_ok=True)
        prefix = "base_model.model.model."
        tensors = {prefix + n.replace(".default.", "."): t for n, t in self.state().items()}
        tensors = {n: t.cpu().contiguous() for n, t in tensors.items()}
        save_file(tensors, os.path.join(folder, "adapter_model.safetensors"))
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


def build(c, source, lm, tokens) -> SAELearner:
    """The learner of TRAIN around the SAE of `source`: read, converted or fresh."""
    splice = Splice(lm, c.LAYER, head_chunk=c.HEAD_CHUNK)
    sae = (
        _fresh(c, source, splice, tokens)
        if source.fresh
        else formats.build(source, source.weights())
    )
    if c.ARCHITECTURE not in ("", source.architecture):
        sae = _converted(c, sae, splice, tokens)
    if isinstance(sae, saes.JumpReLU):
        sae.threshold_F.requires_grad_(c.JUMPRELU_THRESHOLD == "ste")
    return LEARNERS[c.TRAIN](c, sae, splice)


def _first_residuals(c, splice, tokens) -> torch.Tensor:
    """x_ND float32 at the active positions of the first training contexts (64 at most)."""
    parts = tokens.sequences(0, min(64, len(tokens.order_S))).split(c.EVAL_BATCH)
    device = splice.head.W_VD.device
    found = [rows(splice.residual(p.to(device)), tokens.active(p).to(device)) for p in parts]
    return torch.cat(found).float().cpu()


def _fresh(c, source, splice, tokens) -> saes.SAE:
    """Tied random rows and a decoder bias at the mean residual."""
    weights = saes.fresh_weights(
        d_in=source.d_in,
        d_sae=source.d_sae,
        mean_D=_first_residuals(c, splice, tokens).mean(0),
        generator=torch.Generator().manual_seed(c.SEED),
    )
    sae = formats.build(source, weights)
    if isinstance(sae, saes.TopK):
        sae.auxk, sae.dead_after = c.AUXK, c.DEAD_AFTER
    return sae


def _converted(c, sae, splice, tokens) -> saes.SAE:
    """A TopK as the ARCHITECTURE asked for, with a threshold fitted to the same L0."""
    if type(sae) is not saes.TopK or c.ARCHITECTURE not in saes.FROM_TOPK:
        what = f"ARCHITECTURE = {c.ARCHITECTURE}, the SAE is a {type(sae).__name__}"
        hint = f"leave it empty; only a TopK is converted, to {', '.join(saes.FROM_TOPK)}"
        raise UserError(what, hint)
    print(
        f"note: the TopK SAE is converted to {c.ARCHITECTURE}, its threshold fitted to L0 = {sae.k}"
    )
    return saes.FROM_TOPK[c.ARCHITECTURE](sae, _first_residuals(c, splice, tokens))


LEARNERS = {
    "sae": SAELearner,
    "adapter": AdapterLearner,
    "sae_lora": SAELoRALearner,
    "lm_lora": LMLoRALearner,
}
