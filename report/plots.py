"""Figures of any runs: a result against what differs among them, and their curves."""

import os

import numpy as np
from matplotlib.figure import Figure

from klsplice.errors import UserError, near_name
from klsplice.metrics import charted, read_metrics
from klsplice.settings import defaults
from klsplice.storage import read_run_json
from report import compare, tables
from report.style import CE, HOLLOW, clean_line, legend, look, plain

OWN = ("architecture", "k", "d_sae", "l0_before")  # of an SAE, whatever the constants say
NAMES = {"ce_after": CE, "kl_after": "KL, nats per token", "gap_closed": "gap closed"}
NAMES |= {"k": "k: active latents per token", "l0_before": "active latents per token, before"}
NAMES |= {"ce_before": f"{CE}, before", "fvu_after": "FVU", "l0_after": "L0"}
NAMES |= {"ce_recovered_after": "cross-entropy recovered", "kl_before": "KL, before"}
NAMES |= {"train/kl": "training KL, nats per token", "train/mse": "training MSE"}
NAMES |= {"train/lr": "learning rate", "train/grad_norm": "gradient norm, before clipping"}
NAMES |= {
    "train/l0": "training L0",
    "val/ce_spliced": "spliced CE, nats per token",
    "val/kl": NAMES["kl_after"],
}
NAMES |= {"val/fvu": "FVU", "val/gap_closed": "gap closed", "val/l0": "L0"}
RESULTS = ("ce_after", "kl_after")
SLANTED = {"rotation": 25, "ha": "right"}
FEW = 6  # values of x, which stand at the axis themselves


def against(rows: list[dict], x: str = "", ys=RESULTS) -> Figure | None:
    """Results of runs against what differs among them, a panel each; seeds are averaged. A line
    joins runs that differ in x alone, where x is a number; of SAEs, those of one folder, class and
    width. None where nothing but the seed differs.

    x: a constant, one of OWN, a name in results.json, which no line joins, or "" for the number
    with most values. ys: names in results.json.
    Raises UserError where x does not differ among these runs, or they have no such number.
    """
    rows = compare.in_order(rows)
    found = compare.varied(rows)
    values = found | _own(rows)
    if x in ("K", "D_SAE") and "SAE" in found:  # the SAEs' own, which the line joins
        x = x.lower()
    if x not in values:  # lr; K of SAEs that were loaded
        x = next((name for name in (x.upper(), x.lower()) if name in values), x)
    result = x not in values and len(tables.defined(rows, x)) == len(rows)
    if result:
        values[x] = [row[x] for row in rows]
    if x and (x not in values or len({*values[x]}) < 2):
        raise _no_such_x(x, rows, values)
    x = x or _widest(found, values)
    if not x:
        return None
    number = x != "SEED" and all(type(v) in (int, float) for v in values[x])
    at = values[x] if number else compare.told(values[x])
    for y in ys:
        if not tables.defined(rows, y):
            names = _numbers(rows)
            what = f"these runs have no number {y}{near_name(y, names)}"
            raise UserError(what, f"wanted one of {', '.join(names)}")
    series = {}
    for label, place, row in zip(_labels(rows, found, values, x), at, rows):
        series.setdefault(label, {}).setdefault(place, []).append(row)
    figure = Figure(figsize=(4.2 * len(ys), 3.4), layout="constrained")
    for axes, y in zip(figure.subplots(1, len(ys), squeeze=False)[0], ys):
        lines(axes, series, y, ticks=None if number else [*dict.fromkeys(at)], joined=not result)
        if number:
            _scale(axes, sorted({*at}))
        plain(axes, xlabel=NAMES.get(x, x), ylabel=NAMES.get(y, y))
    legend(figure, below=True)
    return figure


def _numbers(rows: list[dict]) -> list[str]:
    """The names of results.json that have a value in some run."""
    return [n for n in rows[0] if any(type(row.get(n)) in (int, float) for row in rows)]


def _no_such_x(x: str, rows: list[dict], values: dict[str, list]) -> UserError:
    """Why nothing can be drawn against x, and what can."""
    differ = [n for n in values if len({*map(repr, values[n])}) > 1]
    hint = f"they differ in {', '.join(differ) or 'nothing'}, and in their results"
    if lacking := len(rows) - len(tables.defined(rows, x)) if x in _numbers(rows) else 0:
        return UserError(f"{x} has no value in {lacking} of these runs", hint)
    if x in values or x in rows[0] or x.upper() in defaults():
        return UserError(f"{x} does not differ among these runs", hint)
    near = near_name(x, [*_numbers(rows), *values, *defaults()])
    return UserError(f"no constant or result is called {x}{near}", hint)


def _own(rows: list[dict]) -> dict[str, list]:
    """What OWN names, run by run; of those that no run lacks."""
    abouts = [read_run_json(os.path.join(row["folder"], "run.json")) for row in rows]
    own = [row | tables.sae_of(about) for row, about in zip(rows, abouts)]
    found = {n: [of_run.get(n) for of_run in own] for n in OWN}
    return {n: of_runs for n, of_runs in found.items() if None not in of_runs}


def _widest(found: dict[str, list], values: dict[str, list]) -> str:
    """What to draw against: the number with most values, or else whatever has most."""
    names = [n for n in found if n != "SEED"]
    if "SAE" in found:  # a size of theirs, where it tells them apart
        size = "k" if "k" in values else "l0_before"
        names += [size] * (len({*values.get(size, ())}) == len({*found["SAE"]}))
    numbers = [n for n in names if all(type(v) in (int, float) for v in values[n])]
    return max(numbers or names, key=lambda name: len({*values[name]}), default="")


def _labels(rows, found, values, x: str) -> list[str]:
    """Of each run what tells its line from others, with how many seeds a point has."""
    names = [n for n in found if n not in (x, x.upper(), "SEED")]
    found = dict(found)
    if "SAE" in names and x in OWN:
        family = {"from": [os.path.dirname(sae) or "scratch" for sae in found["SAE"]]}
        sizes = {"architecture", "d_sae", *(["k"] if x == "d_sae" else [])} - {x}
        sizes -= {name.lower() for name in found}
        family |= {n: values[n] for n in sorted(sizes & values.keys())}
        rest = [n for n in names if n != "SAE"]
        points = [*zip(values[x], *family.values(), *(found[n] for n in rest))]
        if len({*zip(points, found["SAE"])}) == len({*points}):
            found |= {n: v for n, v in family.items() if len({*v}) > 1}
            names = [*rest, *(n for n in family if n in found)]
    said = compare.legends({n: found[n] for n in names}) or [""] * len(rows)
    keys = [*zip(*(map(repr, found[n]) for n in names))] or [()] * len(rows)
    at = [*zip(keys, map(repr, values[x]))]
    n = {key: sorted({at.count(a) for a in at if a[0] == key}) for key in keys}
    return [
        (words or "after") + (f" (n = {'-'.join(map(str, n[key]))})" if n[key] != [1] else "")
        for words, key in zip(said, keys)
    ]


def lines(axes, series: dict, y: str = "ce_after", ticks: list | None = None, joined=True) -> None:
    """A line for each of series, {label: {x: runs}}: mean and standard error; of the CE also that
    before, and the clean LM's. ticks: the names that x are, of points which nothing joins."""
    joined, before = {} if joined and ticks is None else {"linestyle": "none"}, {}
    place = (lambda x: x) if ticks is None else ticks.index
    for i, (label, points) in enumerate(series.items()):
        found = {place(x): tables.defined(runs, y) for x, runs in points.items()}
        found = {x: compare.mean(found[x]) for x in sorted(found) if found[x]}
        if found:
            mean, error = zip(*found.values())
            axes.errorbar([*found], mean, error, label=label, capsize=2, **look(i) | joined)
        started = {place(x): [*filter(compare.started, runs)] for x, runs in points.items()}
        told = [(x, runs[0]["ce_before"]) for x, runs in sorted(started.items()) if runs]
        if told:
            before.setdefault(tuple(told), i)
    if y == "ce_after":
        several = len(before) > 1
        for points, i in before.items():
            own = HOLLOW | ({"color": look(i)["color"]} if several else {}) | joined
            axes.plot(*zip(*points), label=None if several else "before", markersize=4, **own)
        if several:
            axes.plot([], [], label="before", markersize=4, **HOLLOW | joined)
        clean_line(
            axes, [r for points in series.values() for runs in points.values() for r in runs]
        )
    if ticks is not None:
        longest = max(map(len, ticks))
        axes.set_xticks(range(len(ticks)), ticks, **SLANTED if longest > 8 else {})
        axes.figure.set_figheight(3.4 + (0.04 * longest if longest > 8 else 0))
        axes.margins(x=0.15)


def frontier(figure, rows: list[dict]) -> None:
    """What is bought and for what: gap closed, and KL, against FVU. A line a loss, over its rates;
    means and standard errors of seeds, and circles around run.py's own rate."""
    series, rate = {}, defaults()["LR"]
    groups = sorted(tables.grouped(rows), key=lambda runs: runs[0]["constants"]["LR"])
    said = [compare.words(runs[0]) for runs in groups]
    names = [n for n in said[0] if n not in ("rate", "k") and len({w[n] for w in said}) > 1]
    for words, runs in zip(said, groups):
        label = ", ".join(filter(None, (words[n] for n in names)))
        series.setdefault(label or words["loss"], []).append(runs)
    figure.set_size_inches(8, 3.4)
    for axes, y in zip(figure.subplots(1, 2), ("gap_closed", "kl_after")):
        for i, (label, of_line) in enumerate(series.items()):
            (x, x_error), (mean, error) = (
                zip(*(compare.mean([row[name] for row in runs]) for runs in of_line))
                for name in ("fvu_after", y)
            )
            n = "-".join(map(str, sorted({len(runs) for runs in of_line})))
            label += f" (n = {n})" * (n != "1")
            axes.errorbar(x, mean, error, x_error, label=label, capsize=2, **look(i))
            at = [runs[0]["constants"]["LR"] == rate for runs in of_line]
            ring = {"label": f"LR {rate:g}"} if any(at) else {}
            ring |= {"linestyle": "", "marker": "o", "markersize": 11, "markerfacecolor": "none"}
            axes.plot(np.array(x)[at], np.array(mean)[at], color="black", **ring)
        before = {(r["fvu_before"], {"gap_closed": 0.0}.get(y, r["kl_before"])) for r in rows}
        axes.plot(*zip(*sorted(before)), label="before", **HOLLOW | {"linestyle": ""})
        plain(axes, xlabel="FVU", ylabel=NAMES[y])
    legend(figure, below=True)


def _scale(axes, xs: list) -> None:
    """Logarithmic where the numbers are far apart, and with few of them each at the axis."""
    if xs[0] > 0 and xs[-1] >= 8 * xs[0]:
        axes.set_xscale("log")
    if len(xs) <= FEW:
        axes.set_xticks(xs, [f"{x:g}" for x in xs])
        axes.set_xticks([], minor=True)


def curves(folders: list[str], names=()) -> Figure:
    """What metrics.jsonl has of those runs over their tokens, finished or not, a panel a name.
    Finished seeds are averaged, where all of them have a value.

    names: of a training step, or val/... of an evaluation; else what is charted of a step. Raises
    UserError where a name is of none."""
    metrics = [read_metrics(folder) for folder in folders]
    names = [name.removeprefix("train/") for name in names]
    known = {n for lines in metrics for line in lines for n in line if line[n] is not None}
    steps = [n.removeprefix("train/") for n in charted(sorted(known)) if n.startswith("train/")]
    known = {n.removeprefix("train/") for n in known if "/" in n}
    for name in [n for n in names if n not in known]:
        raise UserError(
            f"no line of metrics.jsonl has {name}", f"wanted one of {', '.join(sorted(known))}"
        )
    names = names or steps
    if not names:
        raise UserError("there are no curves yet", "the first line comes after LOG_EVERY steps")
    columns = min(3, len(names))
    figure = Figure(figsize=(3.4 * columns, 2.6 * -(-len(names) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(names) // columns), columns, squeeze=False).flatten()
    groups = _seeds(folders)
    labels = _run_labels([[folders[at] for at in group] for group in groups])
    for axes, name in zip(panels, names):
        key = name if "/" in name else f"train/{name}"
        for i, (label, group) in enumerate(zip(labels, groups)):
            of_runs = (metrics[at] for at in group)
            points = [{x["tokens"]: x[key] for x in m if x.get(key) is not None} for m in of_runs]
            mean_line(axes, points, label, i)
        axes.xaxis.set_major_formatter(compare.short)
        plain(axes, xlabel="training tokens", ylabel=NAMES.get(key, name.replace("_", " ")))
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    legend(figure, below=True)
    return figure


def mean_line(axes, curves: list[dict], label: str | None, i: int) -> None:
    """The i-th line of a panel: the mean of curves, {x: y}, over the x that all of them have, with
    its standard error."""
    x = sorted(set.intersection(*map(set, curves)))  # none: it has no such value
    if x:
        y, error = compare.mean([[points[at] for at in x] for points in curves])
        axes.plot(x, y, label=label, **look(i) | ({} if len(x) < 12 else {"marker": ""}))
        axes.fill_between(x, y - error, y + error, color=look(i)["color"], alpha=0.2, linewidth=0)


def _seeds(folders: list[str]) -> list[list[int]]:
    """Which runs are seeds of one setting; one that is not finished is apart."""
    rows = []
    for at, folder in enumerate(folders):
        about = read_run_json(os.path.join(folder, "run.json"))
        apart = "" if tables.in_folder(folder, "results.json") else f" {at}"
        row = {"at": at, "name": os.path.basename(os.path.normpath(folder))}
        row |= {"setting": tables.setting(about) + apart, "code": about.get("code")}
        rows.append(row | {"constants": about["constants"]})
    return [[row["at"] for row in group] for group in tables.grouped(tables.distinct(rows))]


def _run_labels(groups: list[list[str]]) -> list[str | None]:
    """What differs among groups of seeds; or their names, where that tells them not apart."""
    firsts, n = [group[0] for group in groups], [len(group) for group in groups]
    found = compare.varied([{"folder": folder} for folder in firsts])
    found.pop("SEED", None)
    labels = compare.legends(found) or [""] * len(groups)
    names = zip(compare.told(firsts), labels)
    if len(groups) > 1:
        labels = [", ".join(filter(None, x)) if labels.count(x[1]) > 1 else x[1] for x in names]
    said = [f"{x} (n = {of})".strip() if of > 1 else x for x, of in zip(labels, n)]
    return [x or None for x in said]
