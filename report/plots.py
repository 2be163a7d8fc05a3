"""Figures of any runs: a result against what differs among them, and their curves."""

import os

from matplotlib.figure import Figure

from klsplice.errors import UserError
from klsplice.metrics import read_metrics
from report import compare
from report.style import CE, HOLLOW, clean_line, look, plain

LATENTS = "active latents per token"
NAMES = {"ce_after": CE, "kl_after": "KL, nats per token", "gap_closed": "gap closed"}
CURVES = ("kl", "mse", "alpha", "lr", "grad_norm", "tokens_per_second")


def against(rows: list[dict], x: str = "", ys=("ce_after", "kl_after")) -> Figure | None:
    """Results of runs against a number in which they differ, a panel each, and a line for each
    combination of what else differs. None where no number differs.

    x: a constant, or "" for the one with most values; of different SAEs their active latents. ys:
    names in results.json. Raises UserError where x or ys are no numbers of these runs.
    """
    found = compare.varied(rows)
    numbers = {n: v for n, v in found.items() if all(type(i) in (int, float) for i in v)}
    if "SAE" in found:
        numbers[LATENTS] = [row["l0_after"] for row in rows]
    if x and x not in numbers:
        what = f"{x} is no number that differs among these runs"
        raise UserError(what, f"they differ in {', '.join(found) or 'nothing'}")
    if not numbers:
        return None
    x = x or max(numbers, key=lambda name: len(set(numbers[name])))
    others = [n for n in found if n not in (x, "SEED") and (n != "SAE" or x != LATENTS)]
    label = [", ".join(f"{n} {_short(found[n][i])}" for n in others) for i in range(len(rows))]
    figure = Figure(figsize=(4.2 * len(ys), 3.4), layout="constrained")
    for axes, y in zip(figure.subplots(1, len(ys), squeeze=False)[0], ys):
        if not all(type(row.get(y)) in (int, float) for row in rows):
            raise UserError(f"{y} is no number in the results of these runs")
        for k, which in enumerate(dict.fromkeys(label)):
            points = {}  # seeds stand at one x
            for i, text in enumerate(label):
                if text == which:
                    points.setdefault(numbers[x][i], []).append(rows[i][y])
            xs, seeds = sorted(points), {len(values) for values in points.values()}
            mean, error = zip(*(compare.mean(points[i]) for i in xs))
            n = f" (n = {'-'.join(map(str, sorted(seeds)))})" if seeds != {1} else ""
            axes.errorbar(xs, mean, error, label=f"{which}{n}".strip(), capsize=2, **look(k))
        if y == "ce_after":
            before = {
                i: row["ce_before"] for i, row in zip(numbers[x], rows) if compare.started(row)
            }
            if before:
                axes.plot(*zip(*sorted(before.items())), label="before", markersize=4, **HOLLOW)
            clean_line(axes, rows)
        low, high = min(numbers[x]), max(numbers[x])
        axes.set_xscale("log" if low > 0 and high >= 8 * low else "linear")
        plain(axes, xlabel=x, ylabel=NAMES.get(y, y))
    return figure


def _short(value) -> str:
    if isinstance(value, str):
        return os.path.basename(os.path.normpath(value))
    return f"{value:g}" if type(value) in (int, float) else str(value)


def curves(folders: list[str], names=CURVES) -> Figure:
    """What metrics.jsonl has of those runs over their tokens, finished or not, a panel a name.

    names: of a training step, or val/... of an evaluation. Raises UserError where none has one."""
    columns = min(3, len(names))
    figure = Figure(figsize=(3.4 * columns, 2.6 * -(-len(names) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(names) // columns), columns, squeeze=False).flatten()
    for axes, name in zip(panels, names):
        key, drawn = name if "/" in name else f"train/{name}", False
        for i, folder in enumerate(folders):
            lines = [line for line in read_metrics(folder) if line.get(key) is not None]
            points = [(line["tokens"], line[key]) for line in lines]
            if points:
                label = os.path.basename(os.path.normpath(folder)) if len(folders) > 1 else None
                axes.plot(*zip(*points), label=label, **look(i) | {"marker": ""})
                drawn = True
        if not drawn and len(names) == 1:
            raise UserError(
                f"no line of metrics.jsonl has {key}", f"wanted one of {names_of(folders)}"
            )
        axes.xaxis.set_major_formatter(compare.short)
        plain(axes, xlabel="tokens", ylabel=name.replace("_", " "))
        if axes is not panels[0] and axes.get_legend():
            axes.get_legend().remove()
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    return figure


def names_of(folders: list[str]) -> str:
    found = {n for folder in folders for line in read_metrics(folder) for n in line if "/" in n}
    return ", ".join(sorted(n.removeprefix("train/") for n in found))
