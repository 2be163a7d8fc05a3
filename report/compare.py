"""What is compared? Which runs are seeds of one, what tells the others apart, their curves.

A row is what tables.read gives of a run, or a record holds of it.
"""

import os

import numpy as np

from klsplice.errors import UserError
from klsplice.metrics import read_metrics
from klsplice.settings import FREE
from klsplice.storage import read_run_json
from klsplice.train import BLOCKS, TRAIN
from report import tables

LOSSES = {"kl+mse": "KL + MSE", "mse": "MSE", "kl": "KL"}


def started(row: dict) -> bool:
    """Whether it started from a trained SAE."""
    return row["constants"]["SAE"] != "fresh"


def words(row: dict) -> dict[str, str]:
    """What may tell a run from others, as it stands in legends; "" where it does not apply."""
    c = row["constants"]
    said = {"adapter": c.get("ADAPTER"), "blocks": BLOCKS.get(c.get("LORA_BLOCKS"))}
    return {
        "learns": TRAIN[c["TRAIN"]].legend.format(**said),
        "loss": LOSSES.get(c["LOSS"], c["LOSS"]),
        "start": "finetuned" if started(row) else "from scratch",
        "k": f"k = {row['l0_after'] or 0:.3g}",
        "rank": "" if c["TRAIN"] == "sae" else f"rank {c.get('RANK')}",
        "tokens": f"{short(row['tokens'])} tokens",
        "source": f"from {os.path.basename(str(c['SAE']))}" if started(row) else "",
        "rate": f"LR {c['LR']:g}",
    }


def labels(groups: list[list[dict]], names=()) -> list[str]:
    """Of each group the words that differ: those of `names`, or as few as tell all apart."""
    said = [words(rows[0]) for rows in groups]
    found = [""] * len(said)
    for name in names or said[0]:
        wanted = names or name in ("learns", "loss") or len(set(found)) < len(found)
        if wanted and len({w[name] for w in said}) > 1:
            found = [", ".join(filter(None, (x, w[name]))) for x, w in zip(found, said)]
    if not names and len(set(found)) < len(found):
        found = [tables.group(rows[0]) for rows in groups]
    n = {len(rows) for rows in groups} - {1}
    return [f"{x} (n = {len(rows)})" if n else x for x, rows in zip(found, groups)]


def varied(rows: list[dict]) -> dict[str, list]:
    """The constants that differ among runs -> their values, run by run. Reads their run.json."""
    found = [read_run_json(os.path.join(row["folder"], "run.json"))["constants"] for row in rows]
    names = {name for constants in found for name in constants} - {"RUN_NAME", *FREE}
    values = {name: [constants.get(name) for constants in found] for name in sorted(names)}
    return {name: of_runs for name, of_runs in values.items() if len({*map(repr, of_runs)}) > 1}


def in_order(rows: list[dict]) -> list[dict]:
    """Runs sorted by what differs among them, those of most values last; numbers as numbers."""
    columns = sorted(varied(rows).values(), key=lambda values: len({*map(repr, values)}))
    plain = [[(isinstance(v, str), v) for v in values] for values in columns]
    order = sorted(range(len(rows)), key=lambda i: [values[i] for values in plain])
    return [rows[i] for i in order]


def seeds_together(rows: list[dict]) -> list[list[dict]]:
    return list(tables.grouped(rows).values())


def mean(values) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error over the first axis; the latter 0 for a single one."""
    values = np.asarray(values, float)
    error = values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0 * values[0]
    return values.mean(0), error


def short(x: float, _=None) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(x) >= size:
            return f"{x / size:.3g}{unit}"
    return f"{x:g}"


def evaluations(row: dict) -> dict[int, float]:
    if not row.get("curve"):
        raise UserError(f"{row['name']} has no curve", "python -m report --record writes one")
    return dict(zip(row["curve"]["tokens"], row["curve"]["ce_spliced"]))


def training_mse(row: dict, keep: float = 0.9) -> dict[int, float]:
    """An exponential moving average over logged steps, with the bias of its start taken out."""
    ema, weight, found = 0.0, 0.0, {}
    for line in read_metrics(folder_of(row)):
        if line.get("train/mse") is not None:
            ema = keep * ema + (1 - keep) * line["train/mse"]
            weight = keep * weight + (1 - keep)
            found[line["tokens"]] = ema / weight
    return found


def folder_of(row: dict) -> str:
    if "folder" not in row:
        raise UserError(f"{row['name']} is a record without what this figure shows", "draw the run")
    return row["folder"]
