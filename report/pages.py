"""The tables of README.md and records/LOG.md, filled from records/*.json."""

import json
import os
import re
import sys

from klsplice.errors import UserError
from klsplice.settings import defaults
from report import tables

SHORT = ("before", "after", "gap closed", "KL", "FVU", "tokens")  # of tables.COLUMNS
PAGES = ("README.md", "records/LOG.md")


def markdown(record: dict) -> str:
    """records/*.json -> a table, runs that differ in their seed alone as one row, and its note."""
    return "\n".join([*_rows(record, tables.COLUMNS), "", _note(record)])


def results(record: dict) -> str:
    """The same with the few columns of SHORT, and the note folded."""
    note = f"<details><summary>device, commit, seeds</summary>\n\n{_note(record)}\n\n</details>"
    return "\n".join([*_rows(record, SHORT), "", note])


def _rows(record: dict, columns) -> list[str]:
    lines = [f"| run | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for rows in tables.grouped(record["runs"]):
        label, *cells = tables.cells(rows)
        shown = dict(zip(tables.COLUMNS, cells))
        lines.append(f"| {label} | {' | '.join(shown[name] for name in columns)} |")
    return lines


def _note(record: dict) -> str:
    groups, first = tables.grouped(record["runs"]), record["runs"][0]
    devices = sorted({row["device"] for row in record["runs"]})
    commits = sorted({str(row["commit"]) for row in record["runs"]})
    note = f"{'; '.join(devices)}; torch {first['versions']['torch']}; commit {', '.join(commits)}"
    several = len(groups) < len(record["runs"])
    note += "; mean ± standard error over seeds" if several else "; n = 1"
    return f"{note}. {record.get('note', '')}".strip()


def headline(record: dict) -> str:
    """records/*.json with the groups kl_mse and mse -> the sentence that the README opens with.

    A group mse-long, MSE alone for as long as kl_mse takes, is named too.
    """
    groups = {tables.group(rows[0]): rows for rows in tables.grouped(record["runs"])}
    first = groups["kl_mse"][0]
    closed = {name: _closed(rows, len(groups["kl_mse"])) for name, rows in groups.items()}
    minutes = tables.shown(groups["kl_mse"], "minutes", ".1f")
    longer = f", and {closed['mse-long']} in the same time" if "mse-long" in closed else ""
    return (
        f"On {os.path.basename(first['constants']['MODEL'])} a KL + MSE finetune of "
        f"{first['tokens']:,} tokens, {minutes} minutes on a CPU, closes "
        f"**{closed['kl_mse']}** of the gap (n = {len(groups['kl_mse'])} seeds). MSE alone closes "
        f"{closed['mse']} on the same tokens{longer}."
    )


def on_the_way(record: dict) -> str:
    """The gap closed after each number of tokens, a row a loss and rate, with its n."""
    found = record["gap_closed_on_the_way"]
    tokens = sorted({int(t) for rates in found.values() for rate in rates.values() for t in rate})
    lines = [f"| loss | LR | {' | '.join(f'{t:,} tokens' for t in tokens)} |"]
    lines += ["| --- | ---: |" + " ---: |" * len(tokens)]
    for loss, rates in found.items():
        for rate, of_tokens in rates.items():
            cells = (_with_n(of_tokens[str(t)]) if str(t) in of_tokens else "-" for t in tokens)
            lines.append(f"| {loss} | {rate} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_n(values: list[float]) -> str:
    return f"{tables.mean_text(values, '.1%')} (n = {len(values)})"


def stalled(record: dict) -> str:
    """A record of finetunes from an SAE on which MSE has stalled -> the sentence for the README: at
    the usual rate and at the best one, where there were last several seeds, and at the end."""
    source, found = record["runs"][0], record["gap_closed_on_the_way"]["kl+mse"]
    whole = max(int(tokens) for of_tokens in found.values() for tokens in of_tokens)
    ended = {rate: of_tokens for rate, of_tokens in found.items() if str(whole) in of_tokens}
    best = max(ended, key=lambda rate: sum(ended[rate][str(whole)]))
    rates = f"{defaults()['LR']:g}", best
    counts = [t for t in ended[best] if all(len(ended[rate].get(t, ())) > 1 for rate in rates)]
    most = max(counts, key=int)
    seeds, last = ([ended[rate][str(tokens)] for rate in rates] for tokens in (most, whole))
    closed = (f"**{tables.mean_text(x, '.1%')}** at LR {rate}" for x, rate in zip(seeds, rates))
    at_the_end = " and ".join(tables.mean_text(x, ".1%") for x in last)
    mse = [r["gap_closed"] for r in record["runs"][1:] if r["constants"]["LOSS"] == "mse"]
    model = os.path.basename(source["constants"]["MODEL"])
    return (
        f"On {model}, from an SAE on which MSE has stalled, KL + MSE closes "
        f"{' and '.join(closed)} of the gap in {int(most):,} tokens "
        f"(n = {len(seeds[0])} seeds; {at_the_end} in {whole:,}, n = {len(last[0])}). MSE alone "
        f"closes {min(mse):.1%} to {max(mse):.1%}, at any rate ({len(mse)} runs; "
        f"{source['device']}, commit {source['commit']}; records/LOG.md)."
    )


def _closed(rows: list[dict], n: int) -> str:
    """The gap closed, with its own n where that is not `n`."""
    text = tables.shown(rows, "gap_closed", ".1%")
    return text if len(rows) == n else f"{text} (n = {len(rows)})"


def speed(record: dict) -> str:
    """What `python -m bench` wrote -> a sentence on the first size of SAE."""
    size, loops = next(iter(record["steps"].items()))
    ours = loops["klsplice"]
    said = (
        f"A step of {record['tokens_a_step']:,} tokens ({record['model']}; SAE of {size}) takes "
        f"{1000 * ours['seconds']:,.0f} ms on {record['device']}"
    )
    if "peak_gb" in ours:
        minutes, gb = ours["minutes_per_25M"], ours["peak_gb"]
        said += f"; 25M tokens take {minutes:.1f} minutes, and {gb:.0f} GB"
    said += "; the loop as it is usually written takes "
    names = {"naive": "", "naive, compiled": " with torch.compile"}
    times = [
        f"{1000 * loops[name]['seconds']:,.0f} ms{words}, "
        f"{loops[name]['seconds'] / ours['seconds']:.2f} times as long"
        for name, words in names.items()
        if name in loops
    ]
    note = (
        f"medians of {record['repeats']}, commit {record['commit']}; records/LOG.md has the stages"
    )
    return f"{said}{', and '.join(times)} ({note})."


def bench(record: dict) -> str:
    """What `python -m bench` wrote -> two tables: steps beside the naive loop's, and the stages."""
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
    rows = tables.distinct([tables.read(folder) for folder in folders])
    os.makedirs("records", exist_ok=True)
    with open(path, "w") as f:
        json.dump({"note": note, "runs": rows}, f, indent=1)
        f.write("\n")


FILLERS = {f.__name__: f for f in (results, headline, on_the_way, stalled, bench, speed)}
FILLERS |= {"table": markdown}
MARK = re.compile(rf"<!-- ({'|'.join(FILLERS)}): (\S+) -->\n.*?<!-- end -->", re.S)


def renewed(page: str) -> str:
    """A page with each `<!-- table: NAME -->`, or another filler, filled from records/NAME.json."""

    def fill(match):
        with open(os.path.join("records", f"{match[2]}.json")) as f:
            text = FILLERS[match[1]](json.load(f))
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
