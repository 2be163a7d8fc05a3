"""Tables say what the runs measured, README.md holds what records/ say, figures are drawn."""

import json
import math
import statistics

import pytest

import plots
import report

NUMBERS = {
    "ce_clean": 2.5,
    "ce_zero": 11.0,
    "ce_before": 2.75,
    "ce_after": 2.625,
    "gap_closed": 0.5,
    "ce_recovered_after": 0.985,
    "kl_after": 0.1,
    "fvu_after": 0.2,
    "l0_after": 31.25,
    "dead_fraction": 0.125,
    "tokens": 49_920,
    "seconds": 90.0,
}
SEEDS = [0.50, 0.56, 0.47]  # gap closed by each


def make_run(name, **changes):
    """A finished run's folder with the files that report.py and plots.py read."""
    import pathlib

    folder = pathlib.Path("runs", name)
    folder.mkdir(parents=True)
    about = {"constants": dict.fromkeys([*report.KEPT, "RUN_NAME"], 1), "recipes": ["kl_mse"]}
    about |= {"versions": {"torch": "2.13.0"}, "resolved": {"tokens": "abc", "sae_commit": None}}
    results = NUMBERS | {"device": "2 CPU cores", "commit": "c0ffee"} | changes
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "results.json").write_text(json.dumps(results))
    lines = [{"step": s, "tokens": s * 512, "val/ce_spliced": 2.75 - s / 100} for s in range(5)]
    lines[1:1] = [{"step": 0, "tokens": 0, "train/kl": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return f"runs/{name}"


@pytest.fixture
def seeds(at):
    return [make_run(f"kl_s{i}", gap_closed=gap, seconds=60.0) for i, gap in enumerate(SEEDS)]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def column(line, heading):
    return cells(line)[1 + list(report.COLUMNS).index(heading)]


# ---- tables ----------------------------------------------------------------------------------


def test_a_table_has_a_row_a_run_with_its_numbers(at):
    lines = report.table([make_run("one"), make_run("two", ce_after=2.5, fvu_after=None)])
    heading, one, two = lines.splitlines()
    assert len(heading) == len(one) == len(two)  # aligned
    row = "one 2.5000 11.00 2.7500 2.6250 50.0% 0.9850 0.1000 0.2000 31.2 12.5% 49,920 1.5"
    assert one.split() == row.split()
    assert two.split()[4] == "2.5000" and two.split()[8] == "-"


def test_a_record_shows_mean_and_standard_error_over_the_seeds(seeds):
    rows = [report.read(folder) for folder in [*seeds, make_run("mse_s0", gap_closed=0.1)]]
    heading, rule, kl, mse, _, note = report.markdown({"runs": rows, "note": "LR."}).splitlines()
    error = statistics.stdev(SEEDS) / math.sqrt(3)
    assert column(kl, "gap closed") == f"51.0% ± {error:.1%}" == "51.0% ± 2.6%"
    assert cells(kl)[0] == "kl (n=3)" and cells(mse)[0] == "mse_s0"
    assert column(mse, "gap closed") == "10.0%"
    assert column(kl, "CE clean") == "2.5000" and column(kl, "tokens") == "49,920"
    assert len(cells(heading)) == len(cells(rule)) == len(cells(kl)) == 1 + len(report.COLUMNS)
    for part in ("2 CPU cores", "torch 2.13.0", "commit c0ffee", "standard error", "LR."):
        assert part in note


def test_seeds_are_grouped_by_what_they_are_named_after_alone(at):
    names = ["a_s0", "a_s1", "b-s0", "a_s1x", "bs0"]
    rows = [report.read(make_run(name)) for name in names]
    lines = report.markdown({"runs": rows}).splitlines()[2:-2]
    assert [cells(line)[0] for line in lines] == ["a (n=2)", "b-s0", "a_s1x", "bs0"]


def test_a_single_run_says_n_1(at):
    text = report.markdown({"runs": [report.read(make_run("one"))]})
    assert text.endswith("n = 1.") and "±" not in text


def test_a_record_keeps_the_constants_that_matter_and_no_other(at, capsys):
    assert report.main(["--record", "x", "--note", "Of one.", make_run("one")]) == 0
    record = json.loads((at / "records/x.json").read_text())
    (row,) = record["runs"]
    assert record["note"] == "Of one." and row["constants"].keys() == set(report.KEPT)
    assert row["fingerprint"] == "abc" and row["recipes"] == ["kl_mse"]
    assert "one" in capsys.readouterr().out


# ---- README.md -------------------------------------------------------------------------------


@pytest.fixture
def readme(seeds, at):
    (at / "README.md").write_text(
        "# Title\n<!-- table: x -->\nold\n<!-- end -->\n\ntext \\1\n"
        "<!-- table: x -->\n<!-- end -->\n"
    )
    report.main(["--record", "x", *seeds])
    return at / "README.md"


def test_check_tells_a_stale_readme_from_a_renewed_one(readme, capsys):
    before = readme.read_text()
    assert report.main(["--check"]) == 1 and readme.read_text() == before
    assert "stale" in capsys.readouterr().out
    assert report.main(["--readme"]) == 0 and report.main(["--check"]) == 0
    after = readme.read_text()
    assert after.count("51.0% ± 2.6%") == 2 and "old" not in after
    assert after.startswith("# Title\n<!-- table: x -->\n| run |") and "text \\1\n" in after
    readme.write_text(after.replace("51.0%", "52.0%", 1))
    assert report.main(["--check"]) == 1


def test_the_headline_says_what_both_arms_closed(at):
    runs = [make_run(f"demo-kl_mse-s{i}", gap_closed=gap) for i, gap in enumerate(SEEDS)]
    runs += [make_run(f"demo-mse-s{i}", gap_closed=gap / 10) for i, gap in enumerate(SEEDS)]
    record = {"runs": [report.read(folder) for folder in runs]}
    for row in record["runs"]:
        row["constants"]["MODEL"] = "assets/tiny"
        row["name"] = row["name"].removeprefix("demo-")
    text = report.headline(record)
    for part in (
        "51.0% ± 2.6%",
        "5.1% ± 0.3%",
        "In tiny it",
        "49,920 tokens",
        "2 minutes",
        "n = 3",
    ):
        assert part in text


def test_a_changed_record_makes_the_readme_stale(readme, at):
    report.main(["--readme"])
    report.main(["--record", "x", make_run("other_s0", gap_closed=0.9)])
    assert report.main(["--check"]) == 1


def test_a_missing_record_is_an_error_not_a_traceback(readme, at, capsys):
    (at / "records/x.json").unlink()
    assert report.main(["--check"]) == 2 and "x.json is missing" in capsys.readouterr().err
    assert report.main(["--readme"]) == 2 and "old" in readme.read_text()


# ---- --require -------------------------------------------------------------------------------

REQUIRED = {  # gap closed by ours and by the control -> exit code of --require 0.25 3
    (0.50, 0.10): 0,
    (0.31, 0.10): 0,
    (0.25, 0.05): 0,
    (0.24, 0.01): 1,
    (0.50, 0.20): 1,
    (0.25, -0.1): 0,
    (-0.1, -0.2): 1,
    (None, 0.10): 1,
    (0.50, None): 1,
}


@pytest.mark.parametrize("gaps", REQUIRED)
def test_require_fails_unless_both_share_and_multiple_are_reached(at, capsys, gaps):
    ours, control = (make_run(n, gap_closed=g) for n, g in zip(("ours", "control"), gaps))
    assert report.main(["--require", "0.25", "3", ours, control]) == REQUIRED[gaps]
    assert ("TOO LITTLE" in capsys.readouterr().out) == bool(REQUIRED[gaps])


def test_require_wants_two_finished_runs(at, capsys):
    one = make_run("one")
    for runs in ([one], [one, one, one], []):
        with pytest.raises(SystemExit) as e:
            report.main(["--require", "0.25", "3", *runs])
        assert e.value.code == 2
    assert report.main(["--require", "0.25", "3", one, "runs/none"]) == 2
    assert "no finished run in runs/none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report.main([])


# ---- figures ---------------------------------------------------------------------------------


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def test_plots_draw_a_figure_of_one_run_and_of_several(at, capsys):
    one, two = make_run("one"), make_run("two", ce_clean=2.6)
    plots.run_figures(one, NUMBERS)
    assert min(png_size(at / one / "figures/ce.png")) > 300
    assert plots.main([one, two]) == 0
    assert capsys.readouterr().out == "figures/comparison.png\n"
    assert min(png_size(at / "figures/comparison.png")) > 300


def test_a_figure_has_the_held_out_points_and_the_clean_line(at, monkeypatch):
    drawn = []
    plt = plots._pyplot()
    monkeypatch.setattr(plt, "close", drawn.append)
    plots.run_figures(make_run("one"), NUMBERS)
    (axes,) = drawn[0].axes
    curve, clean = axes.get_lines()
    assert list(curve.get_xdata()) == [0, 512, 1024, 1536, 2048]
    assert list(curve.get_ydata()) == pytest.approx([2.75, 2.74, 2.73, 2.72, 2.71])
    assert set(clean.get_ydata()) == {NUMBERS["ce_clean"]}


def test_plots_of_no_finished_run_are_an_error(at, capsys):
    assert plots.main([]) == 2 and plots.main(["runs/none"]) == 2
    assert "no finished run in runs/none" in capsys.readouterr().err
