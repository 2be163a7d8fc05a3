"""What an evaluation's figure shows. Each draws from the evaluation's JSON alone, for figures.py.

A drawing is a function (figure, found): an empty matplotlib Figure, what evals/<name>.json holds.
"""

import numpy as np

from report import compare, style

COLOUR = {"before": "0.55", "after": "0.1"}
STYLE = {"before": "s--", "after": "o-"}


def tokens(figure, found: dict) -> None:
    """Cost by class of the predicted token, count and position; distance by block."""
    figure.set_size_inches(9, 6)
    panels = figure.subplots(2, 2)
    shown = found["figure"]
    titles = {
        "predicted": "class of the predicted token",
        "count in training text": "its count in the training text",
        "position": "position in the context",
    }
    for axes, (grouping, title) in zip(panels.flat, titles.items()):
        labels, of_label = zip(*shown["cost"][grouping].items())
        before, after, *errors = zip(*of_label)
        values = {"before": before, "after": after}
        _bars(axes, labels, values, errors=dict(zip(values, errors)))
        axes.set_xticks(range(len(labels)), labels, rotation=25, ha="right", fontsize=8)
        axes.set(title=title, ylabel="cost, nats per token")
        axes.axhline(0, color="black", linewidth=0.8)
    last = panels[1, 1]
    for values, (when, colour) in zip(shown["relative L2"], COLOUR.items()):
        at = np.arange(len(values)) + shown["first block"]
        last.plot(at, values, STYLE[when], color=colour, label=when, markersize=4)
    last.set(title="distance from the clean pass", xlabel="after block", ylabel="relative L2")
    last.xaxis.get_major_locator().set_params(integer=True)
    last.set_ylim(0, 1.1 * max(map(max, shown["relative L2"])))
    last.legend(frameon=False)
    panels[0, 0].legend(frameon=False)
    _plain(panels.flat)


def steering(figure, found: dict) -> None:
    """Gain against strength, mean over latents, with its interval."""
    figure.set_size_inches(9, 3.8)
    panels = figure.subplots(1, 2, sharey=True)
    strengths = found["figure"]["strengths"]
    for axes, kind in zip(panels, ("positives", "negatives")):
        for when, colour in COLOUR.items():
            mean, low, high = zip(*found["figure"]["curves"][f"{kind}, {when}"])
            axes.plot(strengths, mean, STYLE[when], color=colour, label=when, markersize=4)
            axes.fill_between(strengths, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(strengths, [f"{s:g}" for s in strengths])
        axes.set(title=kind, xlabel="strength, mean residual norms")
    panels[0].set_ylabel("log-likelihood gained, nats per token")
    panels[0].legend(frameon=False)
    _plain(panels)


def timing(figure, found: dict) -> None:
    """CE over the clean LM's, against minutes and against tokens."""
    figure.set_size_inches(9, 3.8)
    timed = any(x["seconds"] for x in found["figure"].values())
    panels = figure.subplots(1, 1 + timed, sharey=True, squeeze=False)[0]
    for i, (name, x) in enumerate(found["figure"].items()):
        line = {"linestyle": ("-", "--", ":", "-.")[i % 4], "marker": "os^Dv"[i % 5]}
        line |= {"color": str(0.15 * (i % 5)), "label": name, "markersize": 4}
        cost = np.array(x["ce"]) - found["numbers"]["ce_clean"]
        if x["seconds"]:
            panels[0].plot(np.array(x["seconds"]) / 60, cost, **line)
        panels[-1].plot(x["tokens"], cost, **line)
    for axes, label in zip(panels[::-1], ("training tokens", "minutes of training")):
        axes.set(xlabel=label, yscale="log")
    panels[0].yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    panels[0].yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:.0e}"[0] in "25" else "")
    panels[0].set_ylabel("cost: CE over the clean LM's, nats per token")
    panels[-1].xaxis.set_major_formatter(compare.short)
    style.legend(figure, below=True)
    _plain(panels)


def benchmarks(figure, found: dict) -> None:
    """Accuracy of each variant, with its standard error, a group of bars a task."""
    heading, *lines = found["table"]
    lines = [line for line in lines if " vs " not in line[0]][:-1]  # the last counts questions
    pairs = {label: [cell.partition(" ± ") for cell in cells] for label, *cells in lines}
    values = {label: [float(value) for value, *_ in cells] for label, cells in pairs.items()}
    errors = {label: [float(error or 0) for *_, error in cells] for label, cells in pairs.items()}
    _one(figure, heading[1:], values, errors=errors, ylabel="accuracy")


def saebench(figure, found: dict) -> None:
    """What is a share of 1: the cross-entropy score and the probes' accuracies."""
    heading, *lines = found["table"]
    at = [i for i, name in enumerate(heading) if name in ("CE score", "LM") or "top " in name]
    values = {line[0]: [float(line[i]) for i in at] for line in lines}
    _one(figure, [heading[i] for i in at], values, ylabel="score, accuracy")


def _one(figure, labels, values, *, errors=None, ylabel) -> None:
    figure.set_size_inches(6, 3.6)
    axes = figure.subplots()
    _bars(axes, labels, values, errors=errors)
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _plain([axes])


def _bars(axes, labels, values: dict, *, errors=None) -> None:
    """A group of bars for each of `labels`; values, errors: {legend: a number a group}."""
    width = 0.8 / len(values)
    for i, (legend, heights) in enumerate(values.items()):
        at = np.arange(len(labels)) + (i - (len(values) - 1) / 2) * width
        colour = str(0.75 - 0.6 * i / max(1, len(values) - 1))
        bar = {"label": legend, "color": colour, "error_kw": {"linewidth": 0.8}}
        axes.bar(at, heights, width, yerr=(errors or {}).get(legend), **bar)
    axes.set_xticks(range(len(labels)), labels)


def _plain(panels) -> None:
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)


DRAWN = {f.__name__: f for f in (tokens, steering, timing, benchmarks, saebench)}
