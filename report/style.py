"""What all figures look like, and how one is saved."""

import os

from matplotlib.figure import Figure

from klsplice.errors import UserError

# P. Tol's; the first four are apart in greyscale too
COLOURS = ("#004488", "#BB5566", "#DDAA33", "black", "#228833", "#66CCEE", "#AA3377")
DASHES, MARKERS = ("-", "--", "-.", ":"), "os^Dv"
INSIDE = 5, 30  # curves, and characters of a label: the legend of more stands below the panels
PALE, MIDDLE = "#D0D0D0", "#5588BB"
HOLLOW = {"linestyle": ":", "marker": "o", "color": "#888888", "markerfacecolor": "white"}
CE = "spliced cross-entropy, nats per token"
FORMATS = (".png", ".pdf", ".svg")


def save(figure: Figure, path: str, *, force: bool = True) -> None:
    """path: its ending is one of FORMATS. Raises UserError where it is there, if not forced."""
    if not path.endswith(FORMATS):
        raise UserError(f"{path} is no figure", f"wanted a name that ends in {', '.join(FORMATS)}")
    if os.path.exists(path) and not force:
        raise UserError(f"{path} is there already", "give --out another name, or add --force")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    small = {"pil_kwargs": {"optimize": True}} if path.endswith(".png") else {}
    figure.savefig(path, dpi=140, **small)


def look(i: int, mark: str = MARKERS) -> dict:
    """28 kinds of line, one after the other."""
    at = i % len(COLOURS)
    found = {"color": COLOURS[at], "linestyle": DASHES[(at + i // len(COLOURS)) % 4]}
    return found | {"linewidth": 1.5} | ({"marker": mark[i % 5], "markersize": 4} if mark else {})


def plain(axes, **said) -> None:
    axes.set(**said)
    axes.spines[["top", "right"]].set_visible(False)


def legend(figure: Figure, *, below: bool = False) -> None:
    """A legend in each panel; or one below them all, where that is asked for or it is large.
    None where there is one."""
    if figure.legends or any(axes.get_legend() for axes in figure.axes):
        return
    of_panels = [(axes, *axes.get_legend_handles_labels()) for axes in figure.axes]
    found = {label: handle for _, *both in of_panels for handle, label in zip(*both)}
    longest = max(map(len, found), default=0)
    if not (below or len(found) > INSIDE[0] or longest > INSIDE[1]):
        for axes, handles, _ in of_panels:
            if handles:
                axes.legend(frameon=False, fontsize=8)
    elif found:
        width, height = figure.get_size_inches()
        width = max(width, 0.6 + 0.065 * longest)
        columns = max(1, min(len(found), int(width / (0.6 + 0.065 * longest))))
        figure.set_size_inches(width, height + 0.1 + 0.17 * -(-len(found) // columns))
        where = {"loc": "outside lower center", "ncols": columns}
        figure.legend(found.values(), found, frameon=False, fontsize=8, **where)


def clean_line(axes, rows: list[dict]) -> None:
    for ce in sorted({round(row["ce_clean"], 4) for row in rows}):
        axes.axhline(ce, color="black", linewidth=0.8)
        at = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate("clean LM", (1, ce), (0, 2), ha="right", fontsize=8, **at)
