"""Tables of run folders, and what a record keeps of a run."""

import json
import math
import os
import re
from collections import Counter
from hashlib import sha256

from klsplice.errors import UserError
from klsplice.metrics import read_metrics
from klsplice.naming import without_seed
from klsplice.settings import FREE, FRESH_ONLY
from klsplice.storage import read_npz, read_run_json

COLUMNS = {  # of the table of runs: heading, name in results.json, format
    "CE clean": ("ce_clean", ".4f"),
    "zero": ("ce_zero", ".2f"),
    "before": ("ce_before", ".4f"),
    "after": ("ce_after", ".4f"),
    "gap closed": ("gap_closed", ".1%"),
    "recovered": ("ce_recovered_after", ".4f"),
    "KL": ("kl_after", ".4f"),
    "FVU": ("fvu_after", ".4f"),
    "L0": ("l0_after", ".1f"),
    "dead": ("dead_fraction_after", ".1%"),
    "tokens": ("tokens", ",d"),
    "minutes": ("minutes", ".1f"),
}
KEPT = ("MODEL", "LAYER", "SAE", "TRAIN", "LOSS", "LR", "TOKENS", "PASSES", "SEED", "D_SAE", "K")
KEPT += ("KEEP", "CONTEXT", "BATCH", "VAL_TOKENS", "DTYPE", "LOGITS", "ADAPTER", "RANK")
KEPT += ("LORA_BLOCKS",)
CURVE = ("tokens", "val/ce_spliced", "val/ce_clean")  # of every evaluation


def runs_of(paths: list[str], *, finished: bool = False) -> list[str]:
    """Those of `paths` that hold a run, or a finished one: runs/* has other things beside them.

    What is left out of several for not being finished is said. Raises UserError where one is not
    there, or none is left."""
    for path in paths:
        if not os.path.exists(path):
            read_run_json(os.path.join(path, "run.json"))
    found = [path for path in paths if in_folder(path, "run.json")]
    if paths and not found:
        raise UserError(f"{paths[0]} holds no run", "wanted run folders, runs/<name> or runs/*")
    done = [path for path in found if in_folder(path, "results.json")]
    if finished and done and len(found) > len(done):
        print(f"note: unfinished runs are left out: {len(found) - len(done)}")
        return done
    return found


def in_folder(folder: str, name: str) -> bool:
    return os.path.exists(os.path.join(folder, name))


def constants_of(about: dict) -> dict:
    """The constants that decide what a run is, from its run.json; of an SAE that was loaded its own
    k and d_sae, whatever run.py said of fresh ones."""
    c = dict(about["constants"])
    if c["SAE"] != "fresh":
        c |= dict.fromkeys(FRESH_ONLY)
        c |= {"K": about["source"]["k"], "D_SAE": about["source"]["d_sae"]}
    return {name: c[name] for name in sorted(c) if name not in {"RUN_NAME", *FREE}}


def sae_of(about: dict) -> dict:
    """What the SAE of a run is, from its run.json: architecture, k (or None), d_sae."""
    architecture = about["constants"]["ARCHITECTURE"] or about["source"]["architecture"]
    return {"architecture": architecture} | {n: about["source"][n] for n in ("k", "d_sae")}


def setting(about: dict) -> str:
    """A digest of what seeds of one setting have in common: all constants but SEED, and what LM,
    SAE and text these stood for. about: run.json."""
    c = constants_of(about) | {"SEED": None}
    c |= {"SAE": None} if about["resolved"].get("sae") else {}  # its digest says it, wherever it is
    return sha256(json.dumps([c, about["resolved"]]).encode()).hexdigest()[:16]


def read(folder: str, results: dict | None = None) -> dict:
    """A run: its results, with name, recipes, versions, the constants that matter and the curve of
    its evaluations. results: of a run that is about to write its results.json."""
    about = read_run_json(os.path.join(folder, "run.json"))
    if results is None:
        results = read_run_json(os.path.join(folder, "results.json"))
    row = {"name": os.path.basename(os.path.normpath(folder)), **results}
    alone = row.get("together", 1) == 1  # else its seconds depend on what the others made
    row["minutes"] = row["seconds"] / 60 if alone else None
    row["recipes"], row["versions"] = about["recipes"], about["versions"]
    row["fingerprint"] = about["resolved"]["tokens"]
    row["constants"] = {n: about["constants"][n] for n in KEPT}
    row["setting"], row["code"] = setting(about), about.get("code")
    lines = [line for line in read_metrics(folder) if "val/ce_spliced" in line]
    row["curve"] = {n.removeprefix("val/"): [x.get(n) for x in lines] for n in CURVE}
    return row


def losses_of(folder: str) -> tuple[dict, dict]:
    """-> the arrays of a run's before.npz and after.npz. Raises UserError."""
    paths = [os.path.join(folder, f"{when}.npz") for when in ("before", "after")]
    found = [read_npz(path) for path in paths]
    if None in found:
        what = f"{paths[found.index(None)]} is missing or damaged"
        raise UserError(what, "wanted the folder of a finished run, whole")
    return tuple(found)


def table(folders: list[str]) -> str:
    """The runs as aligned text, a row each."""
    return align([["run", *COLUMNS], *(cells([read(folder)]) for folder in folders)])


def cells(rows: list[dict]) -> list[str]:
    """One row of the table: the mean over `rows`, with its standard error for several."""
    label = rows[0]["name"] if len(rows) == 1 else f"{group(rows[0])} (n={len(rows)})"
    return [label, *(shown(rows, name, form) for name, form in COLUMNS.values())]


def shown(rows: list[dict], name: str, form: str) -> str:
    """The mean of what there is of a number, with its standard error; "-" where there is none."""
    values = defined(rows, name)
    return mean_text(values, form) if values else "-"


def defined(rows: list[dict], name: str) -> list[float]:
    """A number of each run where it has a value: JSON's null and NaN are none."""
    values = [row.get(name) for row in rows]
    return [value for value in values if value is not None and value == value]


def mean_text(values: list[float], form: str) -> str:
    """Mean ± standard error, the latter where there are several values that differ."""
    mean = sum(values) / len(values)
    if form.endswith("d"):
        return format(int(mean), form)
    spread = sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)
    error = math.sqrt(spread / len(values))
    shown = format(error, form)
    return format(mean, form) + (f" ± {shown}" if re.search("[1-9]", shown) else "")


def group(row: dict) -> str:
    """A run's name without its seed."""
    return without_seed(row["name"])


def distinct(rows: list[dict]) -> list[dict]:
    """Without those that are of the same constants, seed, LM, SAE and text as one before; these are
    said, since they are no further seeds."""
    kept = {}
    for row in rows:
        first = kept.setdefault((row["setting"], row["constants"]["SEED"]), row)
        if first is not row:
            how = "" if row["code"] == first["code"] else ", by other code; name it alone to see it"
            print(f"note: {row['name']} is left out: it repeats {first['name']}{how}")
    return list(kept.values())


def grouped(rows: list[dict]) -> list[list[dict]]:
    """Seeds of one setting together, by their constants; runs of one seed are apart."""
    groups, seen = {}, Counter()
    for row in rows:
        same = row.get("setting") or group(row)  # older records have none
        seed = same, row["constants"]["SEED"]
        groups.setdefault((same, seen[seed]), []).append(row)
        seen[seed] += 1
    return list(groups.values())


def align(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    pad = [
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]
        for row in rows
    ]
    return "\n".join("  ".join(cells) for cells in pad)
