"""Figures of runs, from their folders or from records/*.json alone.

python -m report.figures runs/a runs/b                  CE over training tokens: figures/ce.png
python -m report.figures --figure frontier runs/*       what each loss buys for its FVU
python -m report.figures runs/* --x LR --y kl_removed   results against a constant, the SAE's own k
                                                        or d_sae, or another result
python -m report.figures runs/* --curve kl lr           what metrics.jsonl has, of unfinished runs
python -m report.figures ... --out paper/fig1.pdf       .png, .pdf or .svg
python -m report.figures --figure tokens runs/a         what an evaluation found, from its JSON
python -m report.figures --record demo                  records/demo-ce.png from records/demo.json

Runs that differ in SEED alone are seeds of one: drawn as mean ± standard error.
"""

import argparse
import os
import sys

import numpy as np
import pandas
from matplotlib.figure import Figure
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from klsplice.errors import UserError
from klsplice.metrics import charted, read_metrics
from klsplice.settings import defaults
from klsplice.storage import read_run_json
from report import answers, changes, runs
from report.style import GREY, PALE, look, new_figure, plain, save, short

NAMES = {  # what axes say of a column, or of a number in metrics.jsonl
    "ce_after": "spliced cross-entropy, nats per token",
    "kl_after": "KL, nats per token",
    "gap_closed": "gap closed",
    "kl_removed": "KL removed",
    "fvu_after": "FVU",
    "l0_after": "L0",
    "k": "k: active latents per token",
    "train/kl": "training KL, nats per token",
    "train/mse": "training MSE",
    "train/lr": "learning rate",
    "train/grad_norm": "gradient norm, before clipping",
    "val/ce_spliced": "spliced cross-entropy, nats per token",
    "val/kl": "KL, nats per token",
}
HELD_OUT = ("MODEL", "KEEP", "DATASET", "DATA_FILES", "SPLIT", "CONTEXT", "BOS", "VAL_TOKENS")
FEW = 6  # values of x, which stand at the axis themselves


def points(table: pandas.DataFrame) -> pandas.DataFrame:
    """The runs that are compared: without the fresh SAE that others started from, and without what
    trained on no token. What is left out is said, and so is what makes them hard to compare."""
    sources = {os.path.basename(os.path.normpath(sae)) for sae in table["SAE"]}
    apart = (table["SAE"] == "fresh") & table["name"].isin(sources) | (table["TOKENS"] == 0)
    if apart.all():
        return table
    if apart.any():
        print(f"note: no points of the figure: {', '.join(table['name'][apart])}")
    table = runs.distinct(table[~apart])
    differ = [name for name in runs.varied(table) if name in HELD_OUT]
    if differ or table["fingerprint"].nunique() > 1:
        what = ", ".join(differ) or "the text"
        print(f"note: these runs differ in {what}: their CE and KL do not compare")
    return table


def against(figure: Figure, table: pandas.DataFrame, x: str, ys: list[str], order="") -> None:
    """Results against a column, a panel each: mean and standard error over seeds, and dotted what
    was before. A line joins settings that differ in x alone, where x is a number of theirs; or, of
    a result, in `order`."""
    measured = x.islower() and x not in runs.OWN
    number = is_numeric_dtype(table[x]) and not is_bool_dtype(table[x]) and x != "SEED"
    own = [order or x] if order or not measured else []
    table = table.assign(line=_told(table, own), at=table[x])
    if not number:
        table["at"], ticks = pandas.factorize(table[x].map(str))
    befores = [y.replace("_after", "_before") for y in ys if y.endswith("_after")]
    befores = [before for before in befores if before in table]
    table.loc[table["SAE"] == "fresh", befores] = np.nan
    keys = ["line", "setting", *(["SEED"] if x == "SEED" else [])]
    groups = table.sort_values(order or "at", kind="stable").groupby(keys, sort=False)
    means = groups[["at", *ys, *befores]].mean()
    errors = groups[["at", *ys]].sem().fillna(0)
    joined = {} if number and (order or not measured) else {"linestyle": "none"}
    for axes, y in zip(figure.subplots(1, len(ys), squeeze=False)[0], ys):
        before = y.replace("_after", "_before")
        for i, (label, line) in enumerate(means.groupby("line", sort=False)):
            error = errors.loc[line.index]
            own = look(i) | joined
            axes.errorbar(line["at"], line[y], error[y], error["at"], label=label, **own)
            if before in befores and line[before].notna().any():
                name = None if i else "before"
                axes.plot(line["at"], line[before], label=name, **GREY | joined)
        if y == "ce_after":
            clean_line(axes, table)
        if not number:
            axes.set_xticks(range(len(ticks)), runs.short_names(ticks), rotation=25, ha="right")
        elif not measured:
            _scale(axes, sorted({*table["at"]}))
        plain(axes, xlabel=NAMES.get(x, x), ylabel=NAMES.get(y, y))


def _scale(axes, xs: list[float]) -> None:
    """Logarithmic where the numbers are far apart, and with few of them each at the axis."""
    if xs[0] > 0 and xs[-1] >= 8 * xs[0]:
        axes.set_xscale("log")
    if len(xs) <= FEW:
        axes.set_xticks(xs, [f"{x:g}" for x in xs])
        axes.set_xticks([], minor=True)


def _told(table: pandas.DataFrame, given=()) -> pandas.Series:
    """runs.labels, with how many seeds there are where there are several."""
    label = runs.labels(table, given)
    sizes = table.groupby([label, "setting"]).size().groupby(level=0).agg(["min", "max"])
    n = {
        name: str(low) if low == high else f"{low}-{high}" for name, low, high in sizes.itertuples()
    }
    if {*n.values()} == {"1"}:
        return label.replace("", "after")
    return label.map(lambda name: f"{name} (n = {n[name]})".strip())


def frontier(figure: Figure, table: pandas.DataFrame) -> None:
    """What is bought, and for how much FVU: a line a loss, over its rates. Circles stand around
    run.py's own rate."""
    table = table[table["SAE"] != "fresh"]
    if table["LR"].nunique() < 2:
        raise UserError("these runs have one LR", "the frontier is of finetunes at several rates")
    figure.set_size_inches(8, 3.4)
    ys, rate = ["kl_removed", "gap_closed"], defaults()["LR"]
    against(figure, table, "fvu_after", ys, order="LR")
    usual = table[table["LR"] == rate].groupby("setting")[["fvu_after", *ys]].mean()
    for axes, y in zip(figure.axes, ys):
        ring = {"markersize": 11, "fillstyle": "none", "color": "black", "label": f"LR {rate:g}"}
        axes.plot(usual["fvu_after"], usual[y], "o", **ring)
        before = table["fvu_before"].unique()
        axes.plot(before, 0 * before, label="before", **GREY | {"linestyle": "none"})


def over_tokens(axes, table: pandas.DataFrame, curve_of, ylabel: str) -> None:
    """A line a setting: the mean over its seeds, at the tokens that all of them have, and a band of
    one standard error. curve_of(run) -> {tokens: value}; {} where a run has none."""
    label = _told(table)
    for i, (_, seeds) in enumerate(table.groupby("setting", sort=False)):
        values = [pandas.Series(curve_of(run), dtype=float) for _, run in seeds.iterrows()]
        curve = pandas.concat(values, axis=1, join="inner").sort_index()
        if curve.empty:
            continue
        mean, error = curve.mean(axis=1), curve.sem(axis=1).fillna(0)
        mark = {"marker": ""} if len(mean) > 12 else {}
        axes.plot(mean.index, mean, label=label[seeds.index[0]], **look(i) | mark)
        band = {"color": look(i)["color"], "alpha": 0.2, "linewidth": 0}
        axes.fill_between(mean.index, mean - error, mean + error, **band)
    axes.xaxis.set_major_formatter(short)
    plain(axes, xlabel="training tokens", ylabel=ylabel)


def ce(figure: Figure, table: pandas.DataFrame) -> None:
    """The spliced cross-entropy at each evaluation, and the clean LM's."""

    def curve(run) -> dict:
        return dict(zip(run["curve"]["tokens"], run["curve"]["ce_spliced"]))

    axes = figure.subplots()
    over_tokens(axes, table, curve, NAMES["ce_after"])
    clean = [curve["ce_clean"][-1] for curve in table["curve"] if curve["ce_clean"]]
    clean_line(axes, pandas.DataFrame({"ce_clean": clean}))  # on the tokens of the curves


def clean_line(axes, table: pandas.DataFrame) -> None:
    for clean in table["ce_clean"].round(4).unique():
        axes.axhline(clean, color="black", linewidth=0.8)
        at = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate("clean LM", (1, clean), (0, 2), ha="right", fontsize=8, **at)


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
    apart = table["state"] != "finished"  # an unfinished run is no seed of the others
    table = table.assign(setting=table["setting"].where(~apart, table["folder"]))
    columns, rows = min(3, len(keys)), -(-len(keys) // 3)
    figure.set_size_inches(3.4 * columns if rows > 1 or columns > 1 else 5.6, 2.8 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, key in zip(panels, keys):

        def curve(run, key=key) -> dict:
            found = lines[run["folder"]]
            return {x["tokens"]: x[key] for x in found if x.get(key) is not None}

        over_tokens(axes, table, curve, NAMES.get(key, key.partition("/")[2].replace("_", " ")))
    for axes in panels[len(keys) :]:
        axes.set_visible(False)


def cosine(figure: Figure, table: pandas.DataFrame) -> None:
    """How far the latents turned: the share of them whose 1 - cosine to before is below x."""
    figure.set_size_inches(6.4, 2.8)
    panels, label = figure.subplots(1, 2, sharey=True), _told(table)
    for i, (_, seeds) in enumerate(table.groupby("setting", sort=False)):
        cosines = [changes.turned(_folder(run)) for _, run in seeds.iterrows()]
        for axes, part in zip(panels, ("encoder", "decoder")):
            turned_F = 1 - np.concatenate([of_run[part] for of_run in cosines])
            name = label[seeds.index[0]] if part == "encoder" else None
            style = look(i) | {"marker": ""}
            axes.ecdf(turned_F.clip(1e-9), label=name, **style)  # 1e-9: it did not turn
            axes.set_xscale("log")
            plain(axes, xlabel=f"1 - cosine of {part} rows to before")
    panels[0].set_ylabel("share of latents below")


def gained(figure: Figure, table: pandas.DataFrame) -> str:
    """The predictions that gained most, and the few that lost most -> the same as Markdown."""
    if len(table) > 1:
        raise UserError("this figure is of one run", "give one folder, or another --figure")
    found, share = changes.losses(_folder(table.iloc[0]), fell=12, rose=4)
    axes, y = figure.subplots(), [i + (i >= 12) for i in range(len(found))]
    clean, before, after = np.array([numbers for _, _, *numbers in found]).T
    axes.hlines(y, before, after, color=PALE, linewidth=3, zorder=0)
    axes.plot(before, y, label="before", **GREY | {"linestyle": "none"})
    axes.plot(after, y, label="after", **look(0) | {"linestyle": "none"})
    axes.plot(clean, y, "|", color="black", markersize=9, label="clean LM")
    said = [f"{context[-36:]} [{token[:14]}]" for context, token, *_ in found]
    axes.set_yticks(y, said, family="monospace", fontsize=7, parse_math=False)
    axes.invert_yaxis()
    plain(axes, xlabel="loss on the token in brackets, nats")
    figure.set_size_inches(7, 1 + 0.2 * len(found))
    texts = [["context", "next token", "clean", "before", "after"]]
    for *words, clean, before, after in found:
        code = [f"`{word.replace('`', ' ').replace('|', '¦')}`" for word in words]
        texts.append([*code, f"{clean:.2f}", f"{before:.2f}", f"{after:.2f}"])
    end = f"The loss fell on {share:.1%} of the held-out tokens."
    return f"{runs.markdown(texts, left=2)}\n\n{end}\n"


def _folder(run) -> str:
    if not run["folder"]:
        what = f"{run['name']} is a record without what this figure shows"
        raise UserError(what, "draw the run's folder")
    return run["folder"]


# ---- the figures of a run, of a sweep, and of a command --------------------------------------

FIGURES = {"ce": ce, "gained": gained, "cosine": cosine, "frontier": frontier}


def draw(drawing, table: pandas.DataFrame, path: str, *further, force: bool = True) -> None:
    """Write `path`, and .md beside it where the drawing has a text. Raises UserError."""
    figure = new_figure()
    text = drawing(figure, table, *further)
    save(figure, path, force=force)
    if text:
        with open(os.path.splitext(path)[0] + ".md", "w", encoding="utf-8") as f:
            f.write(text)


def run_figures(folder: str, results: dict | None = None) -> None:
    """folder/figures/: what one run can show. What cannot be drawn is one line."""
    drawings = {"ce": ce, "gained": gained, "curves": curves}
    table = runs.of_folders([folder])
    if table["SAE"][0] != "fresh" and table["TRAIN"][0] != "lm_lora":
        drawings["cosine"] = cosine
    for name, drawing in drawings.items():
        try:
            draw(drawing, table, os.path.join(folder, "figures", f"{name}.png"))
        except Exception as e:
            print(f"note: no figure {name}: {getattr(e, 'what', None) or repr(e)}")


def sweep(table: pandas.DataFrame, path: str) -> bool:
    """CE and KL against the number that differs most, or else whatever does; False where none."""
    differ = [name for name in runs.varied(table) if name != "SEED"]
    if table["k"].nunique() > 1:
        differ.append("k")
    numbers = [name for name in differ if is_numeric_dtype(table[name])]
    if not differ:
        return False
    x = max(numbers or differ, key=lambda name: table[name].nunique())
    draw(against, table, path, x, ["ce_after", "kl_after"])
    return True


def parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("report.figures", description=__doc__, formatter_class=form)
    parser.add_argument("runs", nargs="*", help="run folders")
    parser.add_argument("--record", metavar="NAME", help="of records/NAME.json, beside it")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--figure", choices=[*FIGURES, *answers.DRAWN], default="ce")
    which.add_argument("--x", metavar="NAME", help="draw against this column")
    several = {"nargs": "+", "metavar": "NAME", "action": "extend"}
    which.add_argument("--curve", **several, help="draw these numbers of metrics.jsonl over tokens")
    parser.add_argument(
        "--y", **several, help="with --x: which results (default ce_after kl_after)"
    )
    parser.add_argument("--out", metavar="FILE", help="a .png, .pdf or .svg")
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    return parser


def main(argv: list[str]) -> int:
    a = parser().parse_args(argv)
    for words in (a.curve or [], a.y or []):  # which take all words that follow
        a.runs += [word for word in words if os.path.isdir(word)]
        words[:] = [name for word in words if not os.path.isdir(word) for name in word.split(",")]
    if bool(a.runs) == bool(a.record) or (a.y and not a.x):
        parser().error("wanted run folders, or --record NAME; and --y with --x alone")
    name = "curves" if a.curve else f"against-{a.x}" if a.x else a.figure
    start = os.path.join("records", f"{a.record}-") if a.record else os.path.join("figures", "")
    path = a.out or f"{start}{name}.png"
    force = a.force or (bool(a.record) and not a.out)
    try:
        _draw_command(a, path, force)
    except UserError as e:
        print(e, file=sys.stderr)
        return e.code
    print(path)
    return 0


def _draw_command(a, path: str, force: bool) -> None:
    if a.figure in answers.DRAWN:
        answer = read_run_json(os.path.join(a.runs[0], "evals", f"{a.figure}.json"))
        return answers.draw(answer, path, force=force)
    if a.record:
        table = runs.frame(runs.read_record(a.record)["runs"])
    else:
        table = runs.of_folders(runs.folders_of(a.runs, finished=not a.curve))
    if a.curve:
        return draw(curves, runs.distinct(table), path, a.curve, force=force)
    if not a.x:
        return draw(FIGURES[a.figure], points(table), path, force=force)
    table, ys = points(table), a.y or ["ce_after", "kl_after"]
    x = a.x.lower() if a.x in ("K", "D_SAE") else a.x  # the SAE's own, loaded or fresh
    for column in (x, *ys):
        if column not in table or table[column].isna().any() and column == x:
            numbers = [n for n in table.select_dtypes("number") if n.islower()]
            hint = f"wanted a constant, or one of {', '.join(numbers)}"
            raise UserError(f"these runs have no {column}", hint)
    if table[x].nunique() < 2:
        differ = ", ".join(runs.varied(table)) or "nothing"
        raise UserError(f"{x} does not differ among these runs", f"they differ in {differ}")
    draw(against, table, path, x, ys, force=force)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
