"""What the tests share: the program on the path, constants, tiny models and tokens."""

import contextlib
import copy
import functools
import os
import sys
from types import SimpleNamespace
from unittest import mock

import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
if not torch.cuda.is_available():  # read by triton when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
# On CPUs with AVX2 alone MKL rounds by where a matrix lies in memory, unless it is told not to.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]

import numpy as np
import pytest
import transformers

import data
import finetune
from klsplice.lm import attention
from klsplice.settings import Config, defaults
from learners import start

torch.set_num_threads(1)  # tiny models: a second thread only waits
transformers.AttentionInterface.register(attention.NAME, attention.attention)
transformers.utils.logging.disable_progress_bar()


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


def constants(**changes) -> Config:
    """run.py's constants with changes, as main() hands them on."""
    known = defaults()
    assert changes.keys() <= known.keys()
    small = {"MODEL": "tiny", "MODEL_REVISION": "", "DTYPE": "float32", "DEVICE": "cpu"}
    return Config(**known | small | changes, recipes=[])


def ours(lm):
    """A copy of a test model with the attention that a run on CUDA gives it."""
    lm = copy.deepcopy(lm)
    lm.set_attn_implementation(attention.implementation(lm.config, "cuda") or "sdpa")
    return lm


def make_tokens(c, *, vocabulary, sequences, val=4, seed=0, special=(1, 2), bos=False):
    """Random tokens as data.Tokens."""
    rng = np.random.default_rng(seed)
    all_SL = rng.integers(3, vocabulary, (val + sequences, c.CONTEXT), dtype=np.uint32)
    fit = {"cfg": c, "special": list(special), "bos": bos, "fingerprint": f"test{seed}"}
    return data.Tokens(all_SL[:val], all_SL[val:], np.arange(sequences), **fit)


def open_learner(c, source, lm, tokens):
    """The learner of TRAIN, as run.py opens it."""
    return start.open_learner(c, source, start.open_splice(c, lm, tokens, learns=True), tokens)


def gradients(c, learner, batch) -> dict:
    """Those of a step, left in .grad -> its means."""
    how = finetune.loss_of(c), getattr(torch, c.LOGITS)
    return finetune.gradients(learner, batch, *how).means()


class QuietLoop:
    """tracking.loop.Loop without a folder: the loop's steps and nothing else."""

    def __init__(self, run, learner, optimizer, *, total, tokens_a_step):
        self.run, self.learner, self.optimizer = run, learner, optimizer
        self.total = total

    def timed(self):
        return contextlib.nullcontext()

    def __iter__(self):
        yield from range(self.total)

    def wants_log(self, step):
        return True

    def log(self, step, scalars):
        self.run.scalars.append(scalars)

    def stop_on(self, problem, step):
        assert problem is None


def quietly(c, learner, tokens) -> list[dict]:
    """A whole training in memory -> its scalars, step by step."""
    run = SimpleNamespace(scalars=[])
    batches = finetune.batches_of(c, learner, tokens)
    with mock.patch.object(finetune, "Loop", QuietLoop):
        training = finetune.Training(c, learner, tokens, run)
    for step in training.loop:
        training.step(step, lambda step=step: batches(step))
    return run.scalars


def resume(splice, tokens_BL, y_BLD, clean=None):
    """A spliced pass with y_BLD at every position."""
    clean = clean or splice.clean(tokens_BL, to_end=False)
    y_ND = y_BLD.flatten(0, 1)
    return splice.spliced(clean, torch.arange(len(y_ND)), y_ND)


def residual(splice, tokens_BL):
    return splice.clean(tokens_BL, to_end=False).x_BLD


@pytest.fixture
def graphs(monkeypatch):
    """torch.compile without a C++ compiler -> its counters: graphs made, and where it broke off."""
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    return counters


@pytest.fixture
def at(tmp_path, monkeypatch):
    """The test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
