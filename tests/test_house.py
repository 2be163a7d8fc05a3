"""The layout: who may import whom, how long a piece of code may be, and what is loaded when."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import conftest  # noqa: F401  first: it puts the program on the path
import pytest

import finetune
import run
from klsplice import settings
from klsplice.train import TRAIN
from learners import start
from sae import ARCHITECTURES

ROOT = settings.PROGRAM
# What stands on a floor imports from the floors below it; klsplice/ and sae.py, the ground, from
# each other too, and from nothing else.
FLOORS = (
    {"klsplice", "sae"},
    {"data", "eval"},
    {"learners", "finetune", "report"},
    {"run", "evals"},
    {"bench"},
)
PLACES = [place for floor in FLOORS for place in floor]
FILES = [p for place in PLACES for p in ([ROOT / f"{place}.py"] + [*(ROOT / place).rglob("*.py")])]
FILES = sorted(p for p in FILES if p.exists())


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def imported(path: Path) -> set[str]:
    """The modules of this program that a file imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {name for name in names if name in MODULES}
    return {m for m in found if not any(o.startswith(m + ".") for o in found)} - {module_of(path)}


def floor_of(module: str) -> int:
    return next(i for i, floor in enumerate(FLOORS) if module.split(".")[0] in floor)


def test_every_import_goes_down_or_stays_in_its_place():
    wrong = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        for other in imported(path)
        if module.split(".")[0] != other.split(".")[0]
        and floor_of(module) <= floor_of(other)
        and floor_of(other) > 0
    ]
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle():
    arrows = {module: imported(path) for module, path in MODULES.items()}
    done = set()

    def visit(module, above):
        assert module not in above, " -> ".join([*above, module])
        if module not in done:
            for other in arrows[module]:
                visit(other, (*above, module))
            done.add(module)

    for module in arrows:
        visit(module, ())


def room_of(module: str) -> str:
    """A top-level file or folder; klsplice is opened: its folders, and its files and sae as one."""
    parts = module.split(".")
    if floor_of(module) > 0:
        return parts[0]
    return ".".join(parts[:2]) if len(parts) == 3 else "klsplice"


def test_rooms_are_tied_by_few_arrows():
    arrows = {
        (room_of(module), room_of(other))
        for module, path in MODULES.items()
        for other in imported(path)
    }
    assert len([pair for pair in arrows if pair[0] != pair[1]]) <= 50


# Lines that the program, its tests and its README may have. A capability that needs more raises
# these in its own commit, so that its price is seen.
BUDGET = {"program": 11_310, "tests": 10_510, "README.md": 187}


def test_the_whole_stays_within_its_budget():
    lines = dict.fromkeys(BUDGET, 0)
    for path in ROOT.rglob("*.py"):
        top = path.relative_to(ROOT).parts[0]
        if not top.startswith("."):
            part = "tests" if top == "tests" else "program"
            lines[part] += len(path.read_text().splitlines())
    lines["README.md"] = len((ROOT / "README.md").read_text().splitlines())
    assert {part: n for part, n in lines.items() if n > BUDGET[part]} == {}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_nothing_is_too_long_for_one_sitting(path):
    limits = {ast.ClassDef: 180, ast.FunctionDef: 60}
    for node in ast.walk(ast.parse(path.read_text())):
        if type(node) in limits:
            # of a function its body: a Triton kernel has a dozen arguments, each on a line
            start = node.lineno if isinstance(node, ast.ClassDef) else node.body[0].lineno
            length = node.end_lineno - start + 1
            assert length <= limits[type(node)], f"{node.name} has {length} lines"


def loaded_by(*words: str) -> set[str]:
    """The modules that are loaded after those words to Python, run in the program's folder."""
    script = "import sys\ntry:\n    {}\nfinally:\n    print(*sorted(sys.modules))"
    code = script.format("\n    ".join(words))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_help_has_every_constant(capsys):
    assert run.main(["--help"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert {f"{name} = {value!r}" for name, value in settings.defaults().items()} <= {*said}


def test_help_waits_for_nothing():
    heavy = {"torch", "numpy", "transformers", "datasets", "matplotlib", "wandb", "peft"}
    assert not heavy & loaded_by("import run", "run.main(['--help'])")


def test_drawing_lora_and_wandb_are_loaded_by_those_who_use_them():
    doors = "import data, eval, finetune, learners.start, klsplice.lm.load, klsplice.formats.write"
    assert not {"matplotlib", "wandb", "peft"} & loaded_by(doors)


def test_choices_of_run_py_are_the_rows_of_the_tables():
    known = settings.declared()
    assert set(known["ARCHITECTURE"].choices) == {"", *ARCHITECTURES}
    assert set(known["TRAIN"].choices) == set(TRAIN) == set(start.LEARNERS)
    assert set(known["LOSS"].choices) == set(finetune.LOSSES)
    for row in TRAIN.values():
        assert set(row.constants) <= known.keys()
