"""Which way to a low cross-entropy is the shortest, in minutes and in tokens?

    python -m evals.timing runs/kl_mse runs/lora runs/adapter runs/sae+runs/tail

Held-out CE of the spliced LM against training time (without loading and evaluations) and training
tokens, from metrics.jsonl. A chain, runs/sae+runs/tail, is one curve: the second started from the
first. The gap is that of the first curve where it starts: its CE minus the clean LM's. Between two
evaluations a curve is taken as straight. The answer lies in the folder of the first curve.
"""

import os
import sys

import numpy as np

from evals import common
from klsplice import metrics
from klsplice.errors import UserError
from klsplice.storage import read_run_json

SHARES = (0.1, 0.25, 0.4)
UNITS = {"minutes": ("seconds", 60.0, ".2f"), "tokens": ("tokens", 1.0, ",.0f")}


def curve(chain: str) -> dict[str, list]:
    """{"seconds", "tokens", "ce", "clean"}: one number an evaluation. Raises UserError.

    seconds is empty where a run shared its clean passes: the first one there pays for all."""
    points, shared, start = [], False, np.zeros(4)
    for folder in chain.split("+"):
        results = read_run_json(os.path.join(folder, "results.json"))
        shared |= results.get("together", 1) > 1
        lines = metrics.evaluations(folder)
        if not lines:
            raise UserError(f"{folder} has no metrics.jsonl with evaluations", "wanted runs/<name>")
        names = ("seconds", "tokens", "val/ce_spliced", "val/ce_clean")
        points += [start + [line[name] for name in names] for line in lines]
        start = np.array([*points[-1][:2], 0, 0])
    seconds, tokens, ce, clean = np.stack(points, 1).tolist()
    return {"seconds": [] if shared else seconds, "tokens": tokens, "ce": ce, "clean": clean}


def reached(ce: list, at: list, target: float) -> float | None:
    """Where a curve first is at `target` or under it, straight between evaluations; None: never."""
    (under,) = np.nonzero(np.array(ce) <= target)
    if not at or not len(under):
        return None
    two = slice(max(under[0] - 1, 0), under[0] + 1)
    return float(np.interp(target, ce[two][::-1], at[two][::-1]))


def evaluate(a) -> dict:
    curves = {chain: curve(chain) for chain in a.runs}
    if shared := sum(not found["seconds"] for found in curves.values()):
        print(f"note: made together with others, and so without minutes of their own: {shared}")
    start, clean = (curves[a.runs[0]][name][0] for name in ("ce", "clean"))
    for name, found in curves.items():
        if np.ptp([clean, *found["clean"]]) > 1e-4:
            what = f"{name} and {a.runs[0]} were not measured on the same tokens of the same LM"
            raise UserError(what, "wanted runs with one MODEL, DATASET and VAL_TOKENS")
    targets = {f"{s:.0%} of the gap": start - s * (start - clean) for s in a.share}
    table, numbers = [["curve", "CE at the end", "target", "CE", *UNITS]], {"ce_clean": clean}
    for name, found in curves.items():
        numbers[f"{name}, CE at the end"] = found["ce"][-1]
        for label, target in targets.items():
            table.append([name, f"{found['ce'][-1]:.4f}", label, f"{target:.4f}"])
            for unit, (column, size, form) in UNITS.items():
                value = reached(found["ce"], found[column], target)
                value = None if value is None else value / size
                numbers[f"{name}, {unit} to {label}"] = value
                table[-1].append("-" if value is None else format(value, form))
    return {"numbers": numbers, "table": table}


def options(parser) -> None:
    parser.add_argument("runs", nargs="+", metavar="runs/NAME[+runs/NAME]", help="curves")
    parser.add_argument("--share", nargs="+", type=float, default=SHARES, help="of the gap, 0 to 1")


def main(argv: list[str]) -> int:
    return common.command(argv, "timing", __doc__, options, evaluate)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
