"""What is kept is used again only where everything that it depends on is the same.

The evaluations and the tokens in CACHE, a run's checkpoint, and what a revision names on the hub.
"""

import json
import os
import re
import shutil

import pytest
import seams
import torch
from safetensors.torch import load_file, save_file
from seams import ALWAYS, QUICK, main, patch, read
from transformers import AutoTokenizer

box, outside, no_figures = seams.box, seams.outside, seams.no_figures
pytestmark = pytest.mark.usefixtures("no_figures")
FREE = {"RUNS", "CACHE", "WANDB_PROJECT", "WANDB_MODE", "LOG_EVERY", "SAVE_EVERY", "TOGETHER"}


# ---- evaluations -----------------------------------------------------------------------------


def evaluation(folder):
    return read(folder, "before.json"), seams.arrays(folder / "before.npz")


def same(a, b) -> bool:
    return a[0] == b[0] and seams.same_arrays(a[1], b[1])


@pytest.fixture(scope="module")
def first(box, tmp_path_factory):
    """A run whose evaluations are in box.cache."""
    runs = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as m:
        patch(m, "figures", lambda *args: None)
        assert main(box, runs, **QUICK) == 0
    return runs / "x"


def changed_sae(folder, source, change):
    """A copy of the SAE after change(tensors, the trainer's part of its config)."""
    shutil.copytree(source, folder)
    weights = torch.load(folder / "ae.pt", weights_only=True)
    config = json.loads((folder / "config.json").read_text())
    change(weights, config["trainer"])
    torch.save(weights, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps(config))
    return {"SAE": folder}


def other_k(weights, trainer):
    weights["k"] = torch.tensor(3, dtype=torch.int32)
    trainer["k"] = 3


DIFFERENT = {  # name: constants, or a function of (box, tmp_path) that makes them
    "LAYER": {"LAYER": 0},
    "KEEP first": {"KEEP": "first"},
    "KEEP special": {"KEEP": "special"},
    "DTYPE": {"DTYPE": "bfloat16"},
    "VAL_TOKENS": {"VAL_TOKENS": 128},
    "CONTEXT": {"CONTEXT": 16},
    "architecture": {"ARCHITECTURE": "batchtopk"},
    "decoder": lambda b, t: changed_sae(t / "s", b.sae, lambda w, c: w["b_dec"].mul_(1.5)),
    "encoder": lambda b, t: changed_sae(t / "s", b.sae, lambda w, c: w["encoder.bias"].mul_(2)),
    "k": lambda b, t: changed_sae(t / "s", b.sae, other_k),
    "text": lambda b, t: {"DATASET": seams.write_texts(t / "text.jsonl", b.texts[::-1])},
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_an_evaluation_of_something_else_is_not_taken_for_this_one(box, first, tmp_path, case):
    change = DIFFERENT[case]
    change = QUICK | (change(box, tmp_path) if callable(change) else change)
    assert main(box, tmp_path, RUN_NAME="shared", **change) == 0
    assert main(box, tmp_path, RUN_NAME="alone", CACHE=tmp_path / "cache", **change) == 0
    found, wanted = evaluation(tmp_path / "shared"), evaluation(tmp_path / "alone")
    assert same(found, wanted)
    assert not same(found, evaluation(first)), "the change changes nothing: this case says nothing"


def test_a_models_weights_changed_in_place_are_measured_anew(box, tmp_path):
    shutil.copytree(box.model, tmp_path / "gem")
    given = QUICK | {"MODEL": tmp_path / "gem", "CACHE": tmp_path / "cache", "KEEP": "first"}
    assert main(box, tmp_path, RUN_NAME="old", **given) == 0
    path = tmp_path / "gem" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.2.mlp.up_proj.weight"].neg_()  # the norm after it would undo a factor
    save_file(weights, path, metadata={"format": "pt"})
    assert main(box, tmp_path, RUN_NAME="shared", **given) == 0
    assert main(box, tmp_path, RUN_NAME="alone", **given | {"CACHE": tmp_path / "other"}) == 0
    old, found, wanted = (evaluation(tmp_path / n) for n in ("old", "shared", "alone"))
    assert same(found, wanted) and not same(found, old)
    for name in ("ce_clean", "ce_zero", "ce_spliced"):
        assert found[0][name] != old[0][name]


def test_another_number_of_held_out_sequences_of_the_same_array_is_measured_anew(box, tmp_path):
    """A .npy is the same file for any VAL_TOKENS: only the number says what was measured."""
    import numpy as np

    rng = np.random.default_rng(0)
    np.save(tmp_path / "tokens.npy", rng.integers(4, 300, (40, 32), dtype=np.uint16))
    given = QUICK | {"DATASET": tmp_path / "tokens.npy", "CACHE": tmp_path / "cache"}
    for val in (256, 128, 512):
        assert main(box, tmp_path, RUN_NAME=f"shared{val}", VAL_TOKENS=val, **given) == 0
        alone = given | {"CACHE": tmp_path / f"cache{val}"}
        assert main(box, tmp_path, RUN_NAME=f"alone{val}", VAL_TOKENS=val, **alone) == 0
        found = evaluation(tmp_path / f"shared{val}")
        assert same(found, evaluation(tmp_path / f"alone{val}"))
        assert {a.shape for a in found[1].values()} == {(val // 32, 32), (64,)}


def test_a_kept_evaluation_comes_with_its_arrays_and_is_not_made_again(box, tmp_path, monkeypatch):
    given = QUICK | {"CACHE": tmp_path / "cache"}
    measure, made = seams.original("evaluate"), []

    def counted(*args, **options):
        made.append(1)
        return measure(*args, **options)

    patch(monkeypatch, "evaluate", counted)
    assert main(box, tmp_path, RUN_NAME="a", **given) == 0
    n = len(made)
    assert main(box, tmp_path, RUN_NAME="b", **given) == 0
    assert n and len(made) == n, "the second run measured what CACHE has"
    assert main(box, tmp_path, RUN_NAME="c", **given | {"CACHE": tmp_path / "empty"}) == 0
    assert len(made) == 2 * n
    for name in ("b", "c"):
        assert seams.differences(tmp_path / "a", tmp_path / name) == []
    found = seams.arrays(tmp_path / "b" / "before.npz")
    latents = dict.fromkeys(("fires", "mean"), (64,))
    assert {n: a.shape for n, a in found.items()} == latents | dict.fromkeys(
        ("ce_clean", "ce", "kl", "tokens"), (8, 32)
    )
    about = read(tmp_path / "b", "before.json")
    assert found["kl"].mean(dtype="float64") == pytest.approx(about["kl"], rel=1e-6)
    assert found["ce"][:, :-1].mean(dtype="float64") == pytest.approx(about["ce_spliced"], rel=1e-6)


def test_the_zero_ablated_pass_is_of_this_layer_and_of_these_positions(box, tmp_path):
    """It is kept apart from the evaluation, for all SAEs.

    With KEEP, since a random Gemma makes zeros of a residual that is zero everywhere.
    """
    base = QUICK | {"KEEP": "first"}
    assert main(box, tmp_path, RUN_NAME="base", **base) == 0
    whole = evaluation(tmp_path / "base")[0]
    sae = changed_sae(tmp_path / "s", box.sae, lambda w, c: w["b_dec"].mul_(1.1))
    for change in ({"LAYER": 0}, {"KEEP": "special"}, {"DTYPE": "bfloat16"}):
        name = "".join(map(str, change.values()))
        for where in ("shared", "alone"):
            cache = {} if where == "shared" else {"CACHE": tmp_path / f"cache-{name}"}
            given = base | sae | change | cache
            assert main(box, tmp_path, RUN_NAME=f"{name}-{where}", **given) == 0
        found, wanted = (
            evaluation(tmp_path / f"{name}-{where}")[0] for where in ("shared", "alone")
        )
        assert found == wanted and found["ce_zero"] != whole["ce_zero"]


def test_an_evaluation_with_something_around_the_sae_is_not_kept_as_the_saes(box, tmp_path):
    """After an adapter was trained, a run from the same SAE is measured before as if alone."""
    given = QUICK | {"LR": 0.1, "TOKENS": 256, "RANK": 4}
    cache = {"CACHE": tmp_path / "cache"}
    for train in ("adapter", "lm_lora"):
        loss = "kl" if train == "lm_lora" else "kl+mse"
        assert main(box, tmp_path, RUN_NAME=train, TRAIN=train, LOSS=loss, **given, **cache) == 0
        after = seams.arrays(tmp_path / train / "after.npz")
        before = seams.arrays(tmp_path / train / "before.npz")
        assert not seams.same_arrays(before, after)
    assert main(box, tmp_path, RUN_NAME="shared", **QUICK, **cache) == 0
    assert main(box, tmp_path, RUN_NAME="alone", **QUICK, CACHE=tmp_path / "other") == 0
    assert same(evaluation(tmp_path / "shared"), evaluation(tmp_path / "alone"))


# ---- tokens ----------------------------------------------------------------------------------


def fingerprint(folder) -> str:
    return read(folder, "run.json")["resolved"]["tokens"]


def packed(model, texts, n: int, context: int):
    """The first n contexts, a token at a time."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    start = [2] if tokenizer("a")["input_ids"][0] == 2 else []
    found, now = [], [*start]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for token in [*ids, tokenizer.eos_token_id]:
            now.append(token)
            if len(now) == context:
                found.append(now)
                now = [*start]
                if len(found) == n:
                    return found
    raise AssertionError("too short a text")


def other_tokenizer(model, folder, change):
    """A copy of the model whose tokenizer is what change(tokenizer's JSON, its config) made."""
    shutil.copytree(model, folder)
    files = [folder / "tokenizer.json", folder / "tokenizer_config.json"]
    both = [json.loads(f.read_text()) for f in files]
    change(*both)
    for f, value in zip(files, both, strict=True):
        f.write_text(json.dumps(value))
    return folder


@pytest.fixture(scope="module")
def twofold(box, tmp_path_factory):
    """A text with two fields, and the same documents in another order of the same bytes."""
    root = tmp_path_factory.mktemp("twofold")
    rows = list(zip(box.texts, box.texts[::-1], strict=True))
    for name, kept in (("a", rows), ("b", rows[1:] + rows[:1])):
        lines = [json.dumps({"text": one, "other": other}) + "\n" for one, other in kept]
        (root / f"{name}.jsonl").write_text("".join(lines))
    assert (root / "a.jsonl").stat().st_size == (root / "b.jsonl").stat().st_size
    return root


def no_bos(tokenizer, config):
    tokenizer["post_processor"] = None


def other_eos(tokenizer, config):
    config["eos_token"] = "<unk>"


def test_whatever_decides_the_tokens_makes_another_fingerprint(box, twofold, tmp_path):
    a, b = twofold / "a.jsonl", twofold / "b.jsonl"
    first, second = box.texts, box.texts[::-1]
    moved = box.texts[1:] + box.texts[:1]
    plain = other_tokenizer(box.model, tmp_path / "plain", no_bos)
    unk = other_tokenizer(box.model, tmp_path / "unk", other_eos)
    cases = {  # constants; then the texts, contexts and length that they stand for
        "all": ({}, first, 8, 32),
        "TEXT_KEY": ({"TEXT_KEY": "other"}, second, 8, 32),
        "content": ({"DATASET": b}, moved, 8, 32),
        "CONTEXT": ({"CONTEXT": 16, "VAL_TOKENS": 128}, first, 8, 16),  # as many of them
        "VAL_TOKENS": ({"VAL_TOKENS": 128}, first, 4, 32),
        "no BOS": ({"MODEL": plain}, first, 8, 32),
        "another EOS": ({"MODEL": unk}, first, 8, 32),
    }
    seen = {}
    for case, (changes, texts, n, context) in cases.items():
        given = QUICK | {"DATASET": a, "CACHE": tmp_path / "cache", "RUN_NAME": case} | changes
        assert main(box, tmp_path, **given) == 0
        tokens = seams.arrays(tmp_path / case / "before.npz")["tokens"]
        assert tokens.tolist() == packed(given.get("MODEL", box.model), texts, n, context), case
        seen[case] = fingerprint(tmp_path / case)
    assert len(set(seen.values())) == len(cases), seen


def test_the_chat_template_decides_the_tokens_of_messages(box, tmp_path):
    template = "{% for m in messages %}SIGN{{ m.content }}{% endfor %}"
    with open(tmp_path / "chat.jsonl", "w") as f:
        for text in box.texts:
            f.write(json.dumps({"text": [{"role": "user", "content": text}]}) + "\n")
    found = {}
    for sign in ("a", "b"):
        (tmp_path / sign).mkdir()
        model = other_tokenizer(box.model, tmp_path / sign / "gem", lambda t, c: None)
        (model / "chat_template.jinja").write_text(template.replace("SIGN", sign))
        given = QUICK | {"DATASET": tmp_path / "chat.jsonl", "CACHE": tmp_path / "cache"}
        assert main(box, tmp_path, MODEL=model, RUN_NAME=sign + "x", **given) == 0
        tokens = seams.arrays(tmp_path / f"{sign}x" / "before.npz")["tokens"]
        assert tokens.tolist() == packed(box.model, [sign + t for t in box.texts], 8, 32)
        found[sign] = fingerprint(tmp_path / f"{sign}x")
    assert found["a"] != found["b"]


def test_runs_that_differ_in_anything_else_share_their_tokens(box, first, tmp_path):
    shutil.copy(box.text, tmp_path / "copy.jsonl")
    other = {"DATASET": tmp_path / "copy.jsonl", "SEED": 1, "KEEP": "first", "LAYER": 0}
    other |= {"BATCH": 4, "TOKENS": 512, "PASSES": 2, "SKIP_TOKENS": 64, "EVAL_BATCH": 4}
    assert main(box, tmp_path, **QUICK | other) == 0
    assert fingerprint(tmp_path / "x") == fingerprint(first)


# ---- the hub ---------------------------------------------------------------------------------


def of(asked, repository) -> set[str]:
    """The revisions of a repository that were asked for."""
    pattern = rf"{repository}/(?:resolve|revision|tree)/([^/?]+)"
    return {found[1] for path in asked if (found := re.search(pattern, path))}


def test_every_case_of_the_hub_runs(outside):
    assert {case: found["code"] for case, found in outside.hub.items()} == dict.fromkeys(
        outside.hub, 0
    )


def test_a_pinned_revision_is_what_is_asked_of_the_hub(outside):
    asked = outside.hub["pinned"]["asked"]
    assert of(asked, "/google/tiny") == {"a" * 40}
    assert of(asked, "/owner/saes") == {"b" * 40}
    assert of(asked, "datasets/owner/pile") == {"c" * 40}
    about = read(outside.runs / "pinned", "run.json")["resolved"]
    assert (about["sae_commit"], about["dataset_commit"]) == ("b" * 40, "c" * 40)
    assert of(outside.hub["other model revision"]["asked"], "/google/tiny") == {"d" * 40}
    assert of(outside.hub["other dataset revision"]["asked"], "datasets/owner/pile") == {"d" * 40}


def test_without_a_revision_main_is_asked_for_and_its_commit_recorded(outside):
    import hub

    asked = outside.hub["not pinned"]["asked"]
    for repository in ("/google/tiny", "/owner/saes", "datasets/owner/pile"):
        assert of(asked, repository) <= {"main", hub.SHA} and of(asked, repository), repository
    about = read(outside.runs / "not-pinned", "run.json")["resolved"]
    assert (about["sae_commit"], about["dataset_commit"]) == (hub.SHA, hub.SHA)


def test_a_dataset_its_revision_its_split_and_its_files_make_other_fingerprints(outside):
    cases = ["pinned", "other dataset", "other dataset revision", "other split", "other files"]
    cases.append("not pinned")  # another commit
    found = {case: fingerprint(outside.runs / case.replace(" ", "-")) for case in cases}
    assert len(set(found.values())) == len(cases), found
    assert fingerprint(outside.runs / "other-model-revision") == found["pinned"]
    held_out = {
        case: seams.arrays(outside.runs / case.replace(" ", "-") / "before.npz")["tokens"].tobytes()
        for case in cases
    }
    assert held_out["pinned"] == held_out["other dataset"] == held_out["other dataset revision"]
    assert len({held_out[case] for case in ("pinned", "other split", "other files")}) == 3


def test_another_revision_or_model_of_the_hub_is_measured_anew(outside):
    """Of each new one: a zero-ablated pass, and the SAE before and after."""

    def kept(case, kind):
        return sum(name.startswith(kind) for name in outside.hub[case]["cache"])

    counts = [
        (kept(case, "zero-"), kept(case, "eval-"))
        for case in ("pinned", "other model revision", "other model")
    ]
    assert counts == [(1, 2), (2, 4), (3, 6)]
    found = {c: read(outside.runs / c, "before.json") for c in ("pinned", "other-model")}
    assert found["pinned"]["ce_clean"] != found["other-model"]["ce_clean"]


# ---- checkpoints -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unfinished(box, tmp_path_factory):
    """A run killed in its seventh step, with the checkpoints of steps 5 and 6."""
    runs = tmp_path_factory.mktemp("unfinished")
    seams.killed(box, runs, step=6, **ALWAYS)
    assert seams.saved(runs / "x") == ["step-000000005", "step-000000006"]
    return runs


def other_text(box, folder):
    seams.write_texts(folder / "text.jsonl", box.texts[::-1])


def other_weights(box, folder):
    """In place: the file's size and dates stay."""
    path = folder / "gem" / "model.safetensors"
    old = path.stat()
    weights = load_file(path)
    weights["model.layers.2.mlp.up_proj.weight"].neg_()
    save_file(weights, path, metadata={"format": "pt"})
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert path.stat().st_size == old.st_size


def other_sae(box, folder):
    weights = torch.load(folder / "sae" / "ae.pt", weights_only=True)
    weights["b_dec"] *= 1.01
    torch.save(weights, folder / "sae" / "ae.pt")


def given_in(box, folder) -> dict:
    """The LM, the SAE and the text as files of the test's own."""
    shutil.copytree(box.model, folder / "gem")
    shutil.copytree(box.sae, folder / "sae")
    seams.write_texts(folder / "text.jsonl", box.texts)
    return {"MODEL": folder / "gem", "SAE": folder / "sae", "DATASET": folder / "text.jsonl"}


@pytest.mark.parametrize(
    "change, named",
    [
        (other_text, "DATASET (at DATASET_REVISION)"),
        (other_weights, "MODEL (at MODEL_REVISION)"),
        (other_sae, "SAE (at SAE_REVISION)"),
    ],
)
def test_a_stopped_run_does_not_go_on_with_another_text_lm_or_sae(
    box, tmp_path, capfd, change, named
):
    """Of the same name; put back as it was, it goes on."""
    given = ALWAYS | given_in(box, tmp_path)
    seams.killed(box, tmp_path / "runs", step=6, **given)
    kept = {p: p.read_bytes() for p in (tmp_path / "runs").rglob("*.json*")}
    (tmp_path / "right").mkdir()
    for name in ("gem", "sae"):
        shutil.copytree(tmp_path / name, tmp_path / "right" / name)
    change(box, tmp_path)
    assert main(box, tmp_path / "runs", **given) == 2
    assert f"error: {named}" in (said := capfd.readouterr().err) and "is not what" in said
    assert kept == {p: p.read_bytes() for p in (tmp_path / "runs").rglob("*.json*")}
    for name in ("gem", "sae"):
        shutil.rmtree(tmp_path / name)
        shutil.copytree(tmp_path / "right" / name, tmp_path / name)
    seams.write_texts(tmp_path / "text.jsonl", box.texts)
    assert main(box, tmp_path / "runs", **given) == 0


def test_an_evaluation_knows_the_lm_by_its_weights_not_by_its_files_dates(box, tmp_path):
    given = QUICK | given_in(box, tmp_path) | {"CACHE": tmp_path / "cache"}
    assert main(box, tmp_path, RUN_NAME="old", **given) == 0
    other_weights(box, tmp_path)
    assert main(box, tmp_path, RUN_NAME="shared", **given) == 0
    old, new = (read(tmp_path / name, "before.json") for name in ("old", "shared"))
    assert old["ce_clean"] != new["ce_clean"]
    shutil.copytree(tmp_path / "gem", tmp_path / "elsewhere" / "gem")  # nor by its folder
    given["MODEL"], n = tmp_path / "elsewhere" / "gem", len(os.listdir(tmp_path / "cache"))
    assert main(box, tmp_path, RUN_NAME="moved", **given) == 0
    assert len(os.listdir(tmp_path / "cache")) == n


def test_a_run_begun_again_in_the_same_folder_is_another_run_for_wandb(box, tmp_path):
    """As is one of the same path on another machine."""
    found = set()
    for _ in range(2):
        assert main(box, tmp_path / "runs", **QUICK) == 0
        found.add(read(tmp_path / "runs" / "x", "run.json")["wandb_id"])
        shutil.rmtree(tmp_path / "runs")
    assert len(found) == 2 and all(len(run_id) == 16 for run_id in found)


def test_a_run_that_older_constants_began_goes_on(box, unfinished, tmp_path):
    """A constant that it did not know means what the program did without it."""
    shutil.copytree(unfinished, tmp_path / "runs")
    path = tmp_path / "runs" / "x" / "run.json"
    about = json.loads(path.read_text())
    assert about["constants"].pop("BOS") == "tokenizer"
    for name in ("model", "sae"):
        del about["resolved"][name]
    del about["wandb_id"], about["checked"]
    path.write_text(json.dumps(about))
    assert main(box, tmp_path / "runs", BOS="never", **ALWAYS) == 2
    assert main(box, tmp_path / "runs", **ALWAYS) == 0


TEXTS = {  # another value of a constant that is one of a few
    "DTYPE": "bfloat16",
    "DEVICE": "cpu:0",
    "BOS": "never",
    "KEEP": "first",
    "ARCHITECTURE": "batchtopk",
    "TRAIN": "adapter",
    "LOSS": "kl",
    "SCHEDULE": "constant",
    "JUMPRELU_THRESHOLD": "ste",
    "ADAPTER": "mlp",
    "LORA_BLOCKS": "after",
    "LORA_MODULES": "mlp",
    "LOGITS": "float32",
}
ALONE = {"SHUFFLE", "MORE_SAES"}  # of other settings only, as recipe.py says before a run is opened


def another(name, value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return {"LAYER": 2, "BATCH": 4, "CLEAN_BATCH": 16}.get(name, value / 2 if value else 0.5)
    return TEXTS.get(name, "another")


def whole(name, value):
    """A whole number stays one; half of 1 is 2."""
    new = another(name, value)
    if isinstance(value, int) and not isinstance(value, bool):
        new = int(new) or 2 if value else 1
    return 2 * value if new == value else new


def refused(capsys, code, name) -> None:
    error = capsys.readouterr().err
    assert code == 2, (name, error)
    first, *rest = error.strip().splitlines()
    assert re.match(rf"error: .* other constants: {name} .* -> ", first), error
    assert len(rest) == 1 and ", " not in first.split("constants: ")[1], error


def bound_names() -> list[str]:
    found = [n for n in seams.constants_of_run() if n not in FREE | {"RUN_NAME"}]
    assert len(found) > 50
    return found


def test_a_run_does_not_go_on_with_any_other_constant(box, unfinished, tmp_path, capsys):
    """Said by a recipe, in which a constant of a fresh SAE may stand as well."""
    old = read(unfinished / "x", "run.json")["constants"]
    before = seams.stamps(unfinished)
    for name in bound_names():
        if name in ALONE:
            continue
        new = whole(name, old[name])
        (tmp_path / "recipe.py").write_text(f"{name} = {new!r}\n")
        words = [w for w in seams.words_of(box, unfinished) if not w.startswith(f"{name}=")]
        if (revision := f"{name}_REVISION") in old:  # which a name of the Hub would leave out
            words.append(f"{revision}={old[revision]}")
        import run

        refused(capsys, run.main([str(tmp_path / "recipe.py"), *words]), name)
    assert seams.stamps(unfinished) == before


def test_a_run_does_not_go_on_from_any_other_constant(box, unfinished, tmp_path, capsys):
    """As before, but the older run is the one with the other value: any is possible there."""
    shutil.copytree(unfinished, tmp_path / "runs")
    path = tmp_path / "runs" / "x" / "run.json"
    about = json.loads(path.read_text())
    for name in bound_names():
        new = whole(name, about["constants"][name])
        path.write_text(json.dumps(about | {"constants": about["constants"] | {name: new}}))
        refused(capsys, main(box, tmp_path / "runs"), name)
    assert len(seams.saved(tmp_path / "runs" / "x")) == 2


@pytest.mark.parametrize(
    "name", ["MICRO_BATCH", "LOGITS", "EVAL_EVERY", "DEVICE", "SEED", "CLIP", "HEAD_CHUNK"]
)
def test_a_checkpoint_is_not_taken_for_that_of_other_constants(
    box, unfinished, tmp_path, capsys, name
):
    """Where run.json was put right by hand, the checkpoints still know whose they are."""
    shutil.copytree(unfinished, tmp_path / "runs")
    path = tmp_path / "runs" / "x" / "run.json"
    about = json.loads(path.read_text())
    new = whole(name, about["constants"][name])
    path.write_text(json.dumps(about | {"constants": about["constants"] | {name: new}}))
    assert main(box, tmp_path / "runs", **{name: new}) == 1
    said = capsys.readouterr()
    assert said.out.count("is damaged (it is of another run)") == 2
    assert "error: no checkpoint in" in said.err


def test_the_free_constants_may_differ_and_change_nothing(box, unfinished, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    shutil.copytree(unfinished, tmp_path / "runs")
    free = {"CACHE": tmp_path / "cache", "LOG_EVERY": 5, "SAVE_EVERY": 3.0, "WANDB_PROJECT": "p"}
    free |= {"WANDB_MODE": "offline", "TOGETHER": 1}
    assert free.keys() | {"RUNS"} == FREE
    with seams.folder_of(tmp_path):
        assert main(box, "runs", **free) == 0
    assert main(box, tmp_path / "whole") == 0
    a, b = tmp_path / "runs" / "x", tmp_path / "whole" / "x"
    assert seams.differences(a, b) == ["metrics.jsonl"]
    steps = [line["step"] for line in seams.metrics(a) if "train/kl" in line]
    assert steps == [2, 4, 6, 10, 15, 20]
    assert os.listdir(tmp_path / "cache")
