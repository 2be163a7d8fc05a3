"""A finished run, opened again with its own loop's parts: tokens, splice, learner."""

import os
from types import SimpleNamespace

from safetensors.torch import load_file

import adapters
import data
import formats
import language_model
import run as program
from errors import UserError
from evals import common
from learner import SAELearner


class Looked(SAELearner):
    """A learner around an SAE that is only looked at."""

    def wrap(self, c, sae):
        return sae.eval().requires_grad_(False)


class Finished:
    """A finished run: folder; c, its constants; about, its run.json; tokenizer; tokens.

    before() and after() are its learner as its two evaluations had it, the LM's LoRA included, and
    each is valid until the other is asked for. device: where to run, "" for where the run did.
    Raises UserError in one line: no finished run, a gated or absent LM, no GPU, other text.
    """

    def __init__(self, folder: str, device: str = ""):
        run = common.open_run(folder, device)
        self.folder, self.about = folder, run.about
        defaults = {n: v for n, v in vars(program).items() if n.isupper()}
        self.c = c = SimpleNamespace(**defaults | vars(run.c) | {"COMPILE": False, "RECIPES": []})
        lm_config, self.tokenizer = language_model.open_lm(c)
        source = formats.open_source(c, lm_config)
        self.tokens = data.prepare(c, self.tokenizer, lm_config)
        if self.tokens.fingerprint != self.about["resolved"]["tokens"]:
            what = f"{folder}: DATASET = {c.DATASET!r} is not the text that it was made on"
            raise UserError(what, "another version of the file, or of the tokeniser")
        self.lm = language_model.load_lm(c, self.tokens)
        self._learner = adapters.build(c, source, self.lm, self.tokens)
        self._learner.train(False)
        self._start = {name: t.cpu().clone() for name, t in self._learner.state().items()}

    def before(self) -> SAELearner:
        self._learner.load_state(self._start)
        return self._learner

    def after(self) -> SAELearner:
        file = os.path.join(self.folder, "sae", "adapter.safetensors")
        if self.c.TRAIN == "lm_lora":
            tensors = load_file(os.path.join(self.folder, "lora", "adapter_model.safetensors"))
            names = {_lora_name(name): name for name in self._start}
            state = {names[_lora_name(name)]: t for name, t in tensors.items()}
            self._learner.load_state(state)
        elif os.path.exists(file):  # an adapter that no SAE class can hold
            self._learner.load_state(self._learner.state() | load_file(file))
        else:
            source = formats.open_sae(self.folder, "")
            sae = formats.build(source, formats.read_weights(source))
            return Looked(self.c, sae, self._learner.splice)
        return self._learner

    def stages(self):
        """Yields ("before", learner) and ("after", learner)."""
        yield "before", self.before()
        yield "after", self.after()

    def batches(self, n: int):
        """Yields (rows, tokens_BL, active_N) of the first n held-out sequences, on the device."""
        for start in range(0, n, self.c.EVAL_BATCH):
            part = slice(start, min(start + self.c.EVAL_BATCH, n))
            tokens_BL = self.tokens.val(part.start, part.stop)
            active_N = self.tokens.active(tokens_BL).to(self.c.DEVICE)
            yield part, tokens_BL.to(self.c.DEVICE), active_N


def _lora_name(name: str) -> str:
    """From the first "layers." on, without peft's name of the adapter: ours and peft's agree."""
    return name[name.index("layers.") :].replace(".default.", ".")
