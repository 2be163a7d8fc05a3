"""Figures of runs, from their folders or from records/*.json alone.

python -m report.figures runs/a runs/b                  CE over training tokens: figures/ce.png
python -m report.figures --figure frontier runs/*       what each loss buys for its FVU
python -m report.figures runs/* --x LR --y kl_removed   results against a constant, the SAE's own k
                                                        or d_sae, or another result
python -m report.figures runs/* --curve kl,lr           what metrics.jsonl has, of unfinished runs
python -m report.figures ... --out paper/fig1.pdf       .png, .pdf or .svg
python -m report.figures --record demo                  records/demo-ce.png from records/demo.json

Runs that differ in SEED alone are seeds of one: drawn as mean ± standard error.
"""

import argparse
import os
import sys

import numpy as np
import pandas
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from klsplice.errors import UserError
from klsplice.metrics import charted, read_metrics
from report import runs

# P. Tol's; the first four are apart in greyscale too
COLOURS = ("#004488", "#BB5566", "#DDAA33", "black", "#228833", "#66CCEE", "#AA3377")
DASHES, MARKERS, FORMATS = ("-", "--", "-.", ":"), "os^Dv", (".png", ".pdf", ".svg")
GREY = {"linestyle": ":", "marker": "o", "markersize": 4, "color": "#888888", "fillstyle": "none"}
NAMES = {  # what axes say of a column, or of a number in metrics.jsonl
    "ce_after": "spliced cross-entropy, nats per token",
    "kl_after": "KL, nats per token",
    "gap_closed": "gap closed",
    "kl_removed": "KL removed",
    "fvu_after": "FVU",
    "k": "k: active latents per token",
}
HELD_OUT = ("MODEL", "KEEP", "DATASET", "DATA_FILES", "SPLIT", "CONTEXT", "BOS", "VAL_TOKENS")


def points(table: pandas.DataFrame) -> pandas.DataFrame:
    """The runs that are compared: without the fresh SAE that others started from, and without what
    trained on no token. What is left out is said, and so is what makes them hard to compare."""
    fresh = table["SAE"] == "fresh"
    sources = {os.path.basename(os.path.normpath(sae)) for sae in table["SAE"][~fresh]}
    apart = fresh & table["name"].isin(sources) | (table["TOKENS"] == 0)
    if apart.any() and not apart.all():
        print(f"note: no points of the figure: {', '.join(table['name'][apart])}")
        table = table[~apart]
    table = runs.distinct(table)
    differ = [name for name in runs.varied(table) if name in HELD_OUT]
    if differ or table["fingerprint"].nunique() > 1:
        what = ", ".join(differ) or "their text"
        print(f"note: these runs differ in {what}: their CE and KL do not compare")
    return table


def against(figure: Figure, table: pandas.DataFrame, x: str, ys: list[str], order="") -> None:
    """Results against a column, a panel each: mean and standard error over seeds, and dotted what
    was before. A line joins settings that differ in x alone, where x is a number of theirs; or, of
    a result, in `order`."""
    measured = x.islower() and x not in runs.OWN
    number = is_numeric_dtype(table[x]) and not is_bool_dtype(table[x]) and x != "SEED"
    table = table.assign(line=_told(table, [] if measured and not order else [order or x]))
    at, ticks = (table[x], []) if number else pandas.factorize(table[x].map(str))
    befores = {y: y.replace("_after", "_before") for y in ys if y.endswith("_after")}
    befores = {y: before for y, before in befores.items() if before in table}
    table.loc[table["SAE"] == "fresh", [*befores.values()]] = np.nan
    keys = ["line", "setting", "SEED"] if x == "SEED" else ["line", "setting"]
    groups = table.assign(at=at).sort_values(order or "at", kind="stable").groupby(keys, sort=False)
    means, errors = groups[["at", *ys, *befores.values()]].mean(), groups[["at", *ys]].sem()
    joined = {} if number and (order or not measured) else {"linestyle": "none"}
    for axes, y in zip(figure.subplots(1, len(ys), squeeze=False)[0], ys):
        for i, (label, line) in enumerate(means.groupby("line", sort=False)):
            error = errors.loc[line.index].fillna(0)
            style = look(i) | joined
            axes.errorbar(
                line["at"], line[y], error[y], error["at"], label=label or "after", **style
            )
            if y in befores:
                axes.plot(line["at"], line[befores[y]], label="before", **GREY | joined)
        if y == "ce_after":
            clean_line(axes, table["ce_clean"])
        if len(ticks):
            axes.set_xticks(range(len(ticks)), runs.short_names(ticks), rotation=25, ha="right")
        elif not measured and at.min() > 0 and at.max() >= 8 * at.min():
            axes.set_xscale("log")
        plain(axes, xlabel=NAMES.get(x, x), ylabel=NAMES.get(y, y))


def _told(table: pandas.DataFrame, given=()) -> pandas.Series:
    """runs.labels, with how many seeds there are where there are several."""
    label = runs.labels(table, given)
    sizes = table.groupby([label.rename("line"), "setting"]).size().groupby(level=0)
    n = {name: "-".join(map(str, sorted({*size}))) for name, size in sizes}
    if {*n.values()} == {"1"}:
        return label
    return label.map(lambda name: f"{name} (n = {n[name]})".strip())


def frontier(figure: Figure, table: pandas.DataFrame) -> None:
    """What is bought, and for how much FVU: a line a loss, over its rates."""
    table = table[table["SAE"] != "fresh"]
    if table["LR"].nunique() < 2:
        raise UserError("these runs have one LR", "the frontier is of finetunes at several rates")
    figure.set_size_inches(8, 3.4)
    against(figure, table, "fvu_after", ["kl_removed", "gap_closed"], order="LR")
    for axes in figure.axes:
        before = table["fvu_before"].unique()
        axes.plot(before, 0 * before, label="before", **GREY | {"linestyle": "none"})


def over_tokens(axes, table: pandas.DataFrame, label: pandas.Series, curve_of, ylabel: str) -> None:
    """A line a setting: the mean over its seeds, at the tokens that all of them have, and a band of
    one standard error. curve_of(run) -> {tokens: value}; {} where a run has none."""
    for i, (_, seeds) in enumerate(table.groupby("setting", sort=False)):
        values = [pandas.Series(curve_of(run), dtype=float) for _, run in seeds.iterrows()]
        curve = pandas.concat(values, axis=1, join="inner").sort_index()
        mean, error = curve.mean(axis=1), curve.sem(axis=1).fillna(0)
        style = look(i) | ({"marker": ""} if len(mean) > 12 else {})
        axes.plot(mean.index, mean, label=label[seeds.index[0]], **style)
        band = {"color": style["color"], "alpha": 0.2, "linewidth": 0}
        axes.fill_between(mean.index, mean - error, mean + error, **band)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 25k
    plain(axes, xlabel="training tokens", ylabel=ylabel)


def ce(figure: Figure, table: pandas.DataFrame) -> None:
    """The spliced cross-entropy at each evaluation, and the clean LM's."""
    axes = figure.subplots()

    def curve(run) -> dict:
        return dict(zip(run["curve"]["tokens"], run["curve"]["ce_spliced"]))

    over_tokens(axes, table, _told(table), curve, NAMES["ce_after"])
    both = zip(table["curve"], table["ce_clean"])  # on the tokens of the curve, where it says so
    clean_line(axes, pandas.Series([(x.get("ce_clean") or [ce])[-1] for x, ce in both]))


def curves(figure: Figure, table: pandas.DataFrame, names=()) -> None:
    """What metrics.jsonl has over the training tokens, as it was measured; a panel a name.

    names: of a training step, or val/... of an evaluation; else what is charted of a step. Raises
    UserError where a name is of none."""
    lines = {folder: read_metrics(folder) for folder in table["folder"]}
    known = {n for of_run in lines.values() for x in of_run for n in x if x[n] is not None}
    keys = [name if "/" in name else f"train/{name}" for name in names]
    keys = keys or [name for name in charted(sorted(known)) if name.startswith("train/")]
    if not keys or {*keys} - known:
        what = f"no line of metrics.jsonl has {', '.join({*keys} - known) or 'a training step'}"
        raise UserError(what, f"it has {', '.join(sorted(n for n in known if '/' in n))}")
    finished = table["state"] == "finished"  # an unfinished run is no seed of the others
    table = table.assign(setting=table["setting"].where(finished, table["folder"]))
    label, rows = _told(table), -(-len(keys) // 3)
    figure.set_size_inches(3.4 * min(3, len(keys)) + 1, 2.8 * rows)
    panels = figure.subplots(rows, min(3, len(keys)), squeeze=False).flat
    for key, axes in zip(keys, panels):

        def curve(run, key=key) -> dict:
            return {x["tokens"]: x[key] for x in lines[run["folder"]] if x.get(key) is not None}

        over_tokens(axes, table, label, curve, key)
    for axes in panels:  # those that are left over
        axes.remove()


# ---- how they look ---------------------------------------------------------------------------


def look(i: int) -> dict:
    """28 kinds of line, one after the other."""
    at = i % len(COLOURS)
    line = {"color": COLOURS[at], "linestyle": DASHES[(at + i // len(COLOURS)) % 4]}
    return line | {"linewidth": 1.5, "marker": MARKERS[i % 5], "markersize": 4}


def plain(axes, **words) -> None:
    axes.set(**words)
    axes.spines[["top", "right"]].set_visible(False)


def clean_line(axes, ce_clean: pandas.Series) -> None:
    for clean in ce_clean.round(4).unique():
        axes.axhline(clean, color="black", linewidth=0.8, label="clean LM")


def draw(drawing, table, path: str, *further, force: bool = True) -> None:
    """Write `path`, with a legend below the panels. Raises UserError where it is there and not
    forced, or ends in none of FORMATS."""
    if not path.endswith(FORMATS):
        raise UserError(f"{path} is no figure", f"wanted a name that ends in {', '.join(FORMATS)}")
    if os.path.exists(path) and not force:
        raise UserError(f"{path} is there already", "give --out another name, or add --force")
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    drawing(figure, table, *further)
    both = [axes.get_legend_handles_labels() for axes in figure.axes]
    lines = {label: line for handles, labels in both for line, label in zip(handles, labels)}
    if lines:
        width = 0.6 + 0.068 * max(map(len, lines))  # inches of an entry
        columns = max(1, min(len(lines), int(figure.get_figwidth() / width)))
        height = figure.get_figheight() + 0.1 + 0.17 * -(-len(lines) // columns)
        figure.set_size_inches(max(figure.get_figwidth(), width), height)
        where = {"loc": "outside lower center", "ncols": columns}
        figure.legend(lines.values(), lines, frameon=False, fontsize=8, **where)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path, dpi=140)


# ---- the figures of a run, of a sweep, and of a command --------------------------------------

FIGURES = {"ce": ce, "frontier": frontier}


def run_figures(folder: str, table: pandas.DataFrame) -> None:
    """folder/figures/: what one run can show. What cannot be drawn is one line."""
    for name, drawing in {"ce": ce, "curves": curves}.items():
        try:
            draw(drawing, table, os.path.join(folder, "figures", f"{name}.png"))
        except Exception as e:
            print(f"note: no figure {name}: {getattr(e, 'what', None) or repr(e)}")


def sweep(table: pandas.DataFrame, path: str) -> bool:
    """CE and KL against the number that differs most, or else whatever does; False where none."""
    differ = {name: table[name].nunique() for name in (*runs.varied(table), *runs.OWN)}
    differ = {name: n for name, n in differ.items() if n > 1 and name != "SEED"}
    numbers = [name for name in differ if is_numeric_dtype(table[name])]
    if differ:
        x = max(numbers or differ, key=differ.get)
        draw(against, table, path, x, ["ce_after", "kl_after"])
    return bool(differ)


def parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m report.figures", description=__doc__, formatter_class=form
    )
    parser.add_argument("runs", nargs="*", help="run folders")
    parser.add_argument("--record", metavar="NAME", help="of records/NAME.json, beside it")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--figure", choices=FIGURES, default="ce")
    which.add_argument("--x", metavar="NAME", help="draw against this column")
    which.add_argument("--curve", metavar="NAME,NAME", help="draw these of metrics.jsonl")
    parser.add_argument("--y", metavar="NAME,NAME", help="with --x: results in place of CE and KL")
    parser.add_argument("--out", metavar="FILE", help="a .png, .pdf or .svg")
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    return parser


def main(argv: list[str]) -> int:
    a = parser().parse_args(argv)
    if bool(a.runs) == bool(a.record) or (a.y and not a.x) or (a.curve and a.record):
        parser().error("wanted run folders, or --record NAME without --curve; --y goes with --x")
    name = "curves" if a.curve else f"against-{a.x}" if a.x else a.figure
    path = a.out or (f"records/{a.record}-{name}.png" if a.record else f"figures/{name}.png")
    try:
        draw(*_chosen(a, path), force=a.force or (a.record and not a.out))
    except UserError as e:
        print(e, file=sys.stderr)
        return e.code
    print(path)
    return 0


def _chosen(a, path: str) -> list:
    """What the command line asks for, as `draw` takes it. Raises UserError."""
    if a.record:
        table = runs.frame(runs.read_record(a.record)["runs"])
    else:
        table = runs.of_folders(runs.folders_of(a.runs, finished=not a.curve))
    if a.curve:
        return [curves, runs.distinct(table), path, a.curve.split(",")]
    table = points(table)
    if not a.x:
        return [FIGURES[a.figure], table, path]
    x = a.x.lower() if a.x in ("K", "D_SAE") else a.x  # the SAE's own, loaded or fresh
    ys = a.y.split(",") if a.y else ["ce_after", "kl_after"]
    if missing := [name for name in (x, *ys) if name not in table or table[name].isna().all()]:
        numbers = ", ".join(n for n in table.select_dtypes("number") if n.islower())
        raise UserError(f"no run has {', '.join(missing)}", f"wanted a constant, or of {numbers}")
    return [against, table, path, x, ys]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
