"""What a run, or a sweep, leaves at its end: figures, the SAE's card, a table."""

from klsplice import distributed, metrics
from klsplice.errors import UserError, first_line
from report import tables


def show(run, results: dict) -> None:
    """Figures, card, results.json and the table. run: tracking.run_folder.Run."""
    run.finish(results)  # first: nothing that is drawn costs a run its results
    try:
        from report import card, figures  # not before there is something to draw

        card.write(run.folder, results, run.about)
        figures.run_figures(run.folder, results)
    except Exception as e:
        print(f"note: no card or no figures: {first_line(e)}")
    if not run.several:
        print(tables.table([run.folder]))
    print(f"the SAE is in {run.path('sae')}, the figures are in {run.path('figures')}")


def show_measured(run, found: dict) -> str:
    """Of a run that trains on no token: results.json and the table. -> its folder.

    found: its evaluation."""
    if run.writes:
        nothing = {"gap_closed": None} | run.totals(0, 0.0)
        run.finish(metrics.results(found, found) | nothing)
        if not run.several:
            print(tables.table([run.folder]))
    return run.folder


def show_finished(run) -> str:
    """A run that was finished before: its table, and nothing else. -> its folder."""
    if run.writes:
        print(f"{run.folder} is finished; nothing was changed{run.other_code}")
        if run.other_code:
            print("  another RUN_NAME makes it anew")
        if not run.several:
            print(tables.table([run.folder]))
    return run.folder


def show_sweep(folders: list[str], path: str, failed: int = 0) -> None:
    """One table of a sweep's finished runs, in the order of what differs, and a figure of that.

    path: of the figure, without its ending. failed: how many runs did."""
    if distributed.rank() > 0:
        return
    if folders:
        _show_finished(folders, path)
    if failed:
        print(f"runs that failed: {failed}; why stands above")


def _show_finished(folders: list[str], path: str) -> None:
    from report import compare, plots, style

    rows = compare.in_order([tables.read(folder) | {"folder": folder} for folder in folders])
    print(tables.table([row["folder"] for row in rows]))
    try:
        if figure := plots.against(rows):
            style.save(figure, f"{path}.png")
            print(f"the figure is {path}.png")
    except UserError as e:
        print(f"note: no figure: {e.what}")
