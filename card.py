"""The model card of a finetuned SAE: sae/README.md, from results.json and run.json alone."""

import json
import os

from export import public

LOADING = {
    "dictionary_learning": """
from dictionary_learning.utils import load_dictionary
sae, config = load_dictionary("{folder}", device="cpu")""",
    "SAELens": """
from sae_lens import SAE
sae = SAE.load_from_disk("{folder}")""",
    "klsplice": """
python run.py SAE={folder}""",
}
ROWS = {  # of the before/after table: heading, name in results.json
    "cross-entropy, spliced": "ce_{}",
    "cross-entropy, spliced, without special tokens": "ce_{}_no_special",
    "cross-entropy recovered": "ce_recovered_{}",
    "cross-entropy recovered, without special tokens": "ce_recovered_{}_no_special",
    "KL(clean to spliced), nats per token": "kl_{}",
    "fraction of variance unexplained": "fvu_{}",
    "L0": "l0_{}",
    "dead latents, fraction": "dead_fraction_{}",
}
SHOWN = (
    "MODEL",
    "MODEL_REVISION",
    "LAYER",
    "SAE",
    "SAE_REVISION",
    "TRAIN",
    "LOSS",
    "LR",
    "SCHEDULE",
)
SHOWN += ("WEIGHT_DECAY", "CLIP", "BATCH", "CONTEXT", "TOKENS", "PASSES", "SKIP_TOKENS", "KEEP")
SHOWN += ("DATASET", "DATASET_REVISION", "DTYPE", "SEED")


CARD = """---
{front}
---

# A sparse autoencoder for {model}, residual stream after block {layer}

{what} with klsplice, by the method of arXiv 2503.17272, on {tokens} tokens. On held-out text it
closed {gap} of the gap between the clean model (cross-entropy {clean}; {zero} with the residual at
zero) and the model with this SAE spliced in.

{table}

Source: {source}, whose licence holds for this one. Made on {device} in {minutes} minutes, klsplice
commit {commit}.

## Loading

{loading}

## Constants

```
{constants}
```

Versions: {versions}
"""


def write(folder: str, results: dict, about: dict) -> None:
    """Write folder/sae/README.md. results: results.json. about: run.json."""
    with open(os.path.join(folder, "sae", "README.md"), "w", encoding="utf-8") as f:
        f.write(text(results, about))


def text(results: dict, about: dict) -> str:
    """The card. Local paths are given by their last part alone: they say something of a machine."""
    c = about["constants"]
    shown = {name: public(c[name]) for name in SHOWN}
    table = ["| | before | after |", "| --- | ---: | ---: |"]
    for heading, name in ROWS.items():
        before, after = (_number(results[name.format(when)]) for when in ("before", "after"))
        table.append(f"| {heading} | {before} | {after} |")
    loading = [
        f"{library}:\n```\n{code.format(folder='path/to/this/folder').strip()}\n```"
        for library, code in LOADING.items()
    ]
    front = {"library_name": "saelens", "tags": "[sparse-autoencoder, interpretability, klsplice]"}
    if _on_hub(c["MODEL"]):
        front["base_model"] = c["MODEL"]
    if _on_hub(c["DATASET"]):
        front["datasets"] = f"[{c['DATASET']}]"
    commit = about["resolved"]["sae_commit"]
    fill = {
        "front": "\n".join(f"{name}: {value}" for name, value in front.items()),
        "model": shown["MODEL"],
        "layer": c["LAYER"],
        "what": _what(c, about),
        "tokens": f"{results['tokens']:,}",
        "clean": _number(results["ce_clean"]),
        "zero": _number(results["ce_zero"]),
        "gap": _number(results["gap_closed"], ".1%"),
        "table": "\n".join(table),
        "source": shown["SAE"] + f" at {commit}" * bool(commit),
        "device": results["device"],
        "minutes": f"{results['seconds'] / 60:.1f}",
        "commit": about["commit"],
        "loading": "\n".join(loading),
        "constants": "\n".join(f"{name} = {value!r}" for name, value in shown.items()),
        "versions": json.dumps(about["versions"]),
    }
    return CARD.format(**fill)


def _what(c: dict, about: dict) -> str:
    kind = f"{about['source']['architecture']} SAE of {about['source']['d_sae']:,} latents"
    if c["SAE"] == "fresh":
        return f"A {kind} trained from nothing on {c['LOSS']}"
    learns = {"adapter": " through an adapter", "sae_lora": " through LoRA"}
    learns["lm_lora"] = ", itself unchanged, by LoRA on the LM,"
    return f"A {kind} finetuned{learns.get(c['TRAIN'], '')} on {c['LOSS']}"


def _on_hub(name: str) -> bool:
    return name.count("/") == 1 and not os.path.exists(name) and not name.startswith((".", "/"))


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)
