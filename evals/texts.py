"""Texts for evals.steering that are not held-out text: from a JSON, or from an endpoint."""

import json
import os
import re
import urllib.error
import urllib.request

from klsplice.errors import UserError

SHAPE = 'wanted {"name": ["a text", "another", ...], ...}'
KEY = "OPENAI_API_KEY"  # the environment variable with the endpoint's key
SECONDS = 120  # that an endpoint may take
PROMPT = """One feature of a language model is active in each of these {n} passages:

{passages}

Write {n} new passages in which that feature would be active too, of {words} words each, on
different subjects. Answer with a JSON array of {n} strings and nothing else."""


def given(a) -> dict[str, list[str]]:
    """What --texts holds, {} without; and a look at --endpoint. Raises UserError."""
    if a.endpoint:
        _key(a.endpoint)
    return from_json(a.texts) if a.texts else {}


def from_json(path: str) -> dict[str, list[str]]:
    """{"latent or name": ["text", ...], ...}, two texts or more each. Raises UserError."""
    try:
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is not readable JSON: {str(e)[:100]}", SHAPE) from None
    if not isinstance(found, dict) or not found or not all(map(_texts, found.values())):
        raise UserError(f"{path} holds no lists of texts", SHAPE)
    return found


def _texts(value) -> bool:
    """Whether it is a list of two texts or more, none of them empty."""
    right = isinstance(value, list) and len(value) > 1
    return right and all(isinstance(x, str) and x.strip() for x in value)


def from_endpoint(url: str, model: str, passages: list[str], *, n: int, words: int) -> list[str]:
    """n passages like these from an OpenAI-compatible endpoint (.../v1); the key is in $KEY.

    The key goes into the request's header and nowhere else; a redirect is not followed, for it
    would carry the key along. Raises UserError.
    """
    key = _key(url)
    prompt = PROMPT.format(n=n, words=words, passages="\n\n".join(passages))
    body = {"model": model, "messages": [{"role": "user", "content": prompt}]}
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(
        f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
    )
    try:
        with urllib.request.build_opener(_Stay).open(request, timeout=SECONDS) as reply:
            content = json.load(reply)["choices"][0]["message"]["content"]
        found = json.loads(re.search(r"\[.*\]", content, re.S)[0])
    except urllib.error.HTTPError as e:
        raise UserError(f"{url} answered {e.code}", f"check --model and ${KEY}", code=1) from None
    except OSError as e:
        cause = getattr(e, "reason", e)
        raise UserError(f"{url} could not be reached: {cause}", "check it", code=1) from None
    except (ValueError, LookupError, TypeError):
        found = None
    if not _texts(found):
        raise UserError(f"{url} answered without a JSON array of texts", "try again", code=1)
    return found[:n]


def _key(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--endpoint {url!r} is no http address", "wanted https://host/v1")
    if not os.environ.get(KEY):
        raise UserError(f"--endpoint without a key in ${KEY}", f"export {KEY}=...")
    return os.environ[KEY]


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):
        return None
