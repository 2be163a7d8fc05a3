"""Tables say what the runs measured, README.md holds what records/ say, figures are drawn."""

import itertools
import json
import math
import os
import shutil
import statistics

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from safetensors.torch import save_file

from klsplice import settings
from klsplice.errors import UserError
from klsplice.formats import read
from report import card, changes, compare, end, figures, pages, plots, style, tables
from report import data as as_data
from report.__main__ import main as report_main

NUMBERS = {
    "ce_clean": 2.5,
    "ce_zero": 11.0,
    "ce_before": 2.75,
    "ce_after": 2.625,
    "gap_closed": 0.5,
    "ce_recovered_after": 0.985,
    "kl_before": 0.2,
    "fvu_before": 0.3,
    "kl_after": 0.1,
    "fvu_after": 0.2,
    "l0_after": 31.25,
    "dead_fraction_after": 0.125,
    "tokens": 49_920,
    "seconds": 90.0,
}
SEEDS = [0.50, 0.56, 0.47]  # gap closed by each


def make_run(name, constants=None, source=None, **changes):
    """A finished run's folder with the files that report/ reads."""
    import pathlib

    folder = pathlib.Path("runs", name)
    folder.mkdir(parents=True)
    c = dict.fromkeys([*tables.KEPT, "RUN_NAME", "MODEL_REVISION", "SAE_REVISION"], 1)
    c |= {"MODEL": "nobody/tiny", "SAE": "runs/src", "TRAIN": "sae", "LOSS": "kl+mse"}
    c |= {"ADAPTER": "linear", "LORA_BLOCKS": "all", "ARCHITECTURE": ""}
    c |= {"SEED": int(name[-1]) if "_s" in name or "-s" in name else 0} | (constants or {})
    about = {"constants": c, "recipes": ["kl_mse"]}
    about["source"] = {"architecture": "topk", "k": 4, "d_sae": 64} | (source or {})
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
    return cells(line)[1 + list(tables.COLUMNS).index(heading)]


# ---- tables ----------------------------------------------------------------------------------


def test_a_table_has_a_row_a_run_with_its_numbers(at):
    lines = tables.table([make_run("one"), make_run("two", ce_after=2.5, fvu_after=None)])
    heading, one, two = lines.splitlines()
    assert len(heading) == len(one) == len(two)  # aligned
    row = "one 2.5000 11.00 2.7500 2.6250 50.0% 0.9850 0.1000 0.2000 31.2 12.5% 49,920 1.5"
    assert one.split() == row.split()
    assert two.split()[4] == "2.5000" and two.split()[8] == "-"


def test_a_record_shows_mean_and_standard_error_over_the_seeds(seeds):
    rows = [tables.read(folder) for folder in [*seeds, make_run("mse_s0", gap_closed=0.1)]]
    heading, rule, kl, mse, _, note = pages.markdown({"runs": rows, "note": "LR."}).splitlines()
    error = statistics.stdev(SEEDS) / math.sqrt(3)
    assert column(kl, "gap closed") == f"51.0% ± {error:.1%}" == "51.0% ± 2.6%"
    assert cells(kl)[0] == "kl (n=3)" and cells(mse)[0] == "mse_s0"
    assert column(mse, "gap closed") == "10.0%"
    assert column(kl, "CE clean") == "2.5000" and column(kl, "tokens") == "49,920"
    assert len(cells(heading)) == len(cells(rule)) == len(cells(kl)) == 1 + len(tables.COLUMNS)
    for part in ("2 CPU cores", "torch 2.13.0", "commit c0ffee", "standard error", "LR."):
        assert part in note


def test_seeds_of_one_setting_are_grouped_by_their_constants_and_not_by_their_names(at):
    found = {"x_SEED0": 0, "x_SEED1": 1, "mine": 2, "c_s3": 3, "c_s4": 4}
    rows = []
    for name, seed in found.items():
        other = {"WARMUP": 5} if name[0] == "c" else {}  # no record keeps it
        rows.append(tables.read(make_run(name, {"SEED": seed} | other)))
    groups = [["x_SEED0", "x_SEED1", "mine"], ["c_s3", "c_s4"]]
    assert [[row["name"] for row in rows] for rows in tables.grouped(rows)] == groups
    lines = pages.markdown({"runs": rows}).splitlines()[2:-2]
    assert [cells(line)[0] for line in lines] == ["x (n=3)", "c (n=2)"]
    same = [tables.read(make_run(name, {"SEED": 0})) for name in ("d_s0", "e_s0", "d_s1")]
    assert [len(rows) for rows in tables.grouped(same)] == [1, 1, 1]  # one seed, made three times


def test_runs_from_two_saes_are_no_seeds_of_one_setting(at):
    """Nor are those of one name whose SAE, LM or text has changed."""
    crossed = [(seed, f"runs/b_s{sae}") for sae in (0, 1) for seed in (0, 1)]
    folders = [make_run(f"a{i}", {"SEED": s, "SAE": x}) for i, (s, x) in enumerate(crossed)]
    rows = [tables.read(folder) for folder in folders]
    assert [[r["name"] for r in group] for group in tables.grouped(rows)] == [
        ["a0", "a1"],
        ["a2", "a3"],
    ]
    about = json.loads((at / "runs/a1/run.json").read_text())
    about["resolved"]["tokens"] = "another text"
    (at / "runs/a1/run.json").write_text(json.dumps(about))
    rows = [tables.read(folder) for folder in folders[:2]]
    assert len(tables.grouped(rows)) == 2


def test_a_record_of_before_settings_is_grouped_by_names(at):
    rows = [tables.read(make_run(name)) for name in ("a_s0", "a_s1", "b_s0")]
    for row in rows:
        del row["setting"]
    assert [len(rows) for rows in tables.grouped(rows)] == [2, 1]


def test_a_single_run_says_n_1(at):
    text = pages.markdown({"runs": [tables.read(make_run("one"))]})
    assert text.endswith("n = 1.") and "±" not in text


def test_a_record_keeps_the_constants_that_matter_and_no_other(at, capsys):
    assert report_main(["--record", "x", "--note", "Of one.", make_run("one")]) == 0
    record = json.loads((at / "records/x.json").read_text())
    (row,) = record["runs"]
    assert record["note"] == "Of one." and row["constants"].keys() == set(tables.KEPT)
    assert row["fingerprint"] == "abc" and row["recipes"] == ["kl_mse"]
    assert "one" in capsys.readouterr().out


# ---- README.md -------------------------------------------------------------------------------


@pytest.fixture
def readme(seeds, at):
    (at / "README.md").write_text(
        "# Title\n<!-- table: x -->\nold\n<!-- end -->\n\ntext \\1\n"
        "<!-- table: x -->\n<!-- end -->\n"
    )
    report_main(["--record", "x", *seeds])
    return at / "README.md"


def test_check_tells_a_stale_readme_from_a_renewed_one(readme, capsys):
    before = readme.read_text()
    assert report_main(["--check"]) == 1 and readme.read_text() == before
    assert "stale" in capsys.readouterr().out
    assert report_main(["--readme"]) == 0 and report_main(["--check"]) == 0
    after = readme.read_text()
    assert after.count("51.0% ± 2.6%") == 2 and "old" not in after
    assert after.startswith("# Title\n<!-- table: x -->\n| run |") and "text \\1\n" in after
    readme.write_text(after.replace("51.0%", "52.0%", 1))
    assert report_main(["--check"]) == 1


def test_the_headline_says_what_both_arms_closed(at):
    runs = [make_run(f"demo-kl_mse-s{i}", gap_closed=gap) for i, gap in enumerate(SEEDS)]
    mse = {"LOSS": "mse"}
    runs += [make_run(f"demo-mse-s{i}", mse, gap_closed=gap / 10) for i, gap in enumerate(SEEDS)]
    record = {"runs": [tables.read(folder) for folder in runs]}
    for row in record["runs"]:
        row["constants"]["MODEL"] = "assets/tiny"
        row["name"] = row["name"].removeprefix("demo-")
    text = pages.headline(record)
    for part in (
        "51.0% ± 2.6%",
        "5.1% ± 0.3%",
        "On tiny a KL + MSE finetune",
        "49,920 tokens",
        "1.5 minutes",
        "n = 3",
    ):
        assert part in text


def test_gaps_closed_on_the_way_stand_with_their_n_and_the_best_rate_is_said(at):
    """Of a record whose runs did not all end."""
    usual = f"{settings.defaults()['LR']:g}"
    found = {usual: {"10": [0.1, 0.3], "20": [0.25]}, "0.001": {"10": [0.4, 0.4], "20": [0.5]}}
    found["0.01"] = {"10": [0.9]}  # it was stopped
    mse = [make_run(f"mse{i}", {"LOSS": "mse"}, gap_closed=gap) for i, gap in enumerate([-0.1, 0])]
    runs = [make_run("source", {"LOSS": "mse", "SAE": "fresh"}, tokens=1000, gap_closed=0.9), *mse]
    record = {"runs": rows_of(*runs), "gap_closed_on_the_way": {"kl+mse": found}}
    header, _, first, _, last = pages.on_the_way(record).splitlines()
    assert header == "| loss | LR | 10 tokens | 20 tokens |"
    assert first == f"| kl+mse | {usual} | 20.0% ± 10.0% (n = 2) | 25.0% (n = 1) |"
    assert last == "| kl+mse | 0.01 | 90.0% (n = 1) | - |"
    said = pages.stalled(record)
    assert f"closes **20.0% ± 10.0%** at LR {usual} and **40.0%** at LR 0.001 of the gap" in said
    assert "in 10 tokens (n = 2 seeds; 25.0% and 50.0% in 20, n = 1)" in said
    assert "MSE alone closes -10.0% to 0.0%, at any rate (2 runs;" in said


def test_the_headline_names_mse_for_as_long(at):
    longer = {"LOSS": "mse", "PASSES": 6}
    longer = make_run("mse-long", longer, gap_closed=0.4, tokens=6 * 49_920, kl_after=0.12)
    mse = make_run("mse", {"LOSS": "mse"}, gap_closed=0.05, kl_after=0.19)
    runs = [make_run("kl_mse-s0"), make_run("kl_mse-s1", kl_after=0.11), mse, longer]
    text = pages.headline({"runs": [tables.read(folder) for folder in runs]})
    assert "closes **50.0%** of the gap (n = 2 seeds). MSE alone closes 5.0% (n = 1) on" in text
    assert text.endswith("on the same tokens, and 40.0% (n = 1) in the same time.")


def test_a_short_table_has_few_columns_of_the_long_one_and_folds_its_note(at):
    record = {"runs": [tables.read(make_run("one"))], "note": "What varied."}
    long, short = pages.markdown(record).splitlines(), pages.results(record).splitlines()
    cells = [dict(zip(*(line.split(" | ") for line in (t[0], t[2])))) for t in (long, short)]
    for name in ("| run", "before", "after", "gap closed", "KL", "FVU"):
        assert cells[0][name] == cells[1][name]
    assert len(cells[1]) == 7 < len(cells[0]) and "tokens |" in short[0]
    assert short[4].startswith("<details>") and short[6] == long[4] and "What varied." in short[6]


def test_the_speed_is_that_of_the_naive_loop_over_ours():
    loops = {"naive": {"seconds": 3.0}, "klsplice": {"seconds": 2.0}}
    record = {"steps": {"4k, k 32": loops}, "tokens_a_step": 1024, "model": "an LM"}
    text = pages.speed(record | {"device": "a CPU", "repeats": 7, "commit": "abc"})
    assert "takes 2,000 ms on a CPU; the loop as it is usually written takes 3,000 ms" in text
    assert "1.50 times as long (medians of 7, commit abc" in text


@pytest.mark.parametrize(("body", "said"), [(None, "cannot be read"), ("{oops", "cannot be read")])
def test_a_half_deleted_run_is_a_line(at, body, said, capsys):
    folder = make_run("one")
    (at / folder / "run.json").unlink()
    if body:
        (at / folder / "run.json").write_text(body)
    for main in (report_main, figures.main):
        assert main([folder]) == 2
        said_of = f"runs/one/run.json {said}" if body else "runs/one holds no run"
        assert f"error: {said_of}" in capsys.readouterr().err


def test_a_changed_record_makes_the_readme_stale(readme, at):
    report_main(["--readme"])
    other = make_run("other_s0", gap_closed=0.9)
    assert report_main(["--record", "x", other]) == 2  # it is not overwritten
    (at / "records/x.json").unlink()
    assert report_main(["--record", "../x", other]) == 2
    assert report_main(["--record", "x", other]) == 0
    assert report_main(["--check"]) == 1


def test_a_missing_record_is_an_error_not_a_traceback(readme, at, capsys):
    (at / "records/x.json").unlink()
    assert report_main(["--check"]) == 2 and "x.json is missing" in capsys.readouterr().err
    assert report_main(["--readme"]) == 2 and "old" in readme.read_text()


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
    assert report_main(["--require", "0.25", "3", ours, control]) == REQUIRED[gaps]
    assert ("TOO LITTLE" in capsys.readouterr().out) == bool(REQUIRED[gaps])


def test_a_gap_that_was_not_there_is_a_dash_and_no_part_of_a_mean(seeds, at):
    none = make_run("kl_s3", gap_closed=None)
    rows = [tables.read(folder) for folder in [*seeds, none]]
    column = 1 + list(tables.COLUMNS).index("gap closed")
    assert tables.cells([rows[-1]])[column] == "-"
    assert tables.cells([rows[-1] | {"gap_closed": math.nan}])[column] == "-"
    assert tables.cells(rows)[column] == tables.cells(rows[:-1])[column]
    named = [rows[-1] | {"name": "kl_mse_s0"}, rows[0] | {"name": "mse_s0", "setting": "mse"}]
    assert "closes **-** of the gap" in pages.headline({"runs": named})
    for found, words in ((rows[-1:], "-"), (rows, "51% closed")):
        figure = Figure()
        figures.bars(figure, found)
        said = [text.get_text() for text in figure.findobj(Text)]
        assert words in said and "nan% closed" not in said


def test_require_wants_two_finished_runs(at, capsys):
    one = make_run("one")
    for runs in ([one], [one, one, one], []):
        with pytest.raises(SystemExit) as e:
            report_main(["--require", "0.25", "3", *runs])
        assert e.value.code == 2
    assert report_main(["--require", "0.25", "3", one, "runs/none"]) == 2
    assert "error: runs/none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report_main([])


# ---- figures ---------------------------------------------------------------------------------


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def rows_of(*folders):
    return [tables.read(folder) | {"folder": folder} for folder in folders]


def drawn(drawing, rows, **options):
    figure = Figure()
    drawing(figure, rows, **options)
    return figure.axes


def test_figures_are_drawn_of_one_run_and_of_several(at, capsys):
    one, two = make_run("one"), make_run("two", ce_clean=2.6)
    (at / one / "results.json").unlink()  # drawn before it is written
    figures.run_figures(one, NUMBERS)
    assert min(png_size(at / one / "figures/ce.png")) > 300
    three = make_run("three", {"LR": 2})
    assert figures.main([two, three]) == 0
    said = capsys.readouterr().out.splitlines()[-3:]
    assert said == [f"figures/{name}.png" for name in ("ce", "mse", "frontier")]
    assert min(png_size(at / "figures/ce.png")) > 300


def test_what_cannot_be_drawn_costs_a_run_one_line(at, capsys):
    figures.run_figures(make_run("one"), NUMBERS)  # no SAEs, no npz
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and said[0].startswith("note: no figure cosine: the SAE that runs/one")
    assert said[1].startswith("note: no figure gained")
    assert figures.main(["runs/one"]) == 0  # the others are drawn and named
    said = capsys.readouterr()
    assert "runs/one/before.npz is missing or damaged" in said.err and "figures/ce.png" in said.out


def test_losses_that_were_cut_short_are_a_line(at):
    folder = make_run("one")
    np.savez(at / folder / "before.npz", ce=np.zeros((2, 9)))
    whole = (at / folder / "before.npz").read_bytes()
    for body in (whole[:-30], b""):
        (at / folder / "after.npz").write_bytes(body)
        with pytest.raises(UserError, match="after.npz is missing or damaged"):
            changes.losses(folder, fell=1, rose=1)


SETTINGS = {  # runs' constants (and results) -> figures beside ce and mse
    "losses": ([{"LOSS": "kl"}, {"LOSS": "mse"}], {"losses"}),
    "seeds alone": ([{}, {}], set()),
    "k": ([{"SAE": "a", "l0_after": 16.0}, {"SAE": "b", "l0_after": 32.0}], {"k"}),
    "tail": ([{"l0_after": 16.0}, {"SAE": "fresh", "l0_after": 32.0}], {"tail"}),
    "rank": ([{"TRAIN": "adapter", "RANK": r} for r in (2, 4)], {"rank"}),
    "adapters": ([{}, {"TRAIN": "adapter"}, {"TRAIN": "adapter", "ADAPTER": "mlp"}], {"adapters"}),
    "lora": ([{"LOSS": "kl"}, {"TRAIN": "lm_lora", "LOSS": "kl"}], {"lora"}),
    "two stages": ([{}, {"SAE": "runs/r_0"}], {"two_stage"}),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_what_the_runs_differ_in_decides_which_figures_are_drawn(at, case, capsys):
    settings, wanted = SETTINGS[case]
    folders = []
    for i, changed in enumerate(settings):
        results = {n: changed[n] for n in changed if n.islower()}
        constants = {n: changed[n] for n in changed if n.isupper()}
        name = f"r_s{i}" if case == "seeds alone" else f"r_{i}"
        folders.append(make_run(name, constants, **results))
    assert figures.main(folders) == 0
    found = {p.stem for p in (at / "figures").iterdir()}
    assert found == wanted | {"ce", "mse"}
    for name in wanted:
        assert min(png_size(at / "figures" / f"{name}.png")) > 150


def test_labels_have_as_few_words_as_tell_the_runs_apart(at):
    short = {"tokens": 32_768}
    rows = rows_of(
        make_run("a_s0", {"LR": 3}, **short),
        make_run("a_s1", {"LR": 3}, **short),
        make_run("b", {"LOSS": "mse"}, **short),
        make_run("c", {"LOSS": "mse"}, tokens=196_608),
    )
    groups = tables.grouped(rows)
    assert [len(runs) for runs in groups] == [2, 1, 1]
    wanted = ["KL + MSE, 32.8k tokens (n = 2)", "MSE, 32.8k tokens (n = 1)"]
    assert compare.labels(groups) == [*wanted, "MSE, 197k tokens (n = 1)"]
    assert compare.labels(groups[:2]) == ["KL + MSE (n = 2)", "MSE (n = 1)"]
    same = tables.grouped(rows_of(make_run("d"), make_run("e")))
    assert compare.labels(same) == ["d", "e"]


def test_a_figure_has_the_held_out_points_and_the_clean_line(at):
    options = figures.FIGURES["ce"][-1]
    (axes,) = drawn(figures.over_tokens, rows_of(make_run("one")), **options)
    curve, clean = axes.get_lines()
    assert list(curve.get_xdata()) == [0, 512, 1024, 1536, 2048]
    assert list(curve.get_ydata()) == pytest.approx([2.75, 2.74, 2.73, 2.72, 2.71])
    assert set(clean.get_ydata()) == {NUMBERS["ce_clean"]}


def test_seeds_are_one_line_with_a_band_of_one_standard_error(at):
    values = ([3.0, 2.0], [3.0, 2.5], [3.0, 2.1])
    rows = rows_of(*(make_run(f"a_s{i}") for i in range(3)))
    for row, ce in zip(rows, values):
        row["curve"] = {"tokens": [0, 512], "ce_spliced": ce}
    (axes,) = drawn(figures.over_tokens, rows, curve=compare.evaluations, ylabel="")
    (line,), (band,) = axes.get_lines(), axes.collections
    assert list(line.get_ydata()) == pytest.approx([3.0, 2.2])
    error = statistics.stdev([2.0, 2.5, 2.1]) / math.sqrt(3)
    edges = {round(y, 9) for x, y in band.get_paths()[0].vertices if x == 512}
    assert edges == {round(2.2 - error, 9), round(2.2 + error, 9)}


def test_the_moving_average_is_not_pulled_to_zero_at_its_start(at):
    folder = make_run("one")
    lines = [{"tokens": 512 * i, "train/mse": v} for i, v in enumerate([4.0, 4.0, 14.0])]
    (at / folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    found = compare.training_mse({"name": "one", "folder": folder}, keep=0.5)
    assert found == pytest.approx({0: 4.0, 512: 4.0, 1024: (4 + 2 * 4 + 4 * 14) / 7})


def test_bars_show_the_cost_before_and_after_above_the_clean_lm(at):
    fresh = make_run("fresh", {"SAE": "fresh"}, ce_before=9.0, ce_after=2.7)
    (axes,) = drawn(figures.bars, rows_of(make_run("a", ce_after=2.6), fresh))
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == pytest.approx([0.25, 0.1, 0.2])  # before and after of a, after of fresh
    assert [text.get_text() for text in axes.texts] == ["50% closed", ""]


def test_a_sweep_is_drawn_against_its_number_in_order(at):
    ce = {64: 2.6, 4: 2.7, 16: 2.65}
    runs = [make_run(f"r{r}", {"TRAIN": "adapter", "RANK": r}, ce_after=ce[r]) for r in ce]
    (axes,) = drawn(figures.against, rows_of(*runs), **figures.RANK)
    after, before = (x for x in axes.get_lines() if x.get_marker() in ("o", "s"))
    assert dict(zip(after.get_xdata(), after.get_ydata())) == {r: ce[r] for r in (4, 16, 64)}
    assert list(after.get_xdata()) == [4, 16, 64] and set(before.get_ydata()) == {2.75}


def test_a_record_is_drawn_without_its_runs(at, capsys):
    runs = [make_run("a"), make_run("b", {"LOSS": "mse"})]
    report_main(["--record", "x", *runs])
    capsys.readouterr()
    for name in ("run.json", "results.json", "metrics.jsonl"):
        (at / "runs/a" / name).unlink()
    assert figures.main(["--record", "x"]) == 0
    assert capsys.readouterr().out.split() == ["records/x-ce.png", "records/x-losses.png"]
    assert all(p.stat().st_size < 60_000 for p in (at / "records").glob("*.png"))
    assert figures.main(["--record", "x", "--figure", "mse"]) == 2
    assert "is a record" in capsys.readouterr().err


def test_a_record_of_before_there_were_curves_still_has_bars(at, capsys):
    report_main(["--record", "x", make_run("a"), make_run("b", {"LOSS": "mse"})])
    record = json.loads((at / "records/x.json").read_text())
    for row in record["runs"]:
        assert row.pop("curve")["tokens"] == [0, 512, 1024, 1536, 2048]
        for name in ("ADAPTER", "RANK", "LORA_BLOCKS"):
            del row["constants"][name]
    (at / "records/x.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert figures.main(["--record", "x"]) == 0
    assert capsys.readouterr().out.split() == ["records/x-losses.png"]


def test_figures_of_no_finished_run_are_an_error(at, capsys):
    assert figures.main(["runs/none"]) == 2
    assert "runs/none" in capsys.readouterr().err
    assert figures.main(["--figure", "rank", make_run("one")]) == 2
    assert capsys.readouterr().err.startswith("error:")
    with pytest.raises(SystemExit):
        figures.main([])


# ---- a result against anything ---------------------------------------------------------------


def against(folders, x="", ys=("ce_after",)):
    """{label: (points, errors)} of each line, its style, and the panel's own labels."""
    figure = plots.against(rows_of(*folders), x, ys)
    figure.draw_without_rendering()
    found = {}
    for bars in figure.axes[0].containers:
        errors = [np.ptp(segment[:, 1]) / 2 for segment in bars.lines[2][0].get_segments()]
        line = bars.lines[0]
        found[bars.get_label()] = (line.get_xydata().tolist(), errors, line.get_linestyle())
    return found, figure


def swept(**lists):
    """A run of each combination, as a sweep names them; the CE after is 2.6, 2.7 ..."""
    folders = []
    for chosen in itertools.product(*lists.values()):
        constants = dict(zip(lists, chosen))
        name = "_".join(["x", *(settings.name_part(n, v) for n, v in constants.items())])
        sae = constants.get("SAE")
        source = {"k": int(sae.rpartition("k")[2])} if sae else None
        ce = 2.6 + len(folders) / 10
        folders.append(make_run(name, constants, source, ce_after=ce))
    return folders


def test_seeds_are_averaged_and_nothing_is_drawn_against_them(at):
    folders = swept(LR=[1e-3, 1e-2], SEED=[0, 1, 2])
    found, _ = against(folders)
    ((label, (points, errors, style)),) = found.items()
    assert label == "after (n = 3)" and style == "-"
    assert points == pytest.approx(np.array([[1e-3, 2.7], [1e-2, 3.0]]))
    assert errors == pytest.approx([0.1 / math.sqrt(3)] * 2)
    assert plots.against(rows_of(*folders[:3])) is None  # they differ in nothing else
    ((points, _, style),) = against(folders[:3], "SEED")[0].values()
    assert len(points) == 3 and style == "None"


def test_x_is_the_saes_own_size_where_it_was_loaded_whatever_run_py_says(at):
    sizes = {16: 1024, 32: 2048}
    folders = [
        make_run(f"r{k}", {"SAE": f"saes/{k}", "K": 80 + k}, {"k": k, "d_sae": d}, ce_after=k)
        for k, d in sizes.items()
    ]
    for x, wanted in {"k": sizes, "K": sizes, "d_sae": sizes.values()}.items():
        found, figure = against(folders, x)
        points = [p for points, *_ in found.values() for p in points]
        assert points == pytest.approx(np.array([*zip(wanted, sizes)]))
        assert "K 9" not in " ".join(found) and figure.axes[0].get_xlabel() != "K"
    fresh = [make_run(f"f{k}", {"SAE": "fresh", "K": k}, {"k": k}, ce_after=k) for k in (4, 8)]
    ((points, *_),) = against(fresh, "K")[0].values()
    assert points == [[4, 4], [8, 8]]


def test_a_line_joins_saes_of_one_folder_class_and_width_and_no_others(at):
    family = swept(SAE=["a/k4", "a/k8", "a/k16"])
    found, _ = against(family)
    ((points, _, style),) = found.values()
    assert [x for x, _ in points] == [4, 8, 16] and style == "-"
    assert against(family, "K")[0] == found
    other = make_run("other", {"SAE": "b/k32"}, {"k": 32})
    wide = make_run("wide", {"SAE": "a/wide_k64"}, {"k": 64, "d_sae": 128})
    found, _ = against([*family, other, wide], "k")
    assert sorted(len(points) for points, *_ in found.values()) == [1, 1, 3]
    same = [
        make_run(f"s{i}", {"SAE": f"a/{name}"}, ce_after=2 + i, l0_before=4 - i / 100)
        for i, name in enumerate("xyz")
    ]
    for folders, x in ((same, ""), (same, "SAE"), ([*family, *same], "k")):
        for points, _, style in against(folders, x)[0].values():  # several of k = 4
            assert style == "None" or len(points) == 1


def test_a_seed_that_is_there_twice_counts_once(at, capsys):
    folders = swept(LR=[1e-3, 1e-2], SEED=[0, 1])
    folders.append(make_run("again", {"LR": 1e-3, "SEED": 0}, ce_after=9.0))
    rows = figures._rows(folders)
    assert "note: again is left out: it repeats x_LR0.001_SEED0" in capsys.readouterr().out
    assert [row["name"] for row in rows] == [os.path.basename(f) for f in folders[:-1]]
    frame = as_data.averaged(folders)
    assert frame["n"].tolist() == [2, 2]
    assert frame["ce_after"].tolist() == pytest.approx([2.65, 2.85])
    assert as_data.main(["--mean", *folders]) == 0
    assert "again is left out" in capsys.readouterr().out
    about = json.loads((at / "runs/again/run.json").read_text())
    (at / "runs/again/run.json").write_text(json.dumps(about | {"code": "edited"}))
    figures._rows(folders)
    assert (
        "it repeats x_LR0.001_SEED0, by other code; name it alone to see it"
        in capsys.readouterr().out
    )
    pages.write_record("twice", "", folders)
    with open("records/twice.json") as f:
        assert len(json.load(f)["runs"]) == 4
    (at / "runs/again/results.json").unlink()  # unfinished runs are no seeds of finished ones
    (at / "runs/again/metrics.jsonl").unlink()
    assert as_data.averaged(folders)["state"].tolist() == ["finished", "finished", "stopped"]


def test_an_sae_that_was_moved_is_the_same_one(at, capsys):
    folders = [make_run(f"x_s{i}", {"SAE": f"place{i}/sae", "SEED": i % 2}) for i in range(3)]
    for folder in folders:
        about = json.loads((at / folder / "run.json").read_text())
        about["resolved"]["sae"] = "a digest"
        (at / folder / "run.json").write_text(json.dumps(about))
    assert as_data.averaged(folders[:2])["n"].tolist() == [2]
    assert compare.varied([{"folder": folder} for folder in folders]).keys() == {"SEED"}
    plots.curves(folders, ["kl"])
    assert "x_s2 is left out: it repeats x_s0\n" in capsys.readouterr().out


def test_few_values_stand_at_the_axis(at):
    folders = [make_run(f"x{k}", {"SAE": f"a/k{k}"}, {"k": k}) for k in (16, 32)]
    _, figure = against(folders, "k")
    assert figure.axes[0].get_xticks().tolist() == [16, 32]


def test_runs_on_other_texts_are_drawn_with_a_note(at, capsys):
    folders = swept(LR=[1e-3, 1e-2], KEEP=["first", "outliers"])
    assert figures.main(["--x", "LR", *folders]) == 0
    assert "note: these runs differ in KEEP: their CE" in capsys.readouterr().out
    assert figures.main(["--x", "LR", "--force", *folders[::2]]) == 0
    assert "note" not in capsys.readouterr().out


def test_a_long_legend_tells_what_is_usual_in_a_line_of_its_own(at, capsys):
    """Few values stay; of many those that tell the runs apart, where they are not the usual one."""
    found = {"LOSS": ["kl", "mse", "mse"], "LR": [1e-3, 1e-3, 1e-2], "EVAL_BATCH": [8, 4, 8]}
    wanted = ["LOSS kl, LR 0.001, EVAL_BATCH 8", "LOSS mse, LR 0.001, EVAL_BATCH 4"]
    assert compare.legends(found)[:2] == wanted and capsys.readouterr().out == ""
    found |= {"DATASET": ["a-long-name-of-a-text.jsonl", "b", "b"], "ADAPTER": [""] * 3}
    found |= {"JUMPRELU_THRESHOLD": ["frozen", "frozen", "ste"]}
    found = {n: [*v, v[-1]] for n, v in found.items()} | {"KEEP": ["none", "none", "none", "first"]}
    assert compare.legends(found) == [
        "LOSS kl, LR 0.001",
        "LOSS mse, LR 0.001",
        "LOSS mse, LR 0.01",
        "LOSS mse, LR 0.01, KEEP first",
    ]
    assert compare.legends({n: [v[0], *v] for n, v in found.items() if n not in ("LOSS", "LR")})[0]
    said = capsys.readouterr().out
    left_out = "EVAL_BATCH, DATASET, ADAPTER, JUMPRELU_THRESHOLD"
    assert f"note: the legend leaves out {left_out}, which" in said
    assert "note: where the legend does not say it: KEEP none\n" in said


def test_an_option_given_twice_has_both_its_values(at):
    folders = swept(LR=[1e-3, 1e-2])
    words = ["--curve", "kl", "--curve", "val/ce_spliced", "--out", "both.png"]
    assert figures.main([*words, *folders]) == 0
    assert figures.main(["--curve", "kl", "--out", "one.png", *folders]) == 0
    assert png_size(at / "both.png")[0] > 1.5 * png_size(at / "one.png")[0]


def test_curves_of_seeds_are_their_mean_where_all_have_a_value(at):
    folders = swept(LR=[1e-3, 1e-2], SEED=[0, 1])
    for i, folder in enumerate(folders):
        lines = [{"tokens": t, "train/kl": float(i + t)} for t in (100, 200, 300)[: 3 - i % 2]]
        (at / folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (axes,) = plots.curves(folders, ["kl"]).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines == {
        "LR 0.001 (n = 2)": [[100, 100.5], [200, 200.5]],
        "LR 0.01 (n = 2)": [[100, 102.5], [200, 202.5]],
    }
    (band, _) = axes.collections
    edges = band.get_paths()[0].vertices[:, 1]
    assert edges.min() == pytest.approx(100) and edges.max() == pytest.approx(201)
    assert axes.get_ylabel() == "training KL, nats per token"
    (at / folders[1] / "results.json").unlink()  # not finished, it stands for itself
    (at / folders[1] / "metrics.jsonl").unlink()
    (axes,) = plots.curves(folders, ["kl"]).axes
    assert len(axes.get_lines()) == 2 and len(axes.get_lines()[0].get_xdata()) == 3
    (at / folders[1] / "results.json").write_text("{}")
    shutil.copy(at / folders[0] / "metrics.jsonl", at / folders[1])
    (axes,) = plots.curves(folders[:2], ["kl"]).axes
    assert [line.get_label() for line in axes.get_lines()] == ["(n = 2)"]


def test_a_result_may_be_the_x_and_no_line_joins_its_points(at):
    folders = [
        make_run(f"x{i}_s{i % 2}", {"LR": lr}, fvu_after=0.1 * i, ce_after=2.0 + i)
        for i, lr in enumerate([1e-3, 1e-3, 1e-2, 1e-2])
    ]
    found, _ = against(folders, "fvu_after")
    assert {label: points for label, (points, *_) in found.items()} == {
        "LR 0.001": [[0.0, 2.0], [pytest.approx(0.1), 3.0]],
        "LR 0.01": [[pytest.approx(0.2), 4.0], [pytest.approx(0.3), 5.0]],
    }
    assert {style for *_, style in found.values()} == {"None"}
    assert figures.main(["--x", "fvu_after", "--y", "kl_after,ce_after", *folders]) == 0
    assert against(folders, "lr")[0].keys() == against(folders, "LR")[0].keys()


def test_names_with_numbers_are_in_the_order_of_the_numbers(at):
    folders = [make_run(f"x{k}", {"SAE": f"a/k{k}"}, {"k": 4}) for k in (16, 8, 32)]
    _, figure = against(folders, "SAE")
    ticks = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert ticks == ["k8", "k16", "k32"]


def test_where_an_sae_was_trained_from_scratch_the_legend_says_so(at):
    folders = [make_run("x0", {"SAE": "fresh", "D_SAE": 64, "K": 4})]
    folders += swept(SAE=["runs/k4", "runs/k8"])
    found, _ = against(folders, "k")
    assert sorted(label.partition(",")[0] for label in found) == ["from runs", "from scratch"]


def test_what_is_no_number_is_a_category_without_a_line(at):
    found, figure = against(swept(LOSS=["kl+mse", "mse"], SEED=[0, 1]))
    ((label, (points, errors, style)),) = found.items()
    assert (label, style) == ("after (n = 2)", "None")
    assert points == pytest.approx(np.array([[0, 2.65], [1, 2.85]]))
    ticks = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert ticks == ["kl+mse", "mse"] and len(errors) == 2


def test_a_sweep_whose_figure_cannot_be_drawn_ends_with_its_table_and_a_line(at, capsys):
    folders = [make_run(f"x{lr}", {"LR": lr}, ce_after=None) for lr in (1e-3, 1e-2)]
    end.show_sweep(folders, "runs/figures/sweep")
    said = capsys.readouterr().out
    assert "x0.001" in said and "note: no figure: these runs have no number ce_after" in said


def test_the_frontier_shows_what_each_loss_buys_for_its_fvu_and_rings_the_usual_rate(at):
    """A line a loss, in the order of its rates, whatever that of the runs; seeds are averaged."""
    usual, folders = settings.defaults()["LR"], []
    for i, (rate, seed) in enumerate([(1e-3, 0), (1e-3, 1), (usual, 0), (usual, 1)]):
        for loss, fvu in (("kl+mse", 0.2), ("mse", 0.1)):
            c = {"LOSS": loss, "LR": rate, "SEED": seed}
            numbers = {"fvu_after": fvu + i / 100, "gap_closed": fvu + i / 10, "fvu_before": 0.3}
            folders.append(make_run(f"{loss}{i}", c, **numbers))
    figure = Figure()
    plots.frontier(figure, rows_of(*folders))
    panel = figure.axes[0]
    lines = {bars.get_label(): bars.lines[0].get_xydata() for bars in panel.containers}
    assert lines.keys() == {"KL + MSE (n = 2)", "MSE (n = 2)"}
    assert lines["MSE (n = 2)"] == pytest.approx(np.array([[0.125, 0.35], [0.105, 0.15]]))
    rings = [x.get_xydata() for x in panel.get_lines() if x.get_label() == f"LR {usual:g}"]
    assert np.concatenate(rings) == pytest.approx(np.array([[0.225, 0.45], [0.125, 0.35]]))
    (before,) = [x.get_xydata() for x in panel.get_lines() if x.get_label() == "before"]
    assert before == pytest.approx(np.array([[0.3, 0]]))


def test_each_sae_has_the_ce_before_of_its_own(at):
    folders = []
    for sae, ce in (("a", 3.0), ("b", 4.0)):
        for lr in (1e-3, 1e-2):
            c = {"SAE": f"saes/{sae}", "LR": lr}
            folders.append(make_run(f"{sae}{lr}", c, ce_before=ce))
    _, figure = against(folders, "LR")
    dotted = [line for line in figure.axes[0].get_lines() if line.get_markerfacecolor() == "white"]
    points = [line.get_xydata().tolist() for line in dotted if len(line.get_xdata())]
    assert points == [[[1e-3, 3.0], [1e-2, 3.0]], [[1e-3, 4.0], [1e-2, 4.0]]]


def test_a_name_that_is_not_there_is_answered_with_those_that_are(at, capsys):
    folders = swept(LR=[1e-3, 1e-2])
    assert figures.main(["--x", "LR", "--y", "kl", "--out", "a.png", *folders]) == 2
    assert "no number kl; did you mean kl_before or kl_after?" in capsys.readouterr().err
    assert figures.main(["--x", "fvu", "--out", "a.png", *folders]) == 2
    said = capsys.readouterr().err
    assert "no constant or result is called fvu; did you mean fvu_before or fvu_after?" in said
    assert figures.main(["--x", "RANK", "--out", "a.png", *folders]) == 2
    assert "they differ in LR" in capsys.readouterr().err
    assert figures.main(["--curve", "kl", "nothing", "--out", "a.png", *folders]) == 2
    said = capsys.readouterr().err
    assert "has nothing" in said and "wanted one of kl, val/ce_spliced" in said
    for words in (
        ["--curve", "kl"],
        ["--curve", "train/kl"],
        ["--x", "LR", "--y", "ce_after"],
    ):  # the paths come last
        out = f"{words[1].replace('/', '-')}.png"
        assert figures.main(["--out", out, *words, *folders]) == 0


@pytest.mark.parametrize(
    "words",
    [
        ["runs/a", "--figure", "k", "--y", "kl_after"],
        ["runs/a", "--figure", "k", "--x", "LR"],
        ["runs/a", "--curve", "kl", "--x", "LR"],
        ["runs/a", "--curve", "kl", "--y", "kl_after"],
        ["--record", "demo", "--x", "LR"],
        ["--record", "demo", "--curve", "kl"],
    ],
)
def test_words_that_would_say_nothing_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        figures.main(words)
    assert "error:" in capsys.readouterr().err


def test_many_runs_with_long_names_leave_the_panels_their_room(at):
    folders = [make_run(f"{'long-' * 12}{i}", {"LR": 10.0**-i, "WARMUP": i}) for i in range(12)]
    figure = plots.curves(folders, ["kl", "val/ce_spliced"])
    figure.draw_without_rendering()
    lines = figure.axes[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[3] == "LR 0.001, WARMUP 3"  # what differs, and no more
    edge = figure.bbox
    for axes in figure.axes:
        box = axes.get_window_extent()
        assert box.width > 200 and box.height > 150
        assert figure.legends[0].get_window_extent().y1 < box.y0
    assert figure.legends[0].get_window_extent().width < edge.width
    stopped = [make_run(f"same{i}") for i in range(2)]
    for folder in stopped:
        (at / folder / "results.json").unlink()
    same = plots.curves(stopped, ["kl"])
    assert [text.get_text() for text in same.legends[0].get_texts()] == ["same0", "same1"]


def test_a_long_legend_stands_below_whatever_is_drawn():
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    panels = figure.subplots(1, 2)
    for i in range(9):
        panels[0].plot([0, 1], [i, i], label=f"{'long ' * 9}{i}", **style.look(i))
    style.legend(figure)
    figure.draw_without_rendering()
    assert min(axes.get_window_extent().height for axes in panels) > 150
    assert len(figure.legends[0].get_texts()) == 9 and panels[0].get_legend() is None


# ---- runs/* ----------------------------------------------------------------------------------

READERS = {
    "report": report_main,
    "report.data": as_data.main,
    "curves as data": lambda folders: as_data.main(["--curves", *folders]),
    "means": lambda folders: as_data.main(["--mean", *folders]),
    "figures": lambda folders: figures.main(["--force", *folders]),
    "against": lambda folders: figures.main(["--force", "--x", "LR", *folders]),
    "curves": lambda folders: figures.main(["--force", "--curve", "kl", "--out", "c", *folders]),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_lies_beside_runs_is_left_out_and_what_is_absent_is_an_error(at, capsys, reader):
    folders, read = swept(LR=[1e-3, 1e-2]), READERS[reader]
    (at / "runs/figures").mkdir()
    (at / "runs/results.csv").write_text("")
    beside = ["runs/figures", "runs/results.csv"]
    assert read([*folders, *beside]) == 0
    capsys.readouterr()
    for paths in ([*folders, "runs/none"], beside, ["runs/none"]):
        assert read(paths) == 2
        assert f"error: {paths[-1 if 'none' in paths[-1] else 0]}" in capsys.readouterr().err


def test_a_card_is_written_of_runs_alone(at, monkeypatch):
    written = []
    monkeypatch.setattr(card, "write", lambda folder, *about: written.append(folder))
    (at / "runs/figures").mkdir(parents=True)
    assert card.main([make_run("one"), "runs/figures"]) == 0 and written == ["runs/one"]


# ---- what a finetune changed -----------------------------------------------------------------


def make_sae(folder, W_enc_FD, W_dec_FD):
    folder.mkdir(parents=True)
    F, D = W_enc_FD.shape
    tensors = {"W_enc": W_enc_FD.T, "b_enc": torch.zeros(F), "W_dec": W_dec_FD}
    tensors = {n: t.contiguous() for n, t in tensors.items()} | {"b_dec": torch.zeros(D)}
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {"architecture": "topk", "d_in": D, "d_sae": F, "k": 2, "apply_b_dec_to_input": True}
    (folder / "cfg.json").write_text(json.dumps(config))


def test_latents_that_were_put_in_another_order_have_no_cosines(at):
    folder = make_run("one")
    about = json.loads((at / folder / "run.json").read_text())
    about["constants"]["ARCHITECTURE"] = "matryoshka"
    (at / folder / "run.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="in another order"):
        changes.turned(folder)


@pytest.mark.parametrize("source", ["runs/src", "elsewhere/src"])
def test_the_cosines_are_those_of_each_latents_rows(at, source):
    angle_F = torch.tensor([0.0, 0.3, 1.0, 2.0])
    turned_FD = torch.stack((angle_F.cos(), angle_F.sin(), 0 * angle_F), 1)
    old_FD = torch.eye(3)[[0, 0, 0, 0]]
    (at / "runs/src").mkdir(parents=True)
    (at / "runs/src/run.json").write_text("{}")  # beside the run, wherever it is called from
    make_sae(at / "runs/src/sae", 5 * old_FD, old_FD)
    folder = make_run("one", {"SAE": source})
    make_sae(at / "runs/one/sae", 3 * turned_FD, turned_FD.flip(0))
    found = changes.turned(folder)
    assert found["encoder"] == pytest.approx(angle_F.cos().numpy(), abs=1e-6)
    assert found["decoder"] == pytest.approx(angle_F.cos().flip(0).numpy(), abs=1e-6)
    (panel, _) = drawn(figures.cosines, rows_of(folder))
    x, y = panel.get_lines()[0].get_data()
    assert y[np.searchsorted(x, 0.6, side="right") - 1] == pytest.approx(0.5)  # cos 1, cos 2


def test_another_sae_where_the_source_was_is_refused(at):
    old_FD = torch.eye(3)[[0, 0, 0, 0]]
    make_sae(at / "runs/src/sae", old_FD, old_FD)
    (at / "runs/src/run.json").write_text("{}")
    folder = make_run("one")
    make_sae(at / "runs/one/sae", old_FD, old_FD)
    about = json.loads((at / folder / "run.json").read_text())
    about["resolved"]["sae"] = read.open_sae("runs/src", "").identity
    (at / folder / "run.json").write_text(json.dumps(about))
    assert changes.turned(folder)["encoder"] == pytest.approx(1)
    shutil.rmtree(at / "runs/src/sae")
    make_sae(at / "runs/src/sae", 2 * old_FD, old_FD)
    with pytest.raises(UserError, match="runs/src is not the SAE that runs/one started from"):
        changes.turned(folder)
    make_sae(at / "elsewhere/src/sae", old_FD, old_FD)  # moved there with the run
    (at / "elsewhere/src/run.json").write_text("{}")
    shutil.copytree(at / folder, at / "elsewhere/one")
    assert changes.turned("elsewhere/one")["encoder"] == pytest.approx(1)
    shutil.rmtree(at / "runs/src")
    with pytest.raises(UserError, match="started from, runs/src, is not here"):
        changes.turned(folder)


def test_the_tokens_that_gained_most_come_first_and_those_that_lost_last(at):
    folder = make_run("one")
    tokens_SL = np.arange(40, dtype=np.uint32).reshape(2, 20)
    before_SL = np.full((2, 20), 5, np.float32)
    after_SL = before_SL.copy()
    after_SL[0, 3], after_SL[1, 6], after_SL[1, 17] = 1, 2, 9
    after_SL[:, -1] = 0  # the last position predicts nothing
    arrays = {"tokens": tokens_SL, "ce_clean": np.full((2, 20), 0.5, np.float32)}
    np.savez(at / folder / "before.npz", ce=before_SL, **arrays)
    np.savez(at / folder / "after.npz", ce=after_SL, **arrays)
    found, share = changes.losses(folder, fell=2, rose=1)
    assert found[0] == ("0 1 2 3", "4", 0.5, 5.0, 1.0)
    assert found[1] == ("20 21 22 23 24 25 26", "27", 0.5, 5.0, 2.0)
    assert found[2] == (" ".join(map(str, range(26, 38))), "38", 0.5, 5.0, 9.0)
    assert share == pytest.approx(2 / 38)
    table = changes.markdown(found, share).splitlines()
    assert table[2] == "| `0 1 2 3` | `4` | 0.50 | 5.00 | 1.00 |" and "5.3%" in table[-1]
