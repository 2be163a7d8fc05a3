"""What the tests share: the program on the path, constants, tiny models and tokens."""

import copy
import functools
import os
import sys
from types import SimpleNamespace

import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
if not torch.cuda.is_available():  # read by triton when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]

import numpy as np
import pytest
import transformers

import data
import language_model
import ops
import run

torch.set_num_threads(1)  # tiny models: a second thread only waits
transformers.AttentionInterface.register(language_model.ATTENTION, ops.attention)
transformers.utils.logging.disable_progress_bar()


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


def constants(**changes) -> SimpleNamespace:
    """run.py's constants with changes, as main() hands them on."""
    c = {name: value for name, value in vars(run).items() if name.isupper()}
    assert changes.keys() <= c.keys()
    small = {"MODEL": "tiny", "MODEL_REVISION": "", "DTYPE": "float32", "DEVICE": "cpu"}
    return SimpleNamespace(**c | small | changes, RECIPES=[])


def ours(lm):
    """A copy of a test model that runs through ops.attention."""
    lm = copy.deepcopy(lm)
    lm.set_attn_implementation(language_model.ATTENTION)
    return lm


def make_tokens(c, *, vocabulary, sequences, val=4, seed=0, special=(1, 2), bos=False):
    """Random tokens as data.Tokens."""
    rng = np.random.default_rng(seed)
    all_SL = rng.integers(3, vocabulary, (val + sequences, c.CONTEXT), dtype=np.uint32)
    fit = {"c": c, "special": list(special), "bos": bos, "fingerprint": f"test{seed}"}
    return data.Tokens(all_SL[:val], all_SL[val:], np.arange(sequences), **fit)


class QuietRun:
    """record.Run without a folder: the loop's steps and nothing else."""

    def __init__(self):
        self.scalars = []

    def steps(self, learner, optimizer, tokens):
        yield from range(tokens.steps)

    def wants_log(self, step):
        return True

    def log(self, step, scalars):
        self.scalars.append(scalars)

    def wants_evaluation(self, step):
        return False

    def stop_on(self, problem, step):
        assert problem is None


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
