"""Does the spliced LM still answer questions? lm-eval on the LM, with its SAE, with its LoRA.

    python -m evals.benchmarks runs/<name> [--tasks hellaswag arc_easy] [--limit N]

The SAE stands in at every position that KEEP does not keep, padding included: it is on the right
and the LM is causal. A change is paired over the questions, which is finer than the error of each
accuracy. Tasks come from the Hub; `everyday`, 60 sentences to finish, is here.
"""

import os
import sys
from contextlib import nullcontext
from importlib.util import find_spec

import pandas as pd
import torch

from evals import common
from evals.open import load_lm, load_sae, spliced, variants
from klsplice import machine
from klsplice.errors import UserError, first_line
from klsplice.text import documents

TASKS = ["mmlu", "hellaswag", "truthfulqa_mc1", "truthfulqa_mc2"]
OFFLINE = ["everyday"]  # where the LM is a local folder
HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tasks")


def load_tasks(names: list[str]):
    """-> lm-eval's manager. Raises UserError where a task cannot be had, or lets the LM write."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=HERE, include_defaults=names != OFFLINE)
    try:
        tasks = manager.load(names)["tasks"]
    except Exception as e:  # of datasets, of the Hub, of the task's own code
        hint = "its text comes from the Hub; that of everyday is here"
        raise UserError(f"--tasks {' '.join(names)}: {first_line(e)}", hint) from None
    if any(task.OUTPUT_TYPE == "generate_until" for task in tasks.values()):
        raise UserError("--tasks: one lets the LM write", "wanted log-likelihood tasks")
    return manager


def scored(run, tasks: list[str], *, limit: int | None, batch: int) -> dict:
    """-> {label: {task: what lm-eval found for that variant, its samples included}}."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    cfg, manager = run.cfg, load_tasks(tasks)
    adapted = cfg.TRAIN == "lm_lora"
    lm, tokenizer = load_lm(run, getattr(torch, cfg.DTYPE), lora=adapted)
    bos = documents.bos_of(tokenizer, cfg.BOS)  # it decides Gemma's results
    options = {"batch_size": batch, "add_bos_token": bos is not None}
    plain = lm.base_model.model if adapted else lm  # as lm-eval knows it
    special, found = documents.special_ids(tokenizer), {}
    for label, (with_lora, when) in variants(run).items():
        print(f"{label}:")
        with (
            lm.disable_adapter() if adapted and not with_lora else nullcontext(),
            spliced(plain, load_sae(run, when), cfg, special) if when else nullcontext(),
        ):
            model = HFLM(plain, tokenizer=tokenizer, backend="causal", **options)
            given = {"model": model, "limit": limit, "task_manager": manager}
            found[label] = {task: simple_evaluate(tasks=[task], **given) for task in tasks}
    return found


def summary(found: dict, tasks: list[str]) -> tuple[dict, list[list[str]]]:
    """-> flat numbers, and the table: accuracy ± standard error, and the paired change."""
    lm, *others = found
    pairs = [(label, lm) for label in others]
    if len(others) > 1:
        pairs.append((others[-1], others[0]))  # what was changed with an SAE in place
    numbers, columns = {}, []
    for task in tasks:
        scores = pd.DataFrame()  # a row a question
        for label in found:
            result = found[label][task]
            metrics = {n.split(",")[0]: v for n, v in result["results"][task].items() if "," in n}
            shown = next(n for n in ("acc_norm", "acc", *metrics) if n in metrics)
            samples = [sample for leaf in result["samples"].values() for sample in leaf]
            scores[label] = [float(sample[shown]) for sample in samples]
            metrics = {n: v for n, v in metrics.items() if not isinstance(v, str)}
            numbers |= {f"{label}/{task}/{n}": v for n, v in metrics.items()}
        for label, reference in pairs:
            name = f"{label} vs {reference}"
            scores[name] = change = scores[label] - scores[reference]
            numbers[f"{name}/{task}/change"] = float(change.mean())
            numbers[f"{name}/{task}/change_stderr"] = float(change.sem())
        cells = [f"{m:.3f} ± {e:.3f}" for m, e in zip(scores.mean(), scores.sem())]
        columns.append([*cells, f"{len(scores):,}"])
    return numbers, [["", *tasks], *map(list, zip([*scores, "questions"], *columns))]


def evaluate(a) -> dict:
    if not find_spec("lm_eval"):
        raise UserError("lm-eval is not installed here", "pip install -r requirements/evals.txt")
    run = common.open_run(a.runs, a.device)
    tasks = a.tasks or (OFFLINE if os.path.isdir(run.cfg.MODEL) else TASKS)
    numbers, table = summary(scored(run, tasks, limit=a.limit, batch=a.batch), tasks)
    return {"device": machine.device_name(run.cfg.DEVICE), "numbers": numbers, "table": table}


def options(parser) -> None:
    common.one_run(parser)
    parser.add_argument("--tasks", nargs="+", help=f"of lm-eval; default {' '.join(TASKS)}")
    parser.add_argument("--limit", type=int, help="questions a task")
    parser.add_argument("--batch", type=int, default=8)


def main(argv: list[str]) -> int:
    return common.command(argv, "benchmarks", __doc__, options, evaluate)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
