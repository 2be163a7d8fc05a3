"""What is compared? Which runs are seeds of one, what tells the others apart, their curves.

A row is what tables.read gives of a run, or a record holds of it.
"""

import os
import re
from collections import Counter

import numpy as np

from klsplice.errors import UserError
from klsplice.metrics import read_metrics
from klsplice.settings import FRESH_ONLY
from klsplice.storage import read_run_json
from klsplice.train import BLOCKS, TRAIN
from report import tables

LOSSES = {"kl+mse": "KL + MSE", "mse": "MSE", "kl": "KL"}
LONG = 24  # characters
LONGEST = 80  # of a legend
# The constants that a legend tells first, and those that change little but the speed.
FIRST = ("SAE", "TRAIN", "LOSS", "LR", "from")
LAST = ("MICRO_BATCH", "CLEAN_BATCH", "EVAL_BATCH", "HEAD_CHUNK", "COMPILE", "LOW_MEMORY")
LAST += ("EVAL_EVERY", "EVAL_TOKENS", "SHUFFLE")
FOLLOW = {f"{name}_REVISION": name for name in ("MODEL", "SAE", "DATASET")}
FOLLOW |= dict.fromkeys(FRESH_ONLY, "SAE")


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
    abouts = [read_run_json(os.path.join(row["folder"], "run.json")) for row in rows]
    found, names = [tables.constants_of(about) for about in abouts], {}
    for c, about in zip(found, abouts):  # one SAE is one, wherever it was
        sae = about["resolved"].get("sae") or c["SAE"]
        c["SAE"] = names.setdefault(sae, c["SAE"])
    values = {name: [c.get(name) for c in found] for name in sorted({n for c in found for n in c})}
    values = {name: v for name, v in values.items() if len({*map(repr, v)}) > 1}
    for name, leader in FOLLOW.items():  # what another constant brings with it is not told twice
        pairs = {*zip(values.get(leader, ()), values.get(name, ()))}
        if pairs and len(pairs) == len({*values[leader]}):
            del values[name]
    return values


def in_order(rows: list[dict]) -> list[dict]:
    """Runs sorted by what differs among them, those of most values last; numbers as numbers."""
    columns = sorted(varied(rows).values(), key=lambda values: len({*map(repr, values)}))
    plain = [[(isinstance(v, str), _natural(v)) for v in values] for values in columns]
    order = sorted(range(len(rows)), key=lambda i: [values[i] for values in plain])
    return [rows[i] for i in order]


def _natural(value):
    """What to sort a value by: None as 0, and k8 before k16."""
    if not isinstance(value, str):
        return value or 0
    return [int(x) if x.isdecimal() else x for x in re.split(r"([0-9]+)", value)]


def legends(found: dict[str, list]) -> list[str]:
    """Of each run the names and values that tell it from others: all of `found`; or where that is
    over LONGEST characters as few as tell them apart, FIRST before the rest, which are told where
    they are not what most runs have. What is left out is printed."""
    said = {n: [f"{n} {text}" for text in told(values)] for n, values in found.items()}
    whole = [", ".join(words) for words in zip(*said.values())]
    if max(map(len, whole), default=0) <= LONGEST:
        return whole
    chosen, apart = [], 1
    for name in sorted(said, key=lambda n: (n in LAST, n not in FIRST)):
        now = len({*zip(*(said[n] for n in (*chosen, name)))})
        if now > apart:
            chosen, apart = [*chosen, name], now
    if left_out := [n for n in said if n not in chosen]:
        print(f"note: the legend leaves out {', '.join(left_out)}, which differ with the rest")
    usual = {Counter(said[n]).most_common(1)[0][0] for n in chosen if n not in FIRST}
    if usual:
        print(f"note: where the legend does not say it: {', '.join(sorted(usual))}")
    lines = zip(*(said[n] for n in chosen))
    return [", ".join(w for w in words if w not in usual) or "the usual" for words in lines]


def told(values: list) -> list[str]:
    """Values of a constant, or names of runs, as short as they can be told apart."""
    values = ["default" if v == "" else v for v in values]
    texts = [f"{v:g}" if type(v) in (int, float) else str(v) for v in values]
    if len({*texts}) < len({*map(repr, values)}):
        texts = [*map(str, values)]
    paths = [os.path.normpath(text).split(os.sep) for text in texts]
    for n in range(1, max(map(len, paths)) + 1):
        found = ["/".join(path[-n:]) for path in paths]
        if len({*found}) == len({*texts}):
            break
    if max(map(len, found)) <= LONG:
        return found
    parts = [re.findall("[^_/]*[_/]*", text) for text in found]
    start = len(os.path.commonprefix(parts))
    end = len(os.path.commonprefix([part[start:-1][::-1] for part in parts]))
    return ["".join(p[start : len(p) - 1 - end]).strip("_/") or x for p, x in zip(parts, found)]


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
