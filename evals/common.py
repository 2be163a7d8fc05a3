"""What the evaluations share: a finished run opened again, and where an answer is kept.

An answer is one JSON file, runs/<name>/evals/<eval>.json, with the numbers, one table and what the
figure shows, so that runs/<name>/figures/<eval>.png can be drawn again without the run's LM.
"""

import argparse
import os
import sys
import time
from types import SimpleNamespace

import numpy as np
from safetensors.torch import load_file

import adapters
import data
import formats
import language_model
import machine
import report
import run as program
from checkpoint import finite, read_json, write_json
from errors import UserError
from learner import SAELearner


class Looked(SAELearner):
    """A learner around an SAE that is only looked at."""

    def wrap(self, c, sae):
        return sae.eval().requires_grad_(False)


class Finished:
    """A finished run, opened again: c, its constants; about, its run.json; tokenizer; tokens.

    before() and after() are its learner as its two evaluations had it, the LM's LoRA included, and
    each is valid until the other is asked for. device: where to run, "" for where the run did.
    Raises UserError in one line: no finished run, a gated or absent LM, no GPU, other text.
    """

    def __init__(self, folder: str, device: str = ""):
        self.folder, self.about = folder, about(folder)
        defaults = {n: v for n, v in vars(program).items() if n.isupper()}
        self.c = c = SimpleNamespace(**defaults | self.about["constants"], RECIPES=[])
        c.DEVICE, c.COMPILE = device or c.DEVICE, False
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


def about(folder: str) -> dict:
    """run.json of a finished run."""
    if not os.path.exists(os.path.join(folder, "results.json")):
        raise UserError(f"no finished run in {folder}", "wanted runs/<name> with a results.json")
    try:
        found = read_json(os.path.join(folder, "run.json"))
        return found | {"constants": dict(found["constants"])}
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"{folder}/run.json is damaged", "make that run again") from None


def positive(text: str) -> int:
    """A command line's whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted a whole number, 1 or more")
    return int(text)


def bootstrap(groups: list[np.ndarray], rounds: int = 2000) -> list[float]:
    """-> [mean of the groups' means, ends of its 95 % interval], resampling within each group."""
    rng = np.random.default_rng(0)
    means = [x_T[rng.integers(len(x_T), size=(rounds, len(x_T)))].mean(1) for x_T in groups]
    ends = np.quantile(np.mean(means, axis=0), (0.025, 0.975))
    return [float(np.mean([x_T.mean() for x_T in groups])), *ends.tolist()]


def command(argv, *, name: str, doc: str, options, evaluate, draw) -> int:
    """`python -m evals.<name> runs/<name> [options]` -> exit code.

    options(parser) adds its own. evaluate(arguments) -> dict with question, device, numbers, table
    (rows, the first of headings) and figure. draw(found, path) draws from that dict alone.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m evals.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--draw", action="store_true", help="only draw the figure again")
    options(parser)
    a = parser.parse_args(argv)
    folder = a.runs[0].split("+")[-1] if isinstance(a.runs, list) else a.runs
    path = os.path.join(folder, "evals", f"{name}.json")
    figure = os.path.join(folder, "figures", f"{name}.png")
    try:
        if a.draw and not os.path.exists(path):
            raise UserError(f"there is no {path} to draw from", "run it without --draw first")
        if not a.draw:
            _write(path, folder, name, evaluate, a)
        found = read_json(path)
        os.makedirs(os.path.dirname(figure), exist_ok=True)
        draw(found, figure)
    except UserError as e:
        print(e, file=sys.stderr)
        return e.code
    print(report.align(found["table"]))
    print("\n".join(filter(None, (found.get("note"), path, figure))))
    return 0


def _write(path, folder, name, evaluate, a) -> None:
    started = time.monotonic()
    found = {"name": name, "run": os.path.basename(os.path.normpath(folder)), **evaluate(a)}
    found["numbers"] = finite(found["numbers"])
    found["seconds"] = round(time.monotonic() - started, 1)
    found["commit"] = machine.git_commit()
    found["versions"] = machine.versions()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_json(path, found)
