"""python -m report.publish runs/<name> user/repo [--public]: upload a run's SAE to the Hub.

The repository is private unless told; `hf auth login` comes first."""

import os
import sys

from klsplice.errors import UserError, first_line


def publish(folder: str, repo: str, *, public: bool) -> None:
    """Upload sae/ and lora/ as far as they are there, and the card to the top too."""
    from huggingface_hub import HfApi

    api = HfApi()
    card = os.path.join(folder, "sae", "README.md")
    if not os.path.exists(card):
        raise UserError(f"{folder} holds no finished run with a card", "wanted runs/<name>")
    api.create_repo(repo, private=not public, exist_ok=True)  # one that exists stays as it is
    if not public and not api.repo_info(repo).private:
        raise UserError(f"{repo} is there already and public", "say --public if you mean it")
    for part in ("sae", "lora"):
        path = os.path.join(folder, part)
        if os.path.isdir(path):
            api.upload_folder(folder_path=path, path_in_repo=part, repo_id=repo)
    with open(card, encoding="utf-8") as f:
        text = f.read().replace("user/repo", repo).encode()
    api.upload_file(path_or_fileobj=text, path_in_repo="README.md", repo_id=repo)


def main(argv: list[str]) -> int:
    words = [word for word in argv if word != "--public"]
    if len(words) != 2 or any(word.startswith("-") for word in words):
        print(f"error: wanted {__doc__.splitlines()[0]}", file=sys.stderr)
        return 2
    try:
        publish(*words, public="--public" in argv)
    except Exception as e:  # of ours; or of the Hub, of its client, of the network
        error = e if isinstance(e, UserError) else UserError(first_line(e), "hf auth login", code=1)
        print(error, file=sys.stderr)
        return error.code
    print(f"uploaded: https://huggingface.co/{words[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
