"""What the evaluations share: a finished run's constants, and where an answer is kept.

An answer is one JSON file, runs/<name>/evals/<eval>.json, with the numbers and one table.
"""

import argparse
import os
import sys
import time
from types import SimpleNamespace

from klsplice import machine
from klsplice.errors import UserError
from klsplice.settings import Config, defaults
from klsplice.site import RESIDUAL
from klsplice.storage import finite, read_run_json, write_json
from report import runs


def open_run(folder: str, device: str = "") -> SimpleNamespace:
    """A finished run -> folder, name, cfg (its constants), about (run.json), results.

    device: where to run, "" for where the run did. Raises UserError.
    """
    about = read_run_json(os.path.join(folder, "run.json"))
    results = read_run_json(os.path.join(folder, "results.json"))
    cfg = Config(**defaults() | about["constants"])
    if cfg.SITE != RESIDUAL or len(cfg.saes) > 1:
        what = f"{folder} is at SITE = {cfg.SITE}, SAE = {cfg.SAE:.80}"
        raise UserError(what, f"wanted one SAE at {RESIDUAL}")
    cfg.DEVICE = device or cfg.DEVICE
    if machine.code_changed(about):
        print(f"note: the program's code has changed since {folder} began")
    name = os.path.basename(os.path.normpath(folder))
    return SimpleNamespace(folder=folder, name=name, cfg=cfg, about=about, results=results)


def one_run(parser) -> None:
    """The options of an evaluation that runs the LM."""
    parser.add_argument("runs", metavar="runs/NAME", help="a finished run")
    parser.add_argument("--device", default="", help="default: the run's own")


def command(argv: list[str], name: str, doc: str, options, evaluate) -> int:
    """`python -m evals.<name> runs/<name> [options]` -> exit code.

    doc: its first line is the question. options(parser) adds its own. evaluate(arguments) -> dict
    with numbers, table (rows, the first of headings), and as needed device and note.
    """
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        f"python -m evals.{name}", description=doc, formatter_class=form
    )
    options(parser)
    a = parser.parse_args(argv)
    folder = a.runs[0].split("+")[-1] if isinstance(a.runs, list) else a.runs
    path = os.path.join(folder, "evals", f"{name}.json")
    try:
        started = time.monotonic()
        answer = {"name": name, "run": os.path.basename(os.path.normpath(folder))}
        answer |= {"question": doc.splitlines()[0]} | evaluate(a)
        answer["numbers"] = finite(answer["numbers"])
        answer["seconds"] = round(time.monotonic() - started, 1)
        answer["commit"] = machine.git_commit()
        answer["versions"] = machine.versions("peft", "lm-eval", "sae-bench")
        print(runs.align(answer["table"]))
        if answer.get("note"):
            print(answer["note"])
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_json(path, answer)
        print(path)
    except UserError as e:
        print(e, file=sys.stderr)
        return e.code
    except OSError as e:
        print(f"error: {e}\n  copy the run to a folder that can be written", file=sys.stderr)
        return 1
    return 0
