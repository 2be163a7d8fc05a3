"""Tables: of run folders on the screen, and of records/*.json in README.md and LOG.md.

python report.py runs/a runs/b                       print a table of runs
python report.py --record NAME runs/a runs/b ...     write records/NAME.json from them
python report.py --readme                            renew the pages' tables from records/
python report.py --check                             exit 1 if that would change a page
python report.py --require 0.25 3 runs/a runs/b      exit 1 unless a closed that share of the
                                                     gap, and that many times what b did
"""

import argparse
import json
import math
import os
import re
import sys

from errors import UserError, first_line, near_path

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
CURVE = ("tokens", "val/ce_spliced")  # of every evaluation
MARK = re.compile(r"<!-- (table|headline|bench): (\S+) -->\n.*?<!-- end -->", re.S)
PAGES = ("README.md", "LOG.md")


def read(folder: str, results: dict | None = None) -> dict:
    """A run: its results, with name, recipes, versions, the constants that matter and the curve of
    its evaluations. results: of a run that is about to write its results.json."""
    about = read_json(os.path.join(folder, "run.json"))
    if results is None:
        results = read_json(os.path.join(folder, "results.json"))
    row = {"name": os.path.basename(os.path.normpath(folder)), **results}
    row["minutes"] = row["seconds"] / 60
    row["recipes"], row["versions"] = about["recipes"], about["versions"]
    row["fingerprint"] = about["resolved"]["tokens"]
    row["constants"] = {n: about["constants"][n] for n in KEPT}
    evaluations = [line for line in read_metrics(folder) if "val/ce_spliced" in line]
    row["curve"] = {n.removeprefix("val/"): [x[n] for x in evaluations] for n in CURVE}
    return row


def read_json(path: str):
    """Raises UserError where it is not there, or no JSON."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError) as e:
        missing = not os.path.exists(path)
        what = f"{path} is missing" if missing else f"{path} cannot be read: {first_line(e)}"
        folder = os.path.dirname(path)
        near = "" if os.path.exists(folder) else near_path(folder)
        raise UserError(what + near, "wanted runs/<name> of a finished run") from None


def read_metrics(folder: str) -> list[dict]:
    """The lines of metrics.jsonl, without a half-written last one."""
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


def table(folders: list[str]) -> str:
    """The runs as aligned text, a row each."""
    return align([["run", *COLUMNS], *(_cells([read(folder)]) for folder in folders)])


def _cells(rows: list[dict]) -> list[str]:
    """One row of the table: the mean over `rows`, with its standard error for several."""
    label = rows[0]["name"] if len(rows) == 1 else f"{group(rows[0])} (n={len(rows)})"
    cells = [label]
    for name, form in COLUMNS.values():
        values = [row[name] for row in rows if row.get(name) is not None]
        if not values:
            cells.append("-")
            continue
        cells.append(mean_text(values, form))
    return cells


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
    return re.sub(r"[-_]s\d+$", "", row["name"])


def align(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    pad = [
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]
        for row in rows
    ]
    return "\n".join("  ".join(cells) for cells in pad)


def markdown(record: dict) -> str:
    """records/*.json -> a table, runs that differ in their seed alone as one row."""
    groups = grouped(record)
    several = len(groups) < len(record["runs"])
    lines = ["| run | " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    lines += ["| " + " | ".join(_cells(rows)) + " |" for rows in groups.values()]
    first = record["runs"][0]
    devices = sorted({row["device"] for row in record["runs"]})
    commits = sorted({str(row["commit"]) for row in record["runs"]})
    note = f"{'; '.join(devices)}; torch {first['versions']['torch']}; commit {', '.join(commits)}"
    note += "; mean ± standard error over seeds" if several else "; n = 1"
    return "\n".join([*lines, "", f"{note}. {record.get('note', '')}".strip()])


def grouped(record: dict) -> dict[str, list[dict]]:
    groups = {}
    for row in record["runs"]:
        groups.setdefault(group(row), []).append(row)
    return groups


def headline(record: dict) -> str:
    """records/*.json with the groups kl_mse and mse -> the sentence that the README opens with.

    A group mse-long, MSE alone for the wall-clock time of kl_mse, is named too. KL stands
    beside the gap: on a text like that of its training an SAE can lower CE and not follow the LM.
    """
    groups = grouped(record)
    closed = {n: _mean(rows, "gap_closed", ".1%") for n, rows in groups.items()}
    kl = {n: _mean(rows, "kl_after", ".3f") for n, rows in groups.items()}
    first = groups["kl_mse"][0]
    model = os.path.basename(first["constants"]["MODEL"])
    before = _mean(groups["kl_mse"], "kl_before", ".3f")
    longer = f", in the same time to {kl['mse-long']}" if "mse-long" in kl else ""
    return (
        f"**In {model} it closes {closed['kl_mse']} of the gap in {first['tokens']:,} tokens and "
        f"{first['minutes']:.1f} minutes of a CPU; MSE alone closes {closed['mse']} on the same "
        f"tokens{_longer(groups, closed)}** (n = {len(groups['kl_mse'])}). The KL to the clean LM "
        f"falls from {before} to {kl['kl_mse']}; by MSE alone to {kl['mse']}{longer}."
    )


def _mean(rows: list[dict], name: str, form: str) -> str:
    return mean_text([row[name] for row in rows], form)


def _longer(groups: dict, closed: dict) -> str:
    if "mse-long" not in groups:
        return ""
    times = groups["mse-long"][0]["tokens"] / groups["kl_mse"][0]["tokens"]
    n = len(groups["mse-long"])
    other = f" (n = {n})" * (n != len(groups["kl_mse"]))
    return f", and {closed['mse-long']} in the same time, on {times:.0f} times the tokens{other}"


def bench(record: dict) -> str:
    """What bench.py wrote -> two tables: whole steps beside the naive loop's, and the stages."""
    lines = ["| SAE | loop | ms a step | tokens/s | minutes per 25M | GB | times naive |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for size, loops in record["steps"].items():
        for name, r in loops.items():
            ratio = loops["naive"]["seconds"] / r["seconds"]
            gb = f"{r['peak_gb']:.1f}" if "peak_gb" in r else "-"
            cells = [size, name, f"{1000 * r['seconds']:,.1f}", f"{r['tokens_per_second']:,.0f}"]
            cells += [f"{r['minutes_per_25M']:,.1f}", gb, f"{ratio:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| stage | predicted ms | measured ms | share of the peak |"]
    lines += ["| --- | ---: | ---: | ---: |"]
    for name, r in record["stages"].items():
        share = f"{r['share']:.0%}" if r.get("share") else "-"
        cells = [name, f"{1000 * r['predicted']:,.1f}", f"{1000 * r['seconds']:,.1f}", share]
        lines.append("| " + " | ".join(cells) + " |")
    note = f"{record['device']}; torch {record['versions']['torch']}; commit {record['commit']}; "
    note += f"{record['model']}, {record['tokens_a_step']:,} tokens a step; medians of "
    note += f"{record['repeats']}. At one and the same reconstruction the KL's gradient is off by"
    off = {n.removesuffix(" dKL/dy"): e for n, e in record["errors"].items() if "dKL/dy" in n}
    each = [f"{off[n]:.1%} ({n.replace('ours', 'klsplice')})" for n in sorted(off, key=off.get)]
    return "\n".join([*lines, "", f"{note} {', '.join(each)}."])


def write_record(name: str, note: str, folders: list[str]) -> None:
    """records/<name>.json from finished runs. Raises UserError where it is there already."""
    path = os.path.join("records", f"{name}.json")
    if not re.fullmatch(r"[\w-]+", name) or os.path.exists(path):
        raise UserError(f"{path} is there already, or no plain name", "remove it, or name another")
    rows = [read(folder) for folder in folders]
    os.makedirs("records", exist_ok=True)
    with open(path, "w") as f:
        json.dump({"note": note, "runs": rows}, f, indent=1)
        f.write("\n")


def renewed(page: str) -> str:
    """A page with each `<!-- table: NAME -->`, headline or bench filled from records/NAME.json."""
    fillers = {"table": markdown, "headline": headline, "bench": bench}

    def fill(match):
        with open(os.path.join("records", f"{match[2]}.json")) as f:
            text = fillers[match[1]](json.load(f))
        return f"<!-- {match[1]}: {match[2]} -->\n{text}\n<!-- end -->"

    return MARK.sub(fill, page)


def renew(*, check: bool) -> int:
    """Fill the tables of PAGES, or say which are stale -> exit code."""
    stale = []
    for page in filter(os.path.exists, PAGES):
        try:
            with open(page, encoding="utf-8") as f:
                old = f.read()
            new = renewed(old)
        except FileNotFoundError as e:
            print(f"error: {e.filename} is missing", file=sys.stderr)
            return 2
        if new != old:
            stale.append(page)
        if not check:
            with open(page, "w", encoding="utf-8") as f:
                f.write(new)
    if check:
        print(f"stale: {', '.join(stale)}; run `make readme`" if stale else "pages are up to date")
    return int(check and bool(stale))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", help="run folders")
    parser.add_argument("--record", metavar="NAME", help="write records/NAME.json")
    parser.add_argument("--note", default="", help="a sentence for the record: what was varied")
    parser.add_argument(
        "--readme", action="store_true", help="renew the tables of README.md and LOG.md"
    )
    parser.add_argument("--check", action="store_true", help="are they up to date?")
    parser.add_argument("--require", nargs=2, type=float, metavar=("SHARE", "TIMES"))
    a = parser.parse_args(argv)
    if a.require and len(a.runs) != 2:
        parser.error("--require compares two runs: ours and the control")
    if not a.runs and not (a.readme or a.check):
        parser.error("wanted run folders")
    if a.readme or a.check:
        return renew(check=a.check)
    try:
        if a.record:
            write_record(a.record, a.note, a.runs)
        print(table(a.runs))
    except UserError as e:
        print(e, file=sys.stderr)
        return e.code
    if a.require:
        ours, control = (read(folder)["gap_closed"] for folder in a.runs)
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
