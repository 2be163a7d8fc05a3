"""Figures, from metrics.jsonl and results.json alone.

python plots.py runs/a runs/b ...    draws figures/comparison.png of several runs
"""

import json
import os
import sys

GREYS = ("-", "--", ":", "-.")  # line styles tell runs apart in print


def run_figures(folder: str, results: dict) -> None:
    """figures/ce.png of one run."""
    os.makedirs(os.path.join(folder, "figures"), exist_ok=True)
    name = os.path.basename(os.path.normpath(folder))
    lines = _metrics(folder)
    ce_over_tokens({name: lines}, results["ce_clean"], os.path.join(folder, "figures", "ce.png"))


def ce_over_tokens(runs: dict[str, list[dict]], ce_clean: float, path: str) -> None:
    """Held-out cross-entropy of the spliced LM against training tokens, and the clean LM's."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(6, 3.6), constrained_layout=True)
    for i, (name, lines) in enumerate(runs.items()):
        points = [(x["tokens"], x["val/ce_spliced"]) for x in lines if "val/ce_spliced" in x]
        style = {"linestyle": GREYS[i % 4], "marker": "os^D"[i % 4], "markersize": 4}
        axes.plot(*zip(*points), label=name, **style)
    axes.axhline(ce_clean, color="black", linewidth=1)
    axes.annotate(
        "clean LM", (0.99, ce_clean), xycoords=("axes fraction", "data"), ha="right", va="bottom"
    )
    axes.set(xlabel="training tokens", ylabel="cross-entropy, nats per token")
    axes.xaxis.set_major_formatter(lambda x, _: _short(x))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _short(x: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(x) >= size:
            return f"{x / size:g}{unit}"
    return f"{x:g}"


def _metrics(folder: str) -> list[dict]:
    with open(os.path.join(folder, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def main(folders: list[str]) -> int:
    missing = [r for r in folders if not os.path.exists(os.path.join(r, "results.json"))]
    if missing or not folders:
        print(
            f"error: no finished run in {', '.join(missing) or 'no folder at all'}", file=sys.stderr
        )
        return 2
    with open(os.path.join(folders[0], "results.json")) as f:
        ce_clean = json.load(f)["ce_clean"]
    runs = {os.path.basename(os.path.normpath(folder)): _metrics(folder) for folder in folders}
    os.makedirs("figures", exist_ok=True)
    path = os.path.join("figures", "comparison.png")
    ce_over_tokens(runs, ce_clean, path)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
