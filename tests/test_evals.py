"""Evaluations beyond cross-entropy, against full forward passes and plain loops.

In process, on finished runs of a random Gemma-2 with 3 blocks.
"""

import itertools
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import hub
import naive
import numpy as np
import pytest
import torch
import transformers
from matplotlib.figure import Figure

import eval as evaluation
import run as program
from bench import __main__ as bench
from evals import (
    benchmarks,
    common,
    groups,
    latents,
    scores,
    steering,
    stock,
    texts,
    timing,
    tokens,
)
from evals.finished import Finished
from klsplice.settings import Config
from klsplice.storage import read_json, write_json
from report import eval_figures, figures

LAYER = 1
SMALL = {"DEVICE": "cpu", "DTYPE": "float32", "CONTEXT": 32, "BATCH": 2, "MICRO_BATCH": 2}
SMALL |= {"EVAL_BATCH": 3, "TOKENS": 1280, "VAL_TOKENS": 256, "LAYER": LAYER, "CHECK_SAE": False}
SMALL |= {"WANDB_PROJECT": "", "EVAL_EVERY": 640, "LR": 1e-2}
RUNS = {
    "sae": {},
    "mlp": {"TRAIN": "adapter", "ADAPTER": "mlp", "RANK": 4},
    "lora": {"TRAIN": "lm_lora", "LOSS": "kl", "RANK": 4},
    "kept": {"KEEP": "first"},
    "converted": {"ARCHITECTURE": "jumprelu"},
    "converted, mlp": {"ARCHITECTURE": "jumprelu", "TRAIN": "adapter", "ADAPTER": "mlp", "RANK": 4},
    "unfolded": {"TRAIN": "adapter", "FOLD": False, "RANK": 4},
    "relu": {"SAE": "fresh", "ARCHITECTURE": "relu", "D_SAE": 64, "K": 8, "LOSS": "mse"},
}
FEW = ["--length", "9", "--texts-each", "2", "-n", "2"]
KEY = "sk-never-shown"


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    """A model, a text, an SAE and the finished RUNS."""
    root = tmp_path_factory.mktemp("evals")
    hub.make_gemma(root / "gem", seed=0)
    hub.make_sae(root / "sae", d_in=32, d_sae=64, k=4, layer=LAYER, lm_name="gem", seed=0)
    with open(root / "text.jsonl", "w") as f:
        for text in hub.make_pile(root / "pile", documents=120, seed=0):
            f.write(json.dumps({"text": text}) + "\n")
    paths = {"MODEL": "gem", "SAE": "sae", "DATASET": "text.jsonl", "CACHE": "cache"}
    paths = {name: root / path for name, path in paths.items()} | {"RUNS": root / "runs"}
    with pytest.MonkeyPatch.context() as m:
        m.setattr(figures, "run_figures", lambda folder, results: None)
        for name, changes in RUNS.items():
            settings = SMALL | paths | changes | {"RUN_NAME": name}
            assert program.main([f"{n}={v}" for n, v in settings.items()]) == 0
    lm = transformers.AutoModelForCausalLM.from_pretrained(
        root / "gem", attn_implementation="eager", dtype=torch.float32
    )
    return SimpleNamespace(root=root, lm=lm.eval(), run=lambda name: str(root / "runs" / name))


@pytest.fixture(scope="module")
def opened(box):
    return {name: Finished(box.run(name)) for name in RUNS}


@pytest.mark.parametrize("name", ["sae", "kept"])
def test_the_bench_takes_the_step_of_a_finished_run(box, name, tmp_path, capsys):
    out = tmp_path / "b.json"
    assert (
        bench.main(["--run", box.run(name), "--device", "cpu", "--quick", "--out", str(out)]) == 0
    )
    found = read_json(out)
    assert found["model"].endswith(box.run(name)) and found["tokens_a_step"] == 2 * 32
    assert max(error for n, error in found["errors"].items() if n.startswith("ours")) < 1e-4
    assert "| 0k, k 4 | klsplice |" in capsys.readouterr().out
    shape = bench.loops.of_run(box.run(name), "cpu")
    step = bench.loops.Tokens(shape).batch(3)
    assert torch.equal(step, Finished(box.run(name)).tokens.batch(3))
    (part,) = bench.loops.Ours(shape["lm"], shape, "cpu", shape["sae"], compiled=False).batches(0)
    assert len(part.x_ND) == 2 * (32 - (name == "kept"))


def test_the_bench_refuses_a_run_that_the_naive_loop_cannot_take(box, capsys):
    for name in ("relu", "lora", "mlp", "unfolded", "converted", "none"):
        assert bench.main(["--run", box.run(name), "--device", "cpu"]) == 2
        assert box.run(name) in (error := capsys.readouterr().err) and len(error.splitlines()) == 2


def plain_sae(folder):
    """An SAE folder as naive.TopK."""
    t = torch.load(f"{folder}/ae.pt")
    names = {"W_enc": t["encoder.weight"], "b_enc": t["encoder.bias"], "b_dec": t["b_dec"]}
    return naive.TopK(names | {"W_dec": t["decoder.weight"].T}, int(t["k"]))


def plain_saes(box, name="sae"):
    after = box.root / "sae" if name == "lora" else f"{box.run(name)}/sae"
    return {"before": plain_sae(box.root / "sae"), "after": plain_sae(after)}


def shifted(logits_LV, ids):
    """Log-likelihood of each token given those before it."""
    logp_LV = logits_LV.log_softmax(-1)
    return [logp_LV[i, ids[i + 1]].item() for i in range(len(ids) - 1)]


@torch.no_grad()
def plain_gain(lm, ids, push_D, *, keep_first=False, sae=None, score=shifted):
    """The change in a text's mean log-likelihood by a push: two full passes, no batch."""
    means = []
    for push in (torch.zeros_like(push_D), push_D):

        def edit(x_BLD, push=push):
            y_BLD = (x_BLD if sae is None else sae(x_BLD)[0]) + push
            if keep_first:
                y_BLD[:, 0] = x_BLD[:, 0]
            return y_BLD

        logits_BLV, _ = naive.run_lm(lm, torch.tensor([ids]), LAYER, edit)
        means.append(np.mean(score(logits_BLV[0], ids)))
    return means[1] - means[0]


# ---- a finished run, opened again -------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_an_opened_run_measures_before_and_after_what_the_run_measured(box, opened, name):
    run = opened[name]
    for when, learner in itertools.chain(run.stages(), run.stages()):
        cfg = Config(**vars(run.cfg) | {"CACHE": str(box.root / "none")})
        n = len(run.tokens.val_SL)
        found = evaluation.Evaluation(cfg, run.tokens, "lm").measure(learner, n).numbers
        kept = read_json(f"{box.run(name)}/{when}.json")
        for number in ("ce_clean", "ce_spliced", "kl", "fvu", "l0"):
            assert found[number] == pytest.approx(kept[number], abs=2e-5), (when, number)
    results = read_json(f"{box.run(name)}/results.json")
    assert abs(results["ce_after"] - results["ce_before"]) > 1e-3  # the two are told apart


def test_a_run_on_other_text_is_refused(box, tmp_path, capsys):
    about = read_json(f"{box.run('sae')}/run.json")
    about["resolved"]["tokens"] = "another"
    write_json(str(tmp_path / "run.json"), about)
    write_json(str(tmp_path / "results.json"), {})
    assert tokens.main([str(tmp_path)]) == 2
    assert "is not what" in capsys.readouterr().err


@pytest.mark.parametrize("module", [steering, tokens], ids=["steering", "tokens"])
def test_without_a_gpu_or_the_hub_a_gemma_run_ends_in_one_line_and_a_hint(
    module, box, tmp_path, capsys
):
    about = read_json(f"{box.run('sae')}/run.json")
    about["constants"] |= {"MODEL": "nobody/gemma-2-2b", "DEVICE": "cuda"}
    write_json(str(tmp_path / "run.json"), about)
    write_json(str(tmp_path / "results.json"), {})
    for words in ([], ["--device", "cpu"]):
        if words or not torch.cuda.is_available():
            assert module.main([str(tmp_path), *words]) == 2
            error = capsys.readouterr().err.splitlines()
            assert error[0].startswith("error: ") and len(error) == 2 and "make demo" in error[1]


def test_an_unfinished_run_and_a_figure_without_numbers_are_refused(box, tmp_path, capsys):
    assert tokens.main([str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err
    assert figures.main(["--figure", "benchmarks", box.run("sae")]) == 2
    assert "have nothing to show there" in capsys.readouterr().err


def test_an_interval_by_resampling_holds_the_mean_as_often_as_it_says():
    rng, held = np.random.default_rng(1), 0
    for _ in range(200):
        groups = [rng.normal(1.0, 1.0, 20), rng.normal(3.0, 2.0, 30)]
        mean, low, high = common.bootstrap(groups, rounds=400)
        assert mean == pytest.approx((groups[0].mean() + groups[1].mean()) / 2)
        held += low <= 2.0 <= high
    assert 0.87 < held / 200 < 0.99


# ---- steering ---------------------------------------------------------------------------------

IDS = [[9, 30, 41, 17, 88, 120, 35], [50, 51], [200, 7, 7, 190, 23, 61, 150, 270, 31, 12]]


@pytest.mark.parametrize("name", ["sae", "kept", "lora"])
@pytest.mark.parametrize("spliced", [False, True], ids=["clean", "spliced"])
def test_steering_is_a_full_pass_with_a_push_scored_against_the_next_token(
    box, opened, name, spliced
):
    run, lm = opened[name], box.lm
    pushes_SD = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)) * 5
    batch = scores.Batch(run, IDS, 8)
    cut = [[2, *ids[:8]] for ids in IDS]  # Gemma's BOS, then 8 tokens at most
    for when, learner in run.stages():
        if name == "lora" and when == "after":  # that LM has another plain form
            continue
        found_SB = scores.scorer(learner, batch, spliced=spliced)(pushes_SD)
        options = {"keep_first": name == "kept"}
        options["sae"] = plain_saes(box, name)[when] if spliced else None
        plain_SB = [[plain_gain(lm, x, p, **options) for x in cut] for p in pushes_SD]
        np.testing.assert_allclose(found_SB, plain_SB, atol=2e-5)

        def own(logits_LV, ids):
            logp_LV = logits_LV.log_softmax(-1)
            return [logp_LV[i, ids[i]].item() for i in range(len(ids))]

        wrong = plain_gain(lm, cut[0], pushes_SD[0], **options, score=own)
        assert abs(found_SB[0, 0] - wrong) > 1e-2  # a position's own token would be seen


def test_lora_on_the_lm_is_in_the_steered_pass_after_and_not_before(box, opened):
    run, push_1D = opened["lora"], torch.ones(1, 32)
    batch = scores.Batch(run, IDS, 8)
    before, after = (scores.scorer(x, batch, spliced=True)(push_1D) for _, x in run.stages())
    assert np.abs(after - before).max() > 1e-3
    again = scores.scorer(run.before(), batch, spliced=True)(push_1D)
    np.testing.assert_array_equal(before, again)


@pytest.fixture(scope="module")
def words():
    """Six texts of the pile's own words."""
    rng = np.random.default_rng(0)
    return [" " + " ".join(rng.choice(hub.vocabulary(), 12)) for _ in range(6)]


def plain_report(box, run, latent, read, strengths, norm):
    """{when: (tuned strength, mean gain of the reporting half, the other half's best strength)}."""
    ids = [[2, *x[:9]] for x in run.tokenizer(read, add_special_tokens=False)["input_ids"]]
    found = {}
    for when, sae in plain_saes(box).items():
        push_D = sae.W_dec[latent].detach() / sae.W_dec[latent].norm() * norm
        gain = {s: [plain_gain(box.lm, x, s * push_D) for x in ids] for s in strengths}
        tune = {s: np.mean(of_text[0::2]) for s, of_text in gain.items()}
        report = {s: np.mean(of_text[1::2]) for s, of_text in gain.items()}
        best = max(tune, key=tune.get)
        found[when] = best, report[best], max(report, key=report.get)
    return found


def test_strength_is_tuned_on_one_half_of_the_texts_and_reported_on_the_other(
    box, opened, words, tmp_path
):
    run, strengths = opened["sae"], (0.05, 0.2, 0.8)
    tokens_BL = torch.from_numpy(run.tokens.val_SL.astype(np.int64))
    with torch.no_grad():
        _, x_BLD = naive.run_lm(box.lm, tokens_BL, LAYER)
    norm = x_BLD.norm(dim=-1).mean().item()
    latent, plain = next(
        (f, found)
        for f in range(64)
        for found in [plain_report(box, run, f, words, strengths, norm)]
        if any(best != other for best, _, other in found.values())  # the halves disagree
    )
    write_json(str(tmp_path / "texts.json"), {str(latent): words})
    given = ["--texts", str(tmp_path / "texts.json"), "--latents", str(latent), *FEW]
    assert steering.main([box.run("sae"), *given, "--strengths", *map(str, strengths)]) == 0
    found = read_json(f"{box.run('sae')}/evals/steering.json")
    assert found["residual norm"] == pytest.approx(norm, rel=1e-5)
    for when, (best, mean, _) in plain.items():
        assert found["numbers"][f"{latent}, strength, {when}"] == best
        assert found["numbers"][f"{latent}, positives, {when}"] == pytest.approx(mean, abs=2e-5)
    negatives = texts.from_json(latents.NEGATIVES)
    ids = run.tokenizer(negatives["verse"], add_special_tokens=False)["input_ids"]
    row_D = plain_saes(box)["after"].W_dec[latent].detach()
    push_D = plain["after"][0] * norm * row_D / row_D.norm()
    mean = np.mean([plain_gain(box.lm, [2, *x[:9]], push_D) for x in ids])
    assert found["numbers"]["all, verse, after"] == pytest.approx(mean, abs=2e-5)


def test_windows_have_the_latents_largest_activation_and_halves_share_no_context(box, opened):
    run = opened["kept"]
    windows = latents.Windows(run, 64, 9)
    found_WF, _ = windows.activations(run.after())
    sae, at = plain_saes(box, "kept")["after"], 0
    for s, ids in enumerate(run.tokens.val_SL.astype(np.int64)):
        with torch.no_grad():
            _, x_BLD = naive.run_lm(box.lm, torch.from_numpy(ids)[None], LAYER)
            z_LF = sae.encode(x_BLD[0])
        for start in (1, 10, 19):  # after the BOS, which KEEP = first leaves alone
            assert windows.tokens_WL[at].tolist() == ids[start : start + 9].tolist()
            np.testing.assert_allclose(found_WF[at], z_LF[start : start + 9].amax(0), atol=1e-4)
            assert windows.tuning_W[at] == (s % 2 == 0)
            at += 1
    assert at == len(windows.tokens_WL)


def test_half_of_the_latents_are_those_whose_decoder_row_turned_most():
    a = SimpleNamespace(latents=None, n=4, seed=0, texts_each=8)
    enough_F = torch.tensor([True] * 8 + [False] * 2)
    cosine_F = torch.tensor([0.9, 0.5, 0.99, 0.7, 0.98, 0.97, 0.96, 0.95, 0.1, 0.2])
    chosen, rule = latents.choose(a, enough_F, cosine_F)
    assert chosen[:2] == [1, 3] and len(set(chosen)) == 4 and max(chosen) < 8
    assert "of 8 active in 8 windows" in rule
    _, rule = latents.choose(a, enough_F, torch.ones(10))  # the SAE did not learn
    assert rule.startswith("0 whose decoder row turned most, 4 at random")


def test_by_itself_steering_takes_texts_in_which_its_latents_are_active(box, opened, capsys):
    assert steering.main([box.run("lora"), *FEW]) == 0
    found = read_json(f"{box.run('lora')}/evals/steering.json")
    assert found["spliced"] is True and found["rule"].startswith("0 whose decoder row turned")
    assert [len(read) for read in found["positives"].values()] == [4, 4]
    assert {"question", "commit", "versions", "device", "seconds", "name"} <= found.keys()
    assert found["name"] == "steering" and "after - before" in capsys.readouterr().out


def test_the_negative_sets_are_five_of_twelve_texts_each():
    sets = texts.from_json(latents.NEGATIVES)
    assert {name: len(set(of_set)) for name, of_set in sets.items()} == dict.fromkeys(
        ("law", "biology", "cooking", "verse", "greek"), 12
    )
    assert all("Ͱ" <= max(text) <= "Ͽ" for text in sets["greek"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--latents", "64"], "there is no latent 64"),
        (["--length", "40"], "no two windows"),
        (["--texts-each", "99"], "no latent is active"),
        (["--texts", "absent.json"], "not readable JSON"),
        (["--endpoint", "file:///etc/hosts"], "is no http address"),
    ],
)
def test_a_mistake_ends_in_one_line(box, words, said, capsys, monkeypatch):
    monkeypatch.setenv(texts.KEY, KEY)
    assert steering.main([box.run("sae"), *FEW, *words]) == 2
    assert said in capsys.readouterr().err


# ---- an endpoint that writes texts -------------------------------------------------------------


class Endpoint(BaseHTTPRequestHandler):
    """A stand-in of an OpenAI-compatible server; `answer` is what it says, or a status."""

    answer, seen = "", []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, self.headers["Authorization"], body))
        status = self.answer if isinstance(self.answer, int) else 200
        self.send_response(status)
        self.send_header("Location", "/v1/elsewhere")
        self.end_headers()
        choice = {"message": {"role": "assistant", "content": str(self.answer)}}
        self.wfile.write(json.dumps({"choices": [choice]}).encode())

    def do_GET(self):
        self.seen.append((self.path, self.headers["Authorization"], None))
        self.send_error(500)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv(texts.KEY, KEY)
    monkeypatch.setattr(Endpoint, "seen", [])
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_an_endpoint_is_asked_for_texts_and_its_key_stays_secret(
    box, endpoint, words, capsys, monkeypatch
):
    monkeypatch.setattr(Endpoint, "answer", f"Here they are:\n```json\n{json.dumps(words)}\n```")
    asked = ["--endpoint", endpoint, "--model", "m", "--latents", "3", *FEW]
    assert steering.main([box.run("sae"), *asked]) == 0
    ((path, authorization, body),) = Endpoint.seen
    assert path == "/v1/chat/completions" and authorization == f"Bearer {KEY}"
    assert body["model"] == "m" and "Write 4 new passages" in body["messages"][0]["content"]
    kept = (box.root / "runs" / "sae" / "evals" / "steering.json").read_text()
    out = capsys.readouterr()
    assert KEY not in kept + out.out + out.err
    read = [
        x.strip()[:20] for x in read_json(f"{box.run('sae')}/evals/steering.json")["positives"]["3"]
    ]
    assert read == [x.strip()[:20] for x in words[:4]]


@pytest.mark.parametrize("answer", [401, 302, "I had rather not.", "[1, 2]", '["one"]'])
def test_what_an_endpoint_refuses_is_one_line_without_the_key(
    box, endpoint, answer, capsys, monkeypatch
):
    monkeypatch.setattr(Endpoint, "answer", answer)
    asked = ["--endpoint", endpoint, "--model", "m", "--latents", "3", *FEW]
    assert steering.main([box.run("sae"), *asked]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: http://127.0.0.1") and KEY not in error
    assert len(Endpoint.seen) == 1  # a redirect is not followed


def test_an_endpoint_without_a_key_is_not_asked(box, endpoint, capsys, monkeypatch):
    monkeypatch.delenv(texts.KEY)
    assert steering.main([box.run("sae"), *FEW, "--latents", "3", "--endpoint", endpoint]) == 2
    assert "without a key" in capsys.readouterr().err and not Endpoint.seen


# ---- tokens -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answered(box):
    assert tokens.main([box.run("sae")]) == 0
    return read_json(f"{box.run('sae')}/evals/tokens.json")


@torch.no_grad()
def plain_passes(box, tokens_BL, sae=None):
    """-> CE of each prediction (B, L - 1), and the residual after LAYER and each block above."""
    seen, edit = [], None if sae is None else lambda x_BLD: sae(x_BLD)[0]

    def keep(module, args, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    layers = box.lm.base_model.layers[LAYER + 1 :]
    handles = [layer.register_forward_hook(keep) for layer in layers]
    logits_BLV, x_BLD = naive.run_lm(box.lm, tokens_BL, LAYER, edit)
    for handle in handles:
        handle.remove()
    first_BLD = x_BLD if edit is None else edit(x_BLD)
    ce_BP = -logits_BLV.log_softmax(-1)[:, :-1].gather(-1, tokens_BL[:, 1:, None])[..., 0]
    return ce_BP.double().numpy(), [first_BLD, *seen], x_BLD


def test_costs_by_position_frequency_and_class_are_those_of_full_passes(box, opened, answered):
    run = opened["sae"]
    tokens_BL = torch.from_numpy(run.tokens.val_SL.astype(np.int64))
    clean_BP, *_ = plain_passes(box, tokens_BL)
    counts, sums = {}, {}
    for ids in run.tokens.train_SL[run.tokens.order_S].tolist():
        for i in ids:
            counts[i] = counts.get(i, 0) + 1
    special = {0, 1, 2}
    for when, sae in plain_saes(box).items():
        cost_BP = plain_passes(box, tokens_BL, sae)[0] - clean_BP
        for b, ids in enumerate(tokens_BL.tolist()):
            for i in range(len(ids) - 1):
                n = counts.get(ids[i + 1], 0)
                size = "0" if n == 0 else "1 to 9" if n < 10 else "10 to 99"
                size = size if n < 100 else "100 to 999"
                place = "0" if i == 0 else "1 to 3" if i < 4 else "4 to 15"
                place = place if i < 16 else "16 to 63"
                keys = [f"position: {place}", f"count in training text: {size}"]
                keys.append("all: predictions")
                for name, token in (("read", ids[i]), ("predicted", ids[i + 1])):
                    text = run.tokenizer.convert_ids_to_tokens(token).replace("Ġ", " ")
                    kind = "piece" if text.isalpha() and text.isascii() else "other"
                    kind = "word" if text[0] == " " and text[1:].isalpha() else kind
                    kind = "space" if text in (" ", "Ċ") else kind
                    keys.append(f"{name}: {'other' if token in special else kind}")
                for key in keys:
                    sums.setdefault(f"cost, {key}, {when}", []).append(cost_BP[b, i])
    found = {n: v for n, v in answered["numbers"].items() if n.startswith("cost, ")}
    assert found.keys() == sums.keys()
    for name, values in sums.items():
        assert found[name] == pytest.approx(np.mean(values), abs=2e-5), name


def test_distances_downstream_and_silent_latents_are_those_of_full_passes(box, opened, answered):
    tokens_BL = torch.from_numpy(opened["sae"].tokens.val_SL.astype(np.int64))
    _, clean, x_BLD = plain_passes(box, tokens_BL)
    numbers, fired = answered["numbers"], {}
    for when, sae in plain_saes(box).items():
        _, spliced, _ = plain_passes(box, tokens_BL, sae)
        assert len(clean) == 2  # LAYER = 1 of three blocks
        for block, (a_BLD, b_BLD) in enumerate(zip(clean, spliced, strict=True), LAYER):
            a, b = a_BLD.flatten(0, 1).detach().numpy(), b_BLD.flatten(0, 1).detach().numpy()
            size = np.sqrt((a**2).sum(1))
            relative = (np.sqrt(((a - b) ** 2).sum(1)) / size).mean()
            cosine = ((a * b).sum(1) / size / np.sqrt((b**2).sum(1))).mean()
            assert numbers[f"relative L2 after block {block}, {when}"] == pytest.approx(
                relative, abs=1e-4
            )
            assert numbers[f"cosine after block {block}, {when}"] == pytest.approx(cosine, abs=1e-4)
        with torch.no_grad():
            fired[when] = (sae.encode(x_BLD) != 0).flatten(0, 1).any(0)
    old, new = fired["before"], fired["after"]
    assert numbers["latents that died"] == int((old & ~new).sum())
    assert numbers["latents that woke"] == int((~old & new).sum())
    rows = [sae.W_enc.detach() for sae in plain_saes(box).values()]
    cosine_F = (rows[0] * rows[1]).sum(1) / rows[0].norm(dim=1) / rows[1].norm(dim=1)
    assert cosine_F.min() < 0.999
    assert numbers["encoder rows, cosine before to after, mean"] == pytest.approx(
        cosine_F.mean().item(), abs=1e-5
    )


def test_lora_on_the_lm_changes_what_is_downstream_and_no_row_of_the_sae(box):
    assert tokens.main([box.run("lora")]) == 0
    found = read_json(f"{box.run('lora')}/evals/tokens.json")
    assert found["numbers"]["decoder rows, cosine before to after, lowest 5 %"] > 1 - 1e-6
    before, after = found["figure"]["relative L2"]
    assert abs(after[-1] - before[-1]) > 1e-3
    assert "the SAE itself did not learn" in found["note"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" the", "word"),
        ("ing", "piece"),
        ("7", "digit"),
        (" 2024", "digit"),
        ("\n\n", "space"),
        (" ", "space"),
        ("**", "punctuation"),
        (' ("', "punctuation"),
        ("\ufffd", "other"),
        ("x1", "other"),
        ("", "other"),
        (" λόγος", "word"),
    ],
)
def test_the_class_of_a_token(text, kind):
    assert groups.token_class(text) == kind


@pytest.mark.parametrize("name", ["tokens", "steering"])
def test_an_evaluation_is_drawn_again_from_its_json(box, answered, name, tmp_path, monkeypatch):
    folder = box.run("sae" if name == "tokens" else "lora")
    if name == "steering":
        assert steering.main([folder, *FEW]) == 0
    monkeypatch.chdir(tmp_path)
    assert figures.main(["--figure", name, folder]) == 0
    drawn = (tmp_path / "figures" / f"{name}.png").read_bytes()
    with open(f"{folder}/figures/{name}.png", "rb") as f:
        assert f.read() == drawn


def test_a_group_of_tasks_is_scored_over_the_questions_of_all_its_leaves():
    def found(*right):
        samples = {"a": [{"acc": r} for r in right[:2]], "b": [{"acc": r} for r in right[2:]]}
        results = {"g": {"alias": "g", "acc,none": sum(right) / 5, "acc_stderr,none": 0.1}}
        groups = {"g": ["inner", "b"], "inner": ["a"], "a": [], "b": []}
        return {"results": results, "group_subtasks": groups, "samples": samples}

    answers = {"LM": found(1, 1, 1, 0, 0), "after": found(1, 0, 0, 0, 0)}
    numbers, table = benchmarks.summary(answers, ["g"])
    assert numbers["g/n"] == 5 and table[-1] == ["questions", "5"]
    change = np.array([0, -1, -1, 0, 0])
    assert numbers["after vs LM/g/change"] == pytest.approx(change.mean())
    error = change.std(ddof=1) / 5**0.5
    assert numbers["after vs LM/g/change_stderr"] == pytest.approx(error)


# ---- for other libraries ----------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
@torch.no_grad()
def test_what_other_libraries_get_is_the_sae_of_the_run(box, opened, name):
    run = common.open_run(box.run(name))
    x_ND = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    saes = {label: when for label, (_, when) in stock.variants(run).items() if when}
    assert ("source" in saes) == name.startswith("converted")
    for label, when in saes.items():
        if label != "source":
            y_ND, z_NF = stock.load_sae(run, when)(x_ND)
            learner = getattr(opened[name], when)()
            again_ND, z_again_NF = learner.reconstruct(x_ND)
            assert torch.allclose(y_ND, again_ND, atol=1e-4), label
            assert torch.equal(z_NF > 0, z_again_NF > 0), label


# ---- timing -----------------------------------------------------------------------------------


def metrics(folder, points, clean=3.0):
    """metrics.jsonl with evaluations (seconds, tokens, CE), and lines of training between them."""
    folder.mkdir()
    with open(folder / "metrics.jsonl", "w") as f:
        for seconds, n, ce in points:
            head = {"step": n, "tokens": n, "seconds": seconds}
            f.write(json.dumps(head | {"train/kl": 1.0}) + "\n")
            f.write(json.dumps(head | {"val/ce_clean": clean, "val/ce_spliced": ce}) + "\n")
    return str(folder)


def test_time_and_tokens_to_a_share_of_the_gap_are_read_off_straight_lines(tmp_path):
    first = metrics(tmp_path / "first", [(0, 0, 4.0), (60, 1000, 3.6), (120, 2000, 3.5)])
    later = metrics(tmp_path / "later", [(0, 0, 5.0), (240, 500, 3.2)])
    chain = metrics(tmp_path / "tail", [(0, 0, 3.5), (60, 1000, 3.0)])
    runs = [first, later, f"{first}+{chain}"]
    assert timing.main([*runs, "--share", "0.5", "0.9"]) == 0
    numbers = read_json(f"{first}/evals/timing.json")["numbers"]
    expected = {
        "first, minutes to 50% of the gap": 2.0,
        "first, tokens to 50% of the gap": 2000,
        "first, minutes to 90% of the gap": None,
        "later, minutes to 50% of the gap": 4 * 1.5 / 1.8,
        "later, tokens to 50% of the gap": 500 * 1.5 / 1.8,
        "first+tail, minutes to 90% of the gap": 2 + 0.8,
        "first+tail, tokens to 90% of the gap": 2800,
    }
    for name, value in expected.items():
        assert numbers[name] == (value if value is None else pytest.approx(value)), name
    assert timing.main([*runs, "--ce", "3.6"]) == 0
    numbers = read_json(f"{first}/evals/timing.json")["numbers"]
    assert numbers["first, tokens to CE 3.6"] == 1000
    figure = tmp_path / "first" / "figures" / "timing.png"
    drawn = figure.read_bytes()
    figure.unlink()
    assert figures.draw("timing", [{"folder": first}], str(figure))
    assert figure.read_bytes() == drawn


def test_a_run_that_shared_its_clean_pass_has_tokens_and_no_minutes(tmp_path, capsys):
    for name, together in (("one", 1), ("shared", 2)):
        folder = metrics(tmp_path / name, [(0, 0, 4.0), (60, 1000, 3.6)])
        write_json(f"{folder}/results.json", {"together": together})
    one, shared = (str(tmp_path / name) for name in ("one", "shared"))
    assert timing.main([one, shared, "--share", "0.2"]) == 0
    numbers = read_json(f"{one}/evals/timing.json")["numbers"]
    for name, minutes in (("one", 0.5), ("shared", None)):
        assert numbers[f"{name}, tokens to 20% of the gap"] == pytest.approx(500)
        found = numbers[f"{name}, minutes to 20% of the gap"]
        assert found == (minutes if minutes is None else pytest.approx(minutes))
    assert "without minutes of their own: 1\n" in capsys.readouterr().out
    for curves, panels in (([one, shared], 2), ([shared], 1)):
        figure = Figure()
        found = {"figure": {x: timing.curve(x) for x in curves}, "numbers": {"ce_clean": 3.0}}
        eval_figures.timing(figure, found)
        assert len(figure.axes) == panels and "cost" in figure.axes[0].get_ylabel()
        assert figure.axes[-1].get_xlabel() == "training tokens"


def test_a_chain_of_which_a_part_was_made_together_has_no_minutes(tmp_path, box):
    for name, source, together in (("a", "fresh", 2), ("b", "runs/a", 1)):
        folder = metrics(tmp_path / name, [(0, 0, 4.0), (60, 1000, 3.6)])
        about = {"constants": {"SAE": source, "DEVICE": "cpu"}, "recipes": []}
        write_json(f"{folder}/run.json", about)
        write_json(f"{folder}/results.json", {"together": together})
    assert timing.curve(f"{tmp_path}/a+{tmp_path}/b")["seconds"] is None
    assert timing.curve(f"{tmp_path}/b")["seconds"] == [0, 60]


def test_runs_of_one_name_in_two_folders_are_two(tmp_path):
    for place, ce in (("A", 3.6), ("B", 3.5)):
        (tmp_path / place).mkdir()
        metrics(tmp_path / place / "x", [(0, 0, 4.0), (60, 1000, ce)])
    first, second = (f"{tmp_path}/{place}/x" for place in "AB")
    assert timing.main([first, second]) == 0
    numbers = read_json(f"{first}/evals/timing.json")["numbers"]
    assert [numbers[f"{x}, CE at the end"] for x in ("A/x", "B/x")] == [3.6, 3.5]


def test_an_unfinished_run_has_no_end_to_compare(tmp_path, capsys):
    folder = metrics(tmp_path / "one", [(0, 0, 4.0), (60, 1000, 3.6)])
    write_json(f"{folder}/run.json", {"constants": {}})
    assert timing.main([folder]) == 2
    assert "one is not finished" in capsys.readouterr().err


def test_a_chain_in_the_wrong_order_is_refused(box, tmp_path, capsys):
    for name, source in (("a", "fresh"), ("b", "runs/a")):
        folder = metrics(tmp_path / name, [(0, 0, 4.0), (60, 1000, 3.6)])
        about = {"constants": {"SAE": source, "DEVICE": "cpu"}, "recipes": []}
        write_json(f"{folder}/run.json", about)
        write_json(f"{folder}/results.json", {})
    a, b = (str(tmp_path / name) for name in "ab")
    assert timing.main([f"{a}+{b}"]) == 0
    assert timing.main([f"{b}+{a}"]) == 2
    assert "started from fresh, not from" in capsys.readouterr().err
    assert not (tmp_path / "a" / "evals").exists()


@pytest.mark.parametrize(
    "words",
    [["--share", "25"], ["--share", "0"], ["--ce", "-1"]],
    ids=" ".join,
)
def test_a_share_is_under_one_and_a_target_over_zero(tmp_path, words, capsys):
    with pytest.raises(SystemExit) as end:
        timing.main([metrics(tmp_path / "first", [(0, 0, 4.0)]), *words])
    assert end.value.code == 2 and "wanted a number over 0" in capsys.readouterr().err


def test_a_run_without_its_losses_is_a_line(box, tmp_path, capsys):
    folder = shutil.copytree(box.run("sae"), tmp_path / "sae")
    (folder / "after.npz").unlink()
    assert tokens.main([str(folder)]) == 2
    assert "after.npz is missing or damaged" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--seed", "-1"], ["--latents", "1,-3"], ["--latents", "3-5"]])
def test_a_number_of_steering_that_is_none_is_a_short_line(box, words, capsys):
    with pytest.raises(SystemExit) as end:
        steering.main([box.run("sae"), *words])
    error = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "wanted a whole number, 0 or more" in error and len(error) < 200


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--texts", "absent.json"], "absent.json"),
        (["--endpoint", "notaurl"], "no http address"),
        (["--endpoint", "http://localhost:1/v1"], "without a key"),
    ],
    ids=["texts", "url", "key"],
)
def test_what_steering_needs_is_asked_for_before_the_lm_loads(
    box, words, said, monkeypatch, capsys
):
    monkeypatch.delenv(texts.KEY, raising=False)
    monkeypatch.setattr(steering, "Finished", None)
    assert steering.main([box.run("sae"), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_said_first(box, monkeypatch, capsys):
    monkeypatch.setattr(tokens, "Finished", None)
    monkeypatch.setattr(common.os, "access", lambda place, mode: False)
    assert tokens.main([box.run("sae")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_an_interrupted_evaluation_is_a_line(box, monkeypatch, capsys):
    def interrupted(*a):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokens, "Finished", interrupted)
    assert tokens.main([box.run("sae")]) == 130
    assert capsys.readouterr().err == "stopped; nothing was written\n"


def test_without_lm_eval_benchmarks_say_what_installs_it(box, monkeypatch, capsys):
    monkeypatch.setattr(benchmarks, "find_spec", lambda name: None)
    assert benchmarks.main([box.run("sae")]) == 2
    assert "requirements/evals.txt" in capsys.readouterr().err


def test_runs_measured_on_other_tokens_are_not_compared(tmp_path, capsys):
    first = metrics(tmp_path / "first", [(0, 0, 4.0)])
    other = metrics(tmp_path / "other", [(0, 0, 4.0)], clean=3.1)
    assert timing.main([first, other]) == 2
    assert "clean CE 3.1000, 3.0000" in capsys.readouterr().err
    assert timing.main([str(tmp_path / "absent")]) == 2
    assert "absent has no metrics.jsonl" in capsys.readouterr().err
