"""Uploads a finished run's sae/ to the Hugging Face Hub, as a private repository unless told.

python -m report.publish runs/<name> user/repo --dry-run    what would go, and how large it is
python -m report.publish runs/<name> user/repo              upload it (after `hf auth login`)
python -m report.publish runs/<name> user/repo --public
"""

import argparse
import os
import re
import sys

from klsplice.errors import UserError, whole


def publish(folder: str, repo: str, *, public: bool, dry_run: bool) -> None:
    """Upload sae/, lora/ where there is one, and the card, which goes to the top as well.

    Raises UserError."""
    folder = os.path.normpath(folder)
    if not os.path.exists(os.path.join(folder, "results.json")):
        raise UserError(f"{folder} is no finished run", "wanted runs/<name> with a results.json")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"{repo!r} is no repository name", "wanted user/name")
    if not os.path.exists(os.path.join(folder, "sae", "README.md")):
        raise UserError(f"{folder} has no sae/ with a card", "make that run again")
    parts = [p for p in ("sae", "lora") if os.path.isdir(os.path.join(folder, p))]
    for part in parts:
        for name in sorted(os.listdir(os.path.join(folder, part))):
            size = os.path.getsize(os.path.join(folder, part, name)) / 1e6
            print(f"{size:10.2f} MB  {part}/{name}")
    visible = "public" if public else "private"
    if dry_run:
        print(f"nothing was sent; without --dry-run these go to {repo} ({visible})")
        return
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, private=not public, exist_ok=True)  # one that exists stays as it is
        if not public and not api.repo_info(repo).private:
            raise UserError(f"{repo} is there already and public", "say --public if you mean it")
        about = {"repo_id": repo, "commit_message": f"klsplice: {os.path.basename(folder)}"}
        for part in parts:
            api.upload_folder(folder_path=os.path.join(folder, part), path_in_repo=part, **about)
        with open(os.path.join(folder, "sae", "README.md"), encoding="utf-8") as f:
            card = f.read().replace("user/repo", repo).encode()
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", **about)
    except UserError:
        raise
    except Exception as e:  # of the hub, of its client, of the network
        hint = "`hf auth login` with a token that may write"
        raise UserError(f"{repo} could not be written:{whole(e)}", hint, code=1) from None
    print(f"uploaded ({visible}): https://huggingface.co/{repo}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="runs/<name>, finished")
    parser.add_argument("repo", help="user/name")
    parser.add_argument("--public", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    a = parser.parse_args(argv)
    try:
        publish(a.run, a.repo, public=a.public, dry_run=a.dry_run)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
