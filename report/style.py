"""What all figures look like, and how one is saved."""

import os

from matplotlib.figure import Figure

from klsplice.errors import UserError

COLOURS = ("#004488", "#BB5566", "#DDAA33", "black")  # P. Tol's, apart in greyscale too
DASHES, MARKERS = ("-", "--", "-.", ":"), "os^Dv"
BESIDE = 5  # curves; the legend of more stands beside the axes
PALE, MIDDLE = "#D0D0D0", "#5588BB"
HOLLOW = {"linestyle": ":", "marker": "o", "color": "black", "markerfacecolor": "white"}
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
    found = {"color": COLOURS[i % 4], "linestyle": DASHES[i % 4], "linewidth": 1.5}
    return found | ({"marker": mark[i % 5], "markersize": 4} if mark else {})


def plain(axes, **said) -> None:
    axes.set(**said)
    axes.spines[["top", "right"]].set_visible(False)
    if n := sum(map(bool, axes.get_legend_handles_labels()[1])):
        beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if n > BESIDE else {}
        axes.legend(frameon=False, fontsize=8, **beside)


def clean_line(axes, rows: list[dict]) -> None:
    for ce in sorted({round(row["ce_clean"], 4) for row in rows}):
        axes.axhline(ce, color="black", linewidth=0.8)
        at = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate("clean LM", (1, ce), (0, 2), ha="right", fontsize=8, **at)
