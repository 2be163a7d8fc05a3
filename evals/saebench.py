"""What does SAEBench say of the SAE: the source, the finetuned one, the one in a LM with LoRA?

python -m evals.saebench runs/<name> [--eval core,sparse_probing] [--datasets a,b]
python -m evals.saebench runs/<name> --draw            the figure again, from the JSON alone

`core` is scored on the run's own held-out tokens where DATASET is local, and otherwise as SAEBench
scores published SAEs: 128 tokens a context of OpenWebText, the LM in bfloat16 on a GPU. Its
ce_loss_score is our ce_recovered over ce_*_no_special. With KEEP = first each context gets a BOS,
as SAEBench knows special tokens but no positions; what is kept from the SAE it zeroes all the same
in its ablation. With LoRA the clean LM is the one with LoRA, merged. `sparse_probing` is that of
sae-probes, which brings its texts along.
"""

import argparse
import glob
import logging
import math
import os
import sys
import tempfile
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from unittest import mock

import torch

import data
import export
import formats
import language_model
from checkpoint import read_json
from errors import UserError
from evals import run_folder

DEFAULT = "core,sparse_probing"
FEW = "119_us_state_TX,156_athlete_sport_baseball,125_world_country_Italy"  # on a CPU
OTHERS = {  # module of sae_bench.evals, its config, further settings; disputed: arXiv 2605.18229
    "absorption": ("absorption", "AbsorptionEvalConfig", {}),
    "scr": ("scr_and_tpp", "ScrAndTppEvalConfig", {"perform_scr": True}),
    "tpp": ("scr_and_tpp", "ScrAndTppEvalConfig", {"perform_scr": False}),
}
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
SHARES = ("CE score", "LM", "top 1", "top 2", "top 5")  # of them, what the figure has
NEEDED = {
    "core": ("ce_loss_score", "kl_div_score", "l0"),
    "sparse_probing": ("llm_test_accuracy", "sae_top_1_test_accuracy"),
}


def as_saelens(run, when: str, bos: bool):
    """The SAE as SAELens' object, through the files that export writes."""
    from sae_lens import SAE

    model = run_folder.load_sae(run, when)
    F, D = model.W_dec_FD.shape
    source = formats.Source(when, export.architecture_of(model), D, F)
    with tempfile.TemporaryDirectory() as folder:
        export.save(folder, model, source, run.c, SimpleNamespace(bos=bos))
        return SAE.load_from_disk(folder, device=run.c.DEVICE)


def held_out(run, config, tokenizer):
    """The run's own held-out contexts as a datasets.Dataset; None where DATASET is of the Hub."""
    from datasets import Dataset

    if data._kind(run.c.DATASET) == "hub":
        return None
    tokens = data.prepare(run.c, tokenizer, config)
    val_SL = tokens.val(0, len(tokens.val_SL))
    if run.c.KEEP == "first" and tokenizer.bos_token_id is not None:
        val_SL[:, 0] = tokenizer.bos_token_id
    return Dataset.from_dict({"tokens": val_SL.tolist()})


@contextmanager
def handed_in(run, lm, tokenizer, text):
    """SAEBench and sae-probes get this LM where they load one by name, and this text, if any."""
    from sae_lens.training.activations_store import ActivationsStore
    from transformer_lens import HookedTransformer, loading_from_pretrained

    load = HookedTransformer.from_pretrained_no_processing
    official, store = loading_from_pretrained.get_official_model_name, ActivationsStore.from_sae

    def load_ours(name, *, device, dtype=torch.float32, **_):
        where = {"device": device, "dtype": dtype}
        return load(run.c.MODEL, hf_model=lm, tokenizer=tokenizer, **where)

    def name_of(name):  # TransformerLens reads a local folder, once it is past its list of names
        return name if os.path.isdir(name) else official(name)

    def store_ours(model, sae, *, dataset, **options):
        return store(model, sae, dataset=text or dataset, **options)

    with (
        mock.patch.object(HookedTransformer, "from_pretrained_no_processing", load_ours),
        mock.patch.object(loading_from_pretrained, "get_official_model_name", name_of),
        mock.patch.object(ActivationsStore, "from_sae", store_ours),
    ):
        yield


def core(run, sae, folder, *, text, dtype, **_):
    from sae_bench.evals.core.main import multiple_evals

    batch = math.gcd(len(text), run.c.EVAL_BATCH) if text else 16
    multiple_evals(
        sae,
        n_eval_reconstruction_batches=len(text) // batch if text else 200,
        n_eval_sparsity_variance_batches=len(text) // batch if text else 2000,
        eval_batch_size_prompts=batch,
        exclude_special_tokens_from_reconstruction=not text or run.c.KEEP != "none",
        context_size=run.c.CONTEXT if text else 128,
        output_folder=folder,
        compute_featurewise_density_statistics=True,  # without both it saves nothing
        compute_featurewise_weight_based_metrics=True,
        dtype=dtype,
        device=run.c.DEVICE,
    )


def sparse_probing(run, sae, folder, *, cache, datasets, **_):
    from sae_bench.evals.sparse_probing_sae_probes import main as probes

    config = probes.SparseProbingSaeProbesEvalConfig(
        model_name=os.path.basename(os.path.normpath(run.c.MODEL)),
        results_path=os.path.join(folder, "probes"),
        model_cache_path=cache,
        **({"dataset_names": datasets} if datasets else {}),
    )
    probes.run_eval(config, sae, run.c.DEVICE, folder)


def other(name, run, sae, folder, *, dtype, cache, **_):
    module, config, further = OTHERS[name]
    main = import_module(f"sae_bench.evals.{module}.main")
    lm = {"model_name": os.path.basename(os.path.normpath(run.c.MODEL)), "llm_dtype": dtype}
    config = getattr(main, config)(**lm, llm_batch_size=16, **further)
    where = {} if name == "absorption" else {"artifacts_path": cache}
    main.run_eval(config, sae, run.c.DEVICE, folder, **where)


def metrics_of(name: str, folder: str, label: str, logged: list[str]) -> dict:
    """The result that SAEBench left in `folder`, flat; it swallows errors, so there may be none."""
    files = glob.glob(os.path.join(folder, "**", "*_eval_results.json"), recursive=True)
    found = {}
    for category in read_json(files[0])["eval_result_metrics"].values() if files else ():
        found |= {n: v for n, v in category.items() if isinstance(v, (int, float))}
    missing = [n for n in NEEDED.get(name, ()) if found.get(n, -1) == -1]  # -1 stands for NaN
    if missing or not found:
        what = f"SAEBench's {name} of {label!r} left no complete result"
        what += f" (no {', '.join(missing)})" * bool(missing)
        raise UserError(
            what,
            "; ".join(line.splitlines()[0] for line in logged)[:300] or "it logged nothing",
            code=1,
        )
    return found


def evaluate(run, names: list[str], datasets: list[str]) -> dict:
    """-> flat numbers, "<variant>/<eval>/<metric>"."""
    c, numbers, logged = run.c, {}, []
    config, tokenizer = language_model.open_lm(c)
    text, bos = held_out(run, config, tokenizer), data.added_bos(tokenizer) is not None
    dtype = "bfloat16" if c.DEVICE.startswith("cuda") else "float32"
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda line: logged.append(line.getMessage())
    logging.getLogger("sae_bench").addHandler(handler)
    lms = {}  # LoRA on? -> LM
    with tempfile.TemporaryDirectory() as scratch:
        for label, (with_lora, when) in run_folder.variants(run).items():
            if when is None:  # every evaluation has the clean LM beside the SAE
                continue
            if with_lora not in lms:
                lm, _ = run_folder.load_lm(run, torch.float32, lora=with_lora)
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


EVALS = {"core": core, "sparse_probing": sparse_probing} | {n: partial(other, n) for n in OTHERS}


def table_of(numbers: dict) -> list[list[str]]:
    labels = list(dict.fromkeys(n.split("/")[0] for n in numbers))
    shown = {h: "/".join(m) for h, m in SHOWN.items() if f"{labels[0]}/{'/'.join(m)}" in numbers}
    cells = [[f"{numbers[f'{x}/{m}']:.4f}" for m in shown.values()] for x in labels]
    return [["", *shown], *([x, *row] for x, row in zip(labels, cells))]


def draw(found: dict, path: str) -> None:
    """What is a share of 1: the cross-entropy score and the probes' accuracies."""
    heading, *lines = found["table"]
    at = [i for i, name in enumerate(heading) if name in SHARES]
    bars = {line[0]: [float(line[i]) for i in at] for line in lines}
    run_folder.bars(path, [heading[i] for i in at], bars, ylabel="score, accuracy")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("evals.saebench", description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--eval", default=DEFAULT, help=f"of {', '.join(EVALS)}")
    parser.add_argument("--datasets", default="", help="of sae-probes; default all, on a CPU three")
    parser.add_argument("--draw", action="store_true", help="the figure again, from the JSON")
    args = parser.parse_args(argv)
    try:
        run, names = run_folder.open_run(args.run), args.eval.split(",")
        if args.draw:
            run_folder.redraw(run, "saebench", draw)
            return 0
        datasets = args.datasets or (FEW if run.c.DEVICE == "cpu" else "")
        datasets = datasets.split(",") if datasets else []
        check(run, names, datasets)
        numbers = evaluate(run, names, datasets)
        question = "What does SAEBench say of the SAE?"
        run_folder.save(run, "saebench", question, table_of(numbers), numbers, draw)
        return 0
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code


def check(run, names: list[str], datasets: list[str]) -> None:
    """Refuse what is known to fail, in a line with the reason."""
    for name in names:
        if name not in EVALS:
            why = REFUSED.get(name, "there is no such evaluation here")
            raise UserError(f"--eval {name}: {why}", f"wanted some of {', '.join(EVALS)}")
    if run.c.MORE_SAES:
        raise UserError("MORE_SAES: SAEBench splices one SAE", "use evals.benchmarks")
    if os.path.exists(os.path.join(run.folder, "sae", "adapter.safetensors")):
        what = f"{run.folder} has an SAE with an adapter, which no class of SAELens holds"
        raise UserError(what, "a linear adapter is folded into the SAE with FOLD=True")
    try:
        import sae_bench  # noqa: F401
        from sae_probes import DATASETS
    except ImportError:
        hint = "`make saebench` makes its environment"
        raise UserError("sae-bench is not installed here", hint) from None
    if unknown := [d for d in datasets if d not in DATASETS]:
        hint = f"wanted some of {', '.join(DATASETS[:3])} and so on, {len(DATASETS)} in all"
        raise UserError(f"sae-probes has no data set {', '.join(unknown)}", hint)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
