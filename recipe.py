"""Reads recipes and NAME=value words over run.py's constants; refuses what it does not know.

A recipe is a docstring and literal assignments; it is parsed, never executed. A word on the command
line is `recipes/x.py` or NAME=value; later ones win, so values stand last. All problems are named
at once, those of an edited run.py too.
"""

import ast
import difflib
import os
from types import SimpleNamespace

import distributed
from errors import UserError

KINDS = {
    str: "MODEL MODEL_REVISION DTYPE DEVICE SAE SAE_REVISION KEEP ARCHITECTURE DATASET "
    "DATASET_REVISION DATA_FILES SPLIT TEXT_KEY TRAIN LOSS SCHEDULE JUMPRELU_THRESHOLD ADAPTER "
    "LORA_BLOCKS LORA_MODULES MORE_SAES LOGITS RUN_NAME WANDB_PROJECT RUNS CACHE",
    int: "LAYER D_SAE K CONTEXT TOKENS PASSES SKIP_TOKENS VAL_TOKENS BATCH WARMUP SEED SHUFFLE "
    "DEAD_AFTER RANK LORA_ALPHA MICRO_BATCH CLEAN_BATCH EVAL_BATCH HEAD_CHUNK EVAL_EVERY LOG_EVERY",
    float: "LR WEIGHT_DECAY CLIP L1 AUXK LORA_DROPOUT SAVE_EVERY",
    bool: "CHECK_SAE FOLD COMPILE LOW_MEMORY",
}
KIND = {name: kind for kind, names in KINDS.items() for name in names.split()}
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
FRESH_ONLY = {"K", "D_SAE", "AUXK", "DEAD_AFTER"}  # a given SAE brings its own


@distributed.in_turn
def read(words: list[str], constants: dict) -> SimpleNamespace:
    """-> the constants after overrides, as attributes, plus RECIPES (names of the files read).

    Raises UserError (exit 2) that lists every unknown name, changed type and impossible value.
    """
    settings, problems, recipes, said = {}, [], [], {}  # said: by a word of one's own
    sources = [("run.py", [(name, value, "run.py") for name, value in constants.items()])]
    problems += [f"run.py lacks {name}" for name in sorted(KIND.keys() - constants.keys())]
    for word in words:
        name, equals, text = word.partition("=")
        if equals and name.isidentifier():
            sources.append((None, [(name, _parse(text, KIND.get(name)), f"{word:.80}")]))
        elif word.endswith(".py"):
            sources.append((word, _literals(word, problems)))
            recipes.append(os.path.splitext(os.path.basename(word))[0])
        else:
            problems.append(_no_word(word))
    for source, assignments in sources:
        for name, value, where in assignments:
            if name not in KIND:
                near = _near(name.upper(), KIND, cutoff=0.5)
                problems.append(f"unknown constant {name:.80} ({where}){near}")
            elif (value := _as_type(value, KIND[name])) is None:
                problems.append(f"{where}: {name} wants {_article(KIND[name])}")
            else:
                settings[name] = value
                if source is None:
                    said[name] = where
                elif name in said:
                    what = f"{said[name]} stands before {source}, which sets it: put it last"
                    problems.append(what)
    problems += [p for name, value in settings.items() if (p := _impossible(name, value))]
    if not problems:
        problems += _contradictions(SimpleNamespace(**settings))
        if settings["SAE"] != "fresh":
            for name in sorted(FRESH_ONLY & said.keys()):
                problems.append(f"{said[name]}: {name} is of a fresh SAE; a given one has its own")
    if problems:
        hint = "the constants and what they mean stand at the top of run.py"
        raise UserError("\n       ".join(problems), hint)
    return SimpleNamespace(**settings, RECIPES=recipes)


def _literals(path: str, problems: list[str]) -> list[tuple]:
    """-> [(name, value, "file:line")] of a recipe's assignments; anything else is a problem."""
    try:
        with open(path, encoding="utf-8") as f:
            tree = ast.parse(f.read())
    except FileNotFoundError:
        folder, name = os.path.split(path)
        folder = folder if folder or name in os.listdir() else "recipes"
        files = [f for f in _listdir(folder) if f.endswith(".py")]
        problems.append(f"no recipe {path}{_near(name, files, cutoff=0.6, folder=folder)}")
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


def _no_word(word: str) -> str:
    """What is wrong with a word that is neither a recipe nor NAME=value."""
    name, equals, value = word.lstrip("-").partition("=")
    name = name.replace("-", "_").upper()
    near = ""
    if name in KIND:
        near = f"; did you mean {name}={value if equals else 'value'} (without spaces)?"
    elif os.path.exists(path := os.path.join("recipes", f"{os.path.basename(word)}.py")):
        near = f"; did you mean {path}?"
    return f"{word!r:.80} is neither a recipe (recipes/NAME.py) nor NAME=value{near}"


def _near(name: str, names, *, cutoff: float, folder: str = "") -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return f"; did you mean {os.path.join(folder, near[0])}?" if near else ""


def _listdir(folder: str) -> list[str]:
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def _parse(text: str, kind: type | None):
    """The value of a NAME=value word: strings as they stand, everything else as a literal."""
    if kind is str:
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        return text[1:-1] if quoted else text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _as_type(value, kind: type):
    """`value` as that kind (1e5 is a fine int, 1 a fine float), or None."""
    if type(value) is kind:
        return value
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    if kind is float and type(value) is int and abs(value) < 1e15:
        return float(value)
    return None


def _article(kind: type) -> str:
    return {int: "a whole number", str: "a text", bool: "True or False"}.get(kind, "a float")


def _impossible(name: str, value) -> str | None:
    if name in CHOICES and value not in CHOICES[name]:
        return f"{name} = {value!r}: choose from {', '.join(x or repr(x) for x in CHOICES[name])}"
    if isinstance(value, str):
        if any(ord(x) < 32 for x in value):
            return f"{name} = {value!r:.80} has a control character"
        return None if value or name in MAY_BE_EMPTY else f"{name} is empty"
    if isinstance(value, bool):
        return None
    if value != value or value < 0 or (value == 0 and name not in MAY_BE_ZERO):
        wanted = "0 or more" if name in MAY_BE_ZERO else "more than 0"
        return f"{name} = {value!r:.40}: wanted a finite number, {wanted}"
    if value >= (limit := 1 if name in BELOW_ONE else 1e15):
        return f"{name} = {value!r:.40} is too large: wanted less than {limit:g}"
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
