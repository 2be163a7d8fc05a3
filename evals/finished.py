"""A finished run, opened again with its own loop's parts: tokens, splice, learner."""

import os
import re

from safetensors.torch import load_file

import data
from evals import common
from klsplice import hub, machine
from klsplice.formats import read
from klsplice.lm import load
from klsplice.settings import Config, defaults
from klsplice.tracking.run_folder import check_same, resolved
from learners import start
from learners.base import SAELearner
from sae import build


class Finished:
    """A finished run: folder; cfg, its constants; about, its run.json; tokenizer; tokens.

    before() and after() are its learner as its two evaluations had it, the LM's LoRA included, and
    each is valid until the other is asked for. device: where to run, "" for where the run did.
    Raises UserError in one line: no finished run, a gated or absent LM, no GPU, other text.
    """

    def __init__(self, folder: str, device: str = ""):
        run = common.open_run(folder, device)
        self.folder, self.about = folder, run.about
        new = {"COMPILE": False, "RECIPES": []}  # and what the run's program did not have yet
        self.cfg = cfg = Config(**defaults() | run.cfg.constants() | new)
        options = {"device": cfg.DEVICE, "layer": cfg.LAYER, "context": cfg.CONTEXT}
        opened = load.open_lm(cfg.MODEL, cfg.MODEL_REVISION, **options)
        self.tokenizer, self.identity = opened.tokenizer, opened.identity
        machine.check_device(cfg.DEVICE, cfg.DTYPE)
        hub.prefer_cache_if_unreachable(cfg.MODEL, cfg.DATASET)
        fresh = cfg.SAE == "fresh"
        source = start.find_source(cfg) if fresh else read.started_from(folder, self.about)
        start.read_source(cfg, source, opened.config)
        self.tokens = data.prepare(cfg, self.tokenizer, opened.config)
        check_same(folder, self.about["resolved"], resolved(opened, source, self.tokens))
        self.lm = load.load_lm(opened, dtype=cfg.DTYPE, device=cfg.DEVICE)
        splice = start.open_splice(cfg, self.lm, self.tokens, learns=False)
        self._learner = start.open_learner(cfg, source, splice, self.tokens)
        self._learner.train(False)
        self._start = {name: t.cpu().clone() for name, t in self._learner.state().items()}

    def before(self) -> SAELearner:
        self._learner.load_state(self._start)
        return self._learner

    def after(self) -> SAELearner:
        file = os.path.join(self.folder, "sae", "adapter.safetensors")
        if self.cfg.TRAIN == "lm_lora":
            tensors = load_file(os.path.join(self.folder, "lora", "adapter_model.safetensors"))
            names = {_lora_name(name): name for name in self._start}
            state = {names[_lora_name(name)]: t for name, t in tensors.items()}
            self._learner.load_state(state)
        elif os.path.exists(file):  # an adapter that no SAE class can hold
            self._learner.load_state(self._learner.state() | load_file(file))
        else:
            source = read.open_sae(self.folder, "")
            sae = build(source, source.read_weights()).eval().requires_grad_(False)
            return SAELearner(sae, self._learner.splice)
        return self._learner

    def stages(self):
        """Yields ("before", learner) and ("after", learner)."""
        yield "before", self.before()
        yield "after", self.after()

    def batches(self, n: int):
        """Yields (rows, tokens_BL, active_N) of the first n held-out sequences, on the device."""
        for first in range(0, n, self.cfg.EVAL_BATCH):
            part = slice(first, min(first + self.cfg.EVAL_BATCH, n))
            tokens_BL = self.tokens.val(part.start, part.stop)
            yield part, tokens_BL.to(self.cfg.DEVICE), self.active(tokens_BL)

    def active(self, tokens_BL):
        """See data.Tokens.active. tokens_BL: on the CPU."""
        x_BLD, device = None, self.cfg.DEVICE
        if self.cfg.KEEP == "outliers":
            x_BLD = self._learner.splice.residual(tokens_BL.to(device))
        return self.tokens.active(tokens_BL, x_BLD).to(device)


def _lora_name(name: str) -> str:
    """From the block's number on, without peft's name of the adapter: ours and peft's agree."""
    number = re.search(r"(?:^|\.)\d+\.", name)
    return name[number.start() :].lstrip(".").replace(".default.", ".")
