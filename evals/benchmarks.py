"""Does the spliced LM still answer questions? lm-eval on the LM, with its SAE, with its LoRA.

    python -m evals.benchmarks runs/<name> [--tasks hellaswag arc_easy] [--limit N]

The SAE stands in at every position that KEEP does not keep, padding included: it is on the right
and the LM is causal. A change is paired over the questions, which is finer than the error of each
accuracy. Tasks come from the Hub; `everyday`, 60 sentences to finish, is here.
"""

import logging
import math
import os
import sys
from contextlib import nullcontext
from importlib.util import find_spec

import numpy as np
import torch

from evals import common
from evals.open import load_lm, load_sae, spliced, variants
from klsplice import machine
from klsplice.errors import UserError, first_line
from klsplice.text import documents

TASKS = ["mmlu", "hellaswag", "truthfulqa_mc1", "truthfulqa_mc2"]
OFFLINE_TASKS = ["everyday"]  # where the LM is a local folder
HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tasks")


def load_tasks(names: list[str]):
    """-> lm-eval's manager. Raises UserError where a task cannot be had, or lets the LM write."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=HERE, include_defaults=names != OFFLINE_TASKS)
    try:
        tasks = manager.load(names)["tasks"]
    except Exception as e:  # of datasets, of the Hub, of the task's own code
        hint = f"its text comes from the Hub: needs the network; {OFFLINE_TASKS[0]} is here"
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
    bos = documents.bos_of(tokenizer, cfg.BOS)
    plain = lm.base_model.model if adapted else lm  # as lm-eval knows it
    special, found = documents.special_ids(tokenizer), {}
    for label, (with_lora, when) in variants(run).items():
        print(f"{label}:")
        with (
            lm.disable_adapter() if adapted and not with_lora else nullcontext(),
            spliced(plain, load_sae(run, when), cfg, special) if when else nullcontext(),
        ):
            model = HFLM(
                plain,
                tokenizer=tokenizer,
                backend="causal",
                batch_size=batch,
                add_bos_token=bos is not None,  # decides Gemma's results
            )
            given = {"model": model, "limit": limit, "task_manager": manager}
            found[label] = {task: simple_evaluate(tasks=[task], **given) for task in tasks}
    return found


def summary(found: dict, tasks: list[str]) -> tuple[dict, list[list[str]]]:
    """-> flat numbers, and the table: accuracy ± standard error, and the paired change."""
    numbers, scores = {}, {}  # of each label and task, question by question
    for label, of_task in found.items():
        scores[label] = {}
        for task, result in of_task.items():
            metrics = {n.split(",")[0]: v for n, v in result["results"][task].items() if "," in n}
            numbers |= {
                f"{label}/{task}/{n}": v for n, v in metrics.items() if not isinstance(v, str)
            }
            shown = next(n for n in ("acc_norm", "acc", *metrics) if n in metrics)
            samples = [sample for leaf in result["samples"].values() for sample in leaf]
            scores[label][task] = np.array([sample[shown] for sample in samples])
    lm, *others = found
    pairs = [(label, lm) for label in others]
    if len(others) > 1:  # what the finetune, or the LoRA, changed with an SAE in place
        pairs.append((others[-1], others[0]))
    for label, reference in pairs:
        change = {task: scores[label][task] - scores[reference][task] for task in tasks}
        scores[f"{label} vs {reference}"] = change
    table = [["", *tasks]]
    for label, of_task in scores.items():
        table.append([label])
        for task, score_Q in of_task.items():
            mean = float(score_Q.mean())
            error = (
                float(score_Q.std(ddof=1) / len(score_Q) ** 0.5) if len(score_Q) > 1 else math.nan
            )
            if label not in found:
                numbers |= {f"{label}/{task}/change": mean, f"{label}/{task}/change_stderr": error}
            table[-1].append(f"{mean:{'.3f' if label in found else '+.3f'}} ± {error:.3f}")
    table.append(["questions", *(str(len(scores[lm][task])) for task in tasks)])
    return numbers, table


def evaluate(a) -> dict:
    if not find_spec("lm_eval"):
        raise UserError("lm-eval is not installed here", "pip install -r requirements/evals.txt")
    run = common.open_run(a.runs, a.device)
    tasks = a.tasks or (OFFLINE_TASKS if os.path.isdir(run.cfg.MODEL) else TASKS)
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
