"""Does an evaluation's figure show its numbers?"""

import numpy as np
import pytest
from matplotlib.figure import Figure

from report import eval_figures


def drawn(name, found):
    figure = Figure()
    eval_figures.DRAWN[name](figure, found)
    return figure.axes


def curves(axes):
    """{legend: its points} of the lines that have one."""
    lines = [line for line in axes.lines if not line.get_label().startswith("_")]
    return {line.get_label(): line.get_xydata().tolist() for line in lines}


def bars(axes):
    """{legend: (height, its error bar's ends) of each group}."""
    found = {}
    for bar in axes.containers:
        if (name := bar.get_label()).startswith("_"):  # error bars have a container of their own
            continue
        heights = [patch.get_height() for patch in bar]
        ends = [(None, None)] * len(heights)
        if bar.errorbar:
            ends = [tuple(path[:, 1]) for path in bar.errorbar.lines[2][0].get_segments()]
        found[name] = list(zip(heights, ends))
    return found


def ticks(axes):
    return [label.get_text() for label in axes.get_xticklabels()]


def test_tokens_shows_each_class_before_and_after_with_errors_and_distance_by_block():
    cost = {"a word": (0.4, 0.2, 0.04, 0.02), "a digit": (0.6, 0.3, 0.06, 0.03)}
    groupings = "predicted", "count in training text", "position"
    shown = {"cost": {g: cost for g in groupings}, "first block": 15}
    shown["relative L2"] = [[0.5, 0.6], [0.3, 0.2]]
    panels = drawn("tokens", {"figure": shown})
    for axes in panels[:3]:
        assert ticks(axes) == ["a word", "a digit"]
        for when, (at, error) in {"before": (0, 2), "after": (1, 3)}.items():
            for (height, ends), wanted in zip(bars(axes)[when], cost.values()):
                assert height == wanted[at]
                assert ends == pytest.approx((height - wanted[error], height + wanted[error]))
    wanted = {"before": [[15, 0.5], [16, 0.6]], "after": [[15, 0.3], [16, 0.2]]}
    assert curves(panels[3]) == wanted


def test_steering_shows_the_mean_within_its_interval_at_each_strength():
    at = {"positives, before": 0.1, "positives, after": 0.2}
    at |= {"negatives, before": -0.1, "negatives, after": -0.2}
    three = {name: [(m * s, m * s - 0.05, m * s + 0.07) for s in (1, 2)] for name, m in at.items()}
    panels = drawn("steering", {"figure": {"strengths": [1, 2], "curves": three}})
    for axes, kind in zip(panels, ("positives", "negatives")):
        assert axes.get_title() == kind
        for when, band in zip(("before", "after"), axes.collections):
            mean = at[f"{kind}, {when}"]
            assert curves(axes)[when] == [[1, mean], [2, 2 * mean]]
            y = np.unique(band.get_paths()[0].vertices[:, 1])
            edges = [mean * s + d for s in (1, 2) for d in (-0.05, 0.07)]
            assert y == pytest.approx(sorted(edges))


def test_timing_shows_the_cost_over_the_clean_lm_against_minutes_and_tokens():
    runs = {"a": {"ce": [3.5, 3.2], "seconds": [0, 120], "tokens": [0, 4096]}}
    minutes, tokens = drawn("timing", {"figure": runs, "numbers": {"ce_clean": 3.0}})
    (points,) = curves(minutes).values()
    assert np.array(points) == pytest.approx(np.array([[0, 0.5], [2, 0.2]]))
    (points,) = curves(tokens).values()
    assert np.array(points) == pytest.approx(np.array([[0, 0.5], [4096, 0.2]]))


def test_benchmarks_shows_each_variants_accuracy_and_error_and_no_difference():
    table = [["", "mmlu", "arc"], ["LM", "0.50 ± 0.02", "0.40"], ["after", "0.45 ± 0.03", "0.30"]]
    table += [["after vs LM", "-0.05 ± 0.01", "-0.1"], ["questions", "500", "99"]]
    (axes,) = drawn("benchmarks", {"table": table})
    assert ticks(axes) == ["mmlu", "arc"]
    shown = bars(axes)
    assert shown.keys() == {"LM", "after"}
    assert [height for height, _ in shown["LM"]] == [0.5, 0.4]
    (_, first), (_, second) = shown["after"]
    assert first == pytest.approx((0.42, 0.48)) and second == pytest.approx((0.3, 0.3))


def test_saebench_shows_what_is_a_share_of_one_alone():
    table = [["", "CE score", "L0", "LM", "SAE top 1"], ["before", "0.95", "32", "0.9", "0.7"]]
    table += [["after", "0.98", "32", "0.9", "0.8"]]
    (axes,) = drawn("saebench", {"table": table})
    assert ticks(axes) == ["CE score", "LM", "SAE top 1"]
    heights = {name: [height for height, _ in shown] for name, shown in bars(axes).items()}
    assert heights == {"before": [0.95, 0.9, 0.7], "after": [0.98, 0.9, 0.8]}
