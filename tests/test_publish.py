"""report.publish sends the SAE's files, privately unless told."""

from types import SimpleNamespace

import huggingface_hub
import pytest

from report import publish


@pytest.fixture
def sent(monkeypatch, tmp_path):
    """What would reach the Hub, as (call, options); .there: the repository as it stands."""
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "README.md").write_text('SAE.from_pretrained("user/repo", "sae")')
    calls = type("Calls", (list,), {"there": SimpleNamespace(private=True)})()
    for name in ("create_repo", "upload_folder", "upload_file"):
        keep = lambda self, *a, _n=name, **o: calls.append((_n, o))  # noqa: E731
        monkeypatch.setattr(huggingface_hub.HfApi, name, keep)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda self, repo: calls.there)
    return calls


@pytest.mark.parametrize("words, private", [([], True), (["--public"], False)])
def test_it_is_private_unless_told(tmp_path, sent, words, private):
    assert publish.main([str(tmp_path), "me/sae", *words]) == 0
    assert sent[0] == ("create_repo", {"private": private, "exist_ok": True})
    assert sent[1][1]["allow_patterns"] == ["sae/*", "lora/*"]
    assert sent[2][1]["path_or_fileobj"] == b'SAE.from_pretrained("me/sae", "sae")'
    sent.there.private = False  # create_repo leaves it so
    assert publish.main([str(tmp_path), "me/sae"]) == 2 and sent[-1][0] == "create_repo"


def test_a_folder_without_a_card_is_not_sent(sent):
    assert publish.main(["runs/none", "me/sae"]) == 2 and sent == []
