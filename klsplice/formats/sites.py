"""Where in an LM an SAE reads, and in which LM, as each format of its files says it."""

import os
import re
from typing import NamedTuple

from klsplice.errors import UserError

RESIDUAL = "the residual after a block"

# Names of the residual after block N, or before block N, in configs.
AFTER = (
    r"blocks\.(\d{1,4})\.hook_resid_post",  # SAELens
    r"(?:\w+\.)*(?:layers|h|blocks)\.(\d{1,4})(?:\.output)?",  # modules of transformers
    r"resid_post_layer_(\d{1,4})",  # dictionary_learning
)
BEFORE = (r"blocks\.(\d{1,4})\.hook_resid_pre", r"resid_pre_layer_(\d{1,4})")
LAYERS = (
    r"(?:^|_)layers?[_.](\d{1,4})(?:[_.]|$)",
    r"^layer(\d{1,4})\.sae\.pt$",
    r"-SAE-l(\d{1,4})(?:\.pth?)?$",
)
FOLDERS = {  # parts of a path -> what an SAE in there reads
    r"SAE-Res-.+": RESIDUAL,  # Qwen-Scope
    r".+-SAE-l\d+(?:\.pth?)?": RESIDUAL,  # Goodfire, qresearch
    r"resid_post_mlp(?:_v\d+_\d+k)?": RESIDUAL,  # OpenAI
    r"gemma-scope-\w+-(?:pt|it)-res": RESIDUAL,
    r"resid_post(?:_all)?": RESIDUAL,
    r"resid_post_layer_\d+": RESIDUAL,
    r"layers\.\d+": RESIDUAL,  # sparsify
    r"gemma-scope-\w+-(?:pt|it)-(?:mlp|att|transcoders)": "",  # "": something else, by that name
    r"(?:mlp_out|attn_out|transcoder|crosscoder|clt)(?:_all)?": "",
    r"(?:mlp_out|attention_out)_layer_\d+": "",
    r"embedding": "",
    r"(?:resid_delta_attn|resid_delta_mlp|resid_post_attn|mlp_post_act)(?:_v\d+_\d+k)?": "",
    r"layers\.\d+\.\w+": "",
}


class Site(NamedTuple):
    """layer: the block, where one is named. what: RESIDUAL; another place, by its own name; or None
    where nothing says it."""

    layer: int | None = None
    what: str | None = None


def of_name(name) -> Site:
    """Of a hook point, or of a module, as a config names it."""
    if not isinstance(name, str) or not name:
        return Site()
    for patterns, shift in ((AFTER, 0), (BEFORE, -1)):
        for pattern in patterns:
            found = re.fullmatch(pattern, name, re.ASCII)
            if found and int(found[1]) + shift >= 0:
                return Site(int(found[1]) + shift, RESIDUAL)
    number = re.search(r"(\d{1,4})", name, re.ASCII)
    return Site(number and int(number[1]), name[:80])


def residual_only(where: str, kind) -> None:
    if kind not in (None, "sae"):
        what = f"SAE = {where} is a {str(kind)[:60]}, not an SAE of one residual stream"
        raise UserError(what, "wanted an SAE that reads and writes the residual after one block")


def of_hooks(into, out) -> Site:
    """Of an SAE that reads `into` and writes `out`, as its config names them."""
    site = of_name(into)
    if out is None or out == into:
        return site
    return site._replace(what=f"{str(into)[:80]}, and writes {str(out)[:80]}")


def of_folder(where: str) -> Site:
    """Of a path, for files that do not say it themselves."""
    layer = what = None
    for part in os.path.normpath(where).split(os.sep):
        for pattern in LAYERS:
            found = re.search(pattern, part, re.ASCII)
            layer = int(found[1]) if found else layer
        for pattern, kind in FOLDERS.items():
            if re.fullmatch(pattern, part, re.ASCII):
                what = kind or part
    return Site(layer, what)


def model_of_folder(where: str) -> str | None:
    """The LM that a repository of SAEs is named after."""
    for pattern in (r"SAE-Res-(.+?)-W\d+K-L0_\d+", r"([^/]+)-SAE-l\d+"):
        if found := re.search(pattern, where, re.ASCII):
            return found[1]
    found = re.search(r"gemma-scope-(2-)?(\w+)-(pt|it)(?:-\w+)?(?:/|$)", where, re.ASCII)
    if not found:
        return None
    return f"google/gemma-{'3' if found[1] else '2'}-{found[2]}" + (
        "-it" if found[3] == "it" else ""
    )


def same_model(one: str, other: str) -> bool:
    """Whether two names are of one LM, as a person would say: owner, case and -pt do not matter."""
    return _plain(one) == _plain(other)


def _plain(name: str) -> str:
    name = os.path.basename(os.path.normpath(name)).lower()
    name = re.sub(r"^meta-", "", re.sub(r"^gemma-v(\d)", r"gemma-\1", name))
    name = re.sub(r"-(?:pt|hf)$", "", name)
    return {"gpt2-small": "gpt2"}.get(name, name)
