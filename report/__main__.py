"""Tables: of run folders, on the screen or as a .csv; and of records/*.json in the pages.

python -m report runs/a runs/b                   a table of runs
python -m report runs/* --csv results.csv        all that is known of each, finished or not
python -m report runs/* --mean                   seeds averaged: mean, standard error, n
python -m report runs/* --curves --csv c.csv     metrics.jsonl: a row a line
python -m report --record NAME runs/a runs/b ... write records/NAME.json from them
python -m report --readme                        renew the pages' tables from records/
python -m report --check                         exit 1 if that would change a page
python -m report --require 0.25 3 runs/a runs/b  exit 1 unless a closed that share of the gap, and
                                                 that many times what b did
"""

import argparse
import os
import signal
import sys

from klsplice.errors import UserError
from report import pages, runs

ROWS = {"mean": runs.mean, "curves": runs.curves}
SHOWN = 40  # rows on the screen


def show(data, path: str | None) -> None:
    """A frame on the screen; or to a .csv, where `path` names one that is not there yet."""
    if path and os.path.exists(path):
        raise UserError(f"{path} is there already", "remove it, or give --csv another name")
    if path:
        data.to_csv(path, index=False)
        print(f"{path}: {len(data):,} rows")
    else:
        print(data.head(SHOWN).to_string(index=False, float_format=lambda x: f"{x:.4g}"))
        if len(data) > SHOWN:
            print(f"... and {len(data) - SHOWN:,} further rows; --csv FILE has all")


def parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m report", description=__doc__, formatter_class=form)
    parser.add_argument("runs", nargs="*", help="run folders")
    parser.add_argument("--csv", metavar="FILE", help="write the rows")
    parser.add_argument("--record", metavar="NAME", help="write records/NAME.json")
    parser.add_argument("--note", default="", help="a sentence for the record: what was varied")
    what = parser.add_mutually_exclusive_group()
    for rows in ROWS:
        what.add_argument(f"--{rows}", action="store_const", const=rows, dest="rows")
    what.add_argument("--readme", action="store_true")
    what.add_argument("--check", action="store_true")
    what.add_argument("--require", nargs=2, type=float, metavar=("SHARE", "TIMES"))
    return parser


def main(argv: list[str]) -> int:
    a = parser().parse_args(argv)
    if bool(a.runs) == (a.readme or a.check):
        parser().error("wanted run folders, or --readme or --check")
    as_data = a.csv or a.rows
    try:
        if a.readme or a.check:
            return pages.renew(check=a.check)
        table = runs.of_folders(runs.folders_of(a.runs, finished=not as_data))
        if a.require and len(table) != 2:
            raise UserError("--require compares two finished runs", "ours and the control")
        if a.record:
            runs.write_record(a.record, a.note, list(table["folder"]))
        if as_data:
            show(ROWS.get(a.rows, runs.as_data)(table), a.csv)
        else:
            print(runs.align(runs.table_of(table)))
    except UserError as e:
        print(e, file=sys.stderr)
        return e.code
    if not a.require:
        return 0
    (ours, control), (share, times) = table["gap_closed"], a.require
    good = ours >= share and ours >= times * control  # NaN, no gap, is neither
    print(f"gap closed {ours:.1%}, control {control:.1%}: {'good' if good else 'TOO LITTLE'}")
    return 0 if good else 1


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # of `| head`
    sys.exit(main(sys.argv[1:]))
