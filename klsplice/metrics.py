"""metrics.jsonl, a line a log step or evaluation: the same numbers that wandb gets."""

import json
import math
import os
import re
from contextlib import suppress

from klsplice import distributed
from klsplice.storage import finite

# Nats; a gap below it is rounding. In float32 an SAE that changes nothing but the rounding moves
# the mean CE of SmolLM2 on 500 tokens by up to 1.2e-6 (measured).
NO_GAP = 1e-5
EACH = re.compile(r"(?:(?:ce_spliced|kl)_alone|fvu|l0|dead_fraction)_\d")
# What is charted of a step, beside the terms of a loss of one's own; and of an evaluation.
TRAIN = ("kl", "mse", "alpha", "lr", "grad_norm", "tokens_per_second")
VAL = ("ce_clean", "ce_spliced", "ce_recovered", "gap_closed", "kl", "fvu", "l0", "dead_fraction")


def charted(names) -> list[str]:
    """Those of the names of a line, train/... or val/..., that have a chart, in its order."""
    usual = [*(f"train/{n}" for n in TRAIN), *(f"val/{n}" for n in VAL)]
    terms = [n for n in names if n.startswith("train/") and n not in (*usual, "train/l0")]
    return [n for n in usual if n in names] + terms


def share(part: float, whole: float) -> float:
    """part / whole, of differences of CE or of KL; NaN where the whole is rounding."""
    return part / whole if abs(whole) > NO_GAP else math.nan


def gap_closed(ce_clean: float, ce_before: float, ce_after: float) -> float:
    """(CE_before - CE_after) / (CE_before - CE_clean), NaN where there is no gap."""
    return share(ce_before - ce_after, ce_before - ce_clean)


def kl_removed(kl_before: float, kl_after: float) -> float:
    """(KL_before - KL_after) / KL_before, NaN where there is none."""
    return share(kl_before - kl_after, kl_before)


def results(before: dict, after: dict | None) -> dict:
    """What results.json says of two evaluations on the same tokens, or of the first alone."""
    newest = after or before
    out = {n: newest[n] for n in ("ce_clean", "ce_zero")}
    if after:
        ce = after["ce_clean"], before["ce_spliced"], after["ce_spliced"]
        out["gap_closed"] = gap_closed(*ce)
        out["kl_removed"] = kl_removed(before["kl"], after["kl"])
    out |= {n: newest[n] for n in ("ce_clean_no_special", "ce_zero_no_special")}
    for when, found in {"before": before, "after": after}.items():
        if not found:
            continue
        for ending in ("", "_no_special"):
            out[f"ce_{when}{ending}"] = found[f"ce_spliced{ending}"]
            out[f"ce_recovered_{when}{ending}"] = found[f"ce_recovered{ending}"]
            out[f"kl_{when}{ending}"] = found[f"kl{ending}"]
        out |= {f"{n}_{when}": found[n] for n in ("fvu", "mse", "l0", "dead_fraction")}
        # of several SAEs, each
        out |= {f"{n}_{when}": value for n, value in found.items() if EACH.match(n)}
    return out


def worse_than_nothing(found: dict, before: float) -> bool:
    """Whether training brought the CE over that with the residual at zero.

    found: an evaluation. before: the CE with the SAE before training."""
    ce, zero, clean = (found[f"ce_{name}"] for name in ("spliced", "zero", "clean"))
    return ce > zero > clean and before < zero


def read_metrics(folder: str) -> list[dict]:
    """The lines of a run's metrics.jsonl without a half-written last one; [] where it is absent."""
    lines = []
    with suppress(OSError, ValueError), open(os.path.join(folder, "metrics.jsonl")) as f:
        for line in f:
            lines.append(json.loads(line))
    return lines


def evaluations(folder: str) -> list[dict]:
    """The lines that an evaluation wrote."""
    return [line for line in read_metrics(folder) if line.get("val/ce_spliced") is not None]


def append(folder: str, line: dict) -> dict:
    """Write one line -> what was written, NaN as None."""
    line = finite(line)
    with open(os.path.join(folder, "metrics.jsonl"), "a") as f:
        f.write(json.dumps(line) + "\n")
    return line


@distributed.main_process_only
def cut(folder: str, step: int, *, evaluations: bool) -> set[int]:
    """Drop the lines of steps that will be made again, and a half-written last one.

    evaluations: whether the one made after `step` steps stays. -> the steps evaluated.
    """
    kept = [line for line in read_metrics(folder) if line["step"] <= step]
    if not evaluations:
        kept = [line for line in kept if line["step"] < step or "val/kl" not in line]
    path = os.path.join(folder, "metrics.jsonl")
    with open(path + ".tmp", "w") as f:
        f.writelines(json.dumps(line) + "\n" for line in kept)
    os.replace(path + ".tmp", path)
    return {line["step"] for line in kept if "val/kl" in line}
