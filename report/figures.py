"""Figures of runs, from their folders or from records/*.json alone.

python -m report.figures runs/a runs/b ...         draw in figures/ all that these runs can show
python -m report.figures --figure k runs/a runs/b  draw that one; --help lists them
python -m report.figures runs/* --x LR             results against a constant, or the SAE's own k
python -m report.figures runs/* --curve kl lr      what metrics.jsonl has, of unfinished runs too
python -m report.figures ... --out paper/fig1.pdf  .png, .pdf or .svg, or a folder
python -m report.figures --figure tokens runs/a    what an evaluation found; from its JSON alone
python -m report.figures --record demo             draw records/demo-*.png from records/demo.json

Runs that differ in SEED alone are seeds of one: drawn as mean ± standard error.
"""

import argparse
import os
import sys
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from klsplice.errors import UserError
from klsplice.storage import read_run_json
from report import changes, compare, eval_figures, plots, tables
from report.style import (
    CE,
    COLOURS,
    FORMATS,
    HOLLOW,
    MIDDLE,
    PALE,
    clean_line,
    legend,
    look,
    plain,
    save,
)

MSE = "training MSE, moving average"


def over_tokens(figure, rows, *, curve, ylabel, clean=False) -> None:
    """A line a group. curve: run -> {tokens: value}."""
    axes, groups = figure.subplots(), tables.grouped(rows)
    for i, (label, runs) in enumerate(zip(compare.labels(groups), groups)):
        plots.mean_line(axes, [curve(row) for row in runs], label, i)
    if clean:
        # on the tokens of the curve
        own = [(row["curve"].get("ce_clean") or [None])[-1] or row["ce_clean"] for row in rows]
        clean_line(axes, [{"ce_clean": ce} for ce in own])
    axes.xaxis.set_major_formatter(compare.short)
    plain(axes, xlabel="training tokens", ylabel=ylabel)


def bars(figure, rows) -> None:
    """What the splice costs after the run, and before it where it started from an SAE."""
    axes, groups = figure.subplots(), tables.grouped(rows)
    for y, runs in enumerate(groups):
        after, error = compare.mean([r["ce_after"] - r["ce_clean"] for r in runs])
        end, said = after, ""
        if compare.started(runs[0]):
            before, _ = compare.mean([r["ce_before"] - r["ce_clean"] for r in runs])
            axes.barh(y, before, height=0.8, color=PALE)
            closed = tables.defined(runs, "gap_closed")
            said = f"{compare.mean(closed)[0]:.0%} closed" if closed else "-"
            end = max(before, after)
        error = {"xerr": error, "capsize": 3} if len(runs) > 1 else {}
        axes.barh(y, after, height=0.5, color=MIDDLE, **error)
        axes.annotate(said, (end, y), (4, 0), textcoords="offset points", va="center", fontsize=8)
    names = compare.labels(groups)
    axes.set_yticks(range(len(groups)), names, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    plain(axes, xlabel="cross-entropy over the clean LM's, nats per token\n(wide and pale: before)")
    figure.set_size_inches(4 + 0.07 * max(map(len, names)), 0.9 + 0.36 * len(groups))


def against(figure, rows, *, value, xlabel, names) -> None:
    """CE after, and before where an SAE was given, against a number in which the runs differ.

    names: of compare.words, what else a line may be told by."""
    axes, groups, series = figure.subplots(), tables.grouped(rows), {}
    xs = [value(runs[0]) for runs in groups]
    for words in (names, (*names, "source")):
        labels = compare.labels(groups, words)
        if len({*zip(labels, xs)}) == len(groups):
            break
    else:  # a line joins no two runs at one x
        labels = [tables.group(runs[0]) for runs in groups]
    for label, x, runs in zip(labels, xs, groups):
        series.setdefault(label or "after", {})[x] = runs
    plots.lines(axes, series)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({*xs}))
    axes.xaxis.set_major_formatter(compare.short)
    plain(axes, xlabel=xlabel, ylabel=CE)


def cosines(figure, rows) -> None:
    """How far the latents turned: the share of rows whose cosine to that before is below x."""
    panels, groups = figure.subplots(1, 2, sharey=True), tables.grouped(rows)
    for i, (label, runs) in enumerate(zip(compare.labels(groups), groups)):
        found = [changes.turned(compare.folder_of(row)) for row in runs]
        for part, axes in zip(("encoder", "decoder"), panels):
            name = label if part == "encoder" else None
            axes.ecdf(np.concatenate([x[part] for x in found]), label=name, **look(i, mark=""))
            axes.locator_params(axis="x", nbins=4)
            plain(axes, xlabel=f"cosine of {part} rows, after to before")
    panels[0].set_ylabel("share of latents below")
    figure.set_size_inches(6.4, 2.8)


def gained(figure, rows) -> str:
    """The predictions that gained most, and the few that lost most -> the same as Markdown."""
    found, share = changes.losses(compare.folder_of(rows[0]), fell=12, rose=4)
    axes, y = figure.subplots(), [i + (i >= 12) for i in range(len(found))]
    clean, before, after = np.array([numbers for _, _, *numbers in found]).T
    axes.hlines(y, before, after, color=PALE, linewidth=3, zorder=0)
    axes.plot(before, y, label="before", **HOLLOW | {"linestyle": "", "color": COLOURS[0]})
    axes.plot(after, y, "o", color=COLOURS[0], label="after")
    axes.plot(clean, y, "|", color="black", markersize=9, label="clean LM")
    said = [f"{context[-36:]} [{token[:14]}]" for context, token, *_ in found]
    axes.set_yticks(y, said, family="monospace", fontsize=7, parse_math=False)
    axes.invert_yaxis()
    plain(axes, xlabel="loss on the token in brackets, nats")
    figure.set_size_inches(7, 1 + 0.2 * len(found))
    return changes.markdown(found, share)


def evaluated(figure, rows, *, name) -> None:
    """What evals/<name>.py found of a run."""
    eval_figures.DRAWN[name](figure, read_run_json(_answer(rows[0], name)))


def _answer(row: dict, name: str) -> str:
    return os.path.join(row.get("folder", ""), "evals", f"{name}.json")


# ---- which figure for which runs -------------------------------------------------------------


def of(*trained, fresh=False):
    """-> a choice of the runs in which one of `trained` learns, from scratch too if `fresh`."""
    return lambda rows: [
        r
        for r in rows
        if r["constants"]["TRAIN"] in trained and r["tokens"] and (fresh or compare.started(r))
    ]


def finetuned(rows: list[dict]) -> list[dict]:
    return [r for r in rows if compare.started(r)] or rows


def staged(rows: list[dict]) -> list[dict]:
    """The finetunes, if one of them started from another."""
    rows = of("sae", "adapter", "sae_lora")(rows)
    sources = {os.path.basename(str(row["constants"]["SAE"])) for row in rows}
    return rows if sources & {row["name"] for row in rows} else []


def rated(rows: list[dict]) -> list[dict]:
    """The finetunes of an SAE, if there are several rates of one loss."""
    rows = of("sae")(rows)
    found = {(row["constants"]["LOSS"], row["constants"]["LR"]) for row in rows}
    return rows if len(found) > len({loss for loss, _ in found}) else []


def answered(name: str):
    """-> a choice of the one run, if it has that evaluation."""
    return lambda rows: rows if len(rows) == 1 and os.path.exists(_answer(rows[0], name)) else []


TOLD = ("learns", "loss", "start", "tokens", "rate")
K = {"value": lambda r: round(r["l0_after"], 1), "xlabel": plots.NAMES["k"], "names": TOLD}
RANK = {"value": lambda r: r["constants"].get("RANK", 0), "xlabel": "rank"}
RANK |= {"names": (*TOLD, "source")}
FIGURES = {  # name: drawing, which runs, the words that must differ among them, options
    "ce": (over_tokens, finetuned, (), {"curve": compare.evaluations, "ylabel": CE, "clean": True}),
    "mse": (over_tokens, finetuned, (), {"curve": compare.training_mse, "ylabel": MSE}),
    "losses": (bars, of("sae"), ("loss",), {}),
    "tail": (against, of("sae", fresh=True), ("start", "k"), K),
    "adapters": (bars, of("sae", "adapter"), ("learns",), {}),
    "two_stage": (bars, staged, (), {}),
    "lora": (bars, of("sae", "sae_lora", "lm_lora"), ("learns",), {}),
    "k": (against, of("sae"), ("k",), K),
    "rank": (against, of("adapter", "sae_lora", "lm_lora"), ("rank",), RANK),
    "frontier": (plots.frontier, rated, (), {}),
    "cosine": (cosines, of("sae", "adapter", "sae_lora"), (), {}),
    "gained": (gained, lambda rows: rows if len(rows) == 1 else [], (), {}),
    **{name: (evaluated, answered(name), (), {"name": name}) for name in eval_figures.DRAWN},
}


def draw(name: str, rows: list[dict], path: str, *, force: bool = True) -> bool:
    """Write `path`, and .md beside it, of the runs that the figure is about; False if none are."""
    drawing, choose, differ, options = FIGURES[name]
    rows = choose(rows)
    if not rows or any(len({compare.words(row)[word] for row in rows}) < 2 for word in differ):
        return False
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    text = drawing(figure, rows, **options)
    legend(figure)
    save(figure, path, force=force)
    if text:
        with open(os.path.splitext(path)[0] + ".md", "w", encoding="utf-8") as f:
            f.write(text)
    return True


def run_figures(folder: str, results: dict) -> None:
    """folder/figures/: all that one run can show. What cannot be drawn costs a line, never a run.

    results: what results.json will hold."""
    rows, where = [tables.read(folder, results) | {"folder": folder}], partial(os.path.join, folder)
    for name in [*FIGURES, "curves"]:
        path = where("figures", f"{name}.png")
        try:
            if name == "curves":
                save(plots.curves([folder]), path)
            else:
                draw(name, rows, path)
        except Exception as e:
            print(f"note: no figure {name}: {getattr(e, 'what', None) or repr(e)}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m report.figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", help="run folders")
    parser.add_argument("--record", metavar="NAME", help="of records/NAME.json, beside it")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--figure", choices=FIGURES, help="draw this one alone")
    x = "draw against a constant, the SAEs' own k or d_sae, or a number of results.json"
    which.add_argument("--x", metavar="NAME", help=x)
    several = {"nargs": "+", "metavar": "NAME", "action": "extend"}
    which.add_argument("--curve", **several, help="draw these numbers of metrics.jsonl over tokens")
    y = f"with --x: which numbers of results.json to draw (default {' '.join(plots.RESULTS)})"
    parser.add_argument("--y", **several, help=y)
    parser.add_argument("--out", metavar="PATH", help="write a .png, .pdf or .svg, or to a folder")
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    a = parser.parse_args(argv)
    for words in (a.curve or [], a.y or []):  # which take all words that follow
        a.runs += [word for word in words if os.path.isdir(word)]
        words[:] = [n for word in words if not os.path.isdir(word) for n in word.split(",") if n]
    if bool(a.runs) == bool(a.record):
        parser.error("wanted run folders, or --record NAME")
    if a.record and (a.x or a.curve):
        parser.error("--x and --curve are of run folders; a record has --figure")
    if a.y and not a.x:
        parser.error("--y NAME goes with --x alone; the other figures have a y of their own")
    ending = os.path.splitext(a.out or "")[1]
    if ending and ending not in FORMATS and not os.path.isdir(a.out):
        parser.error(
            f"--out {a.out}: wanted {', '.join(FORMATS)}, or a folder's name with a / after"
        )
    try:
        a.runs = tables.runs_of(a.runs, finished=not a.curve)
        drawn = _special(a) if a.x or a.curve else _known(a)
    except UserError as e:
        print(e, file=sys.stderr)
        return e.code
    if not drawn:
        what = "error: these runs have nothing to show there"
        print(f"{what}\n  an evaluation's figure needs its `python -m evals.NAME`", file=sys.stderr)
        return 2
    print("\n".join(drawn))
    return 0


def _rows(folders: list[str]) -> list[dict]:
    """Finished runs, each setting and seed once; what they cannot be compared in is said."""
    rows = tables.distinct([tables.read(folder) | {"folder": folder} for folder in folders])
    differ = [n for n in ("MODEL", "KEEP") if len({row["constants"][n] for row in rows}) > 1]
    differ += ["DATASET"] * (len({row["fingerprint"] for row in rows}) > 1)
    if differ:
        print(f"note: these runs differ in {', '.join(differ)}: their CE and KL do not compare")
    return rows


def _special(a) -> list[str]:
    """The figure that --x or --curve asks for -> its path."""
    if a.curve:
        figure, name = plots.curves(a.runs, a.curve), "curves"
    else:
        rows = _rows(a.runs)
        figure, name = plots.against(rows, a.x, a.y or plots.RESULTS), f"against-{a.x}"
    out = a.out or "figures"
    path = out if out.endswith(FORMATS) else os.path.join(out, f"{name}.png")
    save(figure, path, force=a.force)
    return [path]


def _known(a) -> list[str]:
    """All of FIGURES that the runs, or the record, can show; or the one asked for."""
    if a.record:
        rows = read_run_json(os.path.join("records", f"{a.record}.json"))["runs"]
        start = os.path.join("records", f"{a.record}-")
    else:
        rows = _rows(a.runs)
        start = os.path.join("figures", "")
    one = bool(a.out) and a.out.endswith(FORMATS)
    if one and not a.figure:
        raise UserError(f"--out {a.out} is one figure", "say which with --figure, or name a folder")
    drawn = []
    for name in [a.figure] if a.figure else FIGURES:
        path = f"{os.path.join(a.out, '') if a.out else start}{name}.png"
        path = a.out if one else path
        try:
            drawn += [path] * draw(name, rows, path, force=a.force or bool(a.record))
        except UserError as e:
            if a.figure or "is there already" in e.what:
                raise
            if a.runs:
                print(f"note: no figure {name}: {e.what}", file=sys.stderr)
    return drawn


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
