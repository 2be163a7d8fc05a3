"""Reads recipes and NAME=value words over run.py's constants; refuses what it does not know.

A recipe is a docstring and literal assignments; it is parsed, never executed. A word on the command
line is `recipes/x.py` or NAME=value; later words win. Every problem is reported at once.
"""

import ast
import difflib
import os
from types import SimpleNamespace

import distributed
from errors import UserError

CHOICES = {
    "DTYPE": ("bfloat16", "float32"),
    "ARCHITECTURE": ("", "topk", "batchtopk", "relu", "jumprelu", "matryoshka"),
    "KEEP": ("none", "special", "first"),
    "TRAIN": ("sae", "adapter", "sae_lora", "lm_lora"),
    "LOSS": ("kl+mse", "mse", "kl"),
    "SCHEDULE": ("linear", "constant"),
    "LOGITS": ("float32", "bfloat16"),
    "ADAPTER": ("linear", "mlp"),
    "LORA_BLOCKS": ("all", "after", "one"),
    "LORA_MODULES": ("all", "attention", "mlp"),
    "JUMPRELU_THRESHOLD": ("frozen", "ste"),
}
MAY_BE_ZERO = {"LAYER", "SKIP_TOKENS", "WEIGHT_DECAY", "SEED", "SHUFFLE", "WARMUP", "AUXK"}
MAY_BE_ZERO |= {"LORA_DROPOUT", "LORA_ALPHA"}
MAY_BE_EMPTY = {"MODEL_REVISION", "SAE_REVISION", "DATASET_REVISION", "DATA_FILES", "RUN_NAME"}
MAY_BE_EMPTY |= {"WANDB_PROJECT", "MORE_SAES", "ARCHITECTURE"}
BELOW_ONE = {"WEIGHT_DECAY", "LORA_DROPOUT", "AUXK"}


@distributed.in_turn
def read(words: list[str], constants: dict) -> SimpleNamespace:
    """-> the constants after overrides, as attributes, plus RECIPES (names of the files read).

    Raises UserError (exit 2) that lists every unknown name, changed type and impossible value.
    """
    settings, problems, recipes = dict(constants), [], []
    for word in words:
        name, equals, text = word.partition("=")
        if equals and name.isidentifier():
            assignments = [(name, _parse(text, constants.get(name)), f"{word:.80}")]
        elif word.endswith(".py"):
            assignments = _literals(word, problems)
            recipes.append(os.path.splitext(os.path.basename(word))[0])
        else:
            problems.append(f"{word!r:.80} is neither a recipe (recipes/NAME.py) nor NAME=value")
            continue
        for name, value, where in assignments:
            if name not in constants:
                near = _near(name.upper(), constants, cutoff=0.5)
                problems.append(f"unknown constant {name:.80} ({where}){near}")
            elif (value := _as_type(value, constants[name])) is None:
                wanted = type(constants[name]).__name__
                problems.append(
                    f"{where}: {name} wants {_article(wanted)} like {constants[name]!r}"
                )
            else:
                settings[name] = value
    problems += [p for name, value in settings.items() if (p := _impossible(name, value))]
    if not problems:
        problems += _contradictions(SimpleNamespace(**settings))
    if problems:
        hint = "the constants and what they mean stand at the top of run.py"
        raise UserError("\n       ".join(problems), hint)
    return SimpleNamespace(**settings, RECIPES=recipes)


def _literals(path: str, problems: list[str]) -> list[tuple]:
    """-> [(name, value, "file:line")] of a recipe's assignments; anything else is a problem."""
    try:
        with open(path, encoding="utf-8") as f:
            tree = ast.parse(f.read())
    except OSError:
        folder, name = os.path.split(path)
        files = [f for f in _listdir(folder or ".") if f.endswith(".py")]
        problems.append(f"no recipe {path}{_near(name, files, cutoff=0.6, folder=folder)}")
        return []
    except (SyntaxError, ValueError, MemoryError, RecursionError) as e:
        problems.append(f"{path} is not readable as a recipe: {e or type(e).__name__}")
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


def _near(name: str, names, *, cutoff: float, folder: str = "") -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return f"; did you mean {os.path.join(folder, near[0])}?" if near else ""


def _listdir(folder: str) -> list[str]:
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def _parse(text: str, default):
    """The value of a NAME=value word: strings as they stand, everything else as a literal."""
    if isinstance(default, str):
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        return text[1:-1] if quoted else text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _as_type(value, default):
    """`value` in the type of `default` (1e5 is a fine int, 1 a fine float), or None."""
    if type(value) is type(default):
        return value
    if type(default) is int and type(value) is float and value.is_integer():
        return int(value)
    if type(default) is float and type(value) is int and abs(value) < 1e15:
        return float(value)
    return None


def _article(kind: str) -> str:
    return {"int": "a whole number", "str": "a text", "bool": "True or False"}.get(
        kind, f"a {kind}"
    )


def _impossible(name: str, value) -> str | None:
    if name in CHOICES and value not in CHOICES[name]:
        return f"{name} = {value!r}: choose from {', '.join(CHOICES[name])}"
    if isinstance(value, str):
        if "\0" in value:
            return f"{name} has a NUL character"
        return None if value or name in MAY_BE_EMPTY else f"{name} is empty"
    if isinstance(value, bool):
        return None
    if value != value or value < 0 or (value == 0 and name not in MAY_BE_ZERO):
        wanted = "0 or more" if name in MAY_BE_ZERO else "more than 0"
        return f"{name} = {value!r:.40}: wanted a finite number, {wanted}"
    if value >= (1 if name in BELOW_ONE else 1e15):
        return f"{name} = {value!r:.40} is too large"
    return None


def _contradictions(c: SimpleNamespace) -> list[str]:
    """What two constants say against each other."""
    found = []
    if c.K > c.D_SAE:
        found.append(
            f"K = {c.K} is more than D_SAE = {c.D_SAE}: a token cannot use so many latents"
        )
    if c.CONTEXT < 2:
        found.append(f"CONTEXT = {c.CONTEXT}: wanted 2 or more, a prediction needs a next token")
    if c.TOKENS < c.BATCH * c.CONTEXT:
        step = c.BATCH * c.CONTEXT
        found.append(f"TOKENS = {c.TOKENS:,} is less than one step (BATCH x CONTEXT = {step:,})")
    if c.VAL_TOKENS < c.CONTEXT:
        found.append(f"VAL_TOKENS = {c.VAL_TOKENS:,} is less than one context ({c.CONTEXT:,})")
    if c.BATCH % c.MICRO_BATCH:
        found.append(f"BATCH = {c.BATCH} is not a multiple of MICRO_BATCH = {c.MICRO_BATCH}")
    if c.CLEAN_BATCH < c.BATCH and c.CLEAN_BATCH % c.MICRO_BATCH:
        what = f"CLEAN_BATCH = {c.CLEAN_BATCH} is no multiple of MICRO_BATCH = {c.MICRO_BATCH}"
        found.append(what)
    if c.BATCH % distributed.size():
        found.append(f"BATCH = {c.BATCH} is not a multiple of the {distributed.size()} processes")
    if c.SHUFFLE and (c.LOSS != "mse" or c.TRAIN != "sae"):
        found.append("SHUFFLE mixes residuals across contexts: it needs LOSS = mse and TRAIN = sae")
    if c.SHUFFLE and c.SHUFFLE % c.BATCH:
        found.append(f"SHUFFLE = {c.SHUFFLE} is not a multiple of BATCH = {c.BATCH}")
    if c.TRAIN == "lm_lora" and c.LOSS != "kl":
        found.append(f"TRAIN = lm_lora learns from the KL alone: set LOSS=kl (found {c.LOSS})")
    if c.MORE_SAES and c.TRAIN != "lm_lora":
        found.append("MORE_SAES (several layers at once) needs TRAIN = lm_lora")
    if c.SAE == "fresh" and c.ARCHITECTURE not in ("", "topk", "batchtopk", "relu"):
        what = f"ARCHITECTURE = {c.ARCHITECTURE}: no fresh one is trained here"
        found.append(what + "; start from a TopK run, SAE=runs/NAME, which is converted")
    if c.SAE == "fresh" and c.TRAIN != "sae":
        found.append(f"TRAIN = {c.TRAIN} needs a trained SAE, found SAE = fresh")
    return found
