"""report.publish sends the SAE's files, privately unless told, and says what would go."""

import os
from types import SimpleNamespace

import huggingface_hub
import pytest

from report import publish


@pytest.fixture
def finished(tmp_path):
    folder = tmp_path / "runs" / "x"
    (folder / "sae").mkdir(parents=True)
    (folder / "results.json").write_text("{}")
    (folder / "sae" / "ae.pt").write_bytes(b"0" * 2_000_000)
    (folder / "sae" / "README.md").write_text("card")
    return str(folder)


@pytest.fixture
def sent(monkeypatch):
    """What would reach the hub, as (call, arguments); .there: the repository as it stands."""
    calls = type("Calls", (list,), {})()
    for name in ("create_repo", "upload_folder", "upload_file"):
        monkeypatch.setattr(
            huggingface_hub.HfApi, name, lambda self, *a, _n=name, **o: calls.append((_n, a, o))
        )
    there = SimpleNamespace(private=True)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda self, repo: there)
    calls.there = there
    return calls


def test_a_dry_run_lists_the_files_and_sends_nothing(finished, sent, capsys):
    assert publish.main([finished, "me/sae", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "2.00 MB  sae/ae.pt" in said and "README.md" in said and "private" in said
    assert sent == []


@pytest.mark.parametrize("words, private", [([], True), (["--public"], False)])
def test_it_is_private_unless_told(finished, sent, words, private):
    assert publish.main([finished, "me/sae", *words]) == 0
    assert sent[0] == ("create_repo", ("me/sae",), {"private": private, "exist_ok": True})
    assert sent[1][2]["folder_path"].endswith("sae") and sent[1][2]["repo_id"] == "me/sae"


def test_a_public_repository_that_is_there_is_no_private_one(finished, sent, capsys):
    sent.there.private = False  # create_repo leaves it so
    assert publish.main([finished, "me/sae"]) == 2
    assert "there already and public" in capsys.readouterr().err
    assert [name for name, *_ in sent] == ["create_repo"]
    assert publish.main([finished, "me/sae", "--public"]) == 0


def test_a_run_without_a_card_is_not_published(finished, sent, capsys):
    os.remove(f"{finished}/sae/README.md")
    assert publish.main([finished, "me/sae"]) == 2
    assert "no sae/ with a card" in capsys.readouterr().err and sent == []


def test_a_lora_goes_beside_the_sae(finished, sent):
    os.mkdir(f"{finished}/lora")
    assert publish.main([finished, "me/sae"]) == 0
    assert [o["path_in_repo"] for _, _, o in sent[1:]] == ["sae", "lora", "README.md"]


def test_the_card_at_the_top_names_the_repository(finished, sent):
    with open(f"{finished}/sae/README.md", "w") as f:
        f.write('SAE.from_pretrained("user/repo", "sae")')
    assert publish.main([finished, "me/sae"]) == 0
    assert sent[-1][2]["path_or_fileobj"] == b'SAE.from_pretrained("me/sae", "sae")'


@pytest.mark.parametrize("words", [["runs/none", "me/sae"], [None, "not a name"], [None, "me"]])
def test_mistakes_get_one_line_and_exit_2(finished, sent, words, capsys):
    assert publish.main([word or finished for word in words]) == 2
    assert capsys.readouterr().err.startswith("error:") and sent == []


@pytest.mark.parametrize(
    "error",
    [
        huggingface_hub.errors.LocalTokenNotFoundError("Token is required, but no token found."),
        type("ConnectError", (Exception,), {})(""),  # of the hub's client, no OSError
    ],
    ids=["no token", "no network"],
)
def test_a_refusal_of_the_hub_is_one_line_and_exit_1(finished, monkeypatch, capsys, error):
    def refuse(self, *a, **o):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    assert publish.main([finished, "me/sae"]) == 1
    assert "hf auth login" in capsys.readouterr().err
