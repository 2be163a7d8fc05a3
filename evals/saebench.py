"""What does SAEBench say of the SAE: the source, the finetuned one, the one in a LM with LoRA?

    python -m evals.saebench runs/<name> [--eval core,sparse_probing] [--datasets a,b]

`core` is scored on the run's own held-out tokens where DATASET is local, and otherwise as SAEBench
scores published SAEs: 128 tokens a context of OpenWebText, the LM in bfloat16 on a GPU. Its
ce_loss_score is our ce_recovered over ce_*_no_special. With KEEP = first each context gets a BOS,
as SAEBench knows special tokens but no positions; what is kept from the SAE it zeroes all the same
in its ablation. With LoRA the clean LM is the one with LoRA, merged. `sparse_probing` is that of
sae-probes, which brings its texts along.
"""

import logging
import os
import sys
import tempfile

import torch

from evals import common, stock
from evals.saebench_calls import EVALS, as_saelens, handed_in, held_out, metrics_of
from klsplice import machine
from klsplice.errors import UserError
from klsplice.text.documents import bos_of

DEFAULT = "core,sparse_probing"
FEW = "119_us_state_TX,156_athlete_sport_baseball,125_world_country_Italy"  # on a CPU
REFUSED = {
    "ravel": "it breaks on transformers 5",
    "unlearning": "it breaks on transformers 5",
    "mdl": "it needs loguru, which sae-bench does not install",
    "autointerp": "it sends text to a paid service",
}
SHOWN = {  # of the table and the figure: heading, eval, metric
    "CE score": ("core", "ce_loss_score"),
    "KL": ("core", "kl_div_with_sae"),
    "CE, SAE": ("core", "ce_loss_with_sae"),
    "CE, clean": ("core", "ce_loss_without_sae"),
    "L0": ("core", "l0"),
    "LM": ("sparse_probing", "llm_test_accuracy"),
    "top 1": ("sparse_probing", "sae_top_1_test_accuracy"),
    "top 2": ("sparse_probing", "sae_top_2_test_accuracy"),
    "top 5": ("sparse_probing", "sae_top_5_test_accuracy"),
}


def scored(run, names: list[str], datasets: list[str]) -> dict:
    """-> flat numbers, "<variant>/<eval>/<metric>"."""
    cfg, numbers, logged = run.cfg, {}, []
    opened = stock.open_lm(run)
    tokenizer = opened.tokenizer
    text = held_out(run, opened.config, tokenizer)
    bos = bos_of(tokenizer, run.cfg.BOS) is not None
    dtype = "bfloat16" if cfg.DEVICE.startswith("cuda") else "float32"
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda line: logged.append(line.getMessage())
    logging.getLogger("sae_bench").addHandler(handler)
    lms = {}  # LoRA on? -> LM
    with tempfile.TemporaryDirectory() as scratch:
        for label, (with_lora, when) in stock.variants(run).items():
            if when is None:  # every evaluation has the clean LM beside the SAE
                continue
            if with_lora not in lms:
                lm, _ = stock.load_lm(run, torch.float32, lora=with_lora)
                lms[with_lora] = lm.merge_and_unload() if with_lora else lm
            for name in names:
                folder = os.path.join(scratch, label, name)
                given = {"text": text, "dtype": dtype, "datasets": datasets}
                given["cache"] = os.path.join(scratch, f"lora-{with_lora}")
                sae = [(f"{run.name}-{when}", as_saelens(run, when, bos))]
                with handed_in(run, lms[with_lora], tokenizer, text):
                    try:
                        EVALS[name](run, sae, folder, **given)
                    except Exception as e:
                        logged.append(f"{type(e).__name__}: {e}")
                found = metrics_of(name, folder, label, logged)
                numbers |= {f"{label}/{name}/{n}": v for n, v in found.items()}
    return numbers


def table_of(numbers: dict) -> list[list[str]]:
    labels = list(dict.fromkeys(n.split("/")[0] for n in numbers))
    shown = {h: "/".join(m) for h, m in SHOWN.items() if f"{labels[0]}/{'/'.join(m)}" in numbers}
    cells = [[f"{numbers[f'{x}/{m}']:.4f}" for m in shown.values()] for x in labels]
    return [["", *shown], *([x, *row] for x, row in zip(labels, cells))]


def check(run, names: list[str], datasets: list[str]) -> None:
    """Refuse what is known to fail, in a line with the reason."""
    for name in names:
        if name not in EVALS:
            why = REFUSED.get(name, "there is no such evaluation here")
            raise UserError(f"--eval {name}: {why}", f"wanted some of {', '.join(EVALS)}")
    if os.path.exists(os.path.join(run.folder, "sae", "adapter.safetensors")):
        what = f"{run.folder} has an SAE with an adapter, which no class of SAELens holds"
        raise UserError(what, "a linear adapter is folded into the SAE")
    try:
        import sae_bench  # noqa: F401
        from sae_probes import DATASETS
    except ImportError:
        hint = "`make saebench` makes its environment"
        raise UserError("sae-bench is not installed here", hint) from None
    if unknown := [d for d in datasets if d not in DATASETS]:
        hint = f"wanted some of {', '.join(DATASETS[:3])} and so on, {len(DATASETS)} in all"
        raise UserError(f"sae-probes has no data set {', '.join(unknown)}", hint)


def evaluate(a) -> dict:
    run, names = common.open_run(a.runs, a.device), a.eval.split(",")
    datasets = a.datasets or (FEW if run.cfg.DEVICE == "cpu" else "")
    datasets = datasets.split(",") if datasets else []
    check(run, names, datasets)
    numbers, device = scored(run, names, datasets), machine.device_name(run.cfg.DEVICE)
    return {"device": device, "numbers": numbers, "table": table_of(numbers)}


def options(parser) -> None:
    common.one_run(parser)
    parser.add_argument("--eval", default=DEFAULT, help=f"of {', '.join(EVALS)}")
    parser.add_argument("--datasets", default="", help="of sae-probes; default all, on a CPU three")


def main(argv: list[str]) -> int:
    return common.command(argv, "saebench", __doc__, options, evaluate)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
