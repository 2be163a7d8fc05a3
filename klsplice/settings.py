"""The constants of a run: run.py's, then recipes and NAME=value words over them.

run.py says of each constant its type, its choices and its value; a recipe is a docstring and
literal assignments. Both are parsed, never executed here. A word on the command line is
`recipes/x.py` or NAME=value; later ones win, so values stand last. All problems are named at once.

A list of values asks for a run of each, several lists for all combinations; and words after a `--`
are of runs of their own.
"""

import ast
import difflib
import itertools
import json
import os
import re
import subprocess
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

from klsplice import distributed, values
from klsplice.contradictions import contradictions, doubtful
from klsplice.errors import UserError, listed
from klsplice.hub import is_local
from klsplice.train import TRAIN

PROGRAM = Path(__file__).resolve().parents[1]
RUN_PY = str(PROGRAM / "run.py")
READERS = ("*.py", "learners/*.py", "klsplice/**/*.py")  # of the constants
# Types of run.py's constants, beside str (not empty), int (1 or more), float (over 0) and bool:
Text, Count, Share = str, int, float  # may be empty; 0 or more; 0 or more and less than 1
TYPES = {"str": str, "int": int, "float": float, "bool": bool}
TYPES |= {"Text": Text, "Count": Count, "Share": Share}
ARTICLE = {int: "a whole number", str: "a text", bool: "True or False", float: "a float"}
FRESH_ONLY = {"K", "D_SAE", "AUXK", "DEAD_AFTER"}  # a given SAE brings its own
# May differ when a run is resumed:
FREE = {"RUNS", "CACHE", "WANDB_PROJECT", "WANDB_MODE", "LOG_EVERY", "SAVE_EVERY", "TOGETHER"}
NOT_CONSTANTS = {"RECIPES", "SAID", "SWEEP", "AMONG"}  # of a Config


@dataclass(frozen=True)
class Constant:
    """What run.py says of a constant."""

    type: type
    value: object
    where: str  # "run.py:LINE"
    choices: tuple = ()
    may_be_empty: bool = False  # "" or 0
    limit: float = 1e15  # a number is less than this


# What a run that did not have a constant yet did without it.
ADDED = {"BOS": "tokenizer", "EVAL_TOKENS": 250_000}


class Config(SimpleNamespace):
    """The constants after overrides, as attributes; RECIPES, names of the recipes read; SAID, the
    constants that words of their own or a list set; and of several runs of one command SWEEP, a
    name for what they have in common, and AMONG, the values of the constants that vary."""

    RECIPES, SAID, SWEEP, AMONG = (), frozenset(), "", {}

    def __getattr__(self, name: str):
        if name.isupper():
            raise UserError(f"run.py lacks {name}", "wanted it at its top, with a type and a value")
        raise AttributeError(name)

    def told(self) -> str:
        """What tells it from other runs of the same command; of much its recipes and words."""
        recipes, names = [], sorted(self.AMONG.keys() - FREE - {"RUN_NAME"}) or ["SEED"]
        if len(names) > 5:
            recipes, names = self.RECIPES, sorted(self.SAID - FREE - {"RUN_NAME"})
        words = (f"{name}={getattr(self, name)}" for name in names)
        return " ".join([*recipes, *words]) or "the defaults"

    def word(self, name: str) -> str:
        return values.word(name, getattr(self, name), self.AMONG.get(name, ()))

    def constants(self) -> dict:
        return {name: value for name, value in vars(self).items() if name not in NOT_CONSTANTS}


def declared(text: str = "") -> dict[str, Constant]:
    """The constants of run.py, or of a copy's text, in their order. Raises UserError."""
    if not text:
        with open(RUN_PY, encoding="utf-8") as f:
            text = f.read()
    found = {}
    for node in ast.parse(text).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if not isinstance(target, ast.Name) or not target.id.isupper():
            continue
        where = f"run.py:{node.lineno}"
        if target.id in found:
            what = f"{where}: {target.id} stands at {found[target.id].where}, too"
            raise UserError(what, "wanted each constant once")
        try:
            value = ast.literal_eval(node.value)
            found[target.id] = _constant(node.annotation, value, where)
        except (AttributeError, KeyError, TypeError, ValueError):
            what = f"{where}: {ast.unparse(node):.80} is not understood"
            raise UserError(what, "wanted NAME: type = value, the value a literal") from None
    return found


def _constant(annotation: ast.expr, value, where: str) -> Constant:
    if isinstance(annotation, ast.Subscript):  # Literal["a", "b"]
        choices = ast.literal_eval(annotation.slice)
        choices = choices if isinstance(choices, tuple) else (choices,)
        return Constant(str, value, where, choices, may_be_empty="" in choices)
    name = annotation.id
    may_be_empty, limit = name in ("Text", "Count", "Share"), 1 if name == "Share" else 1e15
    return Constant(TYPES[name], value, where, may_be_empty=may_be_empty, limit=limit)


def edited(known: dict[str, Constant]) -> set[str]:
    """The constants whose value in run.py is another than in the program's last commit."""
    words = ["git", "-C", str(PROGRAM), "show", "HEAD:run.py"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        old = declared(done.stdout)
    except (OSError, subprocess.CalledProcessError, UserError):  # outside git, or of other times
        return set()
    return {name for name, c in known.items() if name in old and c.value != old[name].value}


def names_in_use() -> set[str]:
    """The constants that the program reads, found in its own text.

    So that one that is missing from run.py, or misspelt there, is named before anything starts."""
    wanted = re.compile(r"\bcfg\.([A-Z][A-Z_0-9]*)\b|\bconstants\[\"([A-Z_0-9]+)\"\]")
    texts = (path.read_text(encoding="utf-8") for each in READERS for path in PROGRAM.glob(each))
    found = {name for text in texts for names in wanted.findall(text) for name in names if name}
    further = {name for row in TRAIN.values() for name in row.constants}
    return (found | further) - NOT_CONSTANTS


def defaults() -> dict:
    """run.py's constants, by name."""
    return {name: constant.value for name, constant in declared().items()}


@distributed.main_process_first
def read(words: list[str]) -> list[Config]:
    """-> the constants after overrides, of each run that is asked for.

    Raises UserError (exit 2) that lists every unknown name, changed type and impossible value.
    """
    groups = [list(group) for end, group in itertools.groupby(words, "--".__eq__) if not end]
    found = [cfg for group in groups or [[]] for cfg in _runs(group)]
    if len(found) > 1:
        runs = [cfg.constants() for cfg in found]
        columns = {n: [run[n] for run in runs] for n in runs[0]}
        among = {n: values for n, values in columns.items() if any(v != values[0] for v in values)}
        name = _sweep_name(runs, among.keys())
        for cfg in found:
            cfg.SWEEP, cfg.AMONG = name, among
    for said in doubtful(found[0]):
        if all(said in doubtful(cfg) for cfg in found):
            print(f"warning: {said}")
    return found


def _sweep_name(runs: list[dict], among) -> str:
    """What differs among them, and a digest of all that they are: another has another name."""
    said = sorted(json.dumps({n: run[n] for n in sorted(run.keys() - FREE)}) for run in runs)
    varied = "-".join(sorted(among - FREE - {"RUN_NAME"}))
    return f"sweep-{varied:.150}-{sha256(''.join(said).encode()).hexdigest()[:8]}"


def _runs(words: list[str]) -> list[Config]:
    """One run, or one of each combination of the lists. Raises UserError."""
    known, in_use = declared(), names_in_use()
    settings, recipes, said = {}, [], {}  # said: set by a NAME=value word
    problems = [f"run.py lacks {name}" for name in sorted(in_use - known.keys())]
    for name in sorted(known.keys() - in_use):
        near = _near(name, in_use - known.keys(), cutoff=0.5)
        problems.append(f"{known[name].where}: {name} is read nowhere{near}")
    sources = [("run.py", [(name, c.value, c.where) for name, c in known.items()])]
    for word in words:
        name, equals, text = word.partition("=")
        if name.startswith("--") and name.isupper():  # as `wandb agent` passes it
            name = name[2:]
        if equals and name.isidentifier():
            value = values.parse(text, known[name].type if name in known else None)
            sources.append((None, [(name, value, f"{word:.80}")]))
        elif word.endswith(".py"):
            sources.append((word, _literals(word, problems)))
            recipes.append(os.path.splitext(os.path.basename(word))[0])
        else:
            problems.append(_no_word(word, known))
    order = {}  # which of the sources set a constant last
    for i, (source, assignments) in enumerate(sources):
        for name, value, where in assignments:
            if name not in known:
                near = _near(name.upper(), known, cutoff=0.6)
                problems.append(f"unknown constant {name:.80} ({where}){near}")
            elif (typed := values.typed(value, known[name].type)) is None:
                hint = values.needs_brackets(name, value)
                problems.append(f"{where}: {name} wants {ARTICLE[known[name].type]}{hint}")
            elif isinstance(typed, list) and name in {*FREE, "RUN_NAME"}:
                problems.append(f"{where}: {name} wants one value for all runs")
            elif isinstance(typed, list) and len({*typed}) < len(typed):
                problems.append(f"{where}: {name} has a value twice")
            else:
                settings[name], order[name] = typed, i
                if source is None:
                    said[name] = where
                elif name in said:
                    what = f"{said[name]} stands before {source}, which sets it: put it last"
                    problems.append(what)
    if recipes and not problems:
        _note_edits(sources[1:], known, said)
    runs = _combinations(settings, known, recipes, said, problems)
    for name in ("MODEL", "DATASET"):
        _forget_revision(name, runs, sources, order)
    return runs


def _note_edits(sources: list[tuple], known, said) -> None:
    """Say where a recipe overrides what was edited in run.py."""
    mine = edited(known)
    for source, assignments in sources:
        for name, _, where in assignments if source else []:
            if name in mine - said.keys():
                print(f"note: {where} sets {name}, which was edited in run.py; to win, say")
                print(f"      {name}={known[name].value} after the recipe")


def _forget_revision(name: str, runs: list[Config], sources: list[tuple], order: dict) -> None:
    """Of a repository that was set after the revision, whose commit is of the one before it."""
    given = order[f"{name}_REVISION"]
    if order[name] < given or sources[given][0] is None:  # None: a word of its own
        return
    before = [v for _, found in sources[: given + 1] for n, v, _ in found if n == name][-1]
    meant = before if isinstance(before, list) else [before]
    for cfg in runs:
        if getattr(cfg, name) not in meant and not is_local(getattr(cfg, name)):
            setattr(cfg, f"{name}_REVISION", "")


def _combinations(settings, known, recipes, said, problems: list[str]) -> list[Config]:
    """A run of each combination of the lists among `settings`. Raises UserError."""
    lists = {name: value for name, value in settings.items() if isinstance(value, list)}
    found = (
        values.impossible(name, one, known[name])
        for name, value in settings.items()
        for one in lists.get(name, [value])
    )
    problems += [problem for problem in found if problem]
    runs = [
        Config(
            **settings | dict(zip(lists, chosen)),
            RECIPES=recipes,
            SAID=frozenset({*said, *lists}),
        )
        for chosen in itertools.product(*lists.values())
    ]
    if not problems:
        for cfg in runs:
            problems += [x for x in contradictions(cfg) if x not in problems]
            if cfg.RUN_NAME:  # each has one of its own
                varied = (values.word(n, getattr(cfg, n), lists[n]) for n in lists)
                cfg.RUN_NAME = "_".join([cfg.RUN_NAME, *varied])
        if all(cfg.SAE != "fresh" for cfg in runs):
            files = all(cfg.SAE.endswith((".pt", ".pth", ".safetensors")) for cfg in runs)
            brought = FRESH_ONLY - ({"K"} if files else set())  # a file may not say its k
            for name in sorted(brought & said.keys()):
                problems.append(f"{said[name]}: {name} is for SAE=fresh; a loaded SAE has its own")
    if problems:
        hint = "the constants and what they mean stand at the top of run.py"
        raise UserError("\n       ".join(problems), hint)
    return runs


def _literals(path: str, problems: list[str]) -> list[tuple]:
    """-> [(name, value, "file:line")] of a recipe's assignments; anything else is a problem."""
    try:
        with open(path, encoding="utf-8") as f:
            tree = ast.parse(f.read())
    except FileNotFoundError:
        folder, name = os.path.split(path)
        folder = folder if folder or name in listed(".") else "recipes"
        files = [f for f in listed(folder or ".") if f.endswith(".py")]
        files = [f for f in files if os.path.join(folder, f) != path]  # a link to nowhere
        near = _near(name, files, cutoff=0.6, folder=folder)
        if (PROGRAM / path).exists():
            near = "; start from the folder that run.py is in"
        problems.append(f"no recipe {path}{near}")
        return []
    except OSError as e:
        problems.append(f"{path} cannot be read: {e.strerror}")
        return []
    except (SyntaxError, ValueError, MemoryError, RecursionError) as e:
        line = f":{e.lineno}" if isinstance(e, SyntaxError) else ""
        cause = getattr(e, "msg", None) or e or type(e).__name__
        problems.append(f"{path}{line} is not readable as a recipe: {cause}")
        return []
    found = []
    for i, node in enumerate(tree.body):
        where = f"{path}:{node.lineno}"
        if i == 0 and ast.get_docstring(tree) is not None:
            continue
        try:
            (target,) = node.targets
            found.append((target.id, ast.literal_eval(node.value), where))
        except (AttributeError, TypeError, ValueError, RecursionError):
            problems.append(f"{where}: a recipe holds NAME = literal lines and a docstring only")
    return found


def _no_word(word: str, known: dict) -> str:
    """What is wrong with a word that is neither a recipe nor NAME=value."""
    name, equals, value = word.lstrip("-").partition("=")
    name = name.replace("-", "_").upper()
    near = ""
    if name in known:
        near = f"; did you mean {name}={value if equals else 'value'} (without spaces)?"
    elif word.endswith("]") and "[" not in word:
        near = values.NO_SPACES
    elif os.path.exists(path := os.path.join("recipes", f"{os.path.basename(word)}.py")):
        near = f"; did you mean {path}?"
    return f"{word!r:.80} is neither a recipe (recipes/NAME.py) nor NAME=value{near}"


def _near(name: str, names, *, cutoff: float, folder: str = "") -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return f"; did you mean {os.path.join(folder, near[0])}?" if near else ""
