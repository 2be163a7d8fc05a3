"""What does SAEBench say of the SAE: the source, the finetuned one, the one in a LM with LoRA?

    python -m evals.saebench runs/<name> [--eval core sparse_probing] [--datasets a b]

`core` is scored on the run's own held-out tokens where DATASET is local, and otherwise as SAEBench
scores published SAEs: 128 tokens a context of OpenWebText, the LM in bfloat16 on a GPU. Its
ce_loss_score is our ce_recovered over ce_*_no_special. With KEEP = first each context gets a BOS,
as SAEBench knows special tokens but no positions; what is kept from the SAE it zeroes all the same
in its ablation. With LoRA the clean LM is the one with LoRA, merged. `sparse_probing` is that of
sae-probes, which brings its texts along. Numbers are by SAEBench's own names.
"""

import math
import os
import sys
import tempfile
from contextlib import contextmanager
from importlib.util import find_spec
from unittest import mock

import pandas as pd
import torch

import data
from evals import common
from evals.open import load_lm, load_sae, open_lm, variants
from klsplice import machine
from klsplice.errors import UserError
from klsplice.formats import read, write
from klsplice.text.documents import bos_of, kind_of

FEW = ("119_us_state_TX", "156_athlete_sport_baseball", "125_world_country_Italy")  # on a CPU


def as_saelens(run, when: str, bos: bool):
    """The SAE as SAELens' object, through the files that a run writes."""
    from sae_lens import SAE

    model = load_sae(run, when)
    F, D = model.W_dec_FD.shape
    with tempfile.TemporaryDirectory() as folder:
        source = read.Source(when, model.architecture, D, F)
        write.save(folder, model, source, run.cfg.constants(), bos=bos)
        return SAE.load_from_disk(folder, device=run.cfg.DEVICE)


def held_out(run, opened):
    """The run's own held-out contexts as a datasets.Dataset; None where DATASET is of the Hub."""
    from datasets import Dataset

    if kind_of(run.cfg.DATASET) == "hub":
        return None
    tokens = data.prepare(run.cfg, opened.tokenizer, opened.config)
    val_SL = tokens.val(0, len(tokens.val_SL))
    if run.cfg.KEEP == "first" and opened.tokenizer.bos_token_id is not None:
        val_SL[:, 0] = opened.tokenizer.bos_token_id
    return Dataset.from_dict({"tokens": val_SL.tolist()})


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
    if not find_spec("sae_bench"):
        raise UserError("sae-bench is not installed here", "`make saebench` makes its environment")
    run, columns = common.open_run(a.runs, a.device), {}
    if os.path.exists(os.path.join(run.folder, "sae", "adapter.safetensors")):
        raise UserError(f"{run.folder} has an SAE with an adapter, which no class of SAELens holds")
    opened = open_lm(run)
    text, bos = held_out(run, opened), bos_of(opened.tokenizer, run.cfg.BOS) is not None
    datasets = a.datasets or (FEW if run.cfg.DEVICE == "cpu" else None)
    with tempfile.TemporaryDirectory() as scratch:
        for label, (with_lora, when) in variants(run).items():
            if when is None:  # every evaluation has the clean LM beside the SAE
                continue
            lm, tokenizer = load_lm(run, torch.float32, lora=with_lora)
            lm, columns[label] = lm.merge_and_unload() if with_lora else lm, {}
            cache = os.path.join(scratch, f"lora-{with_lora}")  # of the LM's activations
            for name in a.eval:
                sae = as_saelens(run, when, bos)
                with handed_in(run, lm, tokenizer):
                    found = EVALS[name](run, sae, text, cache=cache, datasets=datasets)
                for metrics in found.values():
                    columns[label] |= {f"{name}/{metric}": v for metric, v in metrics.items()}
    frame = pd.DataFrame(columns).astype(float).dropna(how="all")
    table = [["", *frame.columns]]
    table += [[metric, *(f"{v:.4f}" for v in row)] for metric, row in frame.iterrows()]
    numbers = {f"{label}/{m}": v for label, column in frame.items() for m, v in column.items()}
    return {"device": machine.device_name(run.cfg.DEVICE), "numbers": numbers, "table": table}


def options(parser) -> None:
    common.one_run(parser)
    parser.add_argument("--eval", nargs="+", choices=EVALS, default=[*EVALS])
    parser.add_argument("--datasets", nargs="+", help="of sae-probes; all, on a CPU three")


def main(argv: list[str]) -> int:
    return common.command(argv, "saebench", __doc__, options, evaluate)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
