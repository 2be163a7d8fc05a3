"""Recipes and NAME=value words: what is meant is taken, what is not is refused, all at once."""

import ast
import os
import re
import subprocess
import sys
from types import ModuleType
from typing import Literal

import pytest

import run
from klsplice import settings
from klsplice.errors import UserError
from klsplice.formats import write as writer
from klsplice.train import TRAIN
from report import card

ROOT = settings.PROGRAM
CONSTANTS = settings.declared()
VALUES = {name: value for name, value in vars(run).items() if name.isupper()}
RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.py"))


def read(*words, program=None):
    """The first run's."""
    return settings.read(list(words), program)[0]


def refused(*words, program=None):
    """-> the problems, a line each."""
    with pytest.raises(UserError) as e:
        read(*words, program=program)
    assert e.value.code == 2 and "run.py" in e.value.hint
    return [line.strip() for line in e.value.what.splitlines()]


def write(at, text, name="x.py"):
    (at / name).write_text(text)
    return name


# ---- what is meant ---------------------------------------------------------------------------


def test_without_words_the_constants_are_those_of_run_py():
    found = read()
    assert (found.recipes, found.said, found.sweep) == ([], frozenset(), "")
    assert found.constants() == VALUES == settings.defaults()
    assert list(found.constants()) == list(VALUES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_sets_known_constants_and_goes_with_small(name):
    path = str(ROOT / "recipes" / name)
    found = read(path)
    assert found.recipes == [name.removesuffix(".py")]
    docstring, *lines = ast.parse(open(path).read()).body
    assert ast.get_docstring(ast.Module([docstring], []))
    for node in lines:
        constant, value = node.targets[0].id, ast.literal_eval(node.value)
        assert getattr(found, constant) == (value[0] if isinstance(value, list) else value)
    assert read(path, str(ROOT / "recipes/small.py")).MODEL == "assets/smollm2"


def test_words_take_the_type_of_the_constant():
    """Also with dashes, as wandb agent passes them."""
    found = read("--TOKENS=1e6", "LR=1", "CHECK_SAE=False", "MODEL=a/b", "WARMUP=1_024")
    values = [found.TOKENS, found.LR, found.CHECK_SAE, found.MODEL, found.WARMUP]
    assert values == [1_000_000, 1.0, False, "a/b", 1024]
    assert [type(value) for value in values] == [int, float, bool, str, int]


def test_a_list_of_texts_has_each_part_and_a_glob_is_none():
    def texts_of(word):
        return [cfg.DATASET for cfg in settings.read([f"DATASET={word}"])]

    for glob in ("texts/[ab]*.txt", "[ab]/[12]", "[a,b]*.[jt]*[lt]"):
        assert texts_of(glob) == [glob]
    assert texts_of("[texts/[a,b]*.txt, [c]/d.txt,'e']") == ["texts/[a,b]*.txt", "[c]/d.txt", "e"]
    classes = settings.read(["SAE=a/b", "ARCHITECTURE=[,jumprelu]"])
    assert [cfg.ARCHITECTURE for cfg in classes] == ["", "jumprelu"]
    for word in ("SAE=[a/b,]", "LR=[1e-4,0.0001]", "LR=[]", "LR=[1e-4,x]", "SAVE_EVERY=[1,2]"):
        assert word.partition("=")[0] in refused(word)[0]


def test_later_recipes_win_and_words_over_all(at):
    a, b = write(at, "SEED = 1\nLR = 1e-3\n", "a.py"), write(at, '"""Why?"""\nSEED = 2\n', "b.py")
    cases = [(a, b), (b, a), (a, "SEED=3"), ("SEED=3", a), ("SEED=4", "SEED=5")]
    assert [read(*words).SEED for words in cases] == [2, 1, 3, 3, 5]
    assert read(a, b).LR == 1e-3 and read(a, b).recipes == ["a", "b"]


def test_a_commit_of_another_repository_is_left_out(at):
    found = read("DATASET=who/what", "MODEL=who/lm")
    assert (found.DATASET_REVISION, found.MODEL_REVISION) == ("", "")
    found = read("DATASET_REVISION=abc", "DATASET=who/what").constants()
    assert found["DATASET_REVISION"] == "abc"
    assert found["MODEL_REVISION"] == VALUES["MODEL_REVISION"]
    recipe = write(at, 'MODEL_REVISION = "abc"\nMODEL = "x/y"\n')
    assert read(recipe).MODEL_REVISION == read(recipe, "MODEL=x/y").MODEL_REVISION == "abc"
    assert read(recipe, "MODEL=x/z").MODEL_REVISION == ""


# ---- what is not -----------------------------------------------------------------------------

CODE = [
    "import os",
    "SEED = __import__('os').system('touch canary')",
    "if True:\n    SEED = 1",
    "SEED = " + "(" * 999,
    "\0",
]


@pytest.mark.parametrize("code", CODE)
def test_a_recipe_is_never_executed(at, code):
    (problem,) = refused(write(at, f'"""Why?"""\nLAYER = 3\n{code}\n'))
    assert problem.startswith("x.py") and len(problem) < 300
    assert not os.path.exists("canary")


NEAR = {"TOKEN": "TOKENS?", "lr": "LR?", "LAYERS": "LAYER?", "LEARNING_RATE": "LR?", "XYZZY": ""}


@pytest.mark.parametrize("name", NEAR)
def test_an_unknown_name_is_refused_with_the_nearest(at, name):
    for word in (f"{name}=1", f"--{name}=1", write(at, f"{name} = 1")):
        (problem,) = refused(word)
        assert name in problem and problem.endswith(NEAR[name])


IMPOSSIBLE = {  # a constant of each type; of the first value, it may be
    "MODEL": [None, ""],
    "LOSS": ["kl", "other", ""],
    "CHECK_SAE": ["True", "1", "yes", "true", "'True'", "None", ""],
    "BATCH": ["4", "0", "-1", "1.5", "a", "'3'", "True", "None", "1e16", "9" * 5000, "nan", "1j"],
    "LR": ["1", "0", "-1e-9", "nan", "inf", "1e999", "9" * 400, "1e16", "True", "a", "1,5", ""],
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_value_of_another_type_or_out_of_range_is_refused(name):
    fine, *others = IMPOSSIBLE[name]
    assert fine is None or read(f"{name}={fine}")
    for text in others:
        (problem,) = refused(f"{name}={text}")
        assert name in problem and len(problem) < 400


CONTRADICTIONS = {  # words -> the constants that are named
    "SAE=fresh K=100 D_SAE=64": "K D_SAE",
    "CONTEXT=1": "CONTEXT",
    "TOKENS=2047": "TOKENS BATCH CONTEXT",
    "TOKENS=0 SAE=fresh": "TOKENS SAE",
    "VAL_TOKENS=1023": "VAL_TOKENS CONTEXT",
    "MICRO_BATCH=4": "BATCH MICRO_BATCH",
    "BATCH=8 CLEAN_BATCH=3": "CLEAN_BATCH",
    "SHUFFLE=8": "SHUFFLE LOSS",
    "SHUFFLE=8 LOSS=mse TRAIN=adapter": "SHUFFLE TRAIN",
    "SHUFFLE=7 LOSS=mse": "SHUFFLE BATCH",
    "TRAIN=lm_lora": "TRAIN LOSS",
    "SAE=fresh TRAIN=adapter": "SAE TRAIN",
    "SAE=fresh ARCHITECTURE=jumprelu": "ARCHITECTURE",
    "K=64": "K",
}


@pytest.mark.parametrize("words", CONTRADICTIONS)
def test_constants_that_contradict_each_other_are_refused(words):
    (problem,) = refused(*words.split())
    assert all(f"{name} = " in problem for name in CONTRADICTIONS[words].split())


def test_the_limits_themselves_are_fine():
    for words in ("SAE=fresh K=64 D_SAE=64", "TOKENS=2048", "VAL_TOKENS=1024", "CONTEXT=2 BATCH=4"):
        read(*words.split())
    read("SHUFFLE=8", "LOSS=mse")
    read("SAE=mine.pt", "K=64")  # a file may not say it


# ---- run.py ----------------------------------------------------------------------------------


def program(kinds=None, **values):
    """A module with run.py's constants, some of other types or values."""
    copy = ModuleType("copy")
    vars(copy).update({**vars(run), **values})
    copy.__annotations__ = run.__annotations__ | (kinds or {})
    return copy


def test_an_edited_run_py_is_checked_like_words():
    copy = program({"LOSS": Literal["mse"]}, LR=0, SEED="a", CHECK_SAE=1, MODEL="")
    problems = refused("BATCH=x", program=copy)
    names = ["MODEL", "CHECK_SAE", "LOSS", "LR", "SEED", "BATCH"]
    assert [re.search("[A-Z]+_?[A-Z]+", problem)[0] for problem in problems] == names
    found = read(program=program(SKIP_TOKENS=1e3, LR=1))
    assert type(found.SKIP_TOKENS) is int and type(found.LR) is float


def test_a_constant_that_is_added_is_one_like_the_others():
    copy = program({"LR_END": float}, LR_END=1e-6)
    assert read("LR_END=2", program=copy).constants()["LR_END"] == 2.0
    assert "LR_END" in refused("LR_END=x", program=copy)[0]
    with pytest.raises(UserError, match="LR_END has no type"):
        read(program=program(LR_END=1e-6))


def test_every_constant_is_read_and_what_is_read_is_one():
    read_as = re.compile(r"\bcfg\.([A-Z][A-Z_0-9]*)\b|\bconstants\[\"([A-Z_0-9]+)\"\]")
    files = [*ROOT.glob("*.py"), *(ROOT / "learners").glob("*.py"), *ROOT.glob("klsplice/**/*.py")]
    found = [read_as.findall(path.read_text()) for path in files]
    names = {name for pairs in found for pair in pairs for name in pair if name}
    names |= {name for row in TRAIN.values() for name in row.constants}
    assert names == CONSTANTS.keys()
    assert {*settings.FRESH_ONLY, *settings.FREE, *settings.PLACES} < names
    assert {*settings.ALIASES.values(), *writer.FINETUNE, *card.SHOWN} < names


@pytest.mark.parametrize("name", ["MODEL", "SAE", "DATASET", "RUNS", "CACHE"])
def test_home_and_variables_are_filled_in_everywhere(at, monkeypatch, name):
    monkeypatch.setenv("HOME", "/home/of")
    monkeypatch.setenv("SCRATCH", "/scratch")
    places = {"~/x": "/home/of/x", "$SCRATCH/x": "/scratch/x", "a/${HOME}": "a//home/of"}
    for text, wanted in places.items():
        recipe = write(at, f"{name} = {text!r}\n")
        found = [read(f"{name}={text}"), read(recipe), read(program=program(**{name: text}))]
        assert [getattr(cfg, name) for cfg in found] == [wanted] * 3
    for text in ("$NOWHERE/x", "a/${NOWHERE}", "a$", "~nobody-of-this-name/x"):
        assert name in refused(f"{name}={text}")[0]


def test_what_overrides_a_recipe_of_ones_own_is_said(at, capsys):
    mine = write(at, "LR = 1e-3\nBATCH = 8\nDEVICE = 'cpu'\n", "mine.py")
    small, relu = (str(ROOT / f"recipes/{name}.py") for name in ("small", "relu"))
    read(mine, small)
    (line,) = capsys.readouterr().out.splitlines()
    assert small in line and "BATCH = 4 (mine.py:2: 8)" in line
    assert "LR" not in line and "DEVICE" not in line
    read(relu, small)
    read(small, mine)
    read(mine, "BATCH=2")
    assert capsys.readouterr().out == ""


def test_a_python_without_the_packages_says_so():
    words = [sys.executable, "-S", run.__file__]  # no site-packages
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 2
    assert "torch" in done.stderr and ".venv/bin/python" in done.stderr
