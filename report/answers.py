"""The figures of evaluations, each from its JSON alone: runs/<name>/evals/<evaluation>.json."""

import numpy as np

from report.style import look, new_figure, plain, save, short

TOKENS = {
    "predicted": "class of the predicted token",
    "count": "its count in the training text",
    "position": "position in the context",
}


def tokens(figure, answer: dict) -> None:
    """Cost by class of the predicted token, count and position; distance by block."""
    figure.set_size_inches(9, 6)
    panels, shown = figure.subplots(2, 2), answer["figure"]
    for axes, (grouping, title) in zip(panels.flat, TOKENS.items()):
        costs_GX = np.array([*shown["cost"][grouping].values()])
        at_G = np.arange(len(costs_GX))
        for i in (0, 1):  # before, after
            bars = {"width": 0.4, "yerr": costs_GX[:, 2 + i], "color": look(i)["color"]}
            axes.bar(at_G + 0.4 * i - 0.2, costs_GX[:, i], **bars)
        axes.set_xticks(at_G, [*shown["cost"][grouping]], rotation=25, ha="right", fontsize=8)
        plain(axes, title=title, ylabel="cost, nats per token")
    last = panels[1, 1]
    for i, (when, values) in enumerate(zip(("before", "after"), shown["relative L2"])):
        last.plot(np.arange(len(values)) + shown["first block"], values, label=when, **look(i))
    last.xaxis.get_major_locator().set_params(integer=True)
    last.set_ylim(0)
    plain(last, title="distance from the clean pass", xlabel="after block", ylabel="relative L2")


def steering(figure, answer: dict) -> None:
    """Gain against strength, mean over latents, with its interval."""
    figure.set_size_inches(9, 3.8)
    panels, strengths = figure.subplots(1, 2, sharey=True), answer["figure"]["strengths"]
    for axes, kind in zip(panels, ("positives", "negatives")):
        for i, when in enumerate(("before", "after")):
            mean, low, high = zip(*answer["figure"]["curves"][f"{kind}, {when}"])
            axes.plot(strengths, mean, label=when, **look(i))
            axes.fill_between(strengths, low, high, color=look(i)["color"], alpha=0.2)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(strengths, [f"{s:g}" for s in strengths])
        plain(axes, title=kind, xlabel="strength, mean residual norms")
    panels[0].set_ylabel("log-likelihood gained, nats per token")


def timing(figure, answer: dict) -> None:
    """CE over the clean LM's, against tokens and, where there are times, against minutes."""
    figure.set_size_inches(9, 3.8)
    panels = figure.subplots(1, 2, sharey=True)
    for i, (name, curve) in enumerate(answer["figure"].items()):
        cost = np.array(curve["ce"]) - answer["numbers"]["ce_clean"]
        panels[0].plot(curve["tokens"], cost, label=name, **look(i))
        if curve["seconds"]:
            panels[1].plot(np.array(curve["seconds"]) / 60, cost, **look(i))
    panels[0].xaxis.set_major_formatter(short)
    plain(panels[0], xlabel="training tokens", yscale="log", ylabel="CE over the clean LM's, nats")
    panels[0].yaxis.set_major_formatter(short)
    panels[0].yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:.0e}"[0] in "25" else "")
    plain(panels[1], xlabel="minutes of training")


DRAWN = {"tokens": tokens, "steering": steering, "timing": timing}


def draw(answer: dict, path: str, *, force: bool = True) -> bool:
    """Write `path`; False where an evaluation of that name has no figure. Raises UserError."""
    if answer["name"] not in DRAWN:
        return False
    figure = new_figure()
    DRAWN[answer["name"]](figure, answer)
    save(figure, path, force=force)
    return True
