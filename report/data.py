"""Runs as data: a tidy table, a row a run, a latent or a line of the curves.

python -m report.data runs/*                        on the screen: finished, running, stopped runs
python -m report.data runs/* --out results.csv      or .parquet
python -m report.data runs/* --mean                 seeds averaged: mean, standard error, n
python -m report.data runs/* --curves --out c.csv   metrics.jsonl: a row each line
python -m report.data runs/x --latents              which latents changed, most turned first
"""

import argparse
import os
import sys

from klsplice.errors import UserError
from klsplice.metrics import read_metrics
from klsplice.naming import without_seed
from klsplice.storage import in_use, read_run_json
from report import changes, compare

FIRST = ["name", "state", "architecture", "k", "d_sae"]


def runs(folders: list[str]):
    """-> a DataFrame, a row a run: FIRST; the constants that differ; the results, of a run that is
    not finished those of its newest evaluation. k and d_sae are the SAE's own."""
    import pandas

    varied = compare.varied([{"folder": folder} for folder in folders])
    rows = [_row(folder) | {n: v[i] for n, v in varied.items()} for i, folder in enumerate(folders)]
    frame = pandas.DataFrame(rows)
    columns = [*FIRST, *varied, *(name for name in frame if name not in {*FIRST, *varied})]
    return frame[columns]


def _row(folder: str) -> dict:
    about = read_run_json(os.path.join(folder, "run.json"))
    c, source = about["constants"], about["source"]
    row = {"name": os.path.basename(os.path.normpath(folder)), "state": _state(folder)}
    row |= {"architecture": c["ARCHITECTURE"] or source["architecture"]}
    row |= {name: source[name] for name in ("k", "d_sae")}
    if row["state"] == "finished":
        return row | read_run_json(os.path.join(folder, "results.json"))
    lines = read_metrics(folder)
    row |= {name: lines[-1][name] for name in ("tokens", "seconds") if lines}
    found = [line for line in lines if "val/ce_spliced" in line]
    for when, line in (("before", found[:1]), ("after", found[1:][-1:])):
        for name, value in (line[0] if line else {}).items():
            part, _, name = name.partition("val/")
            if not part and name not in ("ce_clean", "ce_zero", "gap_closed"):
                row[f"{name.replace('ce_spliced', 'ce')}_{when}"] = value
            elif not part:
                row[name] = value
    return row


def _state(folder: str) -> str:
    if os.path.exists(os.path.join(folder, "results.json")):
        return "finished"
    return "running" if in_use(os.path.join(folder, "lock")) else "stopped"


def averaged(frame):
    """Seeds of one run as one row: the mean of each number, <name>_se its standard error, and n."""
    frame = frame.assign(name=frame["name"].map(without_seed)).drop(columns="SEED", errors="ignore")
    numbers = [n for n in frame.select_dtypes("number") if n.islower()]
    numbers = [n for n in numbers if n not in {"k", "d_sae"}]  # nor constants, which are upper case
    groups = frame.groupby([n for n in frame if n not in numbers], dropna=False, sort=False)
    means, errors = groups[numbers].mean(), groups[numbers].sem().add_suffix("_se")
    return means.join(errors).assign(n=groups.size()).reset_index()


def curves(folders: list[str]):
    """-> a DataFrame, a row a line of metrics.jsonl, with the run's name."""
    import pandas

    lines = [
        {"name": os.path.basename(os.path.normpath(folder))} | line
        for folder in folders
        for line in read_metrics(folder)
    ]
    return pandas.DataFrame(lines)


def latents(folders: list[str]):
    """-> a DataFrame, a row a latent; see changes.latents."""
    import pandas

    parts = []
    for folder in folders:
        part = pandas.DataFrame(changes.latents(folder))
        part.insert(0, "name", os.path.basename(os.path.normpath(folder)))
        parts.append(part)
    return pandas.concat(parts, ignore_index=True)


def write(frame, path: str) -> None:
    """Raises UserError, also where `path` is there already."""
    if os.path.exists(path):
        raise UserError(f"{path} is there already", "remove it, or give --out another name")
    ending = os.path.splitext(path)[1]
    if ending not in (".csv", ".parquet"):
        raise UserError(f"--out {path}", "wanted a name that ends in .csv or .parquet")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    frame.to_csv(path, index=False) if ending == ".csv" else frame.to_parquet(path)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m report.data", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--out", metavar="FILE", help=".csv or .parquet")
    parser.add_argument("--mean", action="store_true", help="average seeds")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--curves", action="store_true")
    what.add_argument("--latents", action="store_true")
    a = parser.parse_args(argv)
    folders = [f for f in a.runs if len(a.runs) == 1 or os.path.exists(os.path.join(f, "run.json"))]
    try:
        make = curves if a.curves else latents if a.latents else runs
        frame = make(folders)
        frame = averaged(frame) if a.mean and make is runs else frame
        if a.out:
            write(frame, a.out)
            print(f"{a.out}: {len(frame):,} rows")
            return 0
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    shown = frame.head(40) if make is not runs else frame
    print(shown.to_string(index=False, float_format=lambda x: f"{x:.4g}"))
    if len(shown) < len(frame):
        print(f"... and {len(frame) - len(shown):,} further rows; --out FILE has all")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
