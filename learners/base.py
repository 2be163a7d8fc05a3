"""A learner: what learns (TRAIN), and how the clean and the spliced pass are made with it.

finetune.py and eval.py know nothing of an experiment but its learner. This is the plain one, the
SAE itself; adapter.py and lora.py have the others. Shapes as in sae.py and klsplice/lm.
"""

import hashlib
import os
import sys

import torch
from torch import nn

from klsplice.formats import write
from klsplice.lm.splice import Pass, Splice
from klsplice.storage import digest_of
from sae import SAE, Trainable


class SAELearner:
    """The SAE (or whatever stands in `model`) learns; the LM is frozen.

    model: a Trainable. It is moved to the LM's device.
    """

    in_lm = False  # whether what learns is a part of the LM

    def __init__(self, model: Trainable, splice: Splice):
        W_VD = splice.head.W_VD
        self.device, self.dtype = W_VD.device, W_VD.dtype
        self.splice, self.model = splice, model.to(self.device)
        # the files of the model's classes as they are now: they may be edited while it trains
        kinds = [kind for kind in type(model).__mro__ if issubclass(kind, Trainable)]
        files = [getattr(sys.modules[kind.__module__], "__file__", None) or "" for kind in kinds]
        self.code = digest_of([file for file in files if os.path.exists(file)])

    @property
    def sae(self) -> SAE:
        """The SAE to save."""
        return self.model

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def half_precision(self):
        """Autocast to the LM's dtype, where that is not float32."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)

    def reconstruct(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-> y_ND, z_NF; products in the LM's dtype."""
        with self.half_precision():
            return self.model(x_ND)

    def losses(self, x_ND, o_ND, y_ND, z_NF) -> tuple[torch.Tensor, torch.Tensor | None]:
        """-> the MSE of each token (N,), and what else its loss has (N,) or None.

        o_ND: what y_ND, float32, stands in for."""
        with self.half_precision():  # their products are like those of reconstruct
            return self.model.error(o_ND, y_ND, z_NF), self.model.extra(x_ND, o_ND, y_ND, z_NF)

    def spliced(self, clean: Pass, active_N: torch.Tensor) -> tuple[Pass, list]:
        """-> the spliced Pass, and of each site o_ND, y_ND, z_NF at the active positions: what its
        SAE stands in for, what it makes of the clean pass, and its latents."""
        ((x_ND, o_ND),) = clean.rows(active_N)
        y_ND, z_NF = self.reconstruct(x_ND)
        return self.splice.spliced(clean, active_N, y_ND), [(o_ND, y_ND, z_NF)]

    def each(self, source):
        """Yields each SAE's source, the SAE, and how the names of its numbers end."""
        yield source, getattr(self.model, "sae", self.model), ""  # inside an adapter

    def save(self, folder: str, source, constants: dict, *, bos: bool) -> None:
        """The SAE's folder. source: formats.source.Source; for the rest see formats.write.save."""
        block = self.splice.block_of(self.splice.sites[0])
        write.save(folder, self.sae, source, constants, bos=bos, block=block)

    def identity(self) -> str | None:
        """A checksum of what an evaluation depends on here; None where that is more than an SAE."""
        digest = hashlib.sha256((repr(self.model) + self.code).encode())
        tensors = dict(self.model.named_parameters())
        tensors |= {name: getattr(self.model, name) for name in self.model.decides}
        for name, t in tensors.items():
            digest.update(f"{name} {tuple(t.shape)} {getattr(self.model, 'k', '')}".encode())
            digest.update(t.detach().cpu().contiguous().numpy())
        return digest.hexdigest()

    def train(self, on: bool) -> None:
        self.model.train(on)

    def state(self) -> dict:
        """Every tensor that training changes."""
        return self.model.state_dict()

    def load_state(self, state: dict) -> None:
        self.model.load_state_dict(state)

    def begin(self, before: dict) -> None:
        """before: the evaluation before training."""
        self.model.begin(before)

    def end(self, after: dict) -> None:
        """after: the evaluation after training."""
        self.model.end(after)

    def save_rest(self, folder: str) -> None:
        """Write what no SAE file holds; called after the SAE was saved to folder/sae."""


class OnFrozenSAE(Trainable):
    """An SAE that stays as it is; subclasses have something small that learns on it."""

    def __init__(self, sae: SAE):
        super().__init__()
        self.sae = sae.requires_grad_(False)

    @property
    def d_sae(self) -> int:
        return self.sae.d_sae

    def train(self, mode: bool = True):
        super().train(mode)
        self.sae.eval()  # a BatchTopK keeps its threshold
        return self

    def forward(self, x_ND):
        return self.sae(x_ND)


class OnFrozenLearner(SAELearner):
    """Something on, or around, a frozen SAE learns; `model` is an OnFrozenSAE."""

    @property
    def sae(self):
        return self.model.sae

    def identity(self):
        return None

    def learning(self) -> dict[str, nn.Parameter]:
        """What learns, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def parameters(self):
        return list(self.learning().values())

    def state(self):
        return {name: p.detach() for name, p in self.learning().items()}

    def load_state(self, state):
        for name, p in self.state().items():
            p.copy_(state[name])

    def end(self, after):
        self.model.sae.end(after)
