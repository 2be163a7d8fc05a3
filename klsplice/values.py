"""The values of constants: read from words, of the right type, possible, and in names."""

import ast
import os
import re

LIST = re.compile(r"\[(?:[^][]|\[[^][]*\])*\]")  # brackets within it are of a glob
COMMA = re.compile(r",(?![^[]*\])")  # outside those


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


def typed(value, kind: type):
    """A value, or a list of them, as that kind; None where one is not."""
    if not isinstance(value, list):
        return _as_type(value, kind)
    found = [_as_type(one, kind) for one in value]
    return found if found and None not in found else None


def _as_type(value, kind: type):
    """`value` as that kind (1e5 is a fine int, 1 a fine float), or None."""
    if type(value) is kind:
        return value
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    if kind is float and type(value) is int and abs(value) < 1e15:
        return float(value)
    return None


NO_SPACES = "; a list has no spaces, or stands in quotes: 'LR=[1e-4, 3e-4]'"


def needs_brackets(name: str, value) -> str:
    """What to say of values with commas that are no list; "" of others."""
    text = str(value)
    if text.startswith("[") and not text.endswith("]"):
        return NO_SPACES
    return f"; a list needs brackets: {name}=[...]" if "," in text and text[0] != "[" else ""


def impossible(name: str, value, known) -> str | None:
    """What is wrong with a value of the right type, if anything. known: settings.Constant."""
    if known.choices and value not in known.choices:
        choices = ", ".join(x or repr(x) for x in known.choices)
        return f"{name} = {value!r}: choose from {choices}{needs_brackets(name, value)}"
    if isinstance(value, str):
        if any(ord(x) < 32 for x in value):
            return f"{name} = {value!r:.80} has a control character"
        return None if value or known.may_be_empty else f"{name} is empty"
    if isinstance(value, bool):
        return None
    if value != value or value < 0 or (value == 0 and not known.may_be_empty):
        wanted = "0 or more" if known.may_be_empty else "more than 0"
        return f"{name} = {value!r:.40}: wanted a finite number, {wanted}"
    if value >= known.limit:
        return f"{name} = {value!r:.40} is too large: wanted less than {known.limit:g}"
    return None


def word(name: str, value, among=()) -> str:
    """A constant and its value in plain characters; of an SAE or a local path, its last parts."""
    if isinstance(value, str) and (name == "SAE" or os.path.isabs(value) or os.path.exists(value)):
        value = last_parts(value, among)
    return name + re.sub("[^A-Za-z0-9.-]", "-", str(value))


def last_parts(path: str, among=()) -> str:
    """The last part of a path, or as many as tell it from those among which it stands."""
    path, *others = (os.path.normpath(p) for p in (path, *among))
    parts = path.split(os.sep)
    ends = (os.sep.join(parts[-n:]) for n in range(1, len(parts)))
    others = [os.sep + other for other in others if other != path]
    alone = (end for end in ends if not any(o.endswith(os.sep + end) for o in others))
    return next(alone, path).replace(os.sep, "-")
