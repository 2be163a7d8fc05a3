"""The card says what was run, measured and must be known, and nothing of the machine."""

import json
import re

import pytest
from conftest import constants

from report import card

NUMBERS = {
    name.format(when): 0.001 * i + 0.5 * (when == "after")
    for i, name in enumerate(card.ROWS.values())
    for when in ("before", "after")
}
RESULTS = NUMBERS | {"gap_closed": 0.473, "kl_removed": 0.314, "tokens": 32_768, "seconds": 90.0}
RESULTS |= {"device": "NVIDIA X", "commit": "c0ffee", "ce_clean": 2.5, "ce_zero": 15.0}
RESULTS |= {"ce_clean_no_special": 2.25, "ce_zero_no_special": 14.5}


def about(source=None, **changes):
    hub = {"MODEL": "google/gemma-2-2b", "ARCHITECTURE": ""}
    resolved = {"sae_commit": "5ae", "dataset_commit": "da7a", "tokens": "f1ngerpr1nt"}
    made = {"architecture": "topk", "d_in": 8, "d_sae": 65_536, "k": 80, "licence": "mit"}
    more = {"versions": {"torch": "2.13.0"}, "commit": "c0ffee"}
    c = constants(**hub | changes).constants()
    return {"constants": c, "resolved": resolved, "source": made | (source or {}), **more}


def front(text):
    return dict(re.findall(r"^(\w+): (.*)$", text.split("---\n")[1], re.M))


SAID = ["65,536 latents (k = 80)", "32,768 tokens", "closed 47.3%", "removed 31.4% of the KL"]
SAID += ["commit c0ffee", "arxiv.org/abs/2503.17272", "monology/pile-uncopyrighted at da7a"]
SAID += ["f1ngerpr1nt", "trainer_2 at 5ae", "licence (mit)", "LR = 5e-05", "after block 12"]
SAID += ["NVIDIA X in 1.5 minutes", "2.5000 (2.2500 without", "15.0000 (14.5000)"]


def test_the_card_says_what_was_run_and_measured():
    text = card.text(RESULTS, about())
    assert [words for words in SAID if words not in text] == []
    for heading, name in card.ROWS.items():
        before, after = (f"{NUMBERS[name.format(w)]:.4f}" for w in ("before", "after"))
        assert f"| {heading} | {before} | {after} |" in text
    assert front(text) == {
        "library_name": "saelens",
        "tags": "[sparse-autoencoder, interpretability, klsplice]",
        "base_model": "google/gemma-2-2b",
        "datasets": "[monology/pile-uncopyrighted]",
        "license": "mit",
    }
    assert "LOGITS" not in card.text(RESULTS, about(DTYPE="float32"))
    assert "LOGITS = 'bfloat16'" in card.text(RESULTS, about(DTYPE="bfloat16"))


NOTES = {  # what the card says, and not by default, of these constants
    "SAEBench's loader of a topk SAE refuses it": {"TRAIN": "adapter", "ADAPTER": "linear"},
    "load the SAE without its adapter": {"TRAIN": "adapter", "ADAPTER": "mlp"},
    "never stands in at the first position": {"KEEP": "first"},
}


@pytest.mark.parametrize("said", NOTES)
def test_what_a_reader_must_know_is_said(said):
    text = card.text(RESULTS, about(**NOTES[said]))
    assert said in text and said not in card.text(RESULTS, about())
    assert ("refuses it" in text) != ("from sae_bench" in text)


def test_local_paths_are_told_by_their_last_part(tmp_path):
    for name in ("model", "sae", "text.jsonl"):
        (tmp_path / name).mkdir()
    local = {"MODEL": "model", "SAE": "sae", "DATASET": "text.jsonl"}
    text = card.text(RESULTS, about(**{n: str(tmp_path / p) for n, p in local.items()}))
    assert str(tmp_path) not in text and tmp_path.name not in text
    assert all(f"{n} = {p!r}" in text for n, p in local.items())
    assert front(text).keys() == {"library_name", "tags", "license"}


def test_evaluations_come_with_the_card_written_again(tmp_path):
    (tmp_path / "sae").mkdir()
    (tmp_path / "evals").mkdir()
    for name, value in (("results", RESULTS), ("run", about())):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    rows = [["", "mean"], *([f"letter {i}", str(i / 8)] for i in range(20))]
    found = {"name": "absorption", "question": "What is absorbed?", "table": rows}
    (tmp_path / "evals" / "a.json").write_text(json.dumps(found))
    assert card.main([str(tmp_path)]) == 0
    text = (tmp_path / "sae/README.md").read_text()
    assert (
        "absorption: What is absorbed?\n\n|  | mean |\n| --- | ---: |\n| letter 0 | 0.0 |" in text
    )
    assert "| letter 11 | 1.375 |\n\nand 8 further rows." in text and "letter 12" not in text
    assert card.main([]) == 2 and card.main([str(tmp_path / "none")]) == 2
