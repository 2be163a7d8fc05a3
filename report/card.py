"""The model card of a finetuned SAE: sae/README.md, from the run's folder alone.

python -m report.card runs/<name>     write it again, with the evaluations made since (evals/*.json)
"""

import glob
import math
import os
import re
import sys

import jinja2

from klsplice.errors import UserError
from klsplice.storage import public, read_run_json
from klsplice.train import TRAIN
from report import runs
from sae import ARCHITECTURES

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
ROWS_SHOWN = 13  # of an evaluation's table, with its headings
SHOWN = ("MODEL", "MODEL_REVISION", "LAYER", "SAE", "SAE_REVISION", "ARCHITECTURE", "TRAIN")
SHOWN += ("LOSS", "LR", "SCHEDULE", "WARMUP", "WEIGHT_DECAY", "CLIP", "BATCH", "CONTEXT", "TOKENS")
SHOWN += ("PASSES", "SKIP_TOKENS", "VAL_TOKENS", "KEEP", "DATASET", "DATASET_REVISION", "SPLIT")
SHOWN += ("DTYPE", "LOGITS", "SEED")
REVISIONS = {"DATASET_REVISION": "dataset_commit", "SAE_REVISION": "sae_commit"}
ENCODE = """def encode(x):
    z = {relu}({x} @ {W_enc} + {b_enc})
    {latents}"""
LATENTS = {  # of ENCODE: which of z stay
    "topk": """values, at = z.topk(int(t["k"]))
    return torch.zeros_like(z).scatter(-1, at, values)""",
    "batchtopk": 'return z * (z > t["threshold"])',
    "matryoshka": 'return z * (z > t["threshold"])',
    "relu": "return z",
    "jumprelu": 'return z * (z > t["threshold"])',
}


def write(folder: str) -> None:
    """Write folder/sae/README.md of a finished run. Raises UserError."""
    results, about = (read_run_json(os.path.join(folder, f"{n}.json")) for n in ("results", "run"))
    answers = []
    for path in sorted(glob.glob(os.path.join(folder, "evals", "*.json"))):
        answer = read_run_json(path)
        if not isinstance(answer, dict) or not {"name", "question", "table"} <= answer.keys():
            raise UserError(f"{path} is not what an evaluation writes", "remove it")
        answers.append(answer)
    with open(os.path.join(folder, "sae", "README.md"), "w", encoding="utf-8") as f:
        f.write(text(results, about, answers))


def text(results: dict, about: dict, answers=()) -> str:
    """The card. Local paths are given by their last part alone: they say something of a machine.

    results, about: results.json and run.json. answers: of the evaluations."""
    c, source, resolved = about["constants"], about["source"], about["resolved"]
    architecture = c["ARCHITECTURE"] or source["architecture"]
    row, train = ARCHITECTURES[architecture], TRAIN[c["TRAIN"]]
    shown = [*SHOWN, *train.constants]
    if c["TRAIN"] == "sae":
        shown += ["JUMPRELU_THRESHOLD"] if architecture == "jumprelu" else []
        shown += ["AUXK", "DEAD_AFTER"] if c["AUXK"] else []
    idle = {name for name, commit in REVISIONS.items() if resolved.get(commit) is None}
    if c["DTYPE"] == "float32":
        idle.add("LOGITS")  # they are never narrower than the LM
    options = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    loader = jinja2.FileSystemLoader(os.path.dirname(__file__))
    environment = jinja2.Environment(loader=loader, **options)
    environment.globals |= {"public": public, "repr": repr, "markdown": runs.markdown}
    environment.globals |= {"number": _number, "at": _at, "on_hub": _on_hub, "ROWS": ROWS}
    environment.globals |= {"loading": loading(about), "off_unit": off_unit(c, architecture)}
    values = {"about": about, "c": c, "source": source, "resolved": resolved, "results": results}
    values |= {"row": row, "train": train, "architecture": architecture, "answers": answers}
    shown = [name for name in shown if name not in idle]
    return environment.get_template("card.md.jinja").render(values, shown=shown, last=ROWS_SHOWN)


def loading(about: dict) -> dict[str, str]:
    """-> {library: code that loads the SAE}."""
    c, folder = about["constants"], "path/to/this/folder"
    architecture = c["ARCHITECTURE"] or about["source"]["architecture"]
    row, code = ARCHITECTURES[architecture], {}
    if not row.ours_alone():
        code["dictionary_learning"] = (
            "from dictionary_learning.utils import load_dictionary\n"
            f'sae, config = load_dictionary("{folder}", device="cpu")'
        )
    if row.saelens:
        code["SAELens"] = (
            "from sae_lens import SAE\n"
            f'sae = SAE.load_from_disk("{folder}")  # or SAE.from_pretrained("user/repo", "sae")'
        )
    if row.saebench and not off_unit(c, architecture):
        module, _, loader = row.saebench.partition(".")
        model = os.path.basename(os.path.normpath(c["MODEL"]))
        code["SAEBench (from the Hub)"] = (
            f"import torch\nfrom sae_bench.custom_saes import {module}\n"
            f'sae = {module}.{loader}(\n    "user/repo", "sae/ae.pt", "{model}", '
            f'torch.device("cpu"), torch.float32, layer={c["LAYER"]}\n)'
        )
    lm = f"path/to/{public(c['MODEL'])}" if os.path.exists(c["MODEL"]) else c["MODEL"]
    code["klsplice"] = f"python run.py MODEL={lm} LAYER={c['LAYER']} SAE={folder}"
    code["klsplice"] += "  # or SAE=user/repo/sae"
    if architecture in LATENTS:
        code["PyTorch alone"] = _pytorch(architecture, row.tensors, folder)
    return code


def _pytorch(architecture: str, stored: dict[str, str], folder: str) -> str:
    """Encoder and decoder on ae.pt as it lies there. stored: our tensors' names -> theirs."""

    def tensor(name: str, *, transposed: bool = False) -> str:
        lies = stored[name].removesuffix(".T")
        return f't["{lies}"]' + (".T" if stored[name].endswith(".T") != transposed else "")

    b_dec = tensor("b_dec_D")
    encode = ENCODE.format(
        relu="" if architecture == "jumprelu" else "torch.relu",
        x="x" if architecture == "jumprelu" else f"(x - {b_dec})",
        W_enc=tensor("W_enc_FD", transposed=True),
        b_enc=tensor("b_enc_F"),
        latents=LATENTS[architecture],
    )
    load = f'import torch\nt = torch.load("{folder}/ae.pt", weights_only=True)'
    decode = f"def decode(z):\n    return z @ {tensor('W_dec_FD')} + {b_dec}"
    return f"{load}\n\n{encode}\n\n{decode}"


def off_unit(c: dict, architecture: str) -> bool:
    """Whether the decoder's rows lost their norm of 1 to an adapter or LoRA, with no way to rescale
    them: a latent of ReLU and JumpReLU can be rescaled, in a TopK that changes which win."""
    folded = c["TRAIN"] == "adapter" and c["ADAPTER"] == "linear"
    changed = folded or c["TRAIN"] == "sae_lora"
    return changed and ARCHITECTURES[architecture].unit_norm


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


def _at(name: str, commit: str | None) -> str:
    return f"{public(name)} at {commit}" if commit else public(name)


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def main(folders: list[str]) -> int:
    if not folders:
        print("error: wanted python -m report.card runs/<name>", file=sys.stderr)
        return 2
    try:
        for folder in runs.folders_of(folders, finished=True):
            write(folder)
            print(os.path.join(folder, "sae", "README.md"))
    except (UserError, OSError) as e:
        print(e, file=sys.stderr)
        return getattr(e, "code", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
