"""Where in an LM an SAE reads, and in which LM, as each format of its files says it."""

import os
import re
from typing import NamedTuple

RESIDUAL = "the residual after a block"

# A module of transformers, a part of a block by its own name in the second group.
MODULE = r"(?:\w+\.)*(?:layers|h|blocks)\.(\d{1,4})((?:\.\w+)*)"
HOOKS = {  # of the residual: what is added to the number for the block after which it is
    r"blocks\.(\d{1,4})\.hook_resid_post": 0,
    r"resid_post_layer_(\d{1,4})": 0,
    r"blocks\.(\d{1,4})\.hook_resid_pre": -1,
    r"resid_pre_layer_(\d{1,4})": -1,
}
LAYERS = (  # in parts of a path
    r"(?:^|_)layers?[_.](\d{1,4})(?:[_.]|$)",
    r"^layer(\d{1,4})\.sae\.pt$",
    r"-SAE-l(\d{1,4})(?:\.pth?)?$",
)
FOLDERS = {  # parts of a path: whether the SAEs in them are of the residual
    r"SAE-Res-.+": True,  # Qwen-Scope
    r".+-SAE-l\d+(?:\.pth?)?": True,  # Goodfire, qresearch
    r"resid_post_mlp(?:_v\d+_\d+k)?": True,  # OpenAI
    r"(?:resid_delta_attn|resid_delta_mlp|resid_post_attn|mlp_post_act)(?:_v\d+_\d+k)?": False,
    r"gemma-scope-\w+-(?:pt|it)-res": True,
    r"gemma-scope-\w+-(?:pt|it)-(?:mlp|att|transcoders)": False,
    r"resid_post(?:_all)?": True,
    r"(?:mlp_out|attn_out|transcoder|crosscoder|clt)(?:_all)?": False,
    r"resid_post_layer_\d+": True,
    r"(?:mlp_out|attention_out)_layer_\d+": False,
    r"embed(?:ding|_in|_tokens)?": False,
}


class Site(NamedTuple):
    """layer: the block, where one is named. what: RESIDUAL; another place, by its own name; or None
    where nothing says it."""

    layer: int | None = None
    what: str | None = None


def of_name(name) -> Site:
    """Of a hook point, or of a module, as a config names it."""
    name = str(name)[:80]
    for pattern, shift in HOOKS.items():
        hook = re.fullmatch(pattern, name, re.ASCII)
        if hook and int(hook[1]) + shift >= 0:
            return Site(int(hook[1]) + shift, RESIDUAL)
    if module := re.fullmatch(MODULE, name, re.ASCII):
        return Site(int(module[1]), RESIDUAL if module[2] in ("", ".output") else name)
    return Site(None, name)


def of_path(path: str) -> Site:
    """Of an SAE's file, for those that do not say it themselves."""
    layer = what = None
    parts = os.path.normpath(path).split(os.sep)
    for part in parts:
        for pattern in LAYERS:
            if number := re.search(pattern, part, re.ASCII):
                layer = int(number[1])
        if re.fullmatch(MODULE, part, re.ASCII):  # sparsify
            layer, what = of_name(part)
        for pattern, residual in FOLDERS.items():
            if re.fullmatch(pattern, part, re.ASCII):
                what = RESIDUAL if residual else part
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


ALIASES = (  # of names in small letters
    (r"^meta-|-(?:pt|hf)$", ""),
    (r"^gemma-v(\d)", r"gemma-\1"),
    (r"^gpt2-small$", "gpt2"),  # this and the next: TransformerLens
    (r"^(mistral-7b(?:-instruct)?)$", r"\1-v0.1"),
)


def same_model(one: str, other: str) -> bool:
    """Whether two names are of one LM, as a person would say: owner, case and -pt do not matter."""
    return _plain(one) == _plain(other)


def _plain(name: str) -> str:
    name = re.sub(r"/snapshots/\w+/?$", "", name)  # a folder of the Hub's cache
    name = os.path.basename(os.path.normpath(name)).lower().rpartition("--")[2]
    for pattern, plain in ALIASES:
        name = re.sub(pattern, plain, name)
    return name
