"""The model card of a finetuned SAE: sae/README.md, from the run's folder alone.

python -m report.card runs/<name>     write it again, with the evaluations made since (evals/*.json)
"""

import glob
import json
import os
import re
import sys

from klsplice.architectures import ARCHITECTURES
from klsplice.errors import UserError
from klsplice.storage import public, read_run_json
from klsplice.train import TRAIN
from report import tables

PYTORCH = """
import torch
t = torch.load("path/to/this/folder/ae.pt", weights_only=True)
{encode}
def decode(z):
    return z @ {decoder} + {b_dec}"""
ENCODE = {  # in plain PyTorch, on ae.pt as it lies there
    "topk": """
def encode(x):
    z = torch.relu((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"])
    values, at = z.topk(int(t["k"]))
    return torch.zeros_like(z).scatter(-1, at, values)
""",
    "batchtopk": """
def encode(x):
    z = torch.relu((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"])
    return z * (z > t["threshold"])
""",
    "matryoshka": """
def encode(x):
    z = torch.relu((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
    return z * (z > t["threshold"])
""",
    "relu": """
def encode(x):
    return torch.relu((x - t["bias"]) @ t["encoder.weight"].T + t["encoder.bias"])
""",
    "jumprelu": """
def encode(x):
    z = x @ t["W_enc"] + t["b_enc"]
    return z * (z > t["threshold"])
""",
}
LOADING = {
    "dictionary_learning": """
from dictionary_learning.utils import load_dictionary
sae, config = load_dictionary("path/to/this/folder", device="cpu")""",
    "SAELens": """
from sae_lens import SAE
sae = SAE.load_from_disk("path/to/this/folder")  # or SAE.from_pretrained("user/repo", "sae")""",
    "SAEBench (from the Hub)": """
import torch
from sae_bench.custom_saes import {module}
sae = {module}.{loader}(
    "user/repo", "sae/ae.pt", "{model}", torch.device("cpu"), torch.float32, layer={layer}
)""",
    "klsplice": """
python run.py MODEL={lm} LAYER={layer} SAE=path/to/this/folder  # or SAE=user/repo/sae""",
}
ROWS = {  # of the before/after table: heading, name in results.json
    "cross-entropy, spliced": "ce_{}",
    "cross-entropy, spliced, without special tokens": "ce_{}_no_special",
    "cross-entropy recovered": "ce_recovered_{}",
    "cross-entropy recovered, without special tokens": "ce_recovered_{}_no_special",
    "KL(clean to spliced)": "kl_{}",
    "KL, without special tokens": "kl_{}_no_special",
    "fraction of variance unexplained": "fvu_{}",
    "L0": "l0_{}",
    "dead latents, fraction": "dead_fraction_{}",
}
REVISIONS = {"DATASET_REVISION": "dataset_commit", "SAE_REVISION": "sae_commit"}
ROWS_SHOWN = 12  # of an evaluation's table
OTHERS = ("ce_clean", "ce_zero", "ce_clean_no_special", "ce_zero_no_special")
SHOWN = ("MODEL", "MODEL_REVISION", "LAYER", "SAE", "SAE_REVISION", "ARCHITECTURE", "TRAIN")
SHOWN += ("LOSS", "LR", "SCHEDULE", "WARMUP", "WEIGHT_DECAY", "CLIP", "BATCH", "CONTEXT", "TOKENS")
SHOWN += ("PASSES", "SKIP_TOKENS", "VAL_TOKENS", "KEEP", "DATASET", "DATASET_REVISION", "SPLIT")
SHOWN += ("DTYPE", "LOGITS", "SEED")
CARD = """---
{front}
---

# A sparse autoencoder for {model}, residual stream after block {layer}

{what} with klsplice, by the method of [arXiv
2503.17272](https://arxiv.org/abs/2503.17272), on {tokens} tokens. On held-out text {closed}
the gap between the clean model's cross-entropy and that of the model with this SAE spliced in.

{table}

Nats per token, on {val:,} held-out tokens. The clean model has {clean} ({clean_no_special} without
special tokens); with this residual at zero it has {zero} ({zero_no_special}).

{notes}- Started from: {source}. {licence}
- Text: {data}; the first documents are held out.
- Made on {device} {minutes}, klsplice commit {commit}.

{evaluations}## Loading

{loading}

## Constants

```
{constants}
```

Versions: {versions}
"""


def write(folder: str, results: dict, about: dict) -> None:
    """Write folder/sae/README.md. results: results.json. about: run.json."""
    evaluations = []
    for path in sorted(glob.glob(os.path.join(folder, "evals", "*.json"))):
        found = read_run_json(path)
        if not isinstance(found, dict) or not {"name", "question", "table"} <= found.keys():
            raise UserError(f"{path} is not what an evaluation writes", "remove it")
        evaluations.append(found)
    said = text(results, about, evaluations)
    try:
        with open(os.path.join(folder, "sae", "README.md"), "w", encoding="utf-8") as f:
            f.write(said)
    except OSError as e:
        raise UserError(f"{folder}/sae/README.md cannot be written: {e.strerror}") from None


def text(results: dict, about: dict, evaluations=()) -> str:
    """The card. Local paths are given by their last part alone: they say something of a machine.

    evaluations: dicts with "name", "question" and "table", its rows, the first of headings."""
    c, source, resolved = about["constants"], about["source"], about["resolved"]
    architecture = c["ARCHITECTURE"] or source["architecture"]
    further = list(TRAIN[c["TRAIN"]].constants)
    if c["TRAIN"] == "sae":
        further += ["JUMPRELU_THRESHOLD"] * (architecture == "jumprelu")
        further += ["AUXK", "DEAD_AFTER"] * bool(c["AUXK"])
    gap = _number(results["gap_closed"], ".1%")
    fill = {
        "front": _front(c, source),
        "model": public(c["MODEL"]),
        "layer": c["LAYER"],
        "what": _what(c, source),
        "tokens": f"{results['tokens']:,}",
        "val": c["VAL_TOKENS"] // c["CONTEXT"] * c["CONTEXT"],
        "closed": "there was none to close (-) of" if gap == "-" else f"it closed {gap} of",
        **{n.removeprefix("ce_"): _number(results[n]) for n in OTHERS},
        "table": _before_after(results),
        "notes": "".join(f"- {note}\n" for note in _notes(c, architecture, source)),
        "source": _at(c["SAE"], resolved["sae_commit"]),
        "licence": _licence(c, source),
        "data": _at(c["DATASET"], resolved.get("dataset_commit"))
        + f" (fingerprint of text, tokeniser and packing: {resolved['tokens']})",
        "device": results["device"],
        "minutes": _minutes(results),
        "commit": about["commit"],
        "evaluations": _evaluations(evaluations),
        "loading": "\n".join(f"{n}:\n```\n{code}\n```" for n, code in loading(about).items()),
        "constants": "\n".join(
            f"{n} = {public(c[n])!r}"
            for n in (*SHOWN, *further)
            if (n, c["DTYPE"]) != ("LOGITS", "float32")  # they are never narrower than the LM
            and not (n in REVISIONS and resolved.get(REVISIONS[n]) is None)  # of local files
        ),
        "versions": json.dumps(about["versions"]),
    }
    return CARD.format(**fill)


def loading(about: dict) -> dict[str, str]:
    """-> {library: code}, as the card has it."""
    c = about["constants"]
    architecture = c["ARCHITECTURE"] or about["source"]["architecture"]
    row, refused = ARCHITECTURES[architecture], set()
    if row.saebench is None or off_unit(c, architecture):
        refused.add("SAEBench (from the Hub)")
    if row.saelens is None:
        refused.add("SAELens")
    if row.ours_alone:
        refused.add("dictionary_learning")
    module, _, loader = (row.saebench or "").partition(".")
    model = os.path.basename(os.path.normpath(c["MODEL"]))
    fill = {"module": module, "loader": loader, "model": model, "layer": c["LAYER"]}
    local = os.path.exists(c["MODEL"])
    fill["lm"] = f"path/to/{public(c['MODEL'])}" if local else c["MODEL"]
    found = {n: LOADING[n].strip().format(**fill) for n in LOADING if n not in refused}
    if architecture in ENCODE:
        decoder, b_dec = (row.tensors[name] for name in ("W_dec_FD", "b_dec_D"))
        transposed = ".T" * decoder.endswith(".T")
        found["PyTorch alone"] = PYTORCH.strip().format(
            encode=ENCODE[architecture],
            decoder=f"t['{decoder.removesuffix('.T')}']{transposed}".replace("'", '"'),
            b_dec=f't["{b_dec}"]',
        )
    return found


def off_unit(c: dict, architecture: str) -> bool:
    """Whether the decoder's rows lost their norm of 1 to an adapter or LoRA, with no way to rescale
    them: a latent of ReLU and JumpReLU can be rescaled, in a TopK that changes which win."""
    folded = c["TRAIN"] == "adapter" and c["ADAPTER"] == "linear"
    changed = folded or c["TRAIN"] == "sae_lora"
    return changed and ARCHITECTURES[architecture].unit_rows


def _front(c: dict, source: dict) -> str:
    row = ARCHITECTURES[c["ARCHITECTURE"] or source["architecture"]]
    lines = ["library_name: saelens"] if row.saelens else []
    lines.append("tags: [sparse-autoencoder, interpretability, klsplice]")
    if _on_hub(c["MODEL"]):
        lines.append(f"base_model: {c['MODEL']}")
    if _on_hub(c["DATASET"]):
        lines.append(f"datasets: [{c['DATASET']}]")
    if source.get("licence"):
        lines.append(f"license: {source['licence']}")
    return "\n".join(lines)


def _what(c: dict, source: dict) -> str:
    kind = f"{source['architecture']} SAE of {source['d_sae']:,} latents"
    if source["k"]:
        kind += f" (k = {source['k']})"
    if c["SAE"] == "fresh":
        return f"A {kind} trained from nothing on {c['LOSS']}"
    if c["ARCHITECTURE"] not in ("", source["architecture"]):
        kind += f", converted to {c['ARCHITECTURE']} and"
    how = TRAIN[c["TRAIN"]].sentence.format(adapter=c["ADAPTER"])
    return f"A {kind} finetuned{how} on {c['LOSS']}"


def _notes(c: dict, architecture: str, source: dict) -> list[str]:
    """What whoever loads it must know."""
    found, row = [], ARCHITECTURES[architecture]
    if row.ours_alone:
        tensors = ", ".join(name.removesuffix(".T") for name in row.tensors.values())
        found.append(f"No library has its class, {row.dict_class}: it is in sae.py of the klsplice")
        found[-1] += f" that made it. `ae.pt` holds {tensors}."
    if off_unit(c, architecture):
        what = {"adapter": "The adapter is folded", "sae_lora": "LoRA is merged"}[c["TRAIN"]]
        said = f"{what} into the decoder, whose rows are no longer of norm 1: "
        found.append(said + f"SAEBench's loader of a {architecture} SAE refuses it.")
    elif c["TRAIN"] == "adapter" and c["ADAPTER"] != "linear":
        rest = "in `adapter.safetensors`; the numbers above are those with it."
        found.append(f"The libraries load the SAE without its adapter, which is {rest}")
    if c["TRAIN"] == "lm_lora":
        found.append("The SAE is the source's. What learnt is the LoRA (`lora/`), on the LM.")
    if architecture == "relu" and c["TRAIN"] == "sae":
        l1 = f"an L1 penalty that began at {source.get('l1', c['L1']):g} and was steered to keep L0"
        found.append(f"Its loss had, beside {c['LOSS']}, {l1}.")
    if c["KEEP"] != "none":
        which = {
            "first": "the first position",
            "special": "BOS, EOS and padding",
            "outliers": "positions whose residual has over 10 times the context's median norm",
        }[c["KEEP"]]
        found.append(f"The SAE never stands in at {which}: the residual is kept there.")
    return found


def _licence(c: dict, source: dict) -> str:
    if c["SAE"] == "fresh":
        return "It has no licence but what its uploader gives it."
    return (
        f"Its licence ({source.get('licence') or 'which its card does not name'}) holds for this."
    )


def _minutes(results: dict) -> str:
    others = results.get("together", 1) - 1
    return f"beside {others} other runs" if others else f"in {results['seconds'] / 60:.1f} minutes"


def _before_after(results: dict) -> str:
    lines = ["| | before | after |", "| --- | ---: | ---: |"]
    for heading, name in ROWS.items():
        before, after = (_number(results[name.format(when)]) for when in ("before", "after"))
        lines.append(f"| {heading} | {before} | {after} |")
    return "\n".join(lines)


def _evaluations(found) -> str:
    """Each one's question and table, which begins with its headings; at most ROWS_SHOWN rows."""
    parts = ["## Further evaluations\n"] if found else []
    for one in found:
        head, *rows = one["table"]
        lines = [f"{one['name']}: {one['question']}", "", _row(head), _row(["---"] * len(head))]
        lines += map(_row, rows[:ROWS_SHOWN])
        if len(rows) > ROWS_SHOWN:
            lines.append(f"\nand {len(rows) - ROWS_SHOWN} further rows.")
        parts.append("\n".join([*lines, ""]))
    return "\n".join([*parts, ""]) if found else ""


def _row(cells) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _at(name: str, commit: str | None) -> str:
    return f"{public(name)} at {commit}" if commit else public(name)


def _on_hub(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not os.path.exists(name)


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None or value != value else format(value, form)


def main(folders: list[str]) -> int:
    if not folders or folders[0].startswith("-"):
        print("error: wanted python -m report.card runs/<name>", file=sys.stderr)
        return 2
    try:
        for folder in tables.runs_of(folders):
            names = ("results.json", "run.json")
            write(folder, *(read_run_json(os.path.join(folder, name)) for name in names))
            print(os.path.join(folder, "sae", "README.md"))
    except UserError as e:
        print(e, file=sys.stderr)
        return e.code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
