"""Where in an LM an SAE reads, and in which LM, as each format of its files says it."""

import os
import re

from klsplice.site import POINTS, RESIDUAL, Site

# A module of transformers, a part of a block by its own name in the second group.
MODULE = r"(?:\w+\.)*(?:layers|h|blocks)\.(\d{1,4})((?:\.\w+)*)"
# The point of a hook's or folder's name, whose group is the block's number.
HOOKS = {
    r"blocks\.(\d{1,4})\.hook_resid_pre": "pre",  # the residual after the block before
    r"resid_pre_layer_(\d{1,4})": "pre",
    r"resid_post_layer_(\d{1,4})": RESIDUAL,
    r"mlp_out_layer_(\d{1,4})": "hook_mlp_out",
    r"attention_out_layer_(\d{1,4})": "hook_attn_out",
    r"blocks\.(\d{1,4})\.hook_mlp_in": "hook_resid_mid",  # so it is, whatever its name says
}
# Parts of a block in transformers, as configs name them.
PARTS = {
    "": RESIDUAL,
    ".output": RESIDUAL,
    ".mlp": "mlp.hook_out",
    ".post_feedforward_layernorm.output": "hook_mlp_out",
    ".pre_feedforward_layernorm.output": "mlp.hook_in",
    ".self_attn.o_proj.input": "attn.hook_z",
}
LAYERS = (  # in parts of a path
    r"(?:^|_)layers?[_.](\d{1,4})(?:[_.]|$)",
    r"^layer(\d{1,4})\.sae\.pt$",
    r"-SAE-l(\d{1,4})(?:\.pth?)?$",
)
FOLDERS = {  # parts of a path: where the SAEs in them read and write
    r"SAE-Res-.+": RESIDUAL,  # Qwen-Scope
    r".+-SAE-l\d+(?:\.pth?)?": RESIDUAL,  # Goodfire, qresearch
    r"resid_post_mlp(?:_v\d+_\d+k)?": RESIDUAL,  # OpenAI
    r"resid_delta_mlp(?:_v\d+_\d+k)?": "hook_mlp_out",
    r"resid_delta_attn(?:_v\d+_\d+k)?": "hook_attn_out",
    r"(?:resid_post_attn|mlp_post_act)(?:_v\d+_\d+k)?": None,
    r"gemma-scope-\w+-(?:pt|it)-res": RESIDUAL,
    r"gemma-scope-\w+-(?:pt|it)-mlp": "hook_mlp_out",
    r"gemma-scope-\w+-(?:pt|it)-att": "attn.hook_z",
    r"gemma-scope-\w+-(?:pt|it)-transcoders": "ln2.hook_normalized:hook_mlp_out",
    r"resid_post(?:_all)?": RESIDUAL,
    r"mlp_out(?:_all)?": "hook_mlp_out",  # this and the next two: Gemma Scope 2
    r"attn_out(?:_all)?": "attn.hook_z",
    r"transcoder(?:_all)?": "mlp.hook_in:hook_mlp_out",
    r"(?:crosscoder|clt)(?:_all)?": None,
    r"resid_post_layer_\d+": RESIDUAL,
    r"mlp_out_layer_\d+": "hook_mlp_out",
    r"attention_out_layer_\d+": "hook_attn_out",
    r"embed(?:ding|_in|_tokens)?": None,
}


def of_name(name) -> tuple[int | None, str]:
    """Of a hook point, or of a module, as a config names it -> block, one of POINTS or the name."""
    name = str(name)[:80]
    for pattern, point in HOOKS.items():
        if hook := re.fullmatch(pattern, name, re.ASCII):
            layer = int(hook[1])
            if point == "pre":
                return (layer - 1, RESIDUAL) if layer else (None, name)
            return layer, point
    hook = re.fullmatch(r"(?:blocks\.(\d{1,4})\.)?([\w.]+)", name, re.ASCII)
    if hook and hook[2] in POINTS:  # circuit-tracer leaves the block out
        return hook[1] and int(hook[1]), hook[2]
    if module := re.fullmatch(MODULE, name, re.ASCII):
        return int(module[1]), PARTS.get(module[2], name)
    return None, name


def of_path(path: str) -> Site:
    """Of an SAE's file, for those that do not say it themselves."""
    layer = reads = writes = None
    parts = os.path.normpath(path).split(os.sep)
    for part in parts:
        for pattern in LAYERS:
            if number := re.search(pattern, part, re.ASCII):
                layer = int(number[1])
        if re.fullmatch(MODULE, part, re.ASCII):  # sparsify
            layer, reads = of_name(part)
            writes = reads
        for pattern, name in FOLDERS.items():
            if re.fullmatch(pattern, part, re.ASCII):
                reads, _, writes = (name or part).partition(":")
                writes = writes or reads
    last = re.fullmatch(r"(\d{1,4})\.pt", parts[-1], re.ASCII)  # OpenAI
    if last and reads and layer is None:
        layer = int(last[1])
    return Site(layer, reads, writes)


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
    (r"^tiny-?stories-(?:(\d)l(?:ayers?)?-)?", r"tinystories\1-"),
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
