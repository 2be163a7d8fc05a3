"""Upload a run's SAE to the Hub: privately unless told; `hf auth login` comes first."""

import argparse
import sys
from pathlib import Path

from huggingface_hub import HfApi

from klsplice.errors import UserError, first_line


def publish(folder: str, repo: str, *, public: bool) -> None:
    """Upload sae/ and lora/ as far as they are there, and the card to the top too."""
    card, api = Path(folder, "sae", "README.md"), HfApi()
    if not card.exists():
        raise UserError(f"{folder} holds no finished run with a card", "wanted runs/<name>")
    api.create_repo(repo, private=not public, exist_ok=True)  # one that exists stays as it is
    if not public and not api.repo_info(repo).private:
        raise UserError(f"{repo} is there already and public", "say --public if you mean it")
    api.upload_folder(folder_path=folder, repo_id=repo, allow_patterns=["sae/*", "lora/*"])
    text = card.read_text(encoding="utf-8").replace("user/repo", repo)
    api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=repo)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m report.publish", description=__doc__)
    parser.add_argument("run", metavar="runs/NAME")
    parser.add_argument("repo", metavar="USER/REPO")
    parser.add_argument("--public", action="store_true")
    a = parser.parse_args(argv)
    try:
        publish(a.run, a.repo, public=a.public)
        print(f"uploaded: https://huggingface.co/{a.repo}")
    except Exception as e:  # of ours; or of the Hub, of its client, of the network
        error = e if isinstance(e, UserError) else UserError(first_line(e), "hf auth login", code=1)
        print(error, file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
