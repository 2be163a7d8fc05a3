"""The constants of a run: run.py's, then those of recipes, then NAME=value words.

run.py's annotations say the type and the choices of a constant. A recipe is a docstring and literal
assignments; it is parsed, never executed. Of several recipes later ones win, and words win over all
of them. All problems are named at once. A list of values asks for a run of each, several lists for
all combinations; and words after a `--` are of runs of their own.
"""

import ast
import difflib
import importlib
import itertools
import json
import os
import re
import sys
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import NewType, get_args, get_type_hints

from klsplice import distributed, site
from klsplice.errors import UserError, first_line

PROGRAM = Path(__file__).resolve().parents[1]
# Types of run.py's constants, beside str (not empty), int (1 or more), float (over 0) and bool:
Text = NewType("Text", str)  # may be empty
Count = NewType("Count", int)  # 0 or more
Share = NewType("Share", float)  # 0 or more and less than 1
WANTED = {int: "a whole number", str: "a text", bool: "True or False", float: "a float"}
PLACES = {"MODEL", "SAE", "DATASET", "RUNS", "CACHE"}  # may be paths
FRESH_ONLY = {"K", "D_SAE", "AUXK", "DEAD_AFTER"}  # a given SAE brings its own
# May differ when a run is resumed:
FREE = {"RUNS", "CACHE", "WANDB_PROJECT", "WANDB_MODE", "LOG_EVERY", "SAVE_EVERY", "TOGETHER"}
ALIASES = {"LEARNING_RATE": "LR", "BATCH_SIZE": "BATCH", "CTX_LEN": "CONTEXT", "EPOCHS": "PASSES"}
NEEDED = ("torch", "transformers", "datasets", "safetensors", "einops", "tqdm")  # packages
FILES = (".pt", ".pth", ".safetensors")  # may not say their k
LIST = re.compile(r"\[(?:[^][]|\[[^][]*\])*\]")  # of texts; brackets within it are of a glob
COMMA = re.compile(r",(?![^[]*\])")  # outside those


@dataclass(frozen=True)
class Constant:
    """What run.py says of a constant."""

    type: type
    value: object
    choices: tuple = ()
    may_be_empty: bool = False  # "" or 0
    limit: float = 1e15  # a number is less than this


class Config(SimpleNamespace):
    """The constants of a run, as attributes in capitals; and how they came about.

    recipes: names of the recipes. said: constants that words or lists set. sweep: a name for all
    runs of one command, "" where there is one.
    """

    recipes, said, sweep = (), frozenset(), ""

    @property
    def saes(self) -> list[str]:
        """What SAE names: one, or several with commas between them."""
        return (
            [self.SAE] if os.path.exists(self.SAE) else re.split(r"\s*,\s*", self.SAE.strip(", "))
        )

    def constants(self) -> dict:
        return {name: value for name, value in vars(self).items() if name.isupper()}


def declared(program=None) -> dict[str, Constant]:
    """The constants of run.py, or of a copy of it (a module), in their order. Raises UserError."""
    program = program or importlib.import_module("run")
    kinds = get_type_hints(program)
    if bare := sorted({name for name in vars(program) if name.isupper()} - kinds.keys()):
        raise UserError(f"run.py: {', '.join(bare)} has no type", "wanted NAME: type = value")
    return {
        name: Constant(
            type=str if get_args(kind) else getattr(kind, "__supertype__", kind),
            value=getattr(program, name, None),
            choices=get_args(kind),  # of Literal["a", "b"]
            may_be_empty=kind in (Text, Count, Share) or "" in get_args(kind),
            limit=1 if kind is Share else 1e15,
        )
        for name, kind in kinds.items()
    }


def defaults() -> dict:
    """run.py's constants, by name."""
    return {name: constant.value for name, constant in declared().items()}


@distributed.main_process_first
def read(words: list[str], program=None) -> list[Config]:
    """-> the constants after overrides, of each run that is asked for.

    program: the module that has the constants, run.py where it is None. Raises UserError (exit 2)
    that lists every unknown name, other type, impossible value and contradiction.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        hint = "`pip install -r requirements.txt`, or use .venv/bin/python, which `make` installs"
        raise UserError(f"{sys.executable} has no package {', '.join(missing)}", hint)
    known = declared(program)
    groups = [list(group) for end, group in itertools.groupby(words, "--".__eq__) if not end]
    runs = [cfg for group in groups or [[]] for cfg in _runs(group, known)]
    for warning in {long_warm_up(cfg) for cfg in runs} - {""}:
        print(f"warning: {warning}")
    if len(runs) > 1:
        bound = [{n: v for n, v in cfg.constants().items() if n not in FREE} for cfg in runs]
        varied = [n for n in bound[0] if any(one[n] != bound[0][n] for one in bound)]
        digest = sha256(json.dumps(bound).encode()).hexdigest()[:8]
        for cfg in runs:
            cfg.sweep = f"sweep-{'-'.join(varied):.150}-{digest}"
    return runs


def _runs(words: list[str], known: dict[str, Constant]) -> list[Config]:
    """One run, or one of each combination of the lists. Raises UserError."""
    recipes, names, said, problems = [], [], {}, []
    for word in words:
        name, equals, text = word.partition("=")
        name = name.removeprefix("--")  # as `wandb agent` passes it
        if equals and name.isidentifier():
            kind = known[name].type if name in known else None
            said[name] = parse(text, kind), f"{word:.80}"
        elif word.endswith(".py"):
            try:
                recipes.append(read_recipe(word))
                names.append(word)
            except ValueError as e:
                problems.append(str(e))
        else:
            problems.append(f"{word!r:.80} is neither a recipe (recipes/NAME.py) nor NAME=value")
    of_run = {name: (constant.value, "run.py") for name, constant in known.items()}
    settings = _merged([of_run, *recipes, said], known, problems)
    _refuse(problems)
    _note_overridden(names, recipes)
    lists = {name: value for name, value in settings.items() if isinstance(value, list)}
    runs = []
    for chosen in itertools.product(*lists.values()):
        one = dict(zip(lists, chosen))
        if settings["RUN_NAME"] and lists:  # each has one of its own
            varied = (name_part(name, value) for name, value in one.items())
            one["RUN_NAME"] = "_".join([settings["RUN_NAME"], *varied])
        cfg = Config(
            **settings | one,
            recipes=[Path(name).stem for name in names],
            said=frozenset({*said, *lists}),
        )
        found = contradictions(cfg, FRESH_ONLY & cfg.said)
        problems += [problem for problem in found if problem not in problems]
        runs.append(cfg)
    _refuse(problems)
    return runs


def _refuse(problems: list[str]) -> None:
    if problems:
        hint = "the constants and what they mean stand at the top of run.py"
        raise UserError("\n       ".join(problems), hint)


def _note_overridden(paths: list[str], recipes: list[dict]) -> None:
    """Say what a later recipe overrides of one that is the user's own."""
    own = {}
    for path, assignments in zip(paths, recipes):
        old = {
            n: own[n] for n, (value, _) in assignments.items() if n in own and own[n][0] != value
        }
        if old:
            pairs = (f"{n} = {assignments[n][0]!r} ({own[n][1]}: {own[n][0]!r})" for n in old)
            print(f"note: {path} overrides {', '.join(pairs)}")
        ours = PROGRAM / "recipes" in Path(path).resolve().parents
        own = {n: v for n, v in own.items() if n not in assignments} | ({} if ours else assignments)


def _merged(sources: list[dict], known: dict[str, Constant], problems: list[str]) -> dict:
    """sources: name -> (value, where it stands). problems: is added to. -> the last values."""
    settings = {}
    for assignments in sources:
        for name, (value, where) in assignments.items():
            try:
                value = checked(name, value, known)
            except ValueError as e:
                problems.append(f"{where}: {e}")
                continue
            revision, other = f"{name}_REVISION", settings.get(name) != value
            if name in ("MODEL", "DATASET") and other and revision not in assignments:
                settings[revision] = ""  # the commit is of the repository before
            settings[name] = value
    return settings


def read_recipe(path: str) -> dict[str, tuple]:
    """-> name -> (value, "file:line"). Raises ValueError for anything but literal assignments."""
    try:
        with open(path, encoding="utf-8") as f:
            tree = ast.parse(f.read(), path)
    except (OSError, SyntaxError, ValueError, MemoryError, RecursionError) as e:
        raise ValueError(f"{path} cannot be read as a recipe: {first_line(e)}") from None
    found = {}
    lines = tree.body if ast.get_docstring(tree) is None else tree.body[1:]
    for node in lines:
        where = f"{path}:{node.lineno}"
        try:
            (target,) = node.targets
            found[target.id] = ast.literal_eval(node.value), where
        except (AttributeError, TypeError, ValueError, RecursionError):
            what = f"{where}: a recipe holds a docstring and NAME = literal lines only"
            raise ValueError(what) from None
    return found


def parse(text: str, kind: type | None):
    """The value or values of a NAME=value word: texts as they stand, everything else a literal."""
    if kind is str and LIST.fullmatch(text):
        inside = text[1:-1].strip()
        return [parse(part.strip(), str) for part in COMMA.split(inside)] if inside else []
    if kind is str:
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        return text[1:-1] if quoted else text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def checked(name: str, value, known: dict[str, Constant]):
    """The value of a constant in its type, or a list of such. Raises ValueError."""
    if name not in known:
        near = difflib.get_close_matches(name.upper(), [*known, *ALIASES], n=1)
        guess = f"; did you mean {ALIASES.get(near[0], near[0])}?" if near else ""
        raise ValueError(f"unknown constant {name:.80}{guess}")
    if not isinstance(value, list):
        return _checked_one(name, value, known[name])
    values = [_checked_one(name, one, known[name]) for one in value]
    if name in {*FREE, "RUN_NAME"}:
        raise ValueError(f"{name} wants one value for all runs")
    if not values or len({*values}) < len(values):
        raise ValueError(f"{name} wants different values in a list")
    return values


def _checked_one(name: str, value, known: Constant):
    kind = known.type
    if kind is int and type(value) is float and value.is_integer():  # 1e5 is a fine int
        value = int(value)
    if kind is float and type(value) is int and abs(value) < 1e15:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{name} wants {WANTED[kind]}")
    if known.choices and value not in known.choices:
        choices = ", ".join(choice or "''" for choice in known.choices)
        raise ValueError(f"{name} = {value!r:.80}: choose from {choices}")
    if kind is str:
        if not value and not known.may_be_empty:
            raise ValueError(f"{name} is empty")
        if any(ord(character) < 32 for character in value):
            raise ValueError(f"{name} = {value!r:.80} has a control character")
        if name == "SAE":  # may be several
            return ",".join(_expanded(name, one) for one in value.split(","))
        return _expanded(name, value) if name in PLACES else value
    if kind is not bool:
        enough = value >= 0 if known.may_be_empty else value > 0
        if not (enough and value < known.limit):
            least = "0 or more" if known.may_be_empty else "more than 0"
            wanted = f"wanted {least} and less than {known.limit:g}"
            raise ValueError(f"{name} = {value!r:.40}: {wanted}")
    return value


def _expanded(name: str, path: str) -> str:
    """A path with ~ and $NAME filled in. Raises ValueError where one has no value."""
    if "://" in path:
        wanted = "wanted a path, or owner/name of the Hub, without /tree/main or the like"
        raise ValueError(f"{name} = {path!r:.200}: no address is read; {wanted}")
    expanded = os.path.expanduser(os.path.expandvars(path))
    if "$" in expanded or expanded.startswith("~"):
        raise ValueError(f"{name} = {path!r:.200}: a variable or home folder in it is not known")
    return expanded


def contradictions(cfg, of_fresh: set[str]) -> list[str]:
    """A line for each. cfg: settings.Config. of_fresh: what was set that a fresh SAE alone has."""
    from sae import ARCHITECTURES  # here, since it loads torch

    fresh, trained = cfg.SAE == "fresh", cfg.TRAIN != "sae"
    processes, shuffled, lm_alone = distributed.size(), cfg.SHUFFLE > 0, cfg.TRAIN == "lm_lora"
    parts = cfg.CLEAN_BATCH < cfg.BATCH and cfg.CLEAN_BATCH % cfg.MICRO_BATCH
    sites, saes = cfg.SITE.count(",") + 1, len(cfg.saes)
    apart = cfg.KEEP == "outliers" and shuffled and processes > 1
    row = ARCHITECTURES.get(cfg.ARCHITECTURE or "topk")
    needless = set() if fresh else of_fresh - ({"K"} if cfg.SAE.endswith(FILES) else set())
    table = [  # whether it is so, the constants that it is about, what is wrong
        (cfg.K > cfg.D_SAE, "K D_SAE", "a token cannot use more latents than there are"),
        (cfg.CONTEXT < 2, "CONTEXT", "wanted 2 or more, a prediction needs a next token"),
        (0 < cfg.TOKENS < cfg.BATCH * cfg.CONTEXT, "TOKENS BATCH CONTEXT", "not even one step"),
        (fresh and not cfg.TOKENS, "TOKENS SAE", "TOKENS = 0 measures an SAE that there is"),
        (cfg.VAL_TOKENS < cfg.CONTEXT, "VAL_TOKENS CONTEXT", "not even one context"),
        (cfg.BATCH % cfg.MICRO_BATCH, "BATCH MICRO_BATCH", "wanted a multiple of MICRO_BATCH"),
        (parts, "CLEAN_BATCH BATCH MICRO_BATCH", "wanted BATCH or a multiple of MICRO_BATCH"),
        (cfg.BATCH % processes, "BATCH", f"wanted a multiple of the {processes} processes"),
        (shuffled and cfg.LOSS != "mse", "SHUFFLE LOSS", "a KL needs whole contexts: LOSS=mse"),
        (shuffled and trained, "SHUFFLE TRAIN", "shuffled tokens train an SAE alone: TRAIN=sae"),
        (cfg.SHUFFLE % cfg.BATCH, "SHUFFLE BATCH", "wanted a multiple of BATCH"),
        (apart, "KEEP SHUFFLE", "they go together on one process alone: set KEEP=first"),
        (lm_alone and cfg.LOSS != "kl", "TRAIN LOSS", "the LM learns from the KL alone: LOSS=kl"),
        (row is None, "ARCHITECTURE", "no class in sae.py has that name"),
        (
            fresh and row and not row.fresh,
            "SAE ARCHITECTURE",
            "none is trained; convert a TopK run's SAE",
        ),
        (fresh and trained, "SAE TRAIN", "it needs a trained SAE"),
        (cfg.SITE != site.RESIDUAL and trained, "SITE TRAIN", "for the residual alone: TRAIN=sae"),
        (saes > 1 and trained, "SAE TRAIN", "several SAEs learn as they are: TRAIN=sae"),
        (saes > 1 and shuffled, "SAE SHUFFLE", "they go on whole contexts"),
        (saes > 1 and cfg.ARCHITECTURE != "", "ARCHITECTURE SAE", "several are not converted"),
        (sites not in (1, saes), "SITE SAE", "wanted one site, or one each"),
        (bool(site.problem(cfg.SITE)), "SITE", site.problem(cfg.SITE)),
        (cfg.FREEZE != "none" and trained, "FREEZE TRAIN", "halves of an SAE, for TRAIN=sae"),
        (cfg.MSE_WEIGHT != 1 and cfg.LOSS in ("mse", "kl"), "MSE_WEIGHT LOSS", "for MSE beside KL"),
        (needless, " ".join(sorted(needless)), "for SAE=fresh alone; a loaded SAE has its own"),
    ]
    return [
        f"{', '.join(f'{name} = {getattr(cfg, name)}' for name in names.split())}: {problem}"
        for wrong, names, problem in table
        if wrong
    ]


def long_warm_up(cfg) -> str:
    """What to say of a warm-up that is longer than the run; "" of others."""
    steps = cfg.TOKENS // (cfg.BATCH * cfg.CONTEXT) * cfg.PASSES
    said = f"WARMUP = {cfg.WARMUP:,} is not over when the run ends, at step {steps:,}"
    return said if 0 < steps <= cfg.WARMUP else ""


def name_part(name: str, value) -> str:
    """A constant and its value in plain characters; of an SAE or a local path the last part."""
    if isinstance(value, str) and (name == "SAE" or os.path.isabs(value) or os.path.exists(value)):
        value = os.path.basename(os.path.normpath(value))
    return name + re.sub("[^A-Za-z0-9.-]", "-", str(value))
