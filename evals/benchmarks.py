"""Does the spliced LM still answer questions? lm-eval on the LM, with its SAE, with its LoRA.

python -m evals.benchmarks runs/<name> [--tasks hellaswag,arc_easy] [--limit N] [--batch N]
python -m evals.benchmarks runs/<name> --draw          the figure again, from the JSON alone

The SAE stands in at every position that KEEP does not keep, padding included: it is on the right
and the LM is causal. A change is paired over the questions, which is finer than the error of each
accuracy. Tasks come from the Hub; `everyday`, 60 sentences to finish, is here.
"""

import argparse
import logging
import math
import os
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch

import data
import lora
from errors import UserError
from evals import run_folder
from splice import put, rows

TASKS = "mmlu,hellaswag,truthfulqa_mc1,truthfulqa_mc2"
OFFLINE_TASKS = "everyday"  # where the LM is a local folder
HERE = os.path.dirname(os.path.abspath(__file__))
METRICS = ("acc_norm", "acc")  # the one that is shown; the JSON has all


@contextmanager
def spliced(lm, saes: dict[int, torch.nn.Module], c, special: list[int]):
    """`lm` with the residual after block i replaced by what saes[i] makes of it, KEEP respected."""
    decoder, dtype, seen = lm.get_decoder(), getattr(torch, c.DTYPE), SimpleNamespace()
    active = partial(data.Tokens.active, SimpleNamespace(keep=c.KEEP, special=special))

    def note(module, args, kwargs):
        tokens_BL = args[0] if args else kwargs["input_ids"]
        seen.active_N = active(tokens_BL.cpu()).to(tokens_BL.device)

    def stand_in(sae, module, args, output):
        x_BLD = output[0] if isinstance(output, tuple) else output
        with torch.autocast(x_BLD.device.type, dtype, enabled=dtype != torch.float32):
            y_ND, _ = sae(rows(x_BLD, seen.active_N))
        y_BLD = put(x_BLD, y_ND, seen.active_N)
        return (y_BLD, *output[1:]) if isinstance(output, tuple) else y_BLD

    handles = [decoder.register_forward_pre_hook(note, with_kwargs=True)]
    for layer, sae in saes.items():
        handles.append(decoder.layers[layer].register_forward_hook(partial(stand_in, sae)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def load_tasks(names: list[str]):
    """-> lm-eval's manager and its tasks. Raises UserError in a line where one cannot be had."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    here = os.path.join(HERE, "tasks")
    manager = TaskManager(include_path=here, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):  # reading lm-eval's thousands takes a while
        manager = TaskManager(include_path=here)
    tasks = {}
    for name in names:
        try:
            tasks |= manager.load([name])["tasks"]
        except Exception as e:  # of datasets, of the Hub, of the task's own code
            cause = (str(e).strip() or type(e).__name__).splitlines()[0][:160]
            hint = f"its text comes from the Hub: needs the network; {OFFLINE_TASKS} is here"
            raise UserError(f"the task {name!r} could not be loaded: {cause}", hint) from None
    generated = [n for n, t in tasks.items() if t.OUTPUT_TYPE == "generate_until"]
    if generated:
        what = f"{', '.join(generated)} lets the LM write, with padding on the left"
        raise UserError(what, "wanted tasks that are scored by log-likelihood")
    return manager


def evaluate(run, tasks: list[str], *, limit: int | None, batch: int) -> dict:
    """-> label: what lm-eval found for that variant, its samples included."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    c, manager = run.c, load_tasks(tasks)
    variants = run_folder.variants(run)
    lm, tokenizer = run_folder.load_lm(run, getattr(torch, c.DTYPE), lora=c.TRAIN == "lm_lora")
    of = {when: run_folder.load_sae(run, when) for _, when in variants.values() if when}
    plain = lm.base_model.model if c.TRAIN == "lm_lora" else lm  # as lm-eval knows it
    further = {layer: where for layer, where in lora.further_saes(c.MORE_SAES)}
    further = {layer: run_folder.read_sae(run, where) for layer, where in further.items()}
    found = {}
    for label, (with_lora, when) in variants.items():
        print(f"{label}:")
        saes = {c.LAYER: of[when]} | further if when else {}
        lora_off = c.TRAIN == "lm_lora" and not with_lora
        with (
            lm.disable_adapter() if lora_off else nullcontext(),
            spliced(plain, saes, c, data.special_ids(tokenizer)),
        ):
            model = HFLM(
                plain,
                tokenizer=tokenizer,
                backend="causal",
                batch_size=batch,
                add_bos_token=data.added_bos(tokenizer) is not None,  # decides Gemma's results
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
            name = next((m for m in METRICS if m in scores), next(iter(scores)))
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
    if len(others) > 1:  # what the finetune, or the LoRA, changed with an SAE in place
        pairs.append((others[-1], others[0]))
    for label, reference in pairs:
        cells = [f"{label} vs {reference}"]
        for task in tasks:
            both = zip(pooled[label, task], pooled[reference, task], strict=True)
            change = np.array([a - b for a, b in both])
            error = change.std(ddof=1) / math.sqrt(len(change)) if len(change) > 1 else math.nan
            numbers[f"{cells[0]}/{task}/change"] = float(change.mean())
            if _is_number(error):
                numbers[f"{cells[0]}/{task}/change_stderr"] = float(error)
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


def draw(found: dict, path: str) -> None:
    """Accuracy of each variant, with its standard error, a group of bars a task."""
    heading, *lines = found["table"]
    bars = [line for line in lines if " vs " not in line[0]][:-1]
    pairs = {line[0]: [_pair(cell) for cell in line[1:]] for line in bars}
    values, errors = ({n: [p[i] for p in v] for n, v in pairs.items()} for i in (0, 1))
    run_folder.bars(path, heading[1:], values, ylabel="accuracy", errors=errors)


def _pair(cell: str) -> tuple[float, float]:
    value, _, error = cell.partition(" ± ")
    return float(value), float(error or 0)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("evals.benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--tasks", default="", help=f"names of lm-eval's tasks; default {TASKS}")
    parser.add_argument("--limit", type=int, help="questions a task")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--draw", action="store_true", help="the figure again, from the JSON")
    args = parser.parse_args(argv)
    try:
        run = run_folder.open_run(args.run)
        if args.draw:
            run_folder.redraw(run, "benchmarks", draw)
            return 0
        local = os.path.isdir(run.c.MODEL)
        tasks = [t for t in (args.tasks or (OFFLINE_TASKS if local else TASKS)).split(",") if t]
        numbers, table = summary(evaluate(run, tasks, limit=args.limit, batch=args.batch), tasks)
        question = "Does the spliced LM still answer questions?"
        run_folder.save(run, "benchmarks", question, table, numbers, draw)
        return 0
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
