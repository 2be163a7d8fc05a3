"""A finished run as other libraries take it: its LM with stock attention, its SAEs as modules.

Needs no lm-eval and no SAEBench, so it imports in either's environment.
"""

import os
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import torch

import data
from klsplice import hub
from klsplice.formats import read
from klsplice.lm import load
from klsplice.lm.splice import blocks_of, decoder_of, put, rows
from learners.adapter import Adapter
from sae import build


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
    converted = run.cfg.ARCHITECTURE not in ("", run.about["source"]["architecture"])
    label = "source" if converted else "before"
    before = {} if run.cfg.SAE == "fresh" else {label: (False, "before")}
    return {"LM": (False, None)} | before | {"after": (False, "after")}


def load_sae(run, when: str) -> torch.nn.Module:
    """The SAE "before" or "after", with its adapter where it has one: x_ND -> y_ND, z_NF."""
    folder = os.path.join(run.folder, "sae")
    if when == "after":
        model = read_sae(run, folder)
    else:
        source = read.started_from(run.folder, run.about, bare=True)
        model = build(source, source.read_weights())
    adapter = os.path.join(folder, "adapter.safetensors")
    if when == "after" and os.path.exists(adapter):
        from safetensors.torch import load_file

        model = Adapter(model, kind=run.cfg.ADAPTER, rank=run.cfg.RANK, seed=0)
        model.load_state_dict(load_file(adapter), strict=False)
    return model.to(run.cfg.DEVICE).eval().requires_grad_(False)


def read_sae(run, where: str) -> torch.nn.Module:
    """An SAE without the adapter that may lie beside it."""
    revision = run.about["resolved"]["sae_commit"] or run.cfg.SAE_REVISION
    given = {n: run.about["source"][n] for n in ("architecture", "k")}  # its file may not say them
    source = read.open_sae(where, revision, bare=True, **given)
    model = build(source, source.read_weights())
    return model.to(run.cfg.DEVICE).eval().requires_grad_(False)


def open_lm(run) -> load.Opened:
    """The run's LM, without its weights. Raises UserError."""
    cfg = run.cfg
    options = {"device": cfg.DEVICE, "layer": cfg.LAYER, "context": cfg.CONTEXT}
    return load.open_lm(cfg.MODEL, cfg.MODEL_REVISION, **options)


def load_lm(run, dtype: torch.dtype, *, lora: bool):
    """-> (LM with stock attention, tokeniser); with its LoRA on, it is a peft model.

    Raises UserError in a line where the device, the model or the account for it is missing.
    """
    import transformers

    cfg, opened = run.cfg, open_lm(run)
    transformers.utils.logging.disable_progress_bar()
    with hub.model_errors(cfg.MODEL):
        lm = transformers.AutoModelForCausalLM.from_pretrained(
            cfg.MODEL, dtype=dtype, **opened.options
        )
    if lora:
        from peft import PeftModel

        lm = PeftModel.from_pretrained(lm, os.path.join(run.folder, "lora"))
    return lm.to(cfg.DEVICE).eval().requires_grad_(False), opened.tokenizer


@contextmanager
def spliced(lm, saes: dict[int, torch.nn.Module], cfg, special: list[int]):
    """`lm` with the residual after block i replaced by what saes[i] makes of it, KEEP respected."""
    decoder, blocks = decoder_of(lm), blocks_of(lm)
    dtype, seen = getattr(torch, cfg.DTYPE), SimpleNamespace()

    def note(module, args, kwargs):
        tokens_BL = args[0] if args else kwargs["input_ids"]
        seen.tokens_BL = tokens_BL.cpu()

    def stand_in(sae, module, args, output):
        x_BLD = output if torch.is_tensor(output) else output[0]
        kept_BL = data.kept_positions(seen.tokens_BL, x_BLD, cfg.KEEP, special)
        active_N = (~kept_BL.flatten()).nonzero()[:, 0].to(x_BLD.device)
        with torch.autocast(x_BLD.device.type, dtype, enabled=dtype != torch.float32):
            y_ND, _ = sae(rows(x_BLD, active_N))
        y_BLD = put(x_BLD, y_ND, active_N)
        return y_BLD if torch.is_tensor(output) else type(output)((y_BLD, *output[1:]))

    handles = [decoder.register_forward_pre_hook(note, with_kwargs=True)]
    for layer, sae in saes.items():
        handles.append(blocks[layer].register_forward_hook(partial(stand_in, sae)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
