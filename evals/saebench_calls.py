"""SAEBench's own functions, called on our SAE, LM and text instead of names of the Hub."""

import glob
import math
import os
import tempfile
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from unittest import mock

import torch

import data
from evals import stock
from klsplice.errors import UserError
from klsplice.formats import read, write
from klsplice.storage import read_json
from klsplice.text.documents import kind_of

OTHERS = {  # module of sae_bench.evals, its config, further settings; disputed: arXiv 2605.18229
    "absorption": ("absorption", "AbsorptionEvalConfig", {}),
    "scr": ("scr_and_tpp", "ScrAndTppEvalConfig", {"perform_scr": True}),
    "tpp": ("scr_and_tpp", "ScrAndTppEvalConfig", {"perform_scr": False}),
}
NEEDED = {
    "core": ("ce_loss_score", "kl_div_score", "l0"),
    "sparse_probing": ("llm_test_accuracy", "sae_top_1_test_accuracy"),
}


def as_saelens(run, when: str, bos: bool):
    """The SAE as SAELens' object, through the files that a run writes."""
    from sae_lens import SAE

    model = stock.load_sae(run, when)
    F, D = model.W_dec_FD.shape
    source = read.Source(when, model.architecture, D, F)
    with tempfile.TemporaryDirectory() as folder:
        write.save(folder, model, source, run.cfg.constants(), bos=bos)
        return SAE.load_from_disk(folder, device=run.cfg.DEVICE)


def held_out(run, config, tokenizer):
    """The run's own held-out contexts as a datasets.Dataset; None where DATASET is of the Hub."""
    from datasets import Dataset

    if kind_of(run.cfg.DATASET) == "hub":
        return None
    tokens = data.prepare(run.cfg, tokenizer, config)
    val_SL = tokens.val(0, len(tokens.val_SL))
    if run.cfg.KEEP == "first" and tokenizer.bos_token_id is not None:
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
        return load(run.cfg.MODEL, hf_model=lm, tokenizer=tokenizer, **where)

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

    batch = math.gcd(len(text), run.cfg.EVAL_BATCH) if text else 16
    multiple_evals(
        sae,
        n_eval_reconstruction_batches=len(text) // batch if text else 200,
        n_eval_sparsity_variance_batches=len(text) // batch if text else 2000,
        eval_batch_size_prompts=batch,
        exclude_special_tokens_from_reconstruction=not text or run.cfg.KEEP != "none",
        context_size=run.cfg.CONTEXT if text else 128,
        output_folder=folder,
        compute_featurewise_density_statistics=True,  # without both it saves nothing
        compute_featurewise_weight_based_metrics=True,
        dtype=dtype,
        device=run.cfg.DEVICE,
    )


def sparse_probing(run, sae, folder, *, cache, datasets, **_):
    from sae_bench.evals.sparse_probing_sae_probes import main as probes

    config = probes.SparseProbingSaeProbesEvalConfig(
        model_name=os.path.basename(os.path.normpath(run.cfg.MODEL)),
        results_path=os.path.join(folder, "probes"),
        model_cache_path=cache,
        **({"dataset_names": datasets} if datasets else {}),
    )
    probes.run_eval(config, sae, run.cfg.DEVICE, folder)


def other(name, run, sae, folder, *, dtype, cache, **_):
    module, config, further = OTHERS[name]
    main = import_module(f"sae_bench.evals.{module}.main")
    lm = {"model_name": os.path.basename(os.path.normpath(run.cfg.MODEL)), "llm_dtype": dtype}
    config = getattr(main, config)(**lm, llm_batch_size=16, **further)
    where = {} if name == "absorption" else {"artifacts_path": cache}
    main.run_eval(config, sae, run.cfg.DEVICE, folder, **where)


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


EVALS = {"core": core, "sparse_probing": sparse_probing} | {n: partial(other, n) for n in OTHERS}
