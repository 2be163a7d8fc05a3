"""A step never waits for the device: none of its numbers is read by the host.

Where there is a GPU, PyTorch itself says when the host waits. Elsewhere everything is on the device
"meta", which has no numbers that could be read, and no kernel of Triton's is launched.
"""

import importlib
from contextlib import nullcontext

import pytest
import torch
from test_method import CASES, Case, given
from test_triton import CUDA, KERNELS

import finetune
from klsplice.lm.head import Head
from sae import SAE

pytestmark = [pytest.mark.gpu] if CUDA else []
STEPS = {
    f"topk {loss}": Case("topk", None, given(), {"LOSS": loss}) for loss in ("kl+mse", "mse", "kl")
}
STEPS["topk float32"] = Case("topk", None, given(), {"DTYPE": "float32"})
# AuxK asks whether any latent is dead, and saves half of the SAE's work where none is.
LEFT_OUT = ("auxk", "fresh")
STEPS |= {n: case for n, case in CASES.items() if not n.startswith(LEFT_OUT)}


def move(learner, optimizer, monkeypatch):
    """All of it is on the device from here on, wherever it is held, and the kernels are on."""
    device = torch.device("cuda" if CUDA else "meta")
    modules = (learner.splice.lm, learner.model)
    tensors = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}
    for t in [*tensors.values(), optimizer.adamw.found_inf]:
        there = t.detach().to(device)
        if isinstance(t, torch.nn.Parameter):
            there = torch.nn.Parameter(there, t.requires_grad)
        torch.utils.swap_tensors(t, there)
    old = learner.splice.head
    more = {"softcap": old.softcap, "scale": old.scale, "chunk": old.chunk}
    learner.splice.head = Head(old.W_VD, **more)
    learner.device, optimizer.fused = device, isinstance(learner.model, SAE)
    monkeypatch.setattr("klsplice.kernels.topk.sparse_pays", lambda *a: True)
    if not CUDA:
        for module in KERNELS:
            monkeypatch.setattr(module, "launch", lambda *args, **constants: None)
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: t.device == device))
        check = "_device_dtype_check_for_fused"
        monkeypatch.setattr(importlib.import_module("torch.optim.adam"), check, lambda p: None)
        monkeypatch.setattr("torch.autocast", lambda *args, **how: nullcontext())
        monkeypatch.setattr("torch.is_autocast_enabled", lambda device: False)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_never_waits_for_the_device(name, monkeypatch, request):
    """With Gemma-2 and our attention; of other LMs transformers looks for packed sequences."""
    case = Case(**vars(STEPS[name]) | {"family": "gemma2"})
    c, tokens, learner = case.learner(**{"DTYPE": "bfloat16"} | case.constants)
    optimizer = finetune.Optimizer(learner, weight_decay=0.01, clip=1.0)
    move(learner, optimizer, monkeypatch)
    learner.train(True)
    batches, loss = finetune.batches_of(c, learner, tokens), finetune.loss_of(c)
    for step in range(5):
        how = {"lr": 1e-3, "logits_dtype": getattr(torch, c.LOGITS)}
        finetune.training_step(learner, optimizer, batches(step), loss, **how)
        if CUDA:  # from the second step on: the first one compiles
            request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
            torch.cuda.set_sync_debug_mode("error")
