"""Tables, records, pages and figures of runs, on folders that are written by hand."""

import json
import math
import os
import shutil
import statistics
from pathlib import Path

import numpy as np
import pandas
import pytest
from matplotlib.figure import Figure

from klsplice import settings
from report import figures, pages, runs
from report.__main__ import main as report

NUMBERS = {"ce_clean": 2.5, "ce_zero": 11.0, "ce_before": 2.75, "ce_after": 2.625}
NUMBERS |= {"gap_closed": 0.5, "ce_recovered_after": 0.985, "kl_before": 0.2, "kl_after": 0.05}
NUMBERS |= {"fvu_before": 0.3, "fvu_after": 0.2, "l0_after": 31.25, "dead_fraction_after": 0.125}
NUMBERS |= {"tokens": 49_920, "seconds": 90.0}
SEEDS = [0.50, 0.56, 0.47]  # gap closed by each


def make_run(name, constants=None, source=None, resolved=None, **results):
    """A finished run's folder with the files that report/ reads."""
    folder = Path("runs", name)
    folder.mkdir(parents=True)
    c = settings.defaults() | {"MODEL": "nobody/tiny", "SAE": "runs/src", "RUN_NAME": name}
    about = {"constants": c | (constants or {}), "recipes": ["kl_mse"]}
    about["source"] = {"architecture": "topk", "k": 4, "d_sae": 64} | (source or {})
    about |= {"versions": {"torch": "2.13.0"}, "resolved": {"tokens": "abc"} | (resolved or {})}
    results = NUMBERS | {"device": "2 CPU cores", "commit": "c0ffee"} | results
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "results.json").write_text(json.dumps(results))
    lines = [{"step": 0, "tokens": 0, "seconds": 0.0, "train/mse": 4.0}]
    evaluation = {"seconds": 0.0, "val/ce_clean": 2.5, "val/ce_spliced": 2.75}
    lines += [{"step": s, "tokens": s * 512} | evaluation for s in range(3)]
    write_lines(folder, lines)
    return f"runs/{name}"


def write_lines(folder, lines):
    Path(folder, "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


def swept(**lists):
    """A run of each value or pair of values; the CE after is 2.6, 2.7 ..."""
    names = list(lists)
    pairs = [(a, b) for a in lists[names[0]] for b in (lists[names[1]] if names[1:] else [None])]
    folders = []
    for i, values in enumerate(pairs):
        folders.append(make_run(f"x{i}", dict(zip(names, values)), ce_after=2.6 + i / 10))
    return folders


@pytest.fixture
def seeds(at):
    return [make_run(f"kl_s{i}", {"SEED": i}, gap_closed=gap) for i, gap in enumerate(SEEDS)]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


# ---- tables and records ----------------------------------------------------------------------


def test_a_table_has_a_runs_numbers(at):
    folders = [make_run("one"), make_run("two", ce_after=2.5, fvu_after=None, together=3)]
    heading, one, two = runs.align(runs.table_of(runs.of_folders(folders))).splitlines()
    assert len(heading) == len(one) == len(two)
    row = "one 2.5000 11.00 2.7500 2.6250 50.0% 75.0% 0.9850 0.0500 0.2000 31.2 12.5% 49,920 1.5"
    assert one.split() == row.split()
    assert [two.split()[i] for i in (4, 9, 13)] == ["2.5000", "-", "-"]  # no minutes of its own


def test_a_record_shows_mean_and_standard_error(seeds, at, capsys):
    other = make_run("mse_s0", {"LOSS": "mse"}, gap_closed=0.1)
    assert report(["--record", "x", "--note", "LR.", *seeds, other]) == 0
    record = json.loads((at / "records/x.json").read_text())
    assert record["runs"][0]["constants"].keys() == {*runs.KEPT}
    heading, _, kl, mse, _, note = pages.table(record).splitlines()
    error = statistics.stdev(SEEDS) / math.sqrt(3)
    found = dict(zip(cells(heading), cells(kl)))
    assert found["gap closed"] == f"51.0% ± {error:.1%}" and found["run"] == "kl (n=3)"
    assert found["CE clean"] == "2.5000" and found["KL removed"] == "75.0%"
    assert cells(mse)[0] == "mse_s0" and "10.0%" in mse
    assert "standard error" in note and note.endswith("LR.") and "commit c0ffee" in note
    short = pages.results(record).splitlines()
    few = dict(zip(cells(short[0]), cells(short[2])))
    assert few == {name: found[name] for name in ("run", *pages.SHORT)}
    for name in ("x", "../x"):  # nothing is overwritten
        assert report(["--record", name, other]) == 2


def test_seeds_are_told_by_constants_not_names(at):
    crossed = [(seed, sae) for sae in ("a", "b") for seed in (0, 1)]
    folders = [make_run(f"r_s{i}", {"SEED": s, "SAE": x}) for i, (s, x) in enumerate(crossed)]
    folders.append(make_run("mine", {"SEED": 2, "SAE": "a"}))
    folders.append(make_run("text_s3", {"SEED": 3, "SAE": "a"}, resolved={"tokens": "other"}))
    table = runs.of_folders(folders)
    groups = [[*group["name"]] for _, group in table.groupby("setting", sort=False)]
    assert groups == [["r_s0", "r_s1", "mine"], ["r_s2", "r_s3"], ["text_s3"]]


def test_an_sae_that_was_moved_is_the_same(at):
    where = [
        make_run(f"x_s{i}", {"SAE": f"at{i}/sae", "SEED": i}, None, {"sae": "5ae"}) for i in (0, 1)
    ]
    table = runs.of_folders(where)
    assert table["setting"].nunique() == 1 and runs.varied(table) == ["SEED"]


@pytest.fixture
def readme(seeds, at):
    text = "# T\n<!-- table: x -->\nold\n<!-- end -->\n\ntext \\1\n<!-- headline: x -->\n"
    (at / "README.md").write_text(text)
    report(["--record", "x", *seeds])
    return at / "README.md"


def test_pages_are_renewed_and_checked(readme, at):
    before = readme.read_text()
    assert report(["--check"]) == 1 and readme.read_text() == before
    assert report(["--readme"]) == 0 and report(["--check"]) == 0
    after = readme.read_text()
    assert "51.0% ± 2.6%" in after and "old" not in after
    assert (
        after.startswith("# T\n<!-- table: x -->\n| run |") and "text \\1\n<!-- headline" in after
    )
    readme.write_text(after.replace("51.0%", "52.0%"))
    assert report(["--check"]) == 1
    (at / "records/x.json").unlink()
    assert report(["--check"]) == 2 and report(["--readme"]) == 2


REQUIRED = {(0.50, 0.10): 0, (0.25, 0.05): 0, (0.24, 0.01): 1, (0.50, 0.20): 1, (0.25, -0.1): 0}
REQUIRED |= {(-0.1, -0.2): 1, (None, 0.10): 1, (0.50, None): 1}  # of --require 0.25 3


@pytest.mark.parametrize("gaps", REQUIRED)
def test_require_wants_share_and_multiple(at, gaps):
    pair = [make_run(name, gap_closed=gap) for name, gap in zip("ab", gaps)]
    assert report(["--require", "0.25", "3", *pair]) == REQUIRED[gaps]
    assert report(["--require", "0.25", "3", pair[0]]) == 2


# ---- as data ---------------------------------------------------------------------------------


def test_seeds_are_averaged_with_their_error(at, capsys):
    folders = swept(LR=[1e-3, 1e-2], SEED=[0, 1])
    folders.append(make_run("again", {"LR": 1e-3, "SEED": 0}, ce_after=9.0))
    (at / folders[3] / "results.json").unlink()
    write_lines(folders[3], [{"tokens": 512, "seconds": 60.0}])
    assert report([*folders, "--mean", "--csv", "m.csv"]) == 0
    assert "again is left out" in capsys.readouterr().out
    table = pandas.read_csv("m.csv")
    assert [*table["n"]] == [2, 1, 1] and [*table["LR"]] == [1e-3, 1e-2, 1e-2]
    assert [*table["state"]] == ["finished", "finished", "stopped"] and "SEED" not in table
    assert table["ce_after"][0] == pytest.approx(2.65)
    assert table["ce_after_se"][0] == pytest.approx(0.05)
    assert report([*folders, "--csv", "m.csv"]) == 2  # nothing is overwritten


def test_rows_say_what_varies_and_a_stopped_run_has_no_seconds(at):
    folders = [make_run("a", {"LR": 1.0}, {"k": 8}), make_run("b", {"LR": 2.0})]
    (at / folders[1] / "results.json").unlink()
    write_lines(folders[1], [{"tokens": 512, "seconds": 60.0, "train/mse": 1.0}])
    assert report([*folders, "--csv", "r.csv"]) == 0
    table = pandas.read_csv("r.csv")
    assert [*table.columns[:6]] == [*runs.IDENTITY, "LR"] and "setting" not in table
    assert [*table["k"]] == [8, 4] and [*table["tokens"]] == [49_920, 512]
    assert table["seconds"][0] == 90 and math.isnan(table["seconds"][1])
    assert report([*folders, "--curves", "--csv", "c.csv"]) == 0
    lines = pandas.read_csv("c.csv")
    assert [*lines["LR"]] == [1, 1, 1, 1, 2] and lines["train/mse"][4] == 1


# ---- labels and points -----------------------------------------------------------------------


def test_sources_and_measured_runs_are_no_points(at, capsys):
    source = make_run("src", {"SAE": "fresh", "LOSS": "mse"}, ce_clean=2.6)
    measured = make_run("measured", {"TOKENS": 0})
    tuned = swept(LR=[1e-3, 1e-2])
    fresh = make_run("fresh", {"SAE": "fresh"})
    table = figures.points(runs.of_folders([source, measured, *tuned, fresh]))
    assert [*table["name"]] == ["x0", "x1", "fresh"]
    assert "src, measured" in capsys.readouterr().out
    assert [*figures.points(runs.of_folders([source]))["name"]] == ["src"]


# ---- figures ---------------------------------------------------------------------------------


def drawn(drawing, folders, *further):
    figure = Figure()
    drawing(figure, figures.points(runs.of_folders(folders)), *further)
    figure.draw_without_rendering()
    return figure.axes


def against(folders, x, y="ce_after", **options):
    """{label: (points, errors, line style)} of a panel, and the panel."""
    figure = Figure()
    figures.against(figure, runs.of_folders(folders), x, [y], **options)
    figure.draw_without_rendering()
    found = {}
    for bars in figure.axes[0].containers:
        errors = [np.ptp(part[:, 1]) / 2 for part in bars.lines[2][-1].get_segments()]
        line = bars.lines[0]
        found[bars.get_label()] = (line.get_xydata().tolist(), errors, line.get_linestyle())
    return found, figure.axes[0]


def test_seeds_are_a_point_with_its_error(at):
    found, axes = against(swept(LR=[1e-2, 1e-3], SEED=[0, 1]), "LR")
    ((label, (points, errors, style)),) = found.items()
    assert label == "(n = 2)" and style == "-"
    assert points == pytest.approx(np.array([[1e-3, 2.85], [1e-2, 2.65]]))
    assert errors == pytest.approx([0.05, 0.05])
    clean, before = axes.get_lines()[-1], axes.get_lines()[-2]
    assert {*clean.get_ydata()} == {2.5} and {*before.get_ydata()} == {2.75}
    assert axes.get_xscale() == "log"


def test_the_frontier_shows_kl_removed_against_fvu(at):
    folders = [make_run("src", {"SAE": "fresh"})]
    for i, (rate, seed) in enumerate([(1e-3, 0), (1e-3, 1), (1e-4, 0), (1e-4, 1)]):
        for loss, fvu in (("kl+mse", 0.2), ("mse", 0.1)):
            c = {"LOSS": loss, "LR": rate, "SEED": seed}
            numbers = {"fvu_after": fvu + i / 100, "kl_after": 0.2 - i / 100}
            folders.append(make_run(f"{loss}{i}", c, **numbers))
    kl, gap = drawn(figures.frontier, folders)
    lines = {bars.get_label(): bars.lines[0].get_xydata() for bars in kl.containers}
    assert lines.keys() == {"LOSS kl+mse (n = 2)", "LOSS mse (n = 2)"}
    wanted = np.array([[0.125, 0.125], [0.105, 0.025]])  # in the order of the rates
    assert lines["LOSS mse (n = 2)"] == pytest.approx(wanted)
    assert gap.get_ylabel() == "gap closed" and kl.get_ylabel() == "KL removed"
    (before,) = [x.get_xydata() for x in kl.get_lines() if x.get_label() == "before"]
    assert before == pytest.approx(np.array([[0.3, 0]]))


def test_ce_has_a_band_over_seeds_and_one_clean_line(at):
    folders = [make_run(f"a_s{i}", {"SEED": i}) for i in range(3)]
    for folder, ce in zip(folders, (2.0, 2.5, 2.1)):
        line = {"step": 0, "tokens": 0, "val/ce_clean": 1.5, "val/ce_spliced": 3.0}
        write_lines(folder, [line, line | {"step": 1, "tokens": 512, "val/ce_spliced": ce}])
    folders.append(make_run("src", {"SAE": "fresh"}, ce_clean=9.0))
    (axes,) = drawn(figures.ce, folders)
    (line, clean), (band,) = axes.get_lines(), axes.collections
    assert line.get_xydata() == pytest.approx(np.array([[0, 3.0], [512, 2.2]]))
    error = statistics.stdev([2.0, 2.5, 2.1]) / math.sqrt(3)
    edges = {round(y, 9) for x, y in band.get_paths()[0].vertices if x == 512}
    assert edges == {round(2.2 - error, 9), round(2.2 + error, 9)}
    assert {*clean.get_ydata()} == {1.5}


# ---- the command -----------------------------------------------------------------------------


def test_a_figure_has_the_users_path_and_overwrites_nothing(at):
    folders = swept(LR=[1e-3, 1e-2])
    words = ["--x", "LR", "--y", "kl_removed,fvu_after", *folders, "--out", "paper/a.pdf"]
    assert figures.main(words) == 0 and os.path.getsize("paper/a.pdf") > 1000
    assert figures.main(words) == 2 and figures.main([*words, "--force"]) == 0
    wrong = (["--x", "none"], ["--x", "LR", "--y", "none"], ["--curve", "none"])
    for words in wrong:
        assert figures.main([*words, "--out", "d.png", "--force", *folders]) == 2
    assert figures.main(["--out", "d.jpg", *folders]) == 2
    with pytest.raises(SystemExit):
        figures.main(["--y", "kl_after", *folders])
    assert not (at / "d.png").exists() and not (at / "d.jpg").exists()


def test_a_record_is_drawn_without_its_runs(at, capsys):
    folders = [make_run("a"), make_run("b", {"LOSS": "mse"})]
    report(["--record", "x", *folders])
    shutil.rmtree(at / "runs")
    assert figures.main(["--record", "x"]) == 0 and (at / "records/x-ce.png").exists()
    assert figures.main(["--record", "x", "--x", "LOSS"]) == 0
