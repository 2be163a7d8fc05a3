"""Tables: of run folders on the screen, and of records/*.json in README.md and records/LOG.md.

python -m report runs/a runs/b                       print a table of runs
python -m report --record NAME runs/a runs/b ...     write records/NAME.json from them
python -m report --readme                            renew the pages' tables from records/
python -m report --check                             exit 1 if that would change a page
python -m report --require 0.25 3 runs/a runs/b      exit 1 unless a closed that share of the
                                                     gap, and that many times what b did
"""

import argparse
import sys

from klsplice.errors import UserError
from report import pages, tables


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m report", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", help="run folders")
    parser.add_argument("--record", metavar="NAME", help="write records/NAME.json")
    parser.add_argument("--note", default="", help="a sentence for the record: what was varied")
    parser.add_argument(
        "--readme", action="store_true", help="renew the tables of README.md and records/LOG.md"
    )
    parser.add_argument("--check", action="store_true", help="are they up to date?")
    parser.add_argument("--require", nargs=2, type=float, metavar=("SHARE", "TIMES"))
    a = parser.parse_args(argv)
    try:
        a.runs = tables.runs_of(a.runs, finished=not a.require)
    except UserError as e:
        print(e, file=sys.stderr)
        return e.code
    if a.require and len(a.runs) != 2:
        parser.error("--require compares two runs: ours and the control")
    if not a.runs and not (a.readme or a.check):
        parser.error("wanted run folders")
    if a.readme or a.check:
        return pages.renew(check=a.check)
    try:
        if a.record:
            pages.write_record(a.record, a.note, a.runs)
        print(tables.table(a.runs))
    except UserError as e:
        print(e, file=sys.stderr)
        return e.code
    if a.require:
        ours, control = (tables.read(folder)["gap_closed"] for folder in a.runs)
        if ours is None or control is None:  # not finite
            print("no gap was measured: TOO LITTLE")
            return 1
        share, times = a.require
        good = ours >= share and ours >= times * control
        print(f"gap closed {ours:.1%}, control {control:.1%}: {'good' if good else 'TOO LITTLE'}")
        return int(not good)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
