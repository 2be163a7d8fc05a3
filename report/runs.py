"""Runs as one pandas frame, a row a run, from their folders or from a record; and as text.

Columns in capitals are constants. Of the others `name`, `folder`, `state` (finished, running,
stopped or failed) and `architecture`, `k`, `d_sae` (the SAE's own) say what a run is; `setting` is
what its seeds have in common, `curve` its evaluations over the training tokens, and the rest is
what results.json says, of an unfinished run at its newest evaluation.
"""

import json
import math
import os
import re
from hashlib import sha256

import pandas

from klsplice import metrics
from klsplice.errors import UserError, first_line
from klsplice.naming import without_seed
from klsplice.settings import FREE, FRESH_ONLY
from klsplice.site import RESIDUAL
from klsplice.storage import in_use, read_json, read_run_json

COLUMNS = {  # of a table of runs: heading, name in results.json, format
    "CE clean": ("ce_clean", ".4f"),
    "zero": ("ce_zero", ".2f"),
    "before": ("ce_before", ".4f"),
    "after": ("ce_after", ".4f"),
    "gap closed": ("gap_closed", ".1%"),
    "KL removed": ("kl_removed", ".1%"),
    "recovered": ("ce_recovered_after", ".4f"),
    "KL": ("kl_after", ".4f"),
    "FVU": ("fvu_after", ".4f"),
    "L0": ("l0_after", ".1f"),
    "dead": ("dead_fraction_after", ".1%"),
    "tokens": ("tokens", ",d"),
    "minutes": ("minutes", ".1f"),
}
# The constants that a record keeps.
KEPT = ("MODEL", "LAYER", "SAE", "TRAIN", "LOSS", "LR", "TOKENS", "PASSES", "SEED", "D_SAE", "K")
KEPT += ("KEEP", "CONTEXT", "BATCH", "VAL_TOKENS", "DTYPE", "LOGITS", "ADAPTER", "RANK")
KEPT += ("LORA_BLOCKS", "FREEZE", "MSE_WEIGHT")
OWN = ("architecture", "k", "d_sae")  # of an SAE, whatever the constants say
IDENTITY = ("name", "state", *OWN)  # the first columns of a table that is written
# What is no number or word of its own, and goes into no .csv.
INTERNAL = {"folder", "setting", "sae", "code", "curve", "fingerprint", "recipes", "versions"}
# The constants that tell runs apart before any other does.
FIRST = ("TRAIN", "LOSS", "architecture", "k", "d_sae", "SAE", "LR", "TOKENS")


def folders_of(paths: list[str], *, finished: bool = False) -> list[str]:
    """Those of `paths` that hold a run, or a finished one: runs/* has other things beside them.

    Raises UserError where one is not there, or none is left."""
    wanted = "wanted run folders, runs/<name> or runs/*"
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"{path} is not there", wanted)
    folders = [path for path in paths if os.path.exists(os.path.join(path, "run.json"))]
    done = [path for path in folders if os.path.exists(os.path.join(path, "results.json"))]
    if paths and not (done if finished else folders):
        raise UserError(f"{paths[0]} holds no {'finished run' if finished else 'run'}", wanted)
    if finished and len(done) < len(folders):
        print(f"note: unfinished runs are left out: {len(folders) - len(done)}")
    return done if finished else folders


def read(folder: str) -> dict:
    """A run, with all its constants under "constants". Raises UserError."""
    about = read_run_json(os.path.join(folder, "run.json"))
    row = {"name": os.path.basename(os.path.normpath(folder)), "folder": folder}
    row |= {name: about["source"].get(name) for name in OWN}
    row["architecture"] = about["constants"]["ARCHITECTURE"] or row["architecture"]
    if os.path.exists(os.path.join(folder, "results.json")):
        row |= {"state": "finished"} | read_run_json(os.path.join(folder, "results.json"))
        if row.get("together", 1) > 1:  # its seconds depend on what the others made
            row |= {"seconds": None, "tokens_per_second": None}
        row["minutes"] = row["seconds"] and row["seconds"] / 60
    else:
        locked = in_use(os.path.join(folder, "lock"))
        row |= {"state": "running" if locked else "stopped"} | _so_far(folder, about)
    lines = metrics.evaluations(folder)
    row["curve"] = {"tokens": [line["tokens"] for line in lines]}
    row["curve"] |= {n: [x.get(f"val/{n}") for x in lines] for n in ("ce_spliced", "ce_clean")}
    resolved = about["resolved"]
    row |= {"fingerprint": resolved["tokens"], "sae": resolved.get("sae")}
    row |= {"recipes": about["recipes"], "versions": about["versions"], "code": about.get("code")}
    return row | {"constants": about["constants"], "setting": _setting(about)}


def _so_far(folder: str, about: dict) -> dict:
    """Of an unfinished run: tokens, and the numbers of its newest evaluation."""
    lines = metrics.read_metrics(folder)
    row = {"tokens": lines[-1]["tokens"] if lines else math.nan}
    evaluations = [
        {name.removeprefix("val/"): math.nan if v is None else v for name, v in line.items()}
        for line in metrics.evaluations(folder)
    ]
    if not evaluations:
        return row
    before, newest = evaluations[0], evaluations[-1]
    c = about["constants"]
    at_residual = c.get("SITE", RESIDUAL) == RESIDUAL and "," not in c["SAE"]
    if at_residual and metrics.worse_than_nothing(newest, before["ce_spliced"]):
        row["state"] = "failed"
    return row | metrics.results(before, newest if newest["step"] else None)


def _setting(about: dict) -> str:
    """A digest of what seeds of one setting have in common: all constants but SEED that decide a
    run, and the LM, SAE and text that they stood for."""
    c, resolved = about["constants"], about["resolved"]
    names = sorted(c.keys() - {"RUN_NAME", "SEED", *FREE})
    if c["SAE"] != "fresh":
        names = [name for name in names if name not in FRESH_ONLY]
    if resolved.get("sae"):  # this digest says which SAE, wherever it lies
        names.remove("SAE")
    kept = {name: c[name] for name in names}
    return sha256(json.dumps([kept, resolved]).encode()).hexdigest()[:16]


def frame(rows: list[dict]) -> pandas.DataFrame:
    """Rows as `read` gives them, or a record has them."""
    flat = []
    for row in rows:
        c = {n: v for n, v in row["constants"].items() if n not in {"RUN_NAME", *FREE}}
        if c["SAE"] != "fresh":  # a loaded SAE brings its own
            c |= dict.fromkeys(FRESH_ONLY & c.keys())
        row = {"folder": "", "state": "finished", "setting": without_seed(row["name"])} | row
        kl = row.get("kl_before"), row.get("kl_after")
        if "kl_removed" not in row and None not in kl and row["tokens"]:
            row["kl_removed"] = metrics.kl_removed(*kl)
        flat.append({name: v for name, v in row.items() if name != "constants"} | c)
    table = pandas.DataFrame(flat)
    for name in table:
        if table[name].isna().all():
            table[name] = math.nan  # a number that no run has
    if "sae" in table:  # one SAE is one, wherever it lay
        same = table.groupby("sae")["SAE"].transform("first")
        table["SAE"] = same.fillna(table["SAE"])
    return table


def of_folders(folders: list[str]) -> pandas.DataFrame:
    return frame([read(folder) for folder in folders])


def read_record(name: str) -> dict:
    """records/<name>.json. Raises UserError."""
    path = os.path.join("records", f"{name}.json")
    try:
        return read_json(path)
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read: {first_line(e)}") from None


def write_record(name: str, note: str, folders: list[str]) -> None:
    """records/<name>.json from finished runs. Raises UserError where it is there already."""
    path = os.path.join("records", f"{name}.json")
    if not re.fullmatch(r"[\w-]+", name) or os.path.exists(path):
        raise UserError(f"{path} is there already, or no plain name", "remove it, or name another")
    rows = [read(folder) for folder in folders]
    kept = {*distinct(frame(rows))["folder"]}
    rows = [row for row in rows if row["folder"] in kept]
    for row in rows:
        del row["folder"], row["state"]
        row["constants"] = {name: row["constants"][name] for name in KEPT}
    os.makedirs("records", exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        json.dump({"note": note, "runs": rows}, f, indent=1)
        f.write("\n")


# ---- what differs, and what is repeated ------------------------------------------------------


def distinct(table: pandas.DataFrame) -> pandas.DataFrame:
    """Without the runs that repeat a setting and its seed, which are no further seeds; each is
    said."""
    keys = ["setting", "SEED", "state"]
    first = table.groupby(keys)["name"].transform("first")
    repeated = table.duplicated(keys) & (table["state"] == "finished")
    for name, kept in zip(table["name"][repeated], first[repeated]):
        print(f"note: {name} is left out: it repeats {kept}; name it alone to see it")
    return table[~repeated]


def varied(table: pandas.DataFrame) -> list[str]:
    """The constants that differ among runs, but for those that OWN tells."""
    names = [name for name in table if name.isupper() and name.lower() not in OWN]
    return [name for name in names if table[name].map(repr).nunique() > 1]


def labels(table: pandas.DataFrame, given=()) -> pandas.Series:
    """Of each run what tells its setting from the others': "LOSS mse, LR 0.001", with as few
    constants as do, or its name. What is left out is printed.

    given: columns that something else tells, like an axis."""
    firsts, told, chosen = table.drop_duplicates("setting"), {"SEED", *given}, []

    def apart(names) -> int:
        return len({*zip(*(firsts[name].map(repr) for name in names))})

    for name in dict.fromkeys((*FIRST, *varied(table))):
        before = max(apart([*given, *chosen]), 1)
        if name in table and name not in told and apart([*given, *chosen, name]) > before:
            chosen.append(name)
    if max(apart([*given, *chosen]), 1) < len(firsts):
        return table["name"].map(without_seed)
    if rest := [name for name in varied(table) if name not in {*told, *chosen}]:
        print(f"note: these runs differ in {', '.join(rest)} too, which the legend does not say")
    texts = [[f"{name} {x}" for x in short_names(table[name])] for name in chosen]
    words = zip(*texts) if texts else [()] * len(table)
    return pandas.Series(map(", ".join, words), table.index, dtype=object)


def short_names(values) -> list[str]:
    """Numbers as short as they are exact; paths by their last part, where that tells them apart."""
    texts = [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
    last = [os.path.basename(os.path.normpath(text)) for text in texts]
    return last if len({*last}) == len({*texts}) else texts


def as_data(table: pandas.DataFrame) -> pandas.DataFrame:
    """What is written of runs: IDENTITY, the constants that differ, the results."""
    differ = varied(table)
    rest = [n for n in table if not n.isupper() and n not in {*IDENTITY, *INTERNAL}]
    return table[[*IDENTITY, *differ, *rest]]


def mean(table: pandas.DataFrame) -> pandas.DataFrame:
    """Seeds of a setting as one row: the mean of each number, <name>_se its standard error, and n,
    how many there are. Finished and unfinished runs are apart."""
    table = distinct(table)
    data = as_data(table.assign(name=table["name"].map(without_seed))).drop(
        columns="SEED", errors="ignore"
    )
    numbers = [n for n in data.select_dtypes("number") if n.islower() and n not in OWN]
    groups = data.groupby([table["setting"], table["state"].rename("of")], sort=False)
    firsts, errors = groups[[*data.columns.difference(numbers, sort=False)]], groups[numbers].sem()
    parts = [firsts.first(), groups[numbers].mean(), errors.add_suffix("_se")]
    return pandas.concat([*parts, groups.size().rename("n")], axis=1).reset_index(drop=True)


def curves(table: pandas.DataFrame) -> pandas.DataFrame:
    """A row a line of metrics.jsonl, with the run's name and the constants that differ."""
    named = table[["name", *varied(table)]].to_dict("records")
    lines = [metrics.read_metrics(folder) for folder in table["folder"]]
    return pandas.DataFrame([run | line for run, of_run in zip(named, lines) for line in of_run])


def table_of(table: pandas.DataFrame, columns: dict = COLUMNS, by: str = "folder") -> list:
    """Rows of cells, the first of headings. by: "folder" for a row a run, or "setting" for the mean
    ± standard error over its seeds."""
    rows = [["run", *columns]]
    for _, runs in table.groupby(by, sort=False):
        name = runs["name"].iloc[0]
        label = name if len(runs) == 1 else f"{without_seed(name)} (n={len(runs)})"
        cells = (cell(runs[number], form) for number, form in columns.values())
        rows.append([label, *cells])
    return rows


def cell(values: pandas.Series, form: str) -> str:
    """The mean of what there is of a number, with its standard error where values differ."""
    values = values.dropna()
    if values.empty:
        return "-"
    if form.endswith("d"):
        return format(int(values.mean()), form)
    error = format(values.sem(), form)
    return format(values.mean(), form) + (f" ± {error}" if re.search("[1-9]", error) else "")


def align(rows: list[list[str]]) -> str:
    """Rows of cells as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(x.rjust(n) for x, n in zip(rest, widths[1:]))]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def markdown(rows: list[list[str]], *, left: int = 1) -> str:
    """Rows of cells, the first of headings; as many columns as `left` says stand to the left."""
    lines = ["| " + " | ".join(str(x).replace("|", "\\|") for x in row) + " |" for row in rows]
    rule = ["---"] * left + ["---:"] * (len(rows[0]) - left)
    return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]])
