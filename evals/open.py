"""A finished run, opened again: with its own loop's parts, or as other libraries take it.

Finished has its tokens, splice and learner; load_lm and load_sae give the LM with stock attention
and the SAE as a module. Needs no lm-eval and no SAEBench, so it imports in either's environment.
"""

import os
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

import data
from evals import common
from klsplice import hub, machine
from klsplice.formats import read
from klsplice.lm import load
from klsplice.lm.splice import blocks_of, decoder_of, put, rows
from klsplice.tracking.run_folder import check_same, resolved
from learners import start
from learners.adapter import Adapter
from learners.base import OnFrozenLearner, SAELearner
from sae import build


class Finished:
    """A finished run: folder; cfg, its constants; about, its run.json; tokenizer; tokens.

    before() and after() are its learner as its two evaluations had it, the LM's LoRA included, and
    each is valid until the other is asked for. device: "" for where the run did. Raises UserError.
    """

    def __init__(self, folder: str, device: str = ""):
        run = common.open_run(folder, device)
        self.folder, self.about, self.cfg = folder, run.about, run.cfg
        cfg = self.cfg
        cfg.COMPILE = False
        opened = open_lm(self)
        self.tokenizer = opened.tokenizer
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
        if self.cfg.TRAIN == "lm_lora":
            tensors = load_file(os.path.join(self.folder, "lora", "adapter_model.safetensors"))
            # peft's names have a prefix, and lack its name of the adapter
            ends = {"." + name.replace(".default.", "."): name for name in self._start}
            state = {ends[end]: t for n, t in tensors.items() for end in ends if n.endswith(end)}
            self._learner.load_state(state)
            return self._learner
        model = load_sae(self, "after")
        kind = OnFrozenLearner if isinstance(model, Adapter) else SAELearner
        return kind(model, self._learner.splice)

    def stages(self):
        """Yields ("before", learner) and ("after", learner)."""
        yield "before", self.before()
        yield "after", self.after()

    def batches(self, n: int):
        """Yields (tokens_BL, active_N) of the first n held-out sequences, on the device."""
        for first in range(0, n, self.cfg.EVAL_BATCH):
            tokens_BL = self.tokens.val(first, min(first + self.cfg.EVAL_BATCH, n))
            yield tokens_BL.to(self.cfg.DEVICE), self.active(tokens_BL)

    def active(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """See data.Tokens.active. tokens_BL: on the CPU."""
        x_BLD, on_device_BL = None, tokens_BL.to(self.cfg.DEVICE)
        if self.cfg.KEEP == "outliers":
            x_BLD = self._learner.splice.clean(on_device_BL, to_end=False).base_BLD
        return self.tokens.active(tokens_BL, x_BLD).to(self.cfg.DEVICE)


def variants(run) -> dict[str, tuple]:
    """What there is to compare: label -> (LoRA on?, which SAE: None, "before" or "after").

    Of a run with a converted SAE the one before is the source, as it was before the conversion.
    """
    if run.cfg.TRAIN == "lm_lora":
        return {
            "LM": (False, None),
            "LM + SAE": (False, "after"),
            "LoRA": (True, None),
            "LoRA + SAE": (True, "after"),
        }
    found = {"LM": (False, None)}
    if run.cfg.SAE != "fresh":
        converted = run.cfg.ARCHITECTURE not in ("", run.about["source"]["architecture"])
        found["source" if converted else "before"] = (False, "before")
    return found | {"after": (False, "after")}


def load_sae(run, when: str) -> torch.nn.Module:
    """The SAE "before" or "after", with its adapter where it has one: x_ND -> y_ND, z_NF."""
    if when == "before":
        source = read.started_from(run.folder, run.about, bare=True)
    else:
        source = read.open_sae(os.path.join(run.folder, "sae"), "", bare=True)
    model = build(source, source.read_weights())
    adapter = os.path.join(run.folder, "sae", "adapter.safetensors")
    if when == "after" and os.path.exists(adapter):
        model = Adapter(model, kind=run.cfg.ADAPTER, rank=run.cfg.RANK, seed=0)
        model.load_state_dict(load_file(adapter), strict=False)
    return model.to(run.cfg.DEVICE).eval().requires_grad_(False)


def open_lm(run) -> load.Opened:
    """The run's LM, without its weights. Raises UserError."""
    where = {"device": run.cfg.DEVICE, "layer": run.cfg.LAYER, "context": run.cfg.CONTEXT}
    return load.open_lm(run.cfg.MODEL, run.cfg.MODEL_REVISION, **where)


def load_lm(run, dtype: torch.dtype, *, lora: bool):
    """-> (LM with stock attention, tokeniser); with its LoRA on, a peft model. Raises UserError."""
    import transformers

    cfg, opened = run.cfg, open_lm(run)
    transformers.utils.logging.disable_progress_bar()
    with hub.model_errors(cfg.MODEL):
        kind = transformers.AutoModelForCausalLM
        lm = kind.from_pretrained(cfg.MODEL, dtype=dtype, **opened.options)
    if lora:
        from peft import PeftModel

        lm = PeftModel.from_pretrained(lm, os.path.join(run.folder, "lora"))
    return lm.to(cfg.DEVICE).eval().requires_grad_(False), opened.tokenizer


@contextmanager
def spliced(lm, sae: torch.nn.Module, cfg, special: list[int]):
    """`lm` with its residual after block LAYER as the SAE reconstructs it; KEEP is respected."""
    dtype, seen = getattr(torch, cfg.DTYPE), SimpleNamespace()

    def note(module, args, kwargs):
        tokens_BL = args[0] if args else kwargs["input_ids"]
        seen.tokens_BL = tokens_BL.cpu()

    def stand_in(module, args, output):
        x_BLD = output if torch.is_tensor(output) else output[0]
        kept_BL = data.kept_positions(seen.tokens_BL, x_BLD, cfg.KEEP, special)
        active_N = (~kept_BL.flatten()).nonzero()[:, 0].to(x_BLD.device)
        with torch.autocast(x_BLD.device.type, dtype, enabled=dtype != torch.float32):
            y_ND, _ = sae(rows(x_BLD, active_N))
        y_BLD = put(x_BLD, y_ND, active_N)
        return y_BLD if torch.is_tensor(output) else type(output)((y_BLD, *output[1:]))

    handles = [
        decoder_of(lm).register_forward_pre_hook(note, with_kwargs=True),
        blocks_of(lm)[cfg.LAYER].register_forward_hook(stand_in),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
