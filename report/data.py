"""Runs as data: a tidy table, a row a run, a latent or a line of the curves.

python -m report.data runs/*                        on the screen: finished, running, stopped runs
python -m report.data runs/* --out results.csv      or .parquet
python -m report.data runs/* --mean                 seeds averaged: mean, standard error, n
python -m report.data runs/* --curves --out c.csv   metrics.jsonl: a row each line
python -m report.data runs/x --latents              which latents changed, a row a latent

A row of --latents has the cosine of the latent's encoder and decoder rows to those before, the
share of held-out tokens on which it fires, before and after (rate_), and its mean activation where
it fires (mean_). Those whose decoder row turned most come first.
"""

import argparse
import glob
import math
import os
import signal
import sys

from klsplice.errors import UserError
from klsplice.metrics import evaluations, read_metrics, results, worse_than_nothing
from klsplice.naming import without_seed
from klsplice.storage import in_use, read_run_json
from report import changes, compare, tables

FIRST = ["name", "state", "architecture", "k", "d_sae"]


def runs(folders: list[str]):
    """-> a DataFrame, a row a run: FIRST; the constants that differ; the results, of a run that is
    not finished those of its newest evaluation. k and d_sae are the SAE's own."""
    import pandas

    rows = [_row(folder) | told for folder, told in _told(folders)]
    frame = pandas.DataFrame(rows)
    varied = [name for name in frame if name.isupper()]
    columns = [*FIRST, *varied, *(name for name in frame if name not in {*FIRST, *varied})]
    return frame[columns]


def _row(folder: str) -> dict:
    about = read_run_json(os.path.join(folder, "run.json"))
    row = {"name": _name(folder), "state": _state(folder)} | tables.sae_of(about)
    if row["state"] == "finished":
        row |= read_run_json(os.path.join(folder, "results.json"))
        shared = row.get("together", 1) > 1  # then its seconds depend on what the others made
        return row | (dict.fromkeys(("seconds", "tokens_per_second"), math.nan) if shared else {})
    row |= {name: line[name] for line in read_metrics(folder) for name in ("tokens", "seconds")}
    a_step = about["constants"]["BATCH"] * about["constants"]["CONTEXT"]
    row["tokens"] = max(row.get("tokens", 0), _saved(folder) * a_step)
    found = [
        {name.removeprefix("val/"): math.nan if v is None else v for name, v in line.items()}
        for line in evaluations(folder)
    ]
    if found and worse_than_nothing(found[-1], found[0]["ce_spliced"]):
        row["state"] = "failed"
    return row | (results(found[0], found[-1] if found[-1]["step"] else None) if found else {})


def _saved(folder: str) -> int:
    """Steps of the newest checkpoint."""
    names = glob.glob(os.path.join(folder, "checkpoints", "step-*"))
    return max((int(name.rsplit("-", 1)[1]) for name in names if name[-1].isdigit()), default=0)


def _name(folder: str) -> str:
    return os.path.basename(os.path.normpath(folder))


def _state(folder: str) -> str:
    if os.path.exists(os.path.join(folder, "results.json")):
        return "finished"
    return "running" if in_use(os.path.join(folder, "lock")) else "stopped"


def averaged(folders: list[str]):
    """`runs` with the seeds of one setting as one row: the mean of each number, <name>_se its
    standard error, and n. The constants say which are; finished and unfinished runs are apart."""
    frame = runs(folders)
    rows = []
    for i, (folder, state) in enumerate(zip(folders, frame["state"])):
        about = read_run_json(os.path.join(folder, "run.json"))
        row = {"at": i, "name": _name(folder), "constants": about["constants"]}
        row["code"] = about.get("code")
        rows.append(row | {"setting": tables.setting(about) + state})
    done = [row for row in rows if frame["state"][row["at"]] == "finished"]
    groups = tables.grouped(tables.distinct(done) + [row for row in rows if row not in done])
    groups = {r["at"]: i for i, group in enumerate(groups) for r in group}
    frame = frame.loc[sorted(groups)]
    frame = frame.assign(name=frame["name"].map(without_seed)).drop(columns="SEED", errors="ignore")
    numbers = [n for n in frame.select_dtypes("number") if n.islower() and n not in FIRST]
    groups = frame.groupby(frame.index.map(groups), sort=False)
    others = [n for n in frame if n not in numbers]
    same = groups[others].agg(lambda column: _joined(column.unique()))
    means, errors = groups[numbers].mean(), groups[numbers].sem().add_suffix("_se")
    return same.join(means).join(errors).assign(n=groups.size()).reset_index(drop=True)


def _joined(values):
    """The value that all have, or all of them as a text."""
    return values[0] if len(values) == 1 else "; ".join(map(str, values))


def curves(folders: list[str]):
    """-> a DataFrame, a row a line of metrics.jsonl, with the run's name and what varies."""
    import pandas

    return pandas.DataFrame(
        [told | line for folder, told in _told(folders) for line in read_metrics(folder)]
    )


def _told(folders: list[str]):
    """Yields each folder, and what a row of it begins with: the name, the constants that differ."""
    varied = compare.varied([{"folder": folder} for folder in folders])
    for i, folder in enumerate(folders):
        yield folder, {"name": _name(folder)} | {n: values[i] for n, values in varied.items()}


def latents(folders: list[str]):
    """-> a DataFrame, a row a latent; see changes.latents."""
    import pandas

    parts, refused = [], []
    for folder, told in _told(folders):
        try:
            parts.append(pandas.DataFrame(told | changes.latents(folder)))
        except UserError as error:
            refused.append(error)
    if not parts:
        raise refused[0]
    if refused:
        print(f"note: runs that did not finetune an SAE to its end are left out: {len(refused)}")
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
    parser = argparse.ArgumentParser(
        "python -m report.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--out", metavar="FILE", help=".csv or .parquet")
    what = parser.add_mutually_exclusive_group()
    said = {"mean": "a row a setting, averaged over its seeds"}
    said |= {"curves": "a row a line of metrics.jsonl", "latents": "a row a latent"}
    for name, about in said.items():
        say = {"action": "store_const", "const": name, "dest": "what"}
        what.add_argument(f"--{name}", help=about, **say)
    a = parser.parse_args(argv)
    make = {"mean": averaged, "curves": curves, "latents": latents, None: runs}[a.what]
    try:
        frame = make(tables.runs_of(a.runs))
        if a.out:
            write(frame, a.out)
            print(f"{a.out}: {len(frame):,} rows")
            return 0
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    shown = frame.head(40) if make in (curves, latents) else frame
    print(shown.to_string(index=False, float_format=lambda x: f"{x:.4g}"))
    if len(shown) < len(frame):
        print(f"... and {len(frame) - len(shown):,} further rows; --out FILE has all")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # of `| head`
    sys.exit(main(sys.argv[1:]))
