"""Which way to a low cross-entropy is the shortest, in minutes and in tokens?

    python -m evals.timing runs/kl_mse runs/lora runs/adapter runs/sae+runs/tail

Held-out cross-entropy of the spliced LM against training time and training tokens, from
metrics.jsonl alone. A chain, runs/sae+runs/tail, is one curve: the second starts where the first
ended, so that what the source SAE cost is in it. The gap is that of the first curve where it
starts: its CE there minus the clean LM's. Time is the training's own: without loading, evaluations
and what is tokenised before training. Between two evaluations a curve is taken as straight, which
for one that flattens says a little too late. The answer lies in the folder of the first curve('s
last run).
"""

import os
import sys

import numpy as np

from evals import common
from klsplice import metrics
from klsplice.errors import UserError
from klsplice.storage import read_run_json
from report import runs

SHARES = (0.1, 0.25, 0.4)
UNITS = {"minutes": 60.0, "tokens": 1.0}


def curve(chain: str) -> dict[str, list | None]:
    """{"seconds", "tokens", "ce", "clean"}: one number an evaluation, over the runs of a chain.

    No seconds where a run shared its clean passes: the first one there pays for all. Raises
    UserError."""
    alone, found = True, {name: [] for name in ("seconds", "tokens", "ce", "clean")}
    seconds, tokens, before = 0.0, 0.0, None
    for folder in chain.split("+"):
        _check_order(before, folder)
        before = folder
        results = os.path.join(folder, "results.json")
        if os.path.exists(os.path.join(folder, "run.json")) and not os.path.exists(results):
            what = f"{folder} is not finished"
            raise UserError(what, "the command that began it goes on with it")
        if os.path.exists(results):
            alone &= read_run_json(results).get("together", 1) == 1
        lines = metrics.evaluations(folder)
        if not lines:
            raise UserError(f"{folder} has no metrics.jsonl with evaluations", "wanted runs/<name>")
        for line in lines:
            found["seconds"].append(seconds + line["seconds"])
            found["tokens"].append(tokens + line["tokens"])
            found["ce"].append(line["val/ce_spliced"])
            found["clean"].append(line["val/ce_clean"])
        seconds, tokens = found["seconds"][-1], found["tokens"][-1]
    if not alone:
        found["seconds"] = None
    return found


def _check_order(before: str | None, folder: str) -> None:
    """In a chain each run has to start from the one before."""
    if before and os.path.exists(os.path.join(folder, "run.json")):
        source = str(common.open_run(folder).cfg.SAE)
        if os.path.basename(os.path.normpath(source)) != os.path.basename(os.path.normpath(before)):
            what = f"{folder} started from {source}, not from {before}"
            raise UserError(what, "wanted runs/first+runs/second, the second from the first")


def reached(ce: list, at: list, target: float) -> float | None:
    """Where a curve first is at `target` or under it, straight between evaluations; None: never."""
    for i, value in enumerate(ce):
        if value <= target:
            if i == 0:
                return at[0]
            share = (ce[i - 1] - target) / (ce[i - 1] - value)
            return at[i - 1] + share * (at[i] - at[i - 1])
    return None


def evaluate(a) -> dict:
    names = ["+".join(os.path.basename(os.path.normpath(f)) for f in x.split("+")) for x in a.runs]
    if len({*names}) < len({*a.runs}):
        names = a.runs  # of one name in several folders
    names = runs.short_names(names)
    curves = {name: curve(chain) for name, chain in zip(names, a.runs)}
    if shared := sum(found["seconds"] is None for found in curves.values()):
        print(f"note: made together with others, and so without minutes of their own: {shared}")
    start, clean = (curves[names[0]][name][0] for name in ("ce", "clean"))
    for name, found in curves.items():
        if np.ptp([clean, *found["clean"]]) > 1e-4:
            what = f"{name} and {names[0]} were not measured on the same tokens of the same LM: "
            what += f"clean CE {max(found['clean'], key=lambda x: abs(x - clean)):.4f}, {clean:.4f}"
            raise UserError(what, "wanted runs with one MODEL, DATASET and VAL_TOKENS")
    targets = {f"CE {ce:g}": ce for ce in a.ce or ()}
    if not targets:
        targets = {f"{s:.0%} of the gap": start - s * (start - clean) for s in a.share}
    table, numbers = [["curve", "CE at the end", "target", "CE", *UNITS]], {"ce_clean": clean}
    for name, found in curves.items():
        numbers[f"{name}, CE at the end"] = found["ce"][-1]
        for label, target in targets.items():
            row = [name, f"{found['ce'][-1]:.4f}", label, f"{target:.4f}"]
            for unit, size in UNITS.items():
                at = found["tokens" if unit == "tokens" else "seconds"]
                value = reached(found["ce"], at, target) if at else None
                value = None if value is None else value / size
                numbers[f"{name}, {unit} to {label}"] = value
                form = ",.0f" if unit == "tokens" else ".2f"
                nothing = "not reached" if at else "-"
                row.append(nothing if value is None else format(value, form))
            table.append(row)
    return {"numbers": numbers, "table": table, "figure": curves}


def options(parser) -> None:
    parser.add_argument("runs", nargs="+", metavar="runs/NAME[+runs/NAME]", help="curves")
    add = parser.add_argument
    add("--share", nargs="+", type=common.share, default=SHARES, help="of the gap, 0 to 1")
    add("--ce", nargs="+", type=common.over_zero, help="targets in nats, in place of shares")


def main(argv: list[str]) -> int:
    return common.command(argv, "timing", __doc__, options, evaluate)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
