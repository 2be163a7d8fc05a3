"""Figures of runs, from their folders or from records/*.json alone.

python -m report.figures runs/a runs/b ...         draw in figures/ all that these runs can show
python -m report.figures --figure k runs/a runs/b  draw that one; --help lists them
python -m report.figures --figure tokens runs/a    what an evaluation found; from its JSON alone
python -m report.figures --record demo             draw records/demo-*.png from records/demo.json

Runs whose names differ in a last _sN alone are seeds of one: drawn as mean ± standard error.
"""

import argparse
import os
import sys

import numpy as np
from matplotlib.figure import Figure

from klsplice.errors import UserError
from klsplice.storage import read_run_json
from report import changes, compare, eval_figures, tables

COLOURS = ("#004488", "#BB5566", "#DDAA33", "black")  # P. Tol's, apart in greyscale too
DASHES, MARKERS = ("-", "--", "-.", ":"), "os^Dv"
BESIDE = 5  # curves; the legend of more stands beside the axes
PALE, MIDDLE = "#D0D0D0", "#5588BB"
HOLLOW = {"linestyle": ":", "marker": "o", "color": "black", "markerfacecolor": "white"}
CE, MSE = "spliced cross-entropy, nats per token", "training MSE, moving average"


def over_tokens(figure, rows, *, curve, ylabel, clean=False) -> None:
    """A line a group. curve: run -> {tokens: value}."""
    axes, groups = figure.subplots(), compare.seeds_together(rows)
    labels = compare.labels(groups)
    if len(groups) > BESIDE:
        figure.set_size_inches(5.6 + 0.07 * max(map(len, labels)), 3.4)
    for i, (label, runs) in enumerate(zip(labels, groups)):
        curves = [curve(row) for row in runs]
        x = sorted(set.intersection(*map(set, curves)))
        y, error = compare.mean([[points[t] for t in x] for points in curves])
        axes.plot(x, y, label=label, **_style(i) | ({} if len(x) < 12 else {"marker": ""}))
        axes.fill_between(x, y - error, y + error, color=_style(i)["color"], alpha=0.2, linewidth=0)
    if clean:
        _clean_line(axes, rows)
    axes.xaxis.set_major_formatter(compare.short)
    _plain(axes, xlabel="training tokens", ylabel=ylabel)


def bars(figure, rows) -> None:
    """What the splice costs after the run, and before it where it started from an SAE."""
    axes, groups = figure.subplots(), compare.seeds_together(rows)
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
    _plain(
        axes, xlabel="cross-entropy over the clean LM's, nats per token\n(wide and pale: before)"
    )
    figure.set_size_inches(4 + 0.07 * max(map(len, names)), 0.9 + 0.36 * len(groups))


def against(figure, rows, *, value, xlabel) -> None:
    """CE after, and before where an SAE was given, against a number in which the runs differ."""
    axes, groups, series = figure.subplots(), compare.seeds_together(rows), {}
    for label, runs in zip(compare.labels(groups, ("learns", "loss", "start")), groups):
        after = compare.mean([r["ce_after"] for r in runs])
        series.setdefault(label, []).append((value(runs[0]), *map(float, after)))
    for i, (label, points) in enumerate(series.items()):
        x, y, error = zip(*sorted(points))
        axes.errorbar(x, y, error, label=label or "after", capsize=2, **_style(i))
    before = {value(row): row["ce_before"] for row in rows if compare.started(row)}
    if before:
        axes.plot(*zip(*sorted(before.items())), label="before", markersize=4, **HOLLOW)
    _clean_line(axes, rows)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({value(row) for row in rows}))
    axes.xaxis.set_major_formatter(compare.short)
    _plain(axes, xlabel=xlabel, ylabel=CE)


def of_sweep(rows: list[dict], path: str) -> bool:
    """Write `path`.png: CE and KL after training against the number that differs most often among
    these runs, a line for each combination of the others; of SAEs against their active latents.
    False where no number differs."""
    found = compare.varied(rows)
    numbers = {n: v for n, v in found.items() if all(type(x) in (int, float) for x in v)}
    numbers |= (
        {"active latents per token": [row["l0_after"] for row in rows]} if "SAE" in found else {}
    )
    if not numbers:
        return False
    x_name = max(numbers, key=lambda name: len(set(numbers[name])))
    others = [n for n in found if n != x_name and (n != "SAE" or x_name in found)]
    label = [", ".join(f"{n} {short_name(found[n][i])}" for n in others) for i in range(len(rows))]
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    both = zip(figure.subplots(1, 2), ("ce_after", "kl_after"), (CE, "KL, nats per token"))
    for axes, name, ylabel in both:
        for k, which in enumerate(dict.fromkeys(label)):
            points = [
                (x, row[name])
                for x, row, mine in zip(numbers[x_name], rows, label)
                if mine == which
            ]
            axes.plot(*zip(*sorted(points)), label=which or None, **_style(k))
        if name == "ce_after":
            before = [
                (x, r["ce_before"]) for x, r in zip(numbers[x_name], rows) if compare.started(r)
            ]
            if before:
                axes.plot(*zip(*sorted(before)), label="before", markersize=4, **HOLLOW)
            _clean_line(axes, rows)
        low, high = min(numbers[x_name]), max(numbers[x_name])
        axes.set_xscale("log" if low > 0 and high >= 8 * low else "linear")
        _plain(axes, xlabel=x_name, ylabel=ylabel)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    figure.savefig(f"{path}.png", dpi=140, pil_kwargs={"optimize": True})
    return True


def short_name(value) -> str:
    return os.path.basename(os.path.normpath(value)) if isinstance(value, str) else f"{value:g}"


def cosines(figure, rows) -> None:
    """How far the latents turned: the share of rows whose cosine to that before is below x."""
    panels, groups = figure.subplots(1, 2, sharey=True), compare.seeds_together(rows)
    for i, (label, runs) in enumerate(zip(compare.labels(groups), groups)):
        found = [changes.turned(compare.folder_of(row)) for row in runs]
        for part, axes in zip(("encoder", "decoder"), panels):
            name = label if part == "encoder" else None
            axes.ecdf(np.concatenate([x[part] for x in found]), label=name, **_style(i, mark=""))
            axes.locator_params(axis="x", nbins=4)
            _plain(axes, xlabel=f"cosine of {part} rows, after to before")
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
    _plain(axes, xlabel="loss on the token in brackets, nats")
    figure.set_size_inches(7, 1 + 0.2 * len(found))
    return changes.markdown(found, share)


def evaluated(figure, rows, *, name) -> None:
    """What evals/<name>.py found of a run."""
    eval_figures.DRAWN[name](figure, read_run_json(_answer(rows[0], name)))


def _answer(row: dict, name: str) -> str:
    return os.path.join(row.get("folder", ""), "evals", f"{name}.json")


def _style(i: int, mark: str = MARKERS) -> dict:
    look = {"color": COLOURS[i % 4], "linestyle": DASHES[i % 4], "linewidth": 1.5}
    return look | ({"marker": mark[i % 5], "markersize": 4} if mark else {})


def _plain(axes, **said) -> None:
    axes.set(**said)
    axes.spines[["top", "right"]].set_visible(False)
    if n := sum(map(bool, axes.get_legend_handles_labels()[1])):
        beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if n > BESIDE else {}
        axes.legend(frameon=False, fontsize=8, **beside)


def _clean_line(axes, rows: list[dict]) -> None:
    for ce in sorted({round(row["ce_clean"], 4) for row in rows}):
        axes.axhline(ce, color="black", linewidth=0.8)
        at = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate("clean LM", (1, ce), (0, 2), ha="right", fontsize=8, **at)


# ---- which figure for which runs -------------------------------------------------------------


def of(*trained, fresh=False):
    """-> a choice of the runs in which one of `trained` learns, from scratch too if `fresh`."""
    return lambda rows: [
        r for r in rows if r["constants"]["TRAIN"] in trained and (fresh or compare.started(r))
    ]


def finetuned(rows: list[dict]) -> list[dict]:
    return [r for r in rows if compare.started(r)] or rows


def staged(rows: list[dict]) -> list[dict]:
    """The finetunes, if one of them started from another."""
    rows = of("sae", "adapter", "sae_lora")(rows)
    sources = {os.path.basename(str(row["constants"]["SAE"])) for row in rows}
    return rows if sources & {row["name"] for row in rows} else []


def answered(name: str):
    """-> a choice of the one run, if it has that evaluation."""
    return lambda rows: rows if len(rows) == 1 and os.path.exists(_answer(rows[0], name)) else []


K = {"value": lambda r: round(r["l0_after"], 1), "xlabel": "k: active latents per token"}
RANK = {"value": lambda r: r["constants"].get("RANK", 0), "xlabel": "rank"}
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
    "cosine": (cosines, of("sae", "adapter", "sae_lora"), (), {}),
    "gained": (gained, lambda rows: rows if len(rows) == 1 else [], (), {}),
    **{name: (evaluated, answered(name), (), {"name": name}) for name in eval_figures.DRAWN},
}


def draw(name: str, rows: list[dict], path: str) -> bool:
    """Write `path`.png (and .md) of the runs that the figure is about; False if it has none."""
    drawing, choose, differ, options = FIGURES[name]
    rows = choose(rows)
    if not rows or any(len({compare.words(row)[word] for row in rows}) < 2 for word in differ):
        return False
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    text = drawing(figure, rows, **options)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    figure.savefig(f"{path}.png", dpi=140, pil_kwargs={"optimize": True})
    if text:
        with open(f"{path}.md", "w", encoding="utf-8") as f:
            f.write(text)
    return True


def run_figures(folder: str, results: dict) -> None:
    """folder/figures/: all that one run can show. What cannot be drawn costs a line, never a run.

    results: what results.json will hold."""
    rows = [tables.read(folder, results) | {"folder": folder}]
    for name in FIGURES:
        try:
            draw(name, rows, os.path.join(folder, "figures", name))
        except Exception as e:
            print(f"note: no figure {name}: {getattr(e, 'what', None) or repr(e)}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", help="run folders")
    parser.add_argument("--figure", choices=FIGURES, help="this one alone")
    parser.add_argument("--record", metavar="NAME", help="of records/NAME.json, beside it")
    a = parser.parse_args(argv)
    if bool(a.runs) == bool(a.record):
        parser.error("wanted run folders, or --record NAME")
    try:
        rows = [tables.read(folder) | {"folder": folder} for folder in a.runs]
        if a.record:
            rows = read_run_json(os.path.join("records", f"{a.record}.json"))["runs"]
    except UserError as e:
        print(e, file=sys.stderr)
        return e.code
    start = os.path.join("records", f"{a.record}-") if a.record else os.path.join("figures", "")
    drawn = []
    for name in [a.figure] if a.figure else FIGURES:
        try:
            drawn += [f"{start}{name}.png"] * draw(name, rows, start + name)
        except UserError as e:
            if a.figure or a.runs:
                print(f"note: no figure {name}: {e.what}", file=sys.stderr)
    if not drawn:
        what = "error: these runs have nothing to show there"
        print(f"{what}\n  an evaluation's figure needs its `python -m evals.NAME`", file=sys.stderr)
        return 2
    print("\n".join(drawn))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
