"""Recipes and NAME=value words: what is meant is taken, what is not is refused, all at once."""

import ast
import io
import os
import subprocess
import sys
import tokenize

import pytest
from conftest import HERE

import run
from klsplice import settings, values
from klsplice.errors import UserError, near_path
from klsplice.formats import write as writer
from klsplice.train import TRAIN
from report import card, runs
from sae import ARCHITECTURES

ROOT = os.path.dirname(HERE)
CONSTANTS = settings.declared()
VALUES = {name: value for name, value in vars(run).items() if name.isupper()}
TEXTS = [name for name, constant in CONSTANTS.items() if constant.type is str]
NUMBERS = [name for name, constant in CONSTANTS.items() if constant.type in (int, float)]
CHOICES = [name for name, constant in CONSTANTS.items() if constant.choices]
RECIPES = sorted(f for f in os.listdir(os.path.join(ROOT, "recipes")) if f.endswith(".py"))


def read(*words):
    """The first run's."""
    return settings.read(list(words))[0]


def refused(*words):
    """-> the problems, a line each."""
    with pytest.raises(UserError) as e:
        read(*words)
    assert e.value.code == 2 and "run.py" in e.value.hint
    return [line.strip() for line in e.value.what.splitlines()]


def write(at, text, name="x.py"):
    (at / name).write_text(text)
    return name


# ---- what is meant ---------------------------------------------------------------------------


def test_without_words_the_constants_are_those_of_run_py():
    found = vars(read())
    assert found.pop("RECIPES") == [] and not found.pop("SAID")
    assert found == VALUES == settings.defaults() == read().constants()
    assert list(found) == list(VALUES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_docstring_and_known_constants_of_the_right_type(name):
    path = os.path.join(ROOT, "recipes", name)
    found = read(path)
    assert vars(found)["RECIPES"] == [name.removesuffix(".py")]
    tree = ast.parse(open(path).read())
    assert ast.get_docstring(tree)
    for node in tree.body[1:]:
        constant, value = node.targets[0].id, ast.literal_eval(node.value)
        assert getattr(found, constant) == (value[0] if isinstance(value, list) else value)
        assert type(getattr(found, constant)) is CONSTANTS[constant].type


@pytest.mark.parametrize("name", RECIPES)
def test_the_small_recipe_goes_with_every_recipe(name):
    small, other = (os.path.join(ROOT, "recipes", n) for n in ("small.py", name))
    assert read(other, small).MODEL == "assets/smollm2"


def test_words_take_the_type_of_the_constant():
    found = read("TOKENS=1e6", "LR=1", "CHECK_SAE=False", "MODEL=a/b", "WARMUP=1_024", "CLIP=1e-1")
    assert (found.TOKENS, found.LR, found.CHECK_SAE) == (1_000_000, 1.0, False)
    assert (found.MODEL, found.WARMUP, found.CLIP) == ("a/b", 1024, 0.1)
    assert [type(v) for v in (found.TOKENS, found.LR, found.CLIP)] == [int, float, float]


def test_texts_stand_as_they_are_with_or_without_quotes():
    for word in ("RUN_NAME=a b=c", "RUN_NAME='a b=c'", 'RUN_NAME="a b=c"'):
        assert read(word).RUN_NAME == "a b=c"
    for text in ("1e5", "None", "[1", "'", "it's", "a.py", ""):
        assert vars(read(f"RUN_NAME={text}"))["RUN_NAME"] == text
    assert read("RUN_NAME=''").RUN_NAME == ""


def test_a_list_of_texts_has_each_part_and_a_glob_is_none():
    def texts_of(word):
        return [cfg.DATASET for cfg in settings.read([f"DATASET={word}"])]

    for glob in ("texts/[ab]*.txt", "[ab]*.tx[t]", "[ab]/[12]", "[a,b]*.[jt]*[lt]"):
        assert texts_of(glob) == [glob]
    assert texts_of("[texts/[a,b]*.txt, [c]/d.txt,'e']") == ["texts/[a,b]*.txt", "[c]/d.txt", "e"]
    classes = settings.read(["SAE=a/b", "ARCHITECTURE=[,jumprelu]"])
    assert [cfg.ARCHITECTURE for cfg in classes] == ["", "jumprelu"]
    assert refused("SAE=[a/b,]") == ["SAE is empty"]


def test_values_with_commas_are_told_that_a_list_needs_brackets(at):
    hint = "; a list needs brackets: LR=[...]"
    assert refused("LR=1e-4,3e-4") == ["LR=1e-4,3e-4: LR wants a float" + hint]
    assert refused("LR=1e-4,x") == ["LR=1e-4,x: LR wants a float" + hint]
    assert refused(write(at, "LR = 1e-4, 3e-4\n")) == ["x.py:1: LR wants a float" + hint]
    assert refused("LOSS=mse,kl")[0].endswith(
        "choose from kl+mse, mse, kl" + hint.replace("LR", "LOSS")
    )
    assert refused("LR=[1e-4,x]") == ["LR=[1e-4,x]: LR wants a float"]


def test_a_list_that_the_shell_cut_at_its_spaces_is_told_so():
    assert [said.endswith(values.NO_SPACES) for said in refused("LR=[1e-4,", "3e-4]")] == [True] * 2
    assert refused("SAE=[a/b,", "c/d]")[0].endswith(values.NO_SPACES)
    assert len(settings.read(["LR=[1e-4, 3e-4]"])) == 2


def test_a_value_that_stands_twice_in_a_list_is_refused():
    assert refused("LR=[1e-4,0.0001]") == ["LR=[1e-4,0.0001]: LR has a value twice"]


def test_later_words_win_over_earlier_ones(at):
    a, b = write(at, "SEED = 1\nLR = 1e-3\n", "a.py"), write(at, '"""Why?"""\nSEED = 2\n', "b.py")
    found = [read(*words).SEED for words in ((a, b), (b, a), (a, "SEED=3"))]
    assert found == [2, 1, 3]
    assert refused("SEED=3", a) == ["SEED=3 stands before a.py, which sets it: put it last"]
    assert read("SEED=4", "SEED=5").SEED == 5
    both = read(a, b)
    assert both.LR == 1e-3 and both.RECIPES == ["a", "b"]


# ---- what is not -----------------------------------------------------------------------------

CODE = [
    "import os",
    "__import__('os').system('touch canary')",
    "SEED = __import__('os').system('touch canary')",
    "SEED = open('canary', 'w') and 1",
    "SEED = 10 ** 6",
    "SEED = LR",
    "LR = [1e-3][0]",
    "MODEL = f'a'",
    "SEED = 1 if True else 2",
    "SEED: int = 1",
    "SEED += 1",
    "SEED = LAYER = 1",
    "SEED, LAYER = 1, 2",
    "if True:\n    SEED = 1",
    "def f(): pass",
    "SEED.x = 1",
    "(SEED := 1)",
    "5",
    "'''not the first line'''",
]


@pytest.mark.parametrize("code", CODE)
def test_a_recipe_is_never_executed(at, code):
    (problem,) = refused(write(at, f'"""Why?"""\nLAYER = 3\n{code}\n'))
    assert problem.startswith("x.py:3: ") and "NAME = literal" in problem
    assert not os.path.exists("canary")


@pytest.mark.parametrize(
    "text",
    [
        "SEED = ",
        "SEED = 1)",
        "\0",
        "SEED = " + "(" * 999,
        "SEED = " + "-" * 99_999 + "1",
        "é = = 1",
    ],
)
def test_a_recipe_that_is_no_python_is_refused_without_a_traceback(at, text):
    (problem,) = refused(write(at, text))
    assert problem.startswith("x.py") and len(problem) < 200


def test_a_recipe_that_is_no_text_or_not_there_is_refused(at):
    (at / "x.py").write_bytes(b"SEED = '\xff\xfe'")
    (at / "recipes").mkdir()
    write(at, "SEED = 1", "recipes/kl_only.py")
    assert "not readable" in refused("x.py")[0]
    assert refused("recipes/kl_onyl.py") == [
        "no recipe recipes/kl_onyl.py; did you mean recipes/kl_only.py?"
    ]
    assert refused("recipes/zzz.py", "no/such.py", "recipes.py") == [
        "no recipe recipes/zzz.py",
        "no recipe no/such.py",
        "no recipe recipes.py",
    ]


NEAR = {"TOKEN": "TOKENS", "lr": "LR", "Loss": "LOSS", "LAYERS": "LAYER", "VAL_TOKEN": "VAL_TOKENS"}
NEAR |= {"LEARNING": None, "BATCHSIZE": "BATCH", "MICROBATCH": "MICRO_BATCH", "XYZZY": None}


@pytest.mark.parametrize("name", NEAR)
def test_an_unknown_name_is_refused_with_the_nearest(at, name):
    for words, where in (((f"{name}=1",), f"{name}=1"), ((write(at, f"{name} = 1"),), "x.py:1")):
        (problem,) = refused(*words)
        assert problem.startswith(f"unknown constant {name} ({where})")
        if NEAR[name]:
            assert problem.endswith(f"; did you mean {NEAR[name]}?")


@pytest.mark.parametrize("word", ["", "kl", "--help", "-n", "LR", "recipes", "=3", "a b=3", "1=2"])
def test_a_word_that_is_neither_recipe_nor_assignment_is_refused(word):
    assert "neither a recipe" in refused(word)[0]


def test_every_problem_is_reported_at_once(at):
    problems = refused(
        write(at, "SEED = 'a'\nLAYERS = 3\nimport os\n"), "LR=fast", "LOSS=k1", "BATCH=0", "what"
    )
    parts = ["SEED wants a whole number", "LAYERS", "x.py:3", "LR wants", "'what' is neither"]
    parts += ["LOSS = 'k1': choose from kl+mse, mse, kl", "BATCH = 0"]
    assert len(problems) == len(parts)
    assert all(sum(part in p for p in problems) == 1 for part in parts)


TYPES = {
    int: ["1.5", "a", "'3'", "True", "None", "[]", "[1, 'a']", "1e400", "nan", "", "0x", "1j", "()"]
}
TYPES[float] = ["a", "'3'", "True", "None", "[]", "[1.0, None]", "", "1j", "1,5"]
TYPES[bool] = ["1", "0", "yes", "true", "false", "'True'", "None", ""]


@pytest.mark.parametrize("name", [name for name in CONSTANTS if name not in TEXTS])
def test_a_value_of_another_type_is_refused(name):
    for text in TYPES[CONSTANTS[name].type]:
        (problem,) = refused(f"{name}={text}")
        assert len(problem) < 400
        assert name in problem and ("wants" in problem or "finite" in problem)


MAY_BE_EMPTY = {"MODEL_REVISION", "SAE_REVISION", "DATASET_REVISION", "DATA_FILES", "RUN_NAME"}
MAY_BE_EMPTY |= {"WANDB_PROJECT", "MORE_SAES", "ARCHITECTURE"}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_constant_takes_texts_alone(at, name):
    for value in ("3", "None", "True", "['a', 3]", "b'a'"):
        (problem,) = refused(write(at, f"{name} = {value}"))
        assert f"{name} wants a text" in problem
    assert refused(f"{name}=a\0b")
    if not VALUES[name] or name.endswith("_REVISION"):
        assert name in MAY_BE_EMPTY
    if name in MAY_BE_EMPTY:
        assert getattr(read(f"{name}="), name) == ""
    else:
        assert name in refused(f"{name}=")[0]


MAY_BE_ZERO = {"LAYER", "SKIP_TOKENS", "WEIGHT_DECAY", "SEED", "SHUFFLE", "WARMUP", "AUXK"}
MAY_BE_ZERO |= {"LORA_DROPOUT", "LORA_ALPHA", "TOGETHER", "TOKENS"}
BELOW_ONE = {"WEIGHT_DECAY", "LORA_DROPOUT", "AUXK"}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_is_impossible_is_refused(name):
    whole = CONSTANTS[name].type is int
    for text in ["-1", "1e16", "9" * 400, "-" + "9" * 400, "9" * 5000, "-1e-9", "inf", "1e999"]:
        problems = refused(f"{name}={text}")
        assert len(problems) == 1 and name in problems[0] and len(problems[0]) < 400
    if name in MAY_BE_ZERO:
        sae = [] if name == "TOKENS" else ["SAE=fresh"]
        assert getattr(read(f"{name}=0", *sae), name) == 0
    else:
        assert "more than 0" in refused(f"{name}=0")[0]
    if name in BELOW_ONE:
        assert "too large: wanted less than 1" in refused(f"{name}=1.0")[0]
        assert getattr(read(f"{name}=1e-9", "SAE=fresh"), name) == 1e-9
    assert whole or "nan" in refused(f"{name}=nan")[0]


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_outside_its_list_is_refused_with_the_list(name):
    choices = CONSTANTS[name].choices
    assert VALUES[name] in choices
    shown = ", ".join(x or "''" for x in choices)
    assert refused(f"{name}=other") == [f"{name} = 'other': choose from {shown}"]
    for choice in choices:
        further = ["LOSS=kl"] * (choice == "lm_lora")
        assert getattr(read(f"{name}={choice}", *further), name) == choice


def test_what_has_a_list_of_choices():
    wanted = {"DTYPE", "ARCHITECTURE", "KEEP", "TRAIN", "LOSS", "SCHEDULE", "LOGITS", "ADAPTER"}
    wanted |= {"BOS", "FREEZE"}
    wanted |= {"LORA_BLOCKS", "LORA_MODULES", "JUMPRELU_THRESHOLD", "WANDB_MODE"}
    assert set(CHOICES) == wanted


def test_the_tables_name_constants_that_there_are():
    named = settings.FRESH_ONLY | MAY_BE_ZERO | MAY_BE_EMPTY | BELOW_ONE
    named |= {*writer.FINETUNE, *card.SHOWN, *runs.KEPT}
    named |= {name for row in TRAIN.values() for name in row.constants}
    assert named < CONSTANTS.keys()
    assert set(CONSTANTS["TRAIN"].choices) == TRAIN.keys()
    assert set(CONSTANTS["ARCHITECTURE"].choices) == {"", *ARCHITECTURES}


CONTRADICTIONS = {
    "SAE=fresh K=100 D_SAE=64": "K = 100 is more than D_SAE = 64",
    "CONTEXT=1": "CONTEXT = 1",
    "TOKENS=2047": "TOKENS = 2,047 is less than one step",
    "VAL_TOKENS=1023": "VAL_TOKENS = 1,023 is less than one context",
    "BATCH=3": "BATCH = 3 is not a multiple of MICRO_BATCH = 2",
    "MICRO_BATCH=4": "BATCH = 2 is not a multiple of MICRO_BATCH = 4",
    "SHUFFLE=8": "SHUFFLE",
    "SHUFFLE=8 LOSS=mse TRAIN=adapter": "SHUFFLE",
    "SHUFFLE=7 LOSS=mse": "SHUFFLE = 7 is not a multiple of BATCH = 2",
    "TRAIN=lm_lora": "set LOSS=kl",
    "MORE_SAES=3:a": "MORE_SAES",
    "SAE=fresh TRAIN=adapter": "needs a trained SAE",
    "SAE=fresh TRAIN=sae_lora": "needs a trained SAE",
}


@pytest.mark.parametrize("words", CONTRADICTIONS)
def test_constants_that_contradict_each_other_are_refused(words):
    (problem,) = refused(*words.split())
    assert CONTRADICTIONS[words] in problem


def test_the_limits_themselves_are_fine():
    for words in ("SAE=fresh K=64 D_SAE=64", "TOKENS=2048", "VAL_TOKENS=1024", "CONTEXT=2 BATCH=4"):
        read(*words.split())
    read("SHUFFLE=8", "LOSS=mse")
    read("TRAIN=lm_lora", "LOSS=kl", "MORE_SAES=3:a/b/c")


# ---- run.py ----------------------------------------------------------------------------------


@pytest.fixture
def edited(at, monkeypatch):
    """A function: settings.read on a copy of run.py with other lines for some constants."""
    with open(run.__file__, encoding="utf-8") as f:
        text = f.read()
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.AnnAssign)]

    def read_edited(*words, **lines):
        copy = text.splitlines()
        for node in nodes:
            if node.target.id in lines:
                rest = [""] * (node.end_lineno - node.lineno)  # the lines below stay where they are
                copy[node.lineno - 1 : node.end_lineno] = [lines[node.target.id], *rest]
        (at / "edited.py").write_text("\n".join(copy), encoding="utf-8")
        monkeypatch.setattr(settings, "RUN_PY", str(at / "edited.py"))
        (cfg,) = settings.read(list(words))
        return cfg

    return read_edited


EDITS = {
    'LR: float = "5e-5"': "LR wants a float",
    "SEED: Count = None": "SEED wants a whole number",
    "SEED: Count = True": "SEED wants a whole number",
    "CHECK_SAE: bool = 0": "CHECK_SAE wants True or False",
    "RUN_NAME: Text = 3": "RUN_NAME wants a text",
    'LOSS: Literal["kl+mse", "mse", "kl"] = 3': "LOSS wants a text",
}


@pytest.mark.parametrize("line", EDITS)
def test_an_edited_run_py_is_checked_like_words(edited, line):
    name = line.split(":")[0]
    with pytest.raises(UserError) as e:
        edited(**{name: line})
    assert e.value.what == f"{CONSTANTS[name].where}: {EDITS[line]}"
    assert e.value.code == 2 and "run.py" in e.value.hint


NOT_UNDERSTOOD = ["LR = 5e-5", "LRR = 1.0", "LR: number = 5e-5", "LR: float", "LR: float = 1 / 2"]
NOT_UNDERSTOOD += ["LR: 'float' = 5e-5", "LR += 1.0", "LR = SEED = 1", "LR: float = float(1)"]
NOT_UNDERSTOOD += ["LR: list[float] = 1.0"]


@pytest.mark.parametrize("line", NOT_UNDERSTOOD)
def test_a_line_of_run_py_that_declares_nothing_is_named(edited, line):
    with pytest.raises(UserError) as e:
        edited(LR=line)
    assert e.value.what.startswith(f"{CONSTANTS['LR'].where}: ") and e.value.code == 2
    assert e.value.what.endswith(" is not understood") and "\n" not in e.value.what
    assert "NAME: type = value" in e.value.hint


def test_impossible_values_in_run_py_are_refused_all_at_once(edited):
    lines = {"LR": "LR: float = 0", "WEIGHT_DECAY": "WEIGHT_DECAY: Share = 1.0"}
    lines |= {"LOSS": 'LOSS: Literal["mse", "kl"] = "k1"', "SAE": 'SAE: str = ""'}
    with pytest.raises(UserError) as e:
        edited("BATCH=x", CLIP="CLIP: float = {}", **lines)
    problems = [line.strip() for line in e.value.what.splitlines()]
    assert problems == [
        f"{CONSTANTS['CLIP'].where}: CLIP wants a float",
        "BATCH=x: BATCH wants a whole number",
        "SAE is empty",
        "LOSS = 'k1': choose from mse, kl",
        "LR = 0.0: wanted a finite number, more than 0",
        "WEIGHT_DECAY = 1.0 is too large: wanted less than 1",
    ]


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_deleted_from_run_py_is_named_before_anything_starts(edited, name):
    with pytest.raises(UserError) as e:
        edited(**{name: ""})
    assert e.value.what == f"run.py lacks {name}" and e.value.code == 2


def test_a_misspelt_constant_of_run_py_is_named_with_its_line(edited):
    with pytest.raises(UserError) as e:
        edited(LR="LRR: float = 1.0")
    where = CONSTANTS["LR"].where
    wanted = f"run.py lacks LR\n       {where}: LRR is read nowhere; did you mean LR?"
    assert e.value.what == wanted


def test_numbers_of_run_py_become_their_type(edited):
    found = edited(SKIP_TOKENS="SKIP_TOKENS: Count = 1e3", LR="LR: float = 1")
    assert type(found.SKIP_TOKENS) is int and found.SKIP_TOKENS == 1000
    assert type(found.LR) is float and found.LR == 1


def test_a_constant_that_is_added_to_run_py_and_read_is_one_like_the_others(edited, monkeypatch):
    in_use = settings.names_in_use()
    monkeypatch.setattr(settings, "names_in_use", lambda: in_use | {"LR_END"})
    line = {"LR": "LR: float = 5e-5; LR_END: float = 1e-6"}
    assert edited(**line).LR_END == 1e-6 and edited("LR_END=2", **line).constants()["LR_END"] == 2
    with pytest.raises(UserError, match="LR_END wants a float"):
        edited("LR_END=x", **line)


def test_a_list_of_one_choice_is_a_list(edited):
    line = {"LOSS": 'LOSS: Literal["mse"] = "mse"'}
    assert edited("LOSS=mse", **line).LOSS == "mse"
    with pytest.raises(UserError) as e:
        edited("LOSS=ms", **line)
    assert e.value.what == "LOSS = 'ms': choose from mse"


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("kl_only", "did you mean recipes/kl_only.py?"),
        ("kl_only.py", "did you mean recipes/kl_only.py?"),
        ("--lr=1e-4", "did you mean LR=1e-4 (without spaces)?"),
        ("--batch-size", "nor NAME=value"),
        ("--BATCH-SIZE=2", "nor NAME=value"),
        ("--val-tokens=2048", "did you mean VAL_TOKENS=2048 (without spaces)?"),
        ("LR", "did you mean LR=value (without spaces)?"),
        ("tests", "nor NAME=value"),
    ],
)
def test_a_word_that_is_nearly_one_gets_a_guess(word, near, monkeypatch):
    monkeypatch.chdir(ROOT)
    (problem,) = refused(word)
    assert problem.endswith(near)


def test_a_word_may_begin_with_two_dashes_as_wandb_agent_passes_it(at):
    recipe = write(at, "LR = 1.0\nCLIP = 3.0\n")
    words = [recipe, "LR=1e-3", "COMPILE=False", "MODEL=a/b=c"]
    plain, dashed = read(*words), read(recipe, *(f"--{word}" for word in words[1:]))
    assert vars(plain) == vars(dashed) and sorted(plain.SAID) == ["COMPILE", "LR", "MODEL"]
    assert refused("--LRR=3") == ["unknown constant LRR (--LRR=3); did you mean LR?"]
    assert refused("--LR=fast") == ["--LR=fast: LR wants a float"]


def test_no_guess_is_what_was_written(at):
    (at / "recipes").mkdir()
    (at / "recipes" / "mine.py").symlink_to("nowhere.py")
    assert refused("recipes/mine.py") == ["no recipe recipes/mine.py"]
    (at / "model").mkdir()
    for path in ("model", "./model", "model/", str(at / "model"), "recipes/../model"):
        assert near_path(path) == ""
    (at / "model2").mkdir()
    assert near_path("./model/") == "; did you mean model2?"
    assert near_path("model2", "recipes") == "; did you mean model?"
    (at / "recipes" / "model").mkdir()
    assert near_path("modle", "recipes").startswith("; did you mean model")
    assert near_path("recipe/model") == ""
    (at / "runs" / "sae_k8").mkdir(parents=True)  # another number is no slip
    assert near_path("runs/sea_k8") and near_path("runs/sae_k9") == ""


def test_what_only_a_fresh_sae_has_is_refused_beside_a_given_one():
    assert refused("K=64") == ["K=64: K is for SAE=fresh; a loaded SAE has its own"]
    assert read("K=64", "SAE=fresh").K == 64


def test_help_is_the_docstring(capsys):
    assert run.main(["--help"]) == 0
    assert "python run.py recipes/relu.py LR=1e-4" in capsys.readouterr().out


def test_every_constant_has_a_comment_on_its_line_or_the_line_above():
    with open(run.__file__, encoding="utf-8") as f:
        text = f.read()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {t.start[0] for t in tokens if t.type == tokenize.COMMENT}
    lines = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.AnnAssign):
            lines[node.target.id] = (node.lineno - 1, node.lineno, node.end_lineno)
    assert lines.keys() == CONSTANTS.keys()
    assert not [name for name, around in lines.items() if not comments & {*around}]


def test_every_constant_is_read_somewhere():
    assert settings.names_in_use() == CONSTANTS.keys()


def test_a_copy_of_run_py_runs_on_its_own_constants(at):
    """LAYER = -3 is refused before anything is imported: by the copy, not by the words."""
    with open(run.__file__, encoding="utf-8") as f:
        text = f.read()
    copy = text.replace("LAYER: Count = 12", "LAYER: Count = -3")
    (at / "mine.py").write_text(copy, encoding="utf-8")
    env = os.environ | {"PYTHONPATH": os.path.dirname(run.__file__)}
    words = [sys.executable, str(at / "mine.py")]
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and "LAYER = -3" in done.stderr


def test_a_constant_that_stands_twice_in_run_py_is_named(edited):
    with pytest.raises(UserError) as e:
        edited(SEED="LR: float = 1e-3")
    first, second = sorted((CONSTANTS["LR"].where, CONSTANTS["SEED"].where))
    assert e.value.what == f"{second}: LR stands at {first}, too"
