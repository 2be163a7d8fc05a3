"""Bugs planted to see the tests fail, and the kernels compiled (make test-all)."""

import functools
import importlib
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import test_triton as kernels
import torch
from conftest import HERE
from test_method import CASES, differences, our_training, plain_training
from test_triton import KERNELS, pair

import finetune
import sae as saes
from klsplice.lm import head
from learners import lora

# ---- the method ------------------------------------------------------------------------------

SWEEP, STEP, EXTRA = head.kl_sweep, finetune.Optimizer.step, saes.ReLU.extra


def clip_before_projection(self, lr):
    norm = torch.nn.utils.clip_grad_norm_(self.learner.parameters(), self.clip)
    self.learner.model.before_clip()
    self.adamw.param_groups[0]["lr"] = lr
    self.adamw.step()
    self.learner.model.renormalise()
    self.adamw.zero_grad()
    return norm


def no_clip(self, lr):
    self.clip = float("inf")
    return STEP(self, lr)


def adam(self, params, **options):
    torch.optim.Adam.__init__(self, params, lr=0.0, fused=True)


def summed_over_d(self, x_ND, y_ND, z_NF):
    return (y_ND - x_ND).square().sum(-1)


def penalty_too_early(self, x_ND, y_ND, z_NF):
    l0 = (z_NF > 0).sum() / len(z_NF)
    return EXTRA(self, x_ND, y_ND, z_NF) * torch.where(l0 < self.target_l0, 0.999, 1.001)


def without_norms(self, x_ND, y_ND, z_NF):
    return self.penalty * z_NF.sum(-1)


def k_of_each_token(self, pre_NF):
    self.smallest.append(torch.ones(()))
    return saes.TopK.activate(self, pre_NF)


def mean_of_the_micro_batch(self, value_N, part, name):
    return value_N.mean() / 2  # of two micro-batches


def with_weights(weigh):
    return dict(finetune.LOSSES) | {"kl+mse": finetune.Loss(weigh, (finetune.kl,))}


TOPK, SPARSE, RELU, MATRYOSHKA = saes.SAE, saes.KSparse, saes.ReLU, saes.Matryoshka
OPTIMIZER, LM_LORA = finetune.Optimizer, lora.LMLoRALearner
PLANTED = {  # bug: case, owner, what is replaced, by what
    "no 0.5": ("topk gemma2", finetune, "LOSSES", with_weights(lambda mse, kl: (1.0, mse / kl))),
    "no KL": ("topk gemma2", finetune, "LOSSES", with_weights(lambda mse, kl: (1.0, 0.0))),
    "reversed KL": ("topk gemma2", head, "kl_sweep", lambda t, s, *a, **o: SWEEP(s, t, *a, **o)),
    "MSE summed over D": ("topk gemma2", TOPK, "error", summed_over_d),
    "mean of parts": ("topk gemma2", finetune.Sums, "share_of_mean", mean_of_the_micro_batch),
    "no weight decay": ("topk kl", torch.optim.AdamW, "__init__", adam),
    "no clip": ("topk clipped", OPTIMIZER, "step", no_clip),
    "clip before projection": ("topk clipped", OPTIMIZER, "step", clip_before_projection),
    "no projection": ("topk gemma2", TOPK, "before_clip", lambda self: None),
    "no renormalisation": ("topk gemma2", TOPK, "renormalise", lambda self: None),
    "constant lr": ("topk gemma2", finetune, "learning_rate", lambda step, steps, **o: 1e-3),
    "penalty updated before it is used": ("relu", RELU, "extra", penalty_too_early),
    "norms left out of L1": ("relu", RELU, "extra", without_norms),
    "L1 inside the 0.5": ("relu", RELU, "extra", lambda self, *a: 0.5 * EXTRA(self, *a)),
    "b_dec subtracted": ("jumprelu", saes.JumpReLU, "centred", True),
    "k of each token": ("batchtopk", saes.BatchTopK, "activate", k_of_each_token),
    "largest prefix alone": ("matryoshka", MATRYOSHKA, "error", saes.SAE.error),
    "no AuxK": ("auxk", SPARSE, "extra", lambda *a: None),
    "LoRA in the clean pass": ("lora all", LM_LORA, "_without_lora", lambda self: nullcontext()),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_wrong_method_is_noticed(bug, monkeypatch):
    name, owner, attribute, wrong = PLANTED[bug]
    wanted = plain_training(name)
    monkeypatch.setattr(owner, attribute, wrong)
    assert differences(our_training(CASES[name]), wanted, CASES[name].constants.get("LOSS"))


# ---- compiled --------------------------------------------------------------------------------


def compile_all():
    """Compile what is launched for an H100, which needs none; the kernels are not run."""
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    names = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16"}
    done = set()

    def kind(value):
        if isinstance(value, torch.Tensor):
            name = str(value.dtype).removeprefix("torch.")
            return "*" + names.get(name, name.replace("int", "i"))
        return "fp32" if isinstance(value, float) else "i32"

    def launch(kernel, grid, *args, num_warps, **constants):
        signature = dict(zip(kernel.arg_names, map(kind, args)))
        signature |= dict.fromkeys(constants, "constexpr")
        source = compiler.ASTSource(kernel, signature, constexprs=constants)
        made = kernels.triton.compile(source, target=target, options={"num_warps": num_warps})
        assert len(made.asm["cubin"]) > 0
        done.add(kernel.__name__)

    for module in KERNELS:
        module.launch = launch
    t_NV, s_NV = pair(2, 9000)
    kernels.triton_kl.kl_sweep(t_NV, s_NV, t_NV.bfloat16(), softcap=30.0)
    kernels.triton_kl.kl_sweep(t_NV.bfloat16(), s_NV.bfloat16(), t_NV.bfloat16())
    w, x_ND, dy_ND = kernels.everything(2, 2304, 50, 7)
    codes = (torch.ones(2, 7, dtype=torch.bfloat16), torch.zeros(2, 7, dtype=torch.int32))
    kernels.triton_sae.decode(*codes, w["W_dec_FD"], w["b_dec_D"])
    kernels.triton_sae.sparse_gradients(dy_ND, x_ND.bfloat16(), w["W_dec_FD"], w["b_dec_D"], *codes)
    kernels.steps(kernels.optimizer_of(kernels.an_sae(2304), fused=True), [0])
    print(*sorted(done))


def test_every_kernel_compiles_for_an_h100_without_one():
    script = "import planted; planted.compile_all()"
    env = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = os.pathsep.join([os.path.dirname(HERE), HERE])
    run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=300)
    done = run([sys.executable, "-c", script], env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    names = {n for m in KERNELS for n, k in vars(m).items() if hasattr(k, "arg_names")}
    assert done.stdout.split() == sorted(names - {"_logits", "_exp"})  # those are called by others
