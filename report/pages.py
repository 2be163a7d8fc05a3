"""The tables of README.md and records/LOG.md, filled from records/*.json."""

import re
from pathlib import Path

from report import runs

SHORT = ("before", "after", "gap closed", "KL removed", "KL", "FVU", "tokens")  # of runs.COLUMNS
PAGES = ("README.md", "records/LOG.md")
STEPS = ["SAE", "loop", "ms a step", "tokens/s", "minutes per 25M", "GB", "times naive"]


def table(record: dict, columns=tuple(runs.COLUMNS)) -> str:
    """records/*.json -> a table, runs that differ in their seed alone as one row, and its note."""
    rows = runs.frame(record["runs"])
    cells = runs.table_of(rows, {name: runs.COLUMNS[name] for name in columns}, by="setting")
    devices, commits = ("; ".join(sorted({*rows["device"]})), ", ".join(sorted({*rows["commit"]})))
    n = "mean ± standard error over seeds" if rows["setting"].duplicated().any() else "n = 1"
    note = f"{devices}; torch {rows['versions'].iloc[0]['torch']}; commit {commits}; {n}. "
    return f"{runs.markdown(cells)}\n\n{note}{record.get('note', '')}".strip()


def results(record: dict) -> str:
    """The same with the few columns of SHORT, and the note folded."""
    cells, _, note = table(record, SHORT).partition("\n\n")
    summary = "<summary>device, commit, seeds</summary>"
    return f"{cells}\n\n<details>{summary}\n\n{note}\n\n</details>"


def bench(record: dict) -> str:
    """What `python -m bench` wrote -> two tables: steps beside the naive loop's, and the stages."""
    steps, stages = [STEPS], [["stage", "predicted ms", "measured ms", "share of the peak"]]
    for size, loops in record["steps"].items():
        for name, r in loops.items():
            gb = f"{r['peak_gb']:.1f}" if "peak_gb" in r else "-"
            cells = [f"{1000 * r['seconds']:,.1f}", f"{r['tokens_per_second']:,.0f}"]
            cells += [f"{r['minutes_per_25M']:,.1f}", gb]
            ratio = loops["naive"]["seconds"] / r["seconds"]
            steps.append([size, name, *cells, f"{ratio:.2f}"])
    for name, r in record["stages"].items():
        share = f"{r['share']:.0%}" if r.get("share") else "-"
        cells = [f"{1000 * r[n]:,.1f}" if n in r else "-" for n in ("predicted", "seconds")]
        stages.append([name, *cells, share])
    off = {n.removesuffix(" dKL/dy"): e for n, e in record["errors"].items() if "dKL/dy" in n}
    each = [f"{off[n]:.1%} ({n.replace('ours', 'klsplice')})" for n in sorted(off, key=off.get)]
    note = (
        f"{record['device']}; torch {record['versions']['torch']}; commit {record['commit']}; "
        f"{record['model']}, {record['tokens_a_step']:,} tokens a step; medians of "
        f"{record['repeats']}. At one and the same reconstruction the KL's gradient is off by "
        f"{', '.join(each)}."
    )
    return f"{runs.markdown(steps, left=2)}\n\n{runs.markdown(stages)}\n\n{note}"


FILLERS = {"table": table, "results": results, "bench": bench}
MARK = re.compile(rf"<!-- ({'|'.join(FILLERS)}): (\S+) -->\n.*?<!-- end -->", re.S)


def renewed(page: str) -> str:
    """A page with each `<!-- table: NAME -->`, or another filler, filled from records/NAME.json."""

    def fill(match) -> str:
        record = runs.read_record(match[2])
        return f"<!-- {match[1]}: {match[2]} -->\n{FILLERS[match[1]](record)}\n<!-- end -->"

    return MARK.sub(fill, page)


def renew(*, check: bool) -> int:
    """Fill the tables of PAGES, or say which are stale -> exit code. Raises UserError."""
    stale = []
    for path in filter(Path.exists, map(Path, PAGES)):
        old = path.read_text(encoding="utf-8")
        new = renewed(old)
        if new != old:
            stale.append(str(path))
        if not check:
            path.write_text(new, encoding="utf-8")
    if check:
        print(f"stale: {', '.join(stale)}; run `make readme`" if stale else "pages are up to date")
    return int(check and bool(stale))
