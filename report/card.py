"""The model card of a finetuned SAE: sae/README.md, from the run's folder alone.

python -m report.card runs/<name>     write it again, with the evaluations made since (evals/*.json)
"""

import glob
import math
import os
import re
import sys

import jinja2

from klsplice import site
from klsplice.errors import UserError
from klsplice.settings import Config, defaults
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
WHEN = ("before", "after")
ROWS_SHOWN = 13  # of an evaluation's table, with its headings
SHOWN = ("MODEL", "MODEL_REVISION", "LAYER", "SITE", "SAE", "SAE_REVISION", "ARCHITECTURE", "TRAIN")
SHOWN += ("FREEZE", "LOSS", "MSE_WEIGHT", "LR", "SCHEDULE", "WARMUP", "WEIGHT_DECAY", "CLIP")
SHOWN += ("BATCH", "CONTEXT", "TOKENS", "PASSES", "SKIP_TOKENS", "VAL_TOKENS", "KEEP", "DATASET")
SHOWN += ("DATASET_REVISION", "SPLIT", "DTYPE", "LOGITS", "SEED")
REVISIONS = {"DATASET_REVISION": "dataset_commit", "SAE_REVISION": "sae_commit"}
PYTORCH = """import torch
t = torch.load("{folder}/ae.pt", weights_only=True)

def encode(x):
    z = {z}
    {latents}

def decode(z):
    return z @ {W_dec_FD} + {b_dec_D}"""
SPLICE = """import torch
from safetensors.torch import load_file

def splice(lm, folder, reads, writes):  # at all positions: KEEP was {keep}
    t, seen = load_file(folder + "/{file}"), {{}}

    def encode(x):
        z = {z}
        {latents}

    def note(module, args, kwargs):
        seen["x"] = args[0] if args else kwargs["hidden_states"]

    def stand_in(module, args, o):
        return (encode(seen["x"]) @ t["W_dec"] + t["b_dec"]{skip}).to(o.dtype)

    lm.get_submodule(reads).register_forward_pre_hook(note, with_kwargs=True)
    lm.get_submodule(writes).register_forward_hook(stand_in)

{calls}"""
THRESHOLD = 'return z * (z > t["threshold"])'
LATENTS = {  # of PYTORCH: which of z stay
    "topk": """values, at = z.topk(int(t["k"]))
    return torch.zeros_like(z).scatter(-1, at, values)""",
    "batchtopk": THRESHOLD,
    "matryoshka": THRESHOLD,
    "relu": "return z",
    "jumprelu": THRESHOLD,
}


def write(folder: str) -> None:
    """Write folder/sae/README.md of a finished run. Raises UserError."""
    results, about = (read_run_json(os.path.join(folder, f"{n}.json")) for n in ("results", "run"))
    paths = sorted(glob.glob(os.path.join(folder, "evals", "*.json")))
    written = text(results, about, [read_run_json(path) for path in paths])
    with open(os.path.join(folder, "sae", "README.md"), "w", encoding="utf-8") as f:
        f.write(written)


def text(results: dict, about: dict, answers=()) -> str:
    """The card. Local paths are given by their last part alone: they say something of a machine.

    results, about: results.json and run.json. answers: of the evaluations."""
    c, source, resolved = constants(about), about["source"], about["resolved"]
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
    environment.globals |= {"loading": loading(about), "off_unit": off_unit(c, row)}
    environment.globals |= {"of_sparsify": of_sparsify(c, row)}
    values = {"about": about, "c": c, "source": source, "resolved": resolved, "results": results}
    values |= {"row": row, "train": train, "architecture": architecture, "answers": answers}
    names = source["sites"] if _several(c) else []
    values |= {"parts": names, "parts_table": parts_table(names, results)}
    shown = [name for name in shown if name not in idle]
    return environment.get_template("card.md.jinja").render(values, shown=shown, last=ROWS_SHOWN)


def parts_table(names: list[str], results: dict) -> list[list[str]]:
    """Of several SAEs, as their folders are called, a row each: alone and by itself."""
    columns = {"KL alone": "kl_alone", "FVU": "fvu", "L0": "l0", "dead latents": "dead_fraction"}
    rows = [["site", *(f"{column}, {when}" for column in columns for when in WHEN)]]
    for name in names:
        keys = [f"{number}_{name}_{when}" for number in columns.values() for when in WHEN]
        rows.append([name, *(_number(results.get(key)) for key in keys)])
    return rows


def _several(c: dict) -> bool:
    return len(Config(SAE=c["SAE"]).saes) > 1


def constants(about: dict) -> dict:
    """Of a run; where it has not got one, of before that constant, what it does by default."""
    return defaults() | about["constants"]


def loading(about: dict) -> dict[str, str]:
    """-> {library: code that loads the SAE, or one of several}."""
    c, folder, names = constants(about), "path/to/this/folder", [""]
    if _several(c):
        names = about["source"]["sites"]
    folders = ["/".join(filter(None, (folder, name))) for name in names]
    folder = folders[0]  # the others load alike
    row, code = ARCHITECTURES[c["ARCHITECTURE"] or about["source"]["architecture"]], {}
    transcoder, sparsify = ":" in c["SITE"], of_sparsify(c, row)
    within = c["SITE"] != site.RESIDUAL or _several(c)
    if sparsify:
        code["sparsify"] = (
            f'from sparsify import SparseCoder\nsae = SparseCoder.load_from_disk("{folder}")'
        )
    if not (row.ours_alone() or transcoder):
        code["dictionary_learning"] = (
            "from dictionary_learning.utils import load_dictionary\n"
            f'sae, config = load_dictionary("{folder}", device="cpu")'
        )
    if row.saelens and not sparsify:
        code["SAELens"] = (
            "from sae_lens import SAE\n"
            f'sae = SAE.load_from_disk("{folder}")  # or SAE.from_pretrained("user/repo", "sae")'
        )
    if row.saebench and not off_unit(c, row) and not within:
        module, _, loader = row.saebench.partition(".")
        model = os.path.basename(os.path.normpath(c["MODEL"]))
        code["SAEBench (from the Hub)"] = (
            f"import torch\nfrom sae_bench.custom_saes import {module}\n"
            f'sae = {module}.{loader}(\n    "user/repo", "sae/ae.pt", "{model}", '
            f'torch.device("cpu"), torch.float32, layer={c["LAYER"]}\n)'
        )
    lm = f"path/to/{public(c['MODEL'])}" if os.path.exists(c["MODEL"]) else c["MODEL"]
    where = "" if c["SITE"] == site.RESIDUAL else f" SITE={c['SITE']}"
    if _several(c):
        where = f" SITE={','.join(about['source']['at'])}"  # in the order of the folders
    saes = ",".join(folders)
    code["klsplice"] = f"python run.py MODEL={lm} LAYER={c['LAYER']}{where} SAE={saes}"
    code["klsplice"] += "  # or SAE=user/repo/sae" * (not _several(c))
    if "," in c["SITE"]:  # each has its own kind of files
        return {"klsplice": code["klsplice"]}
    if row.architecture in LATENTS and not transcoder:
        code["PyTorch alone"] = _pytorch(row, folder)
    places = about.get("checked", {}).get("places", [])
    if transcoder and all(p["itself"] and p["inputs"] == [True, False] for p in places):
        code["PyTorch alone, spliced"] = _splicing(about, row, places)
    return code


def _splicing(about: dict, row, places: list[dict]) -> str:
    """All of the run's transcoders in place, on the files as they lie there."""
    c, source = constants(about), about["source"]
    sparsify = of_sparsify(c, row)
    W_enc, b_enc = ("encoder.weight", "encoder.bias") if sparsify else ("W_enc", "b_enc")
    z = f'x @ t["{W_enc}"]{".T" if sparsify else ""} + t["{b_enc}"]'
    latents = LATENTS[row.architecture].replace('int(t["k"])', str(source["k"]))
    calls = []
    for p, name in zip(places, source.get("sites") or [""]):
        folder = "/".join(filter(None, ("path/to/this/folder", name)))
        calls.append(f'splice(lm, "{folder}", "{p["reads"]}", "{p["writes"]}")')
    return SPLICE.format(
        keep=c["KEEP"],
        file="sae.safetensors" if sparsify else "sae_weights.safetensors",
        z=z if row.architecture == "jumprelu" else f"torch.relu({z})",
        latents=latents.replace("\n", "\n    "),
        skip=' + seen["x"] @ t["W_skip"].T' * source.get("skips", False),
        calls="\n".join(calls),
    )


def _pytorch(row, folder: str) -> str:
    """Encoder and decoder on ae.pt as it lies there. row: a class of sae.py."""
    t = {}  # how to write each of our tensors in terms of theirs
    for name, stored in row.tensors.items():
        transposed = stored.endswith(".T") != (name == "W_enc_FD")  # encode multiplies by W_enc.T
        t[name] = f't["{stored.removesuffix(".T")}"]' + (".T" if transposed else "")
    x = f"(x - {t['b_dec_D']})" if row.centred else "x"
    relu = "" if row.architecture == "jumprelu" else "torch.relu"
    z = f"{relu}({x} @ {t['W_enc_FD']} + {t['b_enc_F']})"
    return PYTORCH.format(folder=folder, z=z, latents=LATENTS[row.architecture], **t)


def of_sparsify(c: dict, row) -> bool:
    """Whether its files are sparsify's: a TopK transcoder's, which SAELens has not."""
    return ":" in c["SITE"] and row.architecture == "topk"


def off_unit(c: dict, row) -> bool:
    """Whether the decoder's rows lost their norm of 1 to an adapter or LoRA, with no way to rescale
    them: a latent of ReLU and JumpReLU can be rescaled, in a TopK that changes which win."""
    folded = c["TRAIN"] == "adapter" and c["ADAPTER"] == "linear"
    return row.unit_norm and (folded or c["TRAIN"] == "sae_lora")


def _at(name: str, commit: str | None) -> str:
    return f"{public(name)} at {commit}" if commit else public(name)


def _on_hub(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not os.path.exists(name)


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
