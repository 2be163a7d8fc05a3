"""Does the spliced LM still answer questions? lm-eval on the LM, with its SAE, with its LoRA.

    python -m evals.benchmarks runs/<name> [--tasks hellaswag,arc_easy] [--limit N]

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

from evals import common, stock
from klsplice import machine
from klsplice.errors import UserError, whole
from klsplice.text import documents

TASKS = "mmlu,hellaswag,truthfulqa_mc1,truthfulqa_mc2"
OFFLINE_TASKS = "everyday"  # where the LM is a local folder
HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tasks")


def load_tasks(names: list[str]):
    """-> lm-eval's manager and its tasks. Raises UserError in a line where one cannot be had."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=HERE, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):  # reading lm-eval's thousands takes a while
        manager = TaskManager(include_path=HERE)
    tasks = {}
    for name in names:
        try:
            tasks |= manager.load([name])["tasks"]
        except Exception as e:  # of datasets, of the Hub, of the task's own code
            hint = f"its text comes from the Hub: needs the network; {OFFLINE_TASKS} is here"
            what = f"the task {name!r} could not be loaded:{whole(e)}"
            raise UserError(what, hint) from None
    if generated := [n for n, t in tasks.items() if t.OUTPUT_TYPE == "generate_until"]:
        raise UserError(f"{', '.join(generated)} lets the LM write", "wanted log-likelihood tasks")
    return manager


def scored(run, tasks: list[str], *, limit: int | None, batch: int) -> dict:
    """-> label: what lm-eval found for that variant, its samples included."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    cfg, variants, manager = run.cfg, stock.variants(run), load_tasks(tasks)
    adapted = cfg.TRAIN == "lm_lora"
    lm, tokenizer = stock.load_lm(run, getattr(torch, cfg.DTYPE), lora=adapted)
    bos = documents.bos_of(tokenizer, cfg.BOS)
    of = {when: stock.load_sae(run, when) for _, when in variants.values() if when}
    plain = lm.base_model.model if adapted else lm  # as lm-eval knows it
    found = {}
    for label, (with_lora, when) in variants.items():
        print(f"{label}:")
        saes = {cfg.LAYER: of[when]} if when else {}
        with (
            lm.disable_adapter() if adapted and not with_lora else nullcontext(),
            stock.spliced(plain, saes, cfg, documents.special_ids(tokenizer)),
        ):
            model = HFLM(
                plain,
                tokenizer=tokenizer,
                backend="causal",
                batch_size=batch,
                add_bos_token=bos is not None,  # decides Gemma's results
            )
            found[label] = simple_evaluate(model, tasks=tasks, limit=limit, task_manager=manager)
    return found


def summary(found: dict, tasks: list[str]) -> tuple[dict, list[list[str]]]:
    """-> flat numbers, and the table: accuracy ± standard error, and the paired change."""
    numbers, table = {}, [["", *tasks]]
    pooled = {}  # (label, task) -> the score of each question
    for label, result in found.items():
        cells = [label]
        for task in tasks:
            scores = {n.split(",")[0]: v for n, v in result["results"][task].items() if "," in n}
            shown = (m for m in ("acc_norm", "acc", *scores) if m in scores)  # the JSON has all
            name = next(shown)
            numbers |= {f"{label}/{task}/{n}": v for n, v in scores.items() if _is_number(v)}
            parts = result.get("group_subtasks", {}).get(task) or [task]
            samples = [s for p in _leaves(parts, result) for s in result["samples"][p]]
            pooled[label, task] = [s[name] for s in samples]
            numbers[f"{task}/n"] = len(samples)
            error = scores.get(f"{name}_stderr")
            cells.append(f"{scores[name]:.3f}" + (f" ± {error:.3f}" if _is_number(error) else ""))
        table.append(cells)
    lm, *others = found
    pairs = [(label, lm) for label in others]
    # and what the finetune, or the LoRA, changed with an SAE in place
    for label, reference in pairs + [(others[-1], others[0])] * (len(others) > 1):
        cells = [f"{label} vs {reference}"]
        for task in tasks:
            both = zip(pooled[label, task], pooled[reference, task], strict=True)
            change = np.array([a - b for a, b in both])
            error = change.std(ddof=1) / len(change) ** 0.5 if len(change) > 1 else math.nan
            for name, value in (("change", change.mean()), ("change_stderr", error)):
                numbers[f"{cells[0]}/{task}/{name}"] = float(value)
            cells.append(f"{change.mean():+.3f} ± {error:.3f}")
        table.append(cells)
    table.append(["questions", *(str(numbers[f"{task}/n"]) for task in tasks)])
    return numbers, table


def _leaves(names: list[str], result: dict) -> list[str]:
    """Tasks of a group, of its groups, and so on."""
    inner = result.get("group_subtasks", {})
    return [leaf for n in names for leaf in (_leaves(inner[n], result) if inner.get(n) else [n])]


def _is_number(x) -> bool:
    return isinstance(x, (int, float)) and math.isfinite(x)


def evaluate(a) -> dict:
    if not find_spec("lm_eval"):
        raise UserError("lm-eval is not installed here", "pip install -r requirements/evals.txt")
    run = common.open_run(a.runs, a.device)
    tasks = (a.tasks or (OFFLINE_TASKS if os.path.isdir(run.cfg.MODEL) else TASKS)).split(",")
    numbers, table = summary(scored(run, tasks, limit=a.limit, batch=a.batch), tasks)
    return {"device": machine.device_name(run.cfg.DEVICE), "numbers": numbers, "table": table}


def options(parser) -> None:
    common.one_run(parser)
    parser.add_argument("--tasks", default="", help=f"names of lm-eval's tasks; default {TASKS}")
    parser.add_argument("--limit", type=common.positive, help="questions a task")
    parser.add_argument("--batch", type=common.positive, default=8)


def main(argv: list[str]) -> int:
    return common.command(argv, "benchmarks", __doc__, options, evaluate)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
