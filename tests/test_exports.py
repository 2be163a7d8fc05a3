"""What a run writes for others: the SAE in both formats, as it learnt, with all a reader needs.

Every case is a run of two steps from a source that the test wrote itself. Its last checkpoint, kept
aside, says what was learnt; the files are read here by their formats alone.
"""

import ast
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import seams
import torch
from safetensors.torch import load_file, save_file
from seams import ALWAYS, main, patch, read

box, outside = seams.box, seams.outside
D, F, K, GROUPS = 32, 64, 4, [8, 24, 32]
TWO = {"TOKENS": 128, "EVAL_EVERY": 10**9, "LR": 1e-2} | ALWAYS
DICT_CLASSES = {
    "topk": ("AutoEncoderTopK", "TopKTrainer"),
    "batchtopk": ("BatchTopKSAE", "BatchTopKTrainer"),
    "matryoshka": ("MatryoshkaBatchTopKSAE", "MatryoshkaBatchTopKTrainer"),
    "relu": ("AutoEncoder", "StandardTrainerAprilUpdate"),
    "jumprelu": ("JumpReluAutoEncoder", "JumpReluTrainer"),
}
MATRICES = ("matryoshka", "jumprelu")  # whose ae.pt names its tensors W_enc, W_dec
IN_SAELENS = {"topk": "topk", "relu": "standard"}  # the others are jumprelu there
OURS = ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D")


# ---- sources ---------------------------------------------------------------------------------


def weights_of(architecture) -> dict:
    rng = torch.Generator().manual_seed(7)
    W_FD = torch.nn.functional.normalize(torch.randn(F, D, generator=rng), dim=1)
    w = {"W_enc_FD": W_FD + 0.05 * torch.randn(F, D, generator=rng), "W_dec_FD": W_FD.clone()}
    w["b_enc_F"] = 0.1 * torch.randn(F, generator=rng)
    w["b_dec_D"] = 0.1 * torch.randn(D, generator=rng)
    if architecture in ("batchtopk", "matryoshka"):
        w["threshold"] = torch.tensor(0.7)
    if architecture == "jumprelu":
        w["threshold"] = 0.2 + torch.rand(F, generator=rng)
    return w


def dictionary_learning(folder, architecture, *, licence="") -> dict:
    """An ae.pt and its config.json, which this returns."""
    w = weights_of(architecture)
    if architecture in MATRICES:
        t = {"W_enc": w["W_enc_FD"].T, "b_enc": w["b_enc_F"], "W_dec": w["W_dec_FD"]}
        t["b_dec"] = w["b_dec_D"]
    else:
        t = {"encoder.weight": w["W_enc_FD"], "encoder.bias": w["b_enc_F"]}
        t |= {"decoder.weight": w["W_dec_FD"].T}
        t["bias" if architecture == "relu" else "b_dec"] = w["b_dec_D"]
    trainer = {"dict_class": DICT_CLASSES[architecture][0], "trainer_class": "TheirOwn"}
    trainer |= {"activation_dim": D, "dict_size": F, "lr": 3e-4, "seed": 5, "lm_name": "who/gem"}
    if architecture in ("topk", "batchtopk", "matryoshka"):
        t["k"] = torch.tensor(K, dtype=torch.int32)
        trainer["k"] = K
    if architecture == "matryoshka":
        t["group_sizes"] = torch.tensor(GROUPS)
    if architecture == "relu":
        trainer["l1_penalty"] = 0.07
    t |= {"threshold": w.get("threshold", torch.tensor(-1.0))} if architecture != "relu" else {}
    folder.mkdir(parents=True)
    torch.save({n: x.contiguous() for n, x in t.items()}, folder / "ae.pt")
    config = {"trainer": trainer, "of_their_own": {"a": [1, 2]}}
    if architecture == "topk":
        config["buffer"] = {"ctx_len": 128, "n_ctxs": 9}
    (folder / "config.json").write_text(json.dumps(config))
    if licence:
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n# An SAE\n")
    return config


def saelens(folder, architecture) -> dict:
    w = weights_of(architecture)
    t = {"W_enc": w["W_enc_FD"].T, "b_enc": w["b_enc_F"], "W_dec": w["W_dec_FD"]}
    t |= {"b_dec": w["b_dec_D"]} | {n: w[n] for n in ("threshold",) if n in w}
    config = {"architecture": IN_SAELENS.get(architecture, "jumprelu"), "d_in": D, "d_sae": F}
    config |= {"dtype": "bfloat16", "apply_b_dec_to_input": architecture != "jumprelu"}
    config |= {"k": K} if architecture == "topk" else {}
    config["metadata"] = {"model_name": "gem", "hook_name": "blocks.1.hook_resid_post"}
    folder.mkdir(parents=True)
    save_file({n: x.contiguous() for n, x in t.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return {}


# ---- the runs --------------------------------------------------------------------------------

FRESH = {"SAE": "fresh", "D_SAE": F, "K": K, "L1": 0.02, "LOSS": "mse"}
OTHER = {"LAYER": 0, "CONTEXT": 16, "KEEP": "special", "L1": 0.03}  # than a source or run.py says
CASES = {  # name: form of the source, its architecture, constants
    "topk": ("dl", "topk", {"VAL_TOKENS": 95}),
    "batchtopk": ("dl", "batchtopk", {"KEEP": "special", "DTYPE": "bfloat16"}),
    "matryoshka": ("dl", "matryoshka", {"KEEP": "first", "CONTEXT": 16}),
    "relu": ("dl", "relu", {"L1": 0.5}),
    "jumprelu": ("dl", "jumprelu", {"JUMPRELU_THRESHOLD": "ste"}),
    "SAELens topk": ("saelens", "topk", OTHER),
    "SAELens standard": ("saelens", "relu", OTHER),
    "SAELens jumprelu": ("saelens", "jumprelu", OTHER | {"MODEL": "without BOS"}),
    "fresh topk": ("fresh", "topk", FRESH | {"ARCHITECTURE": "topk"}),
    "fresh batchtopk": ("fresh", "batchtopk", FRESH | {"ARCHITECTURE": "batchtopk"}),
    "fresh relu": ("fresh", "relu", FRESH | {"ARCHITECTURE": "relu"}),
    "to batchtopk": ("dl", "topk", {"ARCHITECTURE": "batchtopk"}),
    "to jumprelu": ("dl", "topk", {"ARCHITECTURE": "jumprelu"}),
    "to matryoshka": ("dl", "topk", {"ARCHITECTURE": "matryoshka"}),
    "adapter": ("dl", "topk", {"TRAIN": "adapter", "RANK": 8}),
    "LoRA": ("dl", "topk", {"TRAIN": "sae_lora", "RANK": 2, "LORA_ALPHA": 6}),
    "LoRA on the LM": (
        "dl",
        "topk",
        {"TRAIN": "lm_lora", "LOSS": "kl", "RANK": 2, "LORA_BLOCKS": "after"},
    ),
}
PLAIN = [c for c in CASES if "LoRA" not in c and c != "adapter"]  # whose SAE itself learns
_done = {}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    _done.clear()
    return tmp_path_factory.mktemp("exports")


@pytest.fixture
def made(box, root, request):
    """case -> its run, once: folder, learnt (the last checkpoint), source's config, constants."""

    def make(case) -> SimpleNamespace:
        if case not in _done:
            _done[case] = run_of(box, root / case.replace(" ", "-"), case)
        return _done[case]

    return make


def run_of(box, here, case) -> SimpleNamespace:
    form, architecture, changes = CASES[case]
    source, config = here / "source", {}
    if form == "dl":
        licence = "mit" if architecture == "topk" else ""
        config = dictionary_learning(source, architecture, licence=licence)
    elif form == "saelens":
        saelens(source, architecture)
    given = TWO | ({"SAE": source} if form != "fresh" else {}) | changes
    if given.get("MODEL"):
        given["MODEL"] = shutil.copytree(box.model, here / "gem")
        file = here / "gem" / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))

    def keep_aside(folder, results):
        shutil.copytree(f"{folder}/checkpoints", here / "kept")

    with pytest.MonkeyPatch.context() as m:
        patch(m, "figures", keep_aside)
        assert main(box, here, **given) == 0
    folder = here / "x"
    state = load_file(sorted((here / "kept").iterdir())[-1] / "state.safetensors")
    learnt = {n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")}
    about = read(folder, "run.json")
    c = SimpleNamespace(**about["constants"])
    return SimpleNamespace(
        folder=folder,
        learnt=learnt,
        state=state,
        config=config,
        c=c,
        about=about,
        architecture=c.ARCHITECTURE or architecture,
        started=weights_of(architecture),
        form=form,
    )


# ---- the files, by their formats --------------------------------------------------------------


def of_dictionary_learning(folder) -> tuple[dict, dict]:
    """-> weights under our names, and what else is in ae.pt."""
    t = torch.load(folder / "sae" / "ae.pt", weights_only=True)
    if "W_enc" in t:
        w = {"W_enc_FD": t.pop("W_enc").T, "b_enc_F": t.pop("b_enc"), "W_dec_FD": t.pop("W_dec")}
    else:
        w = {"W_enc_FD": t.pop("encoder.weight"), "b_enc_F": t.pop("encoder.bias")}
        w["W_dec_FD"] = t.pop("decoder.weight").T
    w["b_dec_D"] = t.pop("bias") if "bias" in t else t.pop("b_dec")
    return w, t


def of_saelens(folder) -> tuple[dict, dict]:
    t = load_file(folder / "sae" / "sae_weights.safetensors")
    w = {"W_enc_FD": t.pop("W_enc").T, "b_enc_F": t.pop("b_enc"), "W_dec_FD": t.pop("W_dec")}
    return w | {"b_dec_D": t.pop("b_dec")}, t


def expected(run) -> dict:
    """The learnt weights as every library reads them: for plain residuals, rows of norm 1."""
    w = {n: run.learnt[n].double() for n in OURS}
    if run.architecture == "relu":
        scale = run.learnt["scale"].double()
        assert scale != 1
        w["b_enc_F"], w["b_dec_D"] = w["b_enc_F"] * scale, w["b_dec_D"] * scale
    threshold = run.learnt.get("threshold_F", run.learnt.get("threshold"))
    if run.architecture in ("relu", "jumprelu"):
        norm_F = w["W_dec_FD"].norm(dim=1)
        w["W_dec_FD"] = w["W_dec_FD"] / norm_F[:, None]
        w["W_enc_FD"] = w["W_enc_FD"] * norm_F[:, None]
        w["b_enc_F"] = w["b_enc_F"] * norm_F
        threshold = None if threshold is None else threshold * norm_F
    return w | ({} if threshold is None else {"threshold": threshold.double()})


def close(a, b) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("case", PLAIN)
def test_the_files_hold_what_was_learnt(made, case):
    run = made(case)
    wanted = expected(run)
    (ours, further), (theirs, more) = of_dictionary_learning(run.folder), of_saelens(run.folder)
    for name in OURS:
        close(ours[name], wanted[name])
        assert torch.equal(ours[name], theirs[name]), name
        assert ours[name].dtype == theirs[name].dtype == torch.float32
    if run.form != "fresh":
        assert not torch.equal(ours["W_enc_FD"], run.started["W_enc_FD"])
    with_k = run.architecture in ("topk", "batchtopk", "matryoshka")
    names = {"threshold"} if run.architecture != "relu" else set()
    names |= {"k"} if with_k else set()
    names |= {"group_sizes"} if run.architecture == "matryoshka" else set()
    assert further.keys() == names
    if with_k:
        assert further["k"].dtype == torch.int32 and further["k"].item() == K
    if run.architecture == "matryoshka":
        groups = GROUPS if run.form != "dl" or case == "matryoshka" else [2, 4, 8, 16, 34]
        assert further["group_sizes"].tolist() == groups
    if run.architecture in ("topk", "relu"):
        assert not more
    else:
        threshold = further["threshold"].clamp(min=0).expand(F)
        assert more.keys() == {"threshold"} and torch.equal(more["threshold"], threshold)


@pytest.mark.parametrize("case", PLAIN)
def test_the_threshold_is_that_of_the_end(made, case):
    run = made(case)
    if run.architecture == "relu":
        return
    found = of_dictionary_learning(run.folder)[1]["threshold"]
    if run.architecture == "topk":
        smallest = read(run.folder, "after.json")["smallest_active"]
        assert found.item() == pytest.approx(smallest, rel=1e-6) and found > 0
    else:
        close(found, expected(run)["threshold"])
        assert found.shape == ((F,) if run.architecture == "jumprelu" else ())
        started = run.started.get("threshold")
        moves = run.architecture != "jumprelu" or run.c.JUMPRELU_THRESHOLD == "ste"
        assert started is None or not torch.allclose(found, started, rtol=1e-4) or not moves


def test_a_folded_adapter_is_in_both_files(made):
    run = made("adapter")
    w, _ = of_dictionary_learning(run.folder)
    theirs, _ = of_saelens(run.folder)
    old = {n: t.double() for n, t in run.started.items()}
    down, up = run.learnt["down.weight"].double(), run.learnt["up.weight"].double()
    assert up.abs().max() > 0
    A = torch.eye(D, dtype=torch.float64) + up @ down
    close(w["W_dec_FD"], old["W_dec_FD"] @ A.T)
    close(w["b_dec_D"], A @ old["b_dec_D"])
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(0)).double()
    close(w["W_enc_FD"], old["W_enc_FD"])
    torch.testing.assert_close(
        (x - w["b_dec_D"]) @ w["W_enc_FD"].T.double() + w["b_enc_F"],
        (x - old["b_dec_D"]) @ old["W_enc_FD"].T + old["b_enc_F"],
        rtol=1e-5,
        atol=1e-5,
    )
    assert all(torch.equal(w[n], theirs[n]) for n in OURS)
    assert not (run.folder / "sae" / "adapter.safetensors").exists()


def test_merged_lora_is_in_both_files(made):
    run = made("LoRA")
    w, _ = of_dictionary_learning(run.folder)
    theirs, _ = of_saelens(run.folder)

    def update(layer):
        (low,) = (t for n, t in run.learnt.items() if layer in n and "lora_A" in n)
        (high,) = (t for n, t in run.learnt.items() if layer in n and "lora_B" in n)
        assert low.shape[0] == 2 and high.abs().max() > 0
        return 6 / 2 * high.double() @ low.double()

    close(w["W_enc_FD"], run.started["W_enc_FD"].double() + update("encoder"))
    close(w["W_dec_FD"], run.started["W_dec_FD"].double() + update("decoder").T)
    for name in ("b_enc_F", "b_dec_D"):
        assert torch.equal(w[name], run.started[name])
    assert all(torch.equal(w[n], theirs[n]) for n in OURS)


def test_lora_on_the_lm_leaves_the_sae_and_is_beside_it(made):
    run = made("LoRA on the LM")
    w, further = of_dictionary_learning(run.folder)
    assert all(torch.equal(w[n], run.started[n]) for n in OURS)
    assert further["threshold"].item() == -1.0  # the source's own
    config = read(run.folder, "lora/adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 2, 0.1)
    assert all("layers.2." in name for name in config["target_modules"])
    found = load_file(run.folder / "lora" / "adapter_model.safetensors")
    assert all(n.startswith("base_model.model.model.layers.2.") for n in found)
    wanted = sorted(t.flatten().tolist() for t in run.learnt.values())
    assert sorted(t.flatten().tolist() for t in found.values()) == wanted


# ---- the configs -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_saelens_config_says_all_that_a_reader_needs(made, case):
    run, c = made(case), made(case).c
    kind = IN_SAELENS.get(run.architecture, "jumprelu")
    bos = case != "SAELens jumprelu"
    wanted = {
        "architecture": kind,
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": run.architecture != "jumprelu",
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.0.0",
            "model_name": "gem",
            "hook_name": f"blocks.{c.LAYER}.hook_resid_post",
            "hf_hook_name": f"model.layers.{c.LAYER}",
            "prepend_bos": bos,
            "context_size": c.CONTEXT,
            "dataset_path": "text.jsonl",
            "exclude_special_tokens": c.KEEP == "special",
        },
    } | ({"k": K} if kind == "topk" else {})
    assert read(run.folder, "sae/cfg.json") == wanted


def test_the_cases_differ_in_what_the_configs_say(made):
    found = [made(case).c for case in CASES]
    for name in ("LAYER", "CONTEXT", "KEEP", "DTYPE", "L1", "VAL_TOKENS"):
        assert len({getattr(c, name) for c in found}) > 1, name


@pytest.mark.parametrize("case", CASES)
def test_the_other_config_is_the_sources_with_what_a_reader_needs(made, case):
    run, c = made(case), made(case).c
    dict_class, trainer_class = DICT_CLASSES[run.architecture]
    trainer = {
        "trainer_class": trainer_class,
        "dict_class": dict_class,
        "activation_dim": D,
        "dict_size": F,
        "layer": c.LAYER,
        "lm_name": "gem",
        "submodule_name": f"resid_post_layer_{c.LAYER}",
    }
    trainer |= {"k": K} if run.architecture in ("topk", "batchtopk", "matryoshka") else {}
    if run.architecture == "relu":
        trainer["l1_penalty"] = {"relu": 0.07}.get(case, c.L1)
    theirs = dict(run.config.get("trainer", {}))
    if c.ARCHITECTURE:  # it has become another class
        theirs = {n: v for n, v in theirs.items() if n not in ("dict_class", "trainer_class", "k")}
    rest = {n: v for n, v in run.config.items() if n not in ("trainer", "buffer")}
    buffer = {"ctx_len": c.CONTEXT, "d_submodule": D, "io": "out"} | run.config.get("buffer", {})
    found = read(run.folder, "sae/config.json")
    ours = found.pop("klsplice")
    assert found == {"trainer": trainer | theirs, "buffer": buffer, **rest}
    names = ("SAE", "TRAIN", "LOSS", "LR", "TOKENS", "PASSES", "DATASET", "KEEP", "SEED")
    local = {"dataset": "text.jsonl", "sae": "source" if run.form != "fresh" else "fresh"}
    assert ours == {n.lower(): getattr(c, n) for n in names} | local


def test_what_is_written_is_read_again_as_the_same_sae(made, box, tmp_path, monkeypatch):
    """By this program, in both forms: the numbers before are those after."""
    patch(monkeypatch, "figures", lambda *args: None)
    for case in ("batchtopk", "matryoshka", "relu", "jumprelu", "to jumprelu"):
        run = made(case)
        after = read(run.folder, "after.json")
        constants = ("LAYER", "CONTEXT", "KEEP", "DTYPE", "VAL_TOKENS")
        same = {n: getattr(run.c, n) for n in constants}
        for form, names in (
            ("ae", ("ae.pt", "config.json")),
            ("lens", ("sae_weights.safetensors", "cfg.json")),
        ):
            folder = tmp_path / f"{case}-{form}"
            folder.mkdir()
            for name in names:
                shutil.copy(run.folder / "sae" / name, folder)
            given = seams.QUICK | same | {"SAE": folder, "RUN_NAME": folder.name + "-run"}
            assert main(box, tmp_path, **given) == 0
            before = read(tmp_path / given["RUN_NAME"], "before.json")
            for number in ("ce_spliced", "kl", "fvu", "l0"):
                loose = 2e-3 if run.c.DTYPE == "bfloat16" else 1e-4
                assert before[number] == pytest.approx(after[number], rel=loose), (case, form)


# ---- the card --------------------------------------------------------------------------------

SHOWN = {
    *("MODEL", "MODEL_REVISION", "LAYER", "SAE", "SAE_REVISION", "ARCHITECTURE", "TRAIN", "LOSS"),
    *("LR", "SCHEDULE", "WARMUP", "WEIGHT_DECAY", "CLIP", "BATCH", "CONTEXT", "TOKENS", "PASSES"),
    *("SKIP_TOKENS", "VAL_TOKENS", "KEEP", "DATASET", "DATASET_REVISION", "SPLIT", "DTYPE"),
    *("LOGITS", "SEED"),
}
FURTHER = {
    "adapter": ["ADAPTER", "RANK"],
    "LoRA": ["RANK", "LORA_ALPHA", "LORA_DROPOUT"],
    "LoRA on the LM": ["RANK", "LORA_ALPHA", "LORA_DROPOUT", "LORA_BLOCKS"],
}


def card(folder) -> str:
    return (folder / "sae" / "README.md").read_text()


def front(text) -> dict:
    return dict(re.findall(r"^(\w+): (.*)$", text.split("---\n")[1], re.M))


@pytest.mark.parametrize("case", CASES)
def test_the_card_shows_the_constants_that_it_was_made_with(made, case):
    run = made(case)
    block = card(run.folder).split("## Constants")[1].split("```")[1].strip().splitlines()
    found = {n: ast.literal_eval(v) for n, v in (line.split(" = ", 1) for line in block)}
    names = {*SHOWN, *FURTHER.get(case, [])} - ({"LOGITS"} if case != "batchtopk" else set())
    names |= {"JUMPRELU_THRESHOLD"} if run.architecture == "jumprelu" else set()
    penalty = {"relu": "0.07", "fresh relu": "0.02", "SAELens standard": "0.03"}.get(case)
    assert ("L1 penalty" in card(run.folder)) == (penalty is not None)
    assert penalty is None or f"L1 penalty that began at {penalty} and" in card(run.folder)
    names -= {"SAE_REVISION", "DATASET_REVISION"}  # of local files they say nothing
    assert found.keys() == names and len(block) == len(found)
    local = {"MODEL": "gem", "DATASET": "text.jsonl"}
    local["SAE"] = "fresh" if run.form == "fresh" else "source"
    assert found == {n: local.get(n, run.about["constants"][n]) for n in names}


@pytest.mark.parametrize("case", CASES)
def test_the_card_says_what_was_measured_and_on_how_many_tokens(made, case):
    run = made(case)
    text, found = card(run.folder), read(run.folder, "results.json")
    val = run.c.VAL_TOKENS // run.c.CONTEXT * run.c.CONTEXT
    assert f"on {val} held-out tokens" in text
    assert "on 128 tokens" in text and f"after block {run.c.LAYER}" in text
    for name in ("ce", "ce_recovered", "kl", "fvu", "l0", "dead_fraction"):
        before, after = (found[f"{name}_{when}"] for when in ("before", "after"))
        assert f"| {before:.4f} | {after:.4f} |" in text
    assert f"it closed {found['gap_closed']:.1%}" in text
    assert run.about["resolved"]["tokens"] in text
    assert f"klsplice commit {found['commit']}" in text
    named = re.search(r"A (\w+) SAE of 64 latents( \(k = 4\))?", text)
    source = CASES[case][1]
    assert named[1] == source and bool(named[2]) == (source not in ("relu", "jumprelu"))


def test_the_number_of_held_out_tokens_is_one_of_whole_contexts(made):
    assert "on 64 held-out tokens" in card(made("topk").folder)  # of VAL_TOKENS = 95


def test_the_card_has_the_licence_of_the_source(made):
    text = card(made("topk").folder)
    assert front(text)["license"] == "mit" and "Its licence (mit) holds for this." in text
    assert read(made("topk").folder, "run.json")["source"]["licence"] == "mit"
    none = card(made("batchtopk").folder)
    assert "license" not in front(none) and "which its card does not name" in none
    assert "no licence but what its uploader gives it" in card(made("fresh topk").folder)


def test_the_card_of_what_came_from_the_hub_names_it(made, outside):
    found = front(card(outside.runs / "pinned"))
    assert found["base_model"] == "google/tiny" and found["datasets"] == "[owner/pile]"
    assert found["license"] == "cc-by-4.0" and found["library_name"] == "saelens"
    text = card(outside.runs / "pinned")
    assert "owner/saes/layer_1 at " + "b" * 40 in text and "owner/pile at " + "c" * 40 in text
    config = read(outside.runs / "pinned", "sae/config.json")
    assert config["trainer"]["lm_name"] == "google/tiny"
    assert config["klsplice"]["sae"] == "owner/saes/layer_1"
    lens = read(outside.runs / "pinned", "sae/cfg.json")["metadata"]
    assert (lens["model_name"], lens["dataset_path"]) == ("tiny", "owner/pile")
    local = front(card(made("topk").folder))
    assert not {"base_model", "datasets"} & local.keys()
