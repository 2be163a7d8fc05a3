"""Where in an LM an SAE reads, and in which LM, as each format of its files says it."""

import os
import re
from typing import NamedTuple

RESIDUAL = "the residual after a block"

# Names of the residual after block N, or before block N. Of a module of transformers, a part of a
# block by its own name in the second group.
MODULE = r"(?:\w+\.)*(?:layers|h|blocks)\.(\d{1,4})((?:\.\w+)*)"
AFTER = (r"blocks\.(\d{1,4})\.hook_resid_post", r"resid_post_layer_(\d{1,4})")
BEFORE = (r"blocks\.(\d{1,4})\.hook_resid_pre", r"resid_pre_layer_(\d{1,4})")
LAYERS = (  # in parts of a path
    r"(?:^|_)layers?[_.](\d{1,4})(?:[_.]|$)",
    r"^layer(\d{1,4})\.sae\.pt$",
    r"-SAE-l(\d{1,4})(?:\.pth?)?$",
)
FOLDERS = (  # parts of a path in which SAEs of the residual lie
    r"SAE-Res-.+",  # Qwen-Scope
    r".+-SAE-l\d+(?:\.pth?)?",  # Goodfire, qresearch
    r"resid_post_mlp(?:_v\d+_\d+k)?",  # OpenAI
    r"gemma-scope-\w+-(?:pt|it)-res",
    r"resid_post(?:_all)?",
    r"resid_post_layer_\d+",
)
ELSEWHERE = (  # and those of something else, by that name
    r"gemma-scope-\w+-(?:pt|it)-(?:mlp|att|transcoders)",
    r"(?:mlp_out|attn_out|transcoder|crosscoder|clt)(?:_all)?",
    r"(?:mlp_out|attention_out)_layer_\d+",
    r"embed(?:ding|_in|_tokens)?",
    r"(?:resid_delta_attn|resid_delta_mlp|resid_post_attn|mlp_post_act)(?:_v\d+_\d+k)?",
)


class Site(NamedTuple):
    """layer: the block, where one is named. what: RESIDUAL; another place, by its own name; or None
    where nothing says it."""

    layer: int | None = None
    what: str | None = None


def of_name(name) -> Site:
    """Of a hook point, or of a module, as a config names it."""
    if name is None or name == "":
        return Site()
    name = str(name)[:80]
    for patterns, shift in ((AFTER, 0), (BEFORE, -1)):
        for pattern in patterns:
            found = re.fullmatch(pattern, name, re.ASCII)
            if found and int(found[1]) + shift >= 0:
                return Site(int(found[1]) + shift, RESIDUAL)
    if module := re.fullmatch(MODULE, name, re.ASCII):
        return Site(int(module[1]), RESIDUAL if module[2] in ("", ".output") else name)
    number = re.search(r"(\d{1,4})", name, re.ASCII)
    return Site(number and int(number[1]), name)


def of_path(path: str) -> Site:
    """Of an SAE's file, for those that do not say it themselves."""
    layer = what = None
    parts = os.path.normpath(path).split(os.sep)
    for part in parts:
        for pattern in LAYERS:
            found = re.search(pattern, part, re.ASCII)
            layer = int(found[1]) if found else layer
        if re.fullmatch(MODULE, part, re.ASCII):  # sparsify
            layer, what = of_name(part)
        elif any(re.fullmatch(pattern, part, re.ASCII) for pattern in FOLDERS):
            what = RESIDUAL
        elif any(re.fullmatch(pattern, part, re.ASCII) for pattern in ELSEWHERE):
            what = part
    last = re.fullmatch(r"(\d{1,4})\.pt", parts[-1], re.ASCII)  # OpenAI
    if last and what and layer is None:
        layer = int(last[1])
    return Site(layer, what)


def model_of_path(path: str) -> str | None:
    """The LM that a repository of SAEs is named after."""
    for pattern in (r"SAE-Res-(.+?)-W\d+K-L0_\d+", r"([^/]+)-SAE-l\d+"):
        if found := re.search(pattern, path, re.ASCII):
            return found[1]
    found = re.search(r"gemma-scope-(2-)?(\w+)-(pt|it)(?:-\w+)?(?:/|$)", path, re.ASCII)
    if not found:
        return None
    tuned = "-it" if found[3] == "it" else ""
    return f"google/gemma-{'3' if found[1] else '2'}-{found[2]}{tuned}"


ALIASES = {  # of TransformerLens
    "gpt2-small": "gpt2",
    "mistral-7b": "mistral-7b-v0.1",
    "mistral-7b-instruct": "mistral-7b-instruct-v0.1",
    "tiny-stories-1l-21m": "tinystories-1layer-21m",
    "tiny-stories-33m": "tinystories-33m",
}


def same_model(one: str, other: str) -> bool:
    """Whether two names are of one LM, as a person would say: owner, case and -pt do not matter."""
    return _plain(one) == _plain(other)


def _plain(name: str) -> str:
    name = re.sub(r"/snapshots/\w+/?$", "", name)  # a folder of the Hub's cache
    name = os.path.basename(os.path.normpath(name)).lower().rpartition("--")[2]
    name = re.sub(r"^meta-", "", re.sub(r"^gemma-v(\d)", r"gemma-\1", name))
    name = re.sub(r"-(?:pt|hf)$", "", name)
    return ALIASES.get(name, name)
