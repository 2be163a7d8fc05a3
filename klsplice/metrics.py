"""metrics.jsonl, a line a log step or evaluation: the same numbers that wandb gets."""

import json
import math
import os

from klsplice.storage import finite

# Nats; a gap below it is rounding. In float32 an SAE that changes nothing but the rounding moves
# the mean CE of SmolLM2 on 500 tokens by up to 1.2e-6 (measured).
NO_GAP = 1e-5


def share(part: float, whole: float) -> float:
    """part / whole of two differences of CE; NaN where the whole is rounding."""
    return part / whole if abs(whole) > NO_GAP else math.nan


def gap_closed(ce_clean: float, ce_before: float, ce_after: float) -> float:
    """(CE_before - CE_after) / (CE_before - CE_clean), NaN where there is no gap."""
    return share(ce_before - ce_after, ce_before - ce_clean)


def read_metrics(folder: str) -> list[dict]:
    """The lines of a run's metrics.jsonl without a half-written last one; [] where it is absent."""
    lines = []
    try:
        with open(os.path.join(folder, "metrics.jsonl")) as f:
            for line in f:
                try:
                    lines.append(json.loads(line))
                except ValueError:
                    break
    except OSError:
        pass
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
