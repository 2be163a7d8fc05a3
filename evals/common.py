"""What the evaluations share: a finished run's constants, and where an answer is kept.

An answer is one JSON file, runs/<name>/evals/<eval>.json, with the numbers, one table and what the
figure shows. So `python -m report.figures --figure <eval> runs/<name>` draws it again without a LM.
"""

import argparse
import os
import sys
import time
from types import SimpleNamespace

import numpy as np

from klsplice import machine
from klsplice.errors import UserError
from klsplice.settings import Config
from klsplice.storage import finite, read_json, write_json
from report import figures, tables


def open_run(folder: str, device: str = "") -> SimpleNamespace:
    """A finished run -> folder, name, cfg (its constants), about (run.json), results.

    device: where to run, "" for where the run did. Raises UserError.
    """
    try:
        about = read_json(os.path.join(folder, "run.json"))
        results = read_json(os.path.join(folder, "results.json"))
        cfg = Config(**about["constants"], recipes=about["recipes"])
    except (OSError, ValueError, KeyError, TypeError):
        hint = "wanted runs/<name> with its run.json and results.json"
        raise UserError(f"no finished run in {folder}", hint) from None
    cfg.DEVICE = device or cfg.DEVICE
    if machine.code_changed(about):
        print(f"note: the program's code has changed since {folder} began")
    name = os.path.basename(os.path.normpath(folder))
    return SimpleNamespace(folder=folder, name=name, cfg=cfg, about=about, results=results)


def whole(text: str, *, least: int = 0) -> int:
    """A command line's whole number, `least` or more."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted a whole number, {least} or more")
    return int(text)


def positive(text: str) -> int:
    return whole(text, least=1)


def over_zero(text: str, *, below: float = 1e3) -> float:
    """A command line's number over 0."""
    try:
        value = float(text)
    except ValueError:
        wanted = "wanted a number; several have spaces between them"
        raise argparse.ArgumentTypeError(f"{text!r}: {wanted}") from None
    if not 0 < value < below:
        raise argparse.ArgumentTypeError(f"{text}: wanted a number over 0 and under {below:g}")
    return value


def numbers(text: str) -> list[int]:
    """A command line's list of whole numbers, like 1,2,3."""
    return [whole(x) for x in text.split(",")]


def share(text: str) -> float:
    return over_zero(text, below=1)


def bootstrap(groups: list[np.ndarray], rounds: int = 2000) -> list[float]:
    """-> [mean of the groups' means, ends of its 95 % interval], resampling within each group."""
    rng = np.random.default_rng(0)
    means = [x_T[rng.integers(len(x_T), size=(rounds, len(x_T)))].mean(1) for x_T in groups]
    ends = np.quantile(np.mean(means, axis=0), (0.025, 0.975))
    return [float(np.mean([x_T.mean() for x_T in groups])), *ends.tolist()]


def path(folder: str, name: str) -> str:
    return os.path.join(folder, "evals", f"{name}.json")


def _check_writable(folder: str) -> None:
    for place in (folder, *(os.path.join(folder, kind) for kind in ("evals", "figures"))):
        if os.path.exists(place) and not os.access(place, os.W_OK):
            raise UserError(f"{place} cannot be written", "copy the run to where it can")


def one_run(parser) -> None:
    """The options of an evaluation that runs the LM."""
    parser.add_argument("runs", metavar="runs/NAME", help="a finished run")
    parser.add_argument("--device", default="", help="default: the run's own")


def command(argv: list[str], name: str, doc: str, options, evaluate) -> int:
    """`python -m evals.<name> runs/<name> [options]` -> exit code.

    doc: its first line is the question. options(parser) adds its own. evaluate(arguments) -> dict
    with numbers, table (rows, the first of headings), and as needed device, note and, where the
    table is not enough to draw from, figure. It is drawn where eval_figures.py has a function of
    that name.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m evals.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options(parser)
    a = parser.parse_args(argv)
    folder = a.runs[0].split("+")[-1] if isinstance(a.runs, list) else a.runs
    figure = os.path.join(folder, "figures", name)
    try:
        _check_writable(folder)
        started = time.monotonic()
        found = {"name": name, "run": os.path.basename(os.path.normpath(folder))}
        found |= {"question": doc.splitlines()[0]} | evaluate(a)
        found["numbers"] = finite(found["numbers"])
        found["seconds"] = round(time.monotonic() - started, 1)
        found["commit"] = machine.git_commit()
        found["versions"] = machine.versions("peft", "lm-eval", "sae-bench")
        os.makedirs(os.path.join(folder, "evals"), exist_ok=True)
        write_json(path(folder, name), found)
        drawn = name in figures.FIGURES
        if drawn:
            figures.draw(name, [{"folder": folder}], f"{figure}.png")
    except UserError as e:
        print(e, file=sys.stderr)
        return e.code
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    print(tables.align(found["table"]))
    shown = found.get("note"), path(folder, name), f"{figure}.png" * drawn
    print("\n".join(filter(None, shown)))
    return 0
