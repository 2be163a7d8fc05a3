"""What a run, or a sweep, leaves at its end: results.json, a table, figures, the SAE's card."""

import os

from klsplice import distributed, metrics
from klsplice.errors import first_line
from report import runs


def show(run, results: dict) -> None:
    """results.json, figures, card and the table. run: tracking.run_folder.Run."""
    run.finish(results)  # first: nothing that is drawn costs a run its results
    _show(run)
    print(f"the SAE is in {run.path('sae')}, the figures are in {run.path('figures')}")


def show_measured(run, evaluation: dict) -> None:
    """Of a run that trains on no token: results.json and the table."""
    if run.writes:
        nothing = {"gap_closed": None, "kl_removed": None} | run.totals(0, 0.0)
        run.finish(metrics.results(evaluation, evaluation) | nothing)
        _show(run)


def show_finished(run) -> None:
    """A run that was finished before: its table, and what a kill left undrawn."""
    if run.writes:
        print(f"{run.folder} is finished; nothing was changed{run.other_code()}")
        if run.other_code():
            print("  another RUN_NAME makes it anew")
        _show(run)


def show_sweep(folders: list[str], path: str, failed: int = 0) -> None:
    """One table of a sweep's finished runs, in the order of what differs, and a figure of that.

    path: of the figure, without its ending. failed: how many runs did."""
    if distributed.rank():
        return
    if folders:
        table = runs.of_folders(folders)
        table = table.sort_values(runs.varied(table), ignore_index=True)
        print(runs.align(runs.table_of(table)))
        try:
            from report import figures

            if figures.sweep(table, f"{path}.png"):
                print(f"the figure is {path}.png")
        except Exception as e:
            print(f"note: no figure: {first_line(e)}")
    if failed:
        print(f"runs that failed: {failed}; why stands above")


def _show(run) -> None:
    """Figures and card, where there are an SAE and none yet; and the table. What cannot be drawn is
    a line."""
    table = runs.of_folders([run.folder])
    if os.path.isdir(run.path("sae")) and not os.path.exists(run.path("sae", "README.md")):
        try:
            from report import card, figures

            figures.run_figures(run.folder, table)
            card.write(run.folder)
        except Exception as e:
            print(f"note: no card: {first_line(e)}")
    if not run.several:  # else the sweep has one of all
        print(runs.align(runs.table_of(table)))
