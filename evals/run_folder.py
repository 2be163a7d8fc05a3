"""A finished run, opened again for an evaluation: constants, SAEs, LM; and what is left of it.

Needs no lm-eval and no SAEBench, so it imports in either's environment.
"""

import json
import os
from types import SimpleNamespace

import torch
from matplotlib.figure import Figure

import formats
import language_model
import machine
import report
from checkpoint import read_json, write_json
from errors import UserError


def open_run(folder: str) -> SimpleNamespace:
    """-> folder, name, c (the constants), about (run.json), results. Raises UserError."""
    try:
        about = read_json(os.path.join(folder, "run.json"))
        results = read_json(os.path.join(folder, "results.json"))
        c = SimpleNamespace(**about["constants"], RECIPES=about["recipes"])
    except (OSError, ValueError, KeyError, TypeError):
        hint = "wanted runs/<name> with its run.json and results.json"
        raise UserError(f"no finished run in {folder}", hint) from None
    name = os.path.basename(os.path.normpath(folder))
    return SimpleNamespace(folder=folder, name=name, c=c, about=about, results=results)


def variants(run) -> dict[str, tuple]:
    """What there is to compare: label -> (LoRA on?, which SAE: None, "before" or "after")."""
    if run.c.TRAIN == "lm_lora":
        return {
            "LM": (False, None),
            "LM + SAE": (False, "after"),
            "LoRA": (True, None),
            "LoRA + SAE": (True, "after"),
        }
    before = {} if run.c.SAE == "fresh" else {"before": (False, "before")}
    return {"LM": (False, None)} | before | {"after": (False, "after")}


def load_sae(run, when: str) -> torch.nn.Module:
    """The SAE "before" or "after", with its adapter where it has one: x_ND -> y_ND, z_NF."""
    adapter = os.path.join(run.folder, "sae", "adapter.safetensors")
    if when == "after" and os.path.exists(adapter):
        from safetensors.torch import load_file

        import adapters

        model = adapters.Adapter(
            load_sae(run, "before"), kind=run.c.ADAPTER, rank=run.c.RANK, seed=0
        )
        model.load_state_dict(load_file(adapter), strict=False)
    else:
        model = read_sae(run, os.path.join(run.folder, "sae") if when == "after" else run.c.SAE)
    return model.to(run.c.DEVICE).eval().requires_grad_(False)


def read_sae(run, where: str) -> torch.nn.Module:
    source = formats.open_sae(where, run.about["resolved"]["sae_commit"] or run.c.SAE_REVISION)
    model = formats.build(source, formats.read_weights(source))
    return model.to(run.c.DEVICE).eval().requires_grad_(False)


def load_lm(run, dtype: torch.dtype, *, lora: bool):
    """-> (LM with stock attention, tokeniser); with its LoRA on, it is a peft model.

    Raises UserError in a line where the device, the model or the account for it is missing.
    """
    import transformers

    c = run.c
    config, tokenizer = language_model.open_lm(c)
    softcap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    transformers.utils.logging.disable_progress_bar()
    with language_model.hub_errors(c.MODEL):
        lm = transformers.AutoModelForCausalLM.from_pretrained(
            c.MODEL,
            dtype=dtype,
            attn_implementation="eager" if softcap else "sdpa",  # sdpa has no softcap
            **language_model.hub_options(c.MODEL, c.MODEL_REVISION),
        )
    if lora:
        from peft import PeftModel

        lm = PeftModel.from_pretrained(lm, os.path.join(run.folder, "lora"))
    return lm.to(c.DEVICE).eval().requires_grad_(False), tokenizer


def save(run, name: str, question: str, table: list[list[str]], numbers: dict, draw) -> None:
    """Print the table; write evals/<name>.json and, from it alone, figures/<name>.png."""
    found = {"name": name, "run": run.name, "question": question, "numbers": numbers}
    found |= {"table": table, "versions": machine.versions("peft", "lm-eval", "sae-bench")}
    found |= {"commit": machine.git_commit(), "device": machine.device_name(run.c.DEVICE)}
    for kind in ("evals", "figures"):
        os.makedirs(os.path.join(run.folder, kind), exist_ok=True)
    write_json(path(run, name), found)
    redraw(run, name, draw)
    print(report.align(table))


def redraw(run, name: str, draw) -> None:
    """figures/<name>.png from evals/<name>.json."""
    with open(path(run, name)) as f:
        draw(json.load(f), os.path.join(run.folder, "figures", f"{name}.png"))


def bars(path: str, groups: list[str], of: dict, *, ylabel: str, errors: dict | None = None):
    """A group of bars each of `groups`; of, errors: label -> a value a group."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for i, (label, values) in enumerate(of.items()):
        at = [group + (i - (len(of) - 1) / 2) * 0.8 / len(of) for group in range(len(groups))]
        axes.bar(at, values, 0.75 / len(of), yerr=(errors or {}).get(label), label=label)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def path(run, name: str) -> str:
    return os.path.join(run.folder, "evals", f"{name}.json")
