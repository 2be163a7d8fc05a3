"""Uploads a finished run's sae/ to the Hugging Face Hub, as a private repository unless told.

python -m report.publish runs/<name> user/repo [--public]     (after `hf auth login`)
"""

import argparse
import os
import sys

from klsplice.errors import UserError, first_line


def publish(folder: str, repo: str, *, public: bool) -> None:
    """Upload sae/, lora/ where there is one, and the card, which goes to the top as well.

    Raises UserError."""
    from huggingface_hub import HfApi

    card = os.path.join(folder, "sae", "README.md")
    if not os.path.exists(card):
        raise UserError(f"{folder} holds no finished run with a card", "wanted runs/<name>")
    api, about = HfApi(), {"repo_id": repo, "commit_message": "A finetuned SAE, by klsplice"}
    try:
        api.create_repo(repo, private=not public, exist_ok=True)  # one that exists stays as it is
        if not public and not api.repo_info(repo).private:
            raise UserError(f"{repo} is there already and public", "say --public if you mean it")
        for part in ("sae", "lora"):
            if os.path.isdir(os.path.join(folder, part)):
                api.upload_folder(
                    folder_path=os.path.join(folder, part), path_in_repo=part, **about
                )
        with open(card, encoding="utf-8") as f:
            text = f.read().replace("user/repo", repo).encode()
        api.upload_file(path_or_fileobj=text, path_in_repo="README.md", **about)
    except UserError:
        raise
    except Exception as e:  # of the Hub, of its client, of the network
        what = f"{repo} could not be written: {first_line(e)}"
        raise UserError(what, "`hf auth login` with a token that may write", code=1) from None
    print(f"uploaded ({'public' if public else 'private'}): https://huggingface.co/{repo}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="runs/<name>, finished")
    parser.add_argument("repo", help="user/name")
    parser.add_argument("--public", action="store_true")
    a = parser.parse_args(argv)
    try:
        publish(a.run, a.repo, public=a.public)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
