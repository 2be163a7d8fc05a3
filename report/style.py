"""What all figures look like, and how one is saved."""

import os

from matplotlib.figure import Figure

from klsplice.errors import UserError

# P. Tol's; the first four are apart in greyscale too
COLOURS = ("#004488", "#BB5566", "#DDAA33", "black", "#228833", "#66CCEE", "#AA3377")
DASHES, MARKERS = ("-", "--", "-.", ":"), "os^Dv"
PALE = "#D0D0D0"
GREY = {"linestyle": ":", "marker": "o", "markersize": 4, "color": "#888888", "fillstyle": "none"}
FORMATS = (".png", ".pdf", ".svg")


def new_figure() -> Figure:
    return Figure(figsize=(5.6, 3.4), layout="constrained")


def look(i: int) -> dict:
    """28 kinds of line, one after the other."""
    at = i % len(COLOURS)
    line = {"color": COLOURS[at], "linestyle": DASHES[(at + i // len(COLOURS)) % 4]}
    return line | {"linewidth": 1.5, "marker": MARKERS[i % 5], "markersize": 4}


def plain(axes, **words) -> None:
    axes.set(**words)
    axes.spines[["top", "right"]].set_visible(False)


def short(x: float, _=None) -> str:
    """25000 as 25k."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(x) >= size:
            return f"{x / size:.3g}{unit}"
    return f"{x:g}"


def save(figure: Figure, path: str, *, force: bool = True) -> None:
    """With one legend below its panels. Raises UserError where `path` is there, if not forced, or
    ends in none of FORMATS."""
    if not path.endswith(FORMATS):
        raise UserError(f"{path} is no figure", f"wanted a name that ends in {', '.join(FORMATS)}")
    if os.path.exists(path) and not force:
        raise UserError(f"{path} is there already", "give --out another name, or add --force")
    both = [axes.get_legend_handles_labels() for axes in figure.axes]
    lines = {label: line for lines, labels in both for line, label in zip(lines, labels)}
    if lines:
        width = 0.6 + 0.068 * max(map(len, lines))  # inches of an entry
        columns = max(1, min(len(lines), int(figure.get_figwidth() / width)))
        figure.set_figwidth(max(figure.get_figwidth(), width))
        figure.set_figheight(figure.get_figheight() + 0.1 + 0.17 * -(-len(lines) // columns))
        where = {"loc": "outside lower center", "ncols": columns}
        figure.legend(lines.values(), lines, frameon=False, fontsize=8, **where)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path, dpi=140)
