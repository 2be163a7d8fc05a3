"""What does SAEBench say of the SAE: the source, the finetuned one, the one in a LM with LoRA?

    python -m evals.saebench runs/<name> [--eval core sparse_probing]

`core` is scored on the run's own held-out tokens where DATASET is local, and otherwise as SAEBench
scores published SAEs: 128 tokens a context of OpenWebText, the LM in bfloat16 on a GPU. With KEEP =
first each context gets a BOS, as SAEBench knows special tokens but no positions; what is kept from
the SAE it zeroes all the same in its ablation. With LoRA the clean LM is the one with LoRA, merged.
`sparse_probing` is that of sae-probes; on a CPU of three of its texts.
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

FEW = ["119_us_state_TX", "156_athlete_sport_baseball", "125_world_country_Italy"]  # on a CPU


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


@contextmanager
def handed_in(run, lm, tokenizer):
    """Who loads an LM by its name through TransformerLens, as sae-probes does, gets this one."""
    from transformer_lens import HookedTransformer, loading_from_pretrained

    load = HookedTransformer.from_pretrained_no_processing
    official = loading_from_pretrained.get_official_model_name

    def load_ours(name, *, device, dtype=torch.float32, **_):
        return load(run.cfg.MODEL, hf_model=lm, tokenizer=tokenizer, device=device, dtype=dtype)

    def name_of(name):  # TransformerLens reads a local folder, once it is past its list of names
        return name if os.path.isdir(name) else official(name)

    with (
        mock.patch.object(HookedTransformer, "from_pretrained_no_processing", load_ours),
        mock.patch.object(loading_from_pretrained, "get_official_model_name", name_of),
    ):
        yield


def core(run, sae, text, cache) -> dict:
    from sae_bench.evals.core import main
    from sae_lens.training.activations_store import ActivationsStore
    from transformer_lens import HookedTransformer

    dtype = torch.bfloat16 if run.cfg.DEVICE.startswith("cuda") else torch.float32
    lm = HookedTransformer.from_pretrained_no_processing("", device=run.cfg.DEVICE, dtype=dtype)
    _, sae, _ = main.general_utils.load_and_format_sae("", sae, run.cfg.DEVICE)
    sae = sae.to(device=run.cfg.DEVICE, dtype=dtype)
    dataset, context, batch, batches = "Skylion007/openwebtext", 128, 16, (200, 2000)
    if text:
        dataset, context, batch = text, run.cfg.CONTEXT, math.gcd(len(text), run.cfg.EVAL_BATCH)
        batches = (len(text) // batch, len(text) // batch)
    config = main.CoreEvalConfig(**vars(main.get_multiple_evals_everything_config(batch, *batches)))
    config.exclude_special_tokens_from_reconstruction = not text or run.cfg.KEEP != "none"
    config.context_size = context
    store = ActivationsStore.from_sae(lm, sae, context_size=context, dataset=dataset)
    store.shuffle_input_dataset(seed=42)
    special = {getattr(lm.tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")}
    return main.run_evals(sae, store, lm, config, ignore_tokens=special)[0]


def sparse_probing(run, sae, text, cache) -> dict:
    from sae_bench.evals.sparse_probing_sae_probes import main

    name = os.path.basename(os.path.normpath(run.cfg.MODEL))
    with tempfile.TemporaryDirectory() as folder:
        where = {"results_path": folder, "model_cache_path": cache}
        config = main.SparseProbingSaeProbesEvalConfig(model_name=name, **where)
        if run.cfg.DEVICE == "cpu":
            config.dataset_names = FEW
        (found,) = main.run_eval(config, [("sae", sae)], run.cfg.DEVICE, folder).values()
    return found["eval_result_metrics"]


EVALS = {"core": core, "sparse_probing": sparse_probing}  # -> {category: {metric: number}}


def evaluate(a) -> dict:
    if not find_spec("sae_bench"):
        raise UserError("sae-bench is not installed here", "`make saebench` makes its environment")
    run, columns = common.open_run(a.runs, a.device), {}
    if os.path.exists(os.path.join(run.folder, "sae", "adapter.safetensors")):
        raise UserError(f"{run.folder} has an SAE with an adapter, which no class of SAELens holds")
    opened = open_lm(run)
    text, bos = held_out(run, opened), bos_of(opened.tokenizer, run.cfg.BOS) is not None
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
                    found = EVALS[name](run, sae, text, cache)
                for metrics in found.values():
                    columns[label] |= {f"{name}/{metric}": v for metric, v in metrics.items()}
    frame = pd.DataFrame(columns).astype(float).dropna(how="all")  # a row a metric
    table = [["", *frame.columns]]
    table += [[metric, *(f"{v:.4f}" for v in row)] for metric, row in frame.iterrows()]
    numbers = {f"{label}/{m}": v for label, column in frame.items() for m, v in column.items()}
    return {"device": machine.device_name(run.cfg.DEVICE), "numbers": numbers, "table": table}


def options(parser) -> None:
    common.one_run(parser)
    parser.add_argument("--eval", nargs="+", choices=EVALS, default=[*EVALS])


def main(argv: list[str]) -> int:
    return common.command(argv, "saebench", __doc__, options, evaluate)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
