"""Evaluations beyond cross-entropy, against full forward passes and plain loops."""

import itertools
import json
import os
import shutil

import naive
import numpy as np
import pandas as pd
import pytest
import torch
from evals_world import LAYER, RUNS, World

import eval as evaluation
from evals import benchmarks, features, steering, texts, tokens
from evals.open import Finished, load_sae, variants
from klsplice.metrics import read_metrics
from klsplice.settings import Config
from klsplice.storage import read_json, write_json
from report import figures, runs

FEW = ["--length", "9", "--texts-each", "2", "-n", "2"]
IDS = [[9, 30, 41, 17, 88, 120, 35], [50, 51], [200, 7, 7, 190, 23, 61, 150, 270, 31, 12]]


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setattr(figures, "run_figures", lambda folder, results: None)
        world = World(tmp_path_factory.mktemp("evals"))
        for name in RUNS:
            world.run(name)
        yield world


@pytest.fixture(scope="module")
def opened(box):
    return {name: Finished(box.run(name)) for name in RUNS}


def answer_of(module, folder, *words):
    assert module.main([folder, *map(str, words)]) == 0
    return read_json(f"{folder}/evals/{module.__name__.rpartition('.')[2]}.json")


class PlainSAE(naive.TopK):
    def forward(self, x_BLD):
        return super().forward(x_BLD)[0]


def plain_sae(folder):
    t = torch.load(f"{folder}/ae.pt")
    names = {"W_enc": t["encoder.weight"], "b_enc": t["encoder.bias"], "b_dec": t["b_dec"]}
    sae = PlainSAE(names | {"W_dec": t["decoder.weight"].T}, int(t["k"]))
    return sae.requires_grad_(False)


def plain_saes(box, name="sae"):
    return {"before": plain_sae(box.root / "sae"), "after": plain_sae(f"{box.run(name)}/sae")}


@torch.no_grad()
def plain_passes(box, tokens_BL, edit=None):
    """-> logits, the residual after LAYER as it was, and after LAYER and each block above."""
    after = []
    layers = box.lm.base_model.layers[LAYER + 1 :]

    def keep(module, args, output):
        after.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in layers]
    logits_BLV, x_BLD = naive.run_lm(box.lm, tokens_BL, LAYER, edit)
    for handle in handles:
        handle.remove()
    return logits_BLV, x_BLD, [x_BLD if edit is None else edit(x_BLD), *after]


def val_of(run):
    return torch.from_numpy(run.tokens.val_SL.astype(np.int64))


def plain_gain(box, ids, push_D, *, keep_first=False, sae=None, own=False):
    """The change in a text's mean log-likelihood by a push: two full passes, no batch."""
    means = []
    for push in (torch.zeros_like(push_D), push_D):

        def edit(x_BLD, push=push):
            y_BLD = (x_BLD if sae is None else sae(x_BLD)) + push
            if keep_first:
                y_BLD[:, 0] = x_BLD[:, 0]
            return y_BLD

        logits_BLV, *_ = plain_passes(box, torch.tensor([ids]), edit)
        logp_LV = logits_BLV[0].log_softmax(-1)
        scored = range(len(ids)) if own else range(len(ids) - 1)
        means.append(np.mean([logp_LV[i, ids[i if own else i + 1]].item() for i in scored]))
    return means[1] - means[0]


# ---- a finished run, opened again -------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_opened_run_measures_what_the_run_measured(box, opened, name):
    run = opened[name]
    cfg = Config(**vars(run.cfg) | {"CACHE": str(box.root / "none")})
    for when, learner in itertools.chain(run.stages(), run.stages()):
        measured = evaluation.Evaluation(cfg, run.tokens, "lm", []).measure([learner], 8)[0].numbers
        kept = read_json(f"{box.run(name)}/{when}.json")
        for number in ("ce_clean", "ce_spliced", "kl", "fvu", "l0"):
            assert measured[number] == pytest.approx(kept[number], abs=2e-5), (when, number)
    results = read_json(f"{box.run(name)}/results.json")
    assert abs(results["ce_after"] - results["ce_before"]) > 1e-3  # the two are told apart


@pytest.mark.parametrize("name", RUNS)
@torch.no_grad()
def test_module_for_other_libraries_is_the_runs_sae(box, opened, name):
    x_ND = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    saes = {label: when for label, (_, when) in variants(opened[name]).items() if when}
    assert ("source" in saes) == (name == "converted")
    for label, when in saes.items():
        if label != "source":
            y_ND, z_NF = load_sae(opened[name], when)(x_ND)
            again_ND, z_again_NF = getattr(opened[name], when)().reconstruct(x_ND)
            assert torch.allclose(y_ND, again_ND, atol=1e-4)
            assert torch.equal(z_NF > 0, z_again_NF > 0)


# ---- runs as rows -----------------------------------------------------------------------------


def test_no_tokens_measure_an_sae(box):
    measured, whole = (box.run(name, **c) for name, c in (("none", {"TOKENS": 0}), ("sae", {})))
    found, trained = (read_json(f"{folder}/results.json") for folder in (measured, whole))
    for name in ("ce_clean", "ce_zero", "ce_before", "kl_before", "fvu_before", "l0_before"):
        assert found[name] == trained[name]
    assert found["ce_after"] == found["ce_before"]
    assert found["gap_closed"] is None and found["kl_removed"] is None
    removed = (trained["kl_before"] - trained["kl_after"]) / trained["kl_before"]
    assert trained["kl_removed"] == pytest.approx(removed)
    assert not os.path.exists(f"{measured}/sae") and os.path.exists(f"{whole}/sae")
    assert box.main("wrong", TOKENS=0, SAE="fresh") == 2


def test_an_unfinished_run_has_the_names_of_a_finished_one(box, tmp_path):
    folders = [box.run("sae")]
    for name, step in (("early", 6), ("late", 14)):  # an evaluation comes after step 10
        folders.append(str(shutil.copytree(box.run("sae"), tmp_path / name)))
        os.remove(tmp_path / name / "results.json")
        lines = [x for x in read_metrics(box.run("sae")) if x["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    table = runs.as_data(runs.of_folders(folders))
    assert {*table} == {*runs.as_data(runs.of_folders(folders[:1]))}
    assert [*table["state"]] == ["finished", "stopped", "stopped"] and {*table["k"]} == {4}
    (line,) = (x for x in lines if x["step"] == 10 and "val/kl" in x)
    assert table["gap_closed"][2] == line["val/gap_closed"]
    for name in ("gap_closed", "kl_removed", "ce_after", "kl_after_no_special"):
        assert np.isnan(table[name][1]) and not np.isnan(table[name][2])
    assert table["ce_before_no_special"].nunique() == 1


def test_a_rate_at_which_the_loss_explodes_stops_the_run(box, monkeypatch):
    """CE over that with the residual at zero, which a random LM has by nature: so it is set."""
    measure, calls = evaluation.Evaluation.measure, []

    def worse(self, learners, n, poll=lambda: None):
        (found,) = measure(self, learners, n, poll)
        calls.append(n)  # of the check, before, and then after some training
        found.numbers["ce_zero"] = found.numbers["ce_clean"] + 1
        found.numbers["ce_spliced"] = found.numbers["ce_clean"] + (0.5 if len(calls) < 3 else 2)
        return [found]

    monkeypatch.setattr(evaluation.Evaluation, "measure", worse)
    assert box.main("exploded", CACHE=box.root / "empty") == 1
    assert runs.read(str(box.root / "runs/exploded"))["state"] == "failed"


# ---- steering ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sae", "kept"])
@pytest.mark.parametrize("spliced", [False, True], ids=["clean", "spliced"])
def test_push_is_scored_against_the_next_token(box, opened, name, spliced):
    run, batch = opened[name], texts.Batch(opened[name], IDS, 8)
    pushes_SD = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)) * 5
    cut = [[2, *ids[:8]] for ids in IDS]  # BOS, then 8 tokens at most
    for when, learner in run.stages():
        gain_SB = steering.gains(learner, batch, pushes_SD, spliced=spliced)
        options = {"keep_first": name == "kept"}
        options["sae"] = plain_saes(box, name)[when] if spliced else None
        plain_SB = [[plain_gain(box, x, p, **options) for x in cut] for p in pushes_SD]
        np.testing.assert_allclose(gain_SB, plain_SB, atol=2e-5)
        own = plain_gain(box, cut[0], pushes_SD[0], **options, own=True)
        assert abs(gain_SB[0, 0] - own) > 1e-2


def test_lora_is_in_the_steered_pass_after_only(opened):
    run, push_1D = opened["lora"], torch.ones(1, 32)
    batch = texts.Batch(run, IDS, 8)
    gain = [steering.gains(x, batch, push_1D, spliced=True) for _, x in run.stages()]
    assert np.abs(gain[1] - gain[0]).max() > 1e-3
    again = steering.gains(run.before(), batch, push_1D, spliced=True)
    np.testing.assert_array_equal(gain[0], again)


def test_strength_is_tuned_on_one_half_only(box, opened, tmp_path, monkeypatch):
    run, strengths = opened["sae"], (0.05, 0.2, 0.8)
    monkeypatch.setattr(steering, "STRENGTHS", strengths)
    _, x_BLD, _ = plain_passes(box, val_of(run))
    norm = x_BLD.norm(dim=-1).mean().item()
    words = run.tokenizer.batch_decode([ids[1:13] for ids in run.tokens.val_SL[:6].tolist()])
    ids = [[2, *x[:9]] for x in run.tokenizer(words, add_special_tokens=False)["input_ids"]]

    def plain_report(latent):
        """{when: (tuned strength, mean gain of the other half, which that half would take)}."""
        report = {}
        for when, sae in plain_saes(box).items():
            push_D = sae.W_dec[latent] / sae.W_dec[latent].norm() * norm
            gain_ST = np.array([[plain_gain(box, x, s * push_D) for x in ids] for s in strengths])
            tune_S, report_S = gain_ST[:, 0::2].mean(1), gain_ST[:, 1::2].mean(1)
            best = tune_S.argmax()
            report[when] = strengths[best], report_S[best], strengths[report_S.argmax()]
        return report

    reports = ((latent, plain_report(latent)) for latent in range(64))
    latent, report = next(  # of which the halves disagree
        (f, x) for f, x in reports if any(best != other for best, _, other in x.values())
    )
    write_json(str(tmp_path / "texts.json"), {str(latent): words})
    found = answer_of(steering, box.run("sae"), "--texts", tmp_path / "texts.json", *FEW)
    assert found["residual norm"] == pytest.approx(norm, rel=1e-5)
    for when, (best, mean, _) in report.items():
        assert found["numbers"][f"{latent}, strength, {when}"] == best
        assert found["numbers"][f"{latent}, positives, {when}"] == pytest.approx(mean, abs=2e-5)
    verses = run.tokenizer(texts.from_json(texts.NEGATIVES)["verse"], add_special_tokens=False)
    row_D = plain_saes(box)["after"].W_dec[latent]
    push_D = report["after"][0] * norm * row_D / row_D.norm()
    mean = np.mean([plain_gain(box, [2, *x[:9]], push_D) for x in verses["input_ids"]])
    assert found["numbers"]["all, verse, after"] == pytest.approx(mean, abs=2e-5)


def test_windows_hold_the_largest_activation_and_halves_share_no_context(box, opened):
    run = opened["kept"]
    windows = texts.Windows(run, 64, 9)
    largest_WF, _ = steering.activations(run, run.after(), windows)
    sae, at = plain_saes(box, "kept")["after"], 0
    for s, ids_L in enumerate(val_of(run)):
        z_LF = sae.encode(plain_passes(box, ids_L[None])[1][0])
        for start in (1, 10, 19):  # after the BOS
            assert windows.tokens_WL[at].tolist() == ids_L[start : start + 9].tolist()
            np.testing.assert_allclose(largest_WF[at], z_LF[start : start + 9].amax(0), atol=1e-4)
            assert windows.tuning_W[at] == (s % 2 == 0)
            at += 1
    assert at == len(windows.tokens_WL)


# ---- tokens -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens_answer(box):
    return answer_of(tokens, box.run("sae"))


def test_costs_by_group_are_those_of_full_passes(box, opened, tokens_answer):
    run, tokens_BL = opened["sae"], val_of(opened["sae"])
    counts_V = np.bincount(run.tokens.train_SL[run.tokens.order_S].ravel(), minlength=300)

    def ce_BP(edit=None):
        logp_BPV = plain_passes(box, tokens_BL, edit)[0].log_softmax(-1)[:, :-1]
        return -logp_BPV.gather(-1, tokens_BL[:, 1:, None])[..., 0].double().numpy()

    def kind_of(token):
        text = run.tokenizer.convert_ids_to_tokens(token).replace("Ġ", " ")
        if token in run.tokens.special:
            return "other"
        if text in (" ", "Ċ"):
            return "space"
        if text[0] == " " and text[1:].isalpha():
            return "word"
        return "piece" if text.isalpha() and text.isascii() else "other"

    costs = {}
    for when, sae in plain_saes(box).items():
        cost_BP = ce_BP(sae) - ce_BP()
        for b, ids in enumerate(tokens_BL.tolist()):
            for i, (read, predicted) in enumerate(itertools.pairwise(ids)):
                size = max(x for x in (0, 1, 10, 100, 1000) if x <= counts_V[predicted])
                place = max(x for x in (0, 1, 4, 16) if x <= i)
                keys = [f"position: from {place}", f"count in training text: from {size:,}"]
                keys += [f"read: {kind_of(read)}", f"predicted: {kind_of(predicted)}"]
                for key in ["all: predictions", *keys]:
                    costs.setdefault(f"cost, {key}, {when}", []).append(cost_BP[b, i])
    found = {n: v for n, v in tokens_answer["numbers"].items() if n.startswith("cost, ")}
    assert found.keys() == costs.keys()
    for name, values in costs.items():
        assert found[name] == pytest.approx(np.mean(values), abs=2e-5), name


def test_distances_upward_are_those_of_full_passes(box, opened, tokens_answer):
    tokens_BL = val_of(opened["sae"])
    clean = plain_passes(box, tokens_BL)[2]
    for when, sae in plain_saes(box).items():
        spliced = plain_passes(box, tokens_BL, sae)[2]
        assert len(clean) == 2  # LAYER = 1 of three blocks
        for block, (a_BLD, b_BLD) in enumerate(zip(clean, spliced, strict=True), LAYER):
            relative = ((a_BLD - b_BLD).norm(dim=-1) / a_BLD.norm(dim=-1)).mean().item()
            name = f"relative L2 after block {block}, {when}"
            assert tokens_answer["numbers"][name] == pytest.approx(relative, abs=1e-4)


# ---- features ---------------------------------------------------------------------------------


def test_latents_are_compared_as_plain_sets(box, opened, tmp_path):
    out = tmp_path / "latents.csv"
    numbers = answer_of(features, box.run("kept"), "--out", out)["numbers"]
    saes, fires, best = plain_saes(box, "kept"), {}, {}
    _, x_BLD, _ = plain_passes(box, val_of(opened["kept"]))
    for when, sae in saes.items():
        z_BLF = sae.encode(x_BLD)
        z_BLF[:, 0] = 0  # KEEP = first: it is not used there
        for f in range(64):
            fires[when, f] = set(map(tuple, z_BLF[..., f].nonzero().tolist()))
            largest = z_BLF[..., f].amax(1).tolist()
            order = sorted(range(len(largest)), key=lambda s: -largest[s])
            best[when, f] = {s for s in order[:10] if largest[s] > 0}
    frame = pd.read_csv(out)
    assert sorted(frame.latent) == [*range(64)] and frame["decoder cosine"].is_monotonic_increasing
    for _, row in frame.iterrows():
        f = int(row.latent)
        for part, weight in (("decoder", "W_dec"), ("encoder", "W_enc")):
            rows = (getattr(sae, weight)[f] for sae in saes.values())
            cosine = torch.nn.functional.cosine_similarity(*rows, dim=0).item()
            assert row[f"{part} cosine"] == pytest.approx(cosine, abs=1e-5)
        old, new = fires["before", f], fires["after", f]
        assert [row["fires before"], row["fires after"]] == [len(old), len(new)]
        if old | new:
            assert row["Jaccard of tokens"] == pytest.approx(len(old & new) / len(old | new))
            old, new = best["before", f], best["after", f]
            shared = len(old & new) / max(len(old), len(new))
            assert row["strongest contexts"] == pytest.approx(shared)
    alive = [{f for f in range(64) if fires[when, f]} for when in saes]
    assert [numbers["died"], numbers["woke"]] == [
        len(alive[0] - alive[1]),
        len(alive[1] - alive[0]),
    ]
    jaccard = frame["Jaccard of tokens"].dropna()
    assert numbers["Jaccard of tokens, mean"] == pytest.approx(jaccard.mean()) != 1
    assert numbers["Jaccard of tokens, lowest 5 %"] == pytest.approx(np.quantile(jaccard, 0.05))


@pytest.mark.parametrize("name", ["linear", "mlp", "lora"])
def test_frozen_encoder_fires_exactly_as_before(box, name, tmp_path):
    folder = shutil.copytree(box.run(name), tmp_path / name)
    tensors = torch.load(folder / "sae" / "ae.pt")
    tensors["encoder.bias"] += 0.3 * torch.randn(64)  # as rounding might, where it is folded
    torch.save(tensors, folder / "sae" / "ae.pt")
    numbers = answer_of(features, str(folder))["numbers"]
    assert numbers["Jaccard of tokens, mean"] == numbers["Jaccard of tokens, lowest 5 %"] == 1
    assert numbers["died"] == numbers["woke"] == 0
    assert numbers["encoder cosine, lowest 5 %"] == pytest.approx(1)


@pytest.mark.parametrize("name", ["sae", "kept", "lora"])
def test_kl_of_the_saes_error_and_of_a_random_one(box, opened, name):
    numbers = answer_of(features, box.run(name))["numbers"]
    for when in ("before", "after"):
        kl = read_json(f"{box.run(name)}/{when}.json")["kl"]
        assert numbers[f"KL, the SAE's error, {when}"] == pytest.approx(kl, rel=1e-4)
        ratio = kl / numbers[f"KL, a random error, {when}"]
        assert numbers[f"KL, ratio, {when}"] == pytest.approx(ratio, rel=1e-4)
        if name == "lora":
            continue
        sae, rng = plain_saes(box, name)[when], torch.Generator().manual_seed(0)
        first, kls = int(name == "kept"), []
        for tokens_BL in val_of(opened[name]).split(4):
            clean_BLV, x_BLD, _ = plain_passes(box, tokens_BL)
            x_ND = x_BLD[:, first:].reshape(-1, 32)
            e_ND = torch.randn(x_ND.shape, generator=rng)
            e_ND *= (sae(x_ND) - x_ND).norm(dim=1, keepdim=True) / e_ND.norm(dim=1, keepdim=True)
            other_BLD = x_BLD.clone()
            other_BLD[:, first:] += e_ND.view(4, -1, 32)
            spliced_BLV, *_ = plain_passes(box, tokens_BL, lambda _, other=other_BLD: other)
            kls.append(naive.kl_per_token(clean_BLV, spliced_BLV))
        mean = torch.cat(kls).mean().item()
        assert numbers[f"KL, a random error, {when}"] == pytest.approx(mean, rel=1e-3)


# ---- benchmarks -------------------------------------------------------------------------------


def test_group_of_tasks_is_scored_over_all_its_leaves():
    def found(*right):
        samples = {"a": [{"acc": r} for r in right[:2]], "b": [{"acc": r} for r in right[2:]]}
        results = {"g": {"alias": "g", "acc,none": sum(right) / 5, "acc_stderr,none": 0.1}}
        return {"g": {"results": results, "samples": samples}}

    answers = {"LM": found(1, 1, 1, 0, 0), "after": found(1, 0, 0, 0, 0)}
    numbers, table = benchmarks.summary(answers, ["g"])
    change = np.array([0, -1, -1, 0, 0])
    assert numbers["after vs LM/g/change"] == pytest.approx(change.mean())
    error = change.std(ddof=1) / 5**0.5
    assert numbers["after vs LM/g/change_stderr"] == pytest.approx(error)
    assert table[-1] == ["questions", "5"]
