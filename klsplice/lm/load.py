"""The language model: found, and loaded frozen."""

import os
from typing import NamedTuple

import torch

from klsplice import distributed, hub, machine, storage
from klsplice.errors import UserError
from klsplice.lm import attention

PROBE = "In 1998  we've 1,234,567 tokens:\n\n\n  \tif x!=y \u00e9 ABCdef \uff21\u4e2d\u6587 ...\n"
WEIGHTS = (".safetensors", ".bin", "config.json", ".index.json")  # endings of a local LM's files


class Opened(NamedTuple):
    """An LM of which all but the weights is read.

    identity: name and commit on the Hub, or a digest of a local folder's files: what an evaluation
    or a stopped run depends on. options: from_pretrained's keywords, for just this commit.
    """

    name: str
    config: object
    tokenizer: object
    identity: str
    options: dict


@distributed.main_process_first
def open_lm(model: str, revision: str, *, device: str, layer: int, context: int) -> Opened:
    """Find MODEL and read its config and tokeniser. Raises UserError in seconds."""
    machine.check_device(device)
    hub.prefer_cache_if_unreachable(model)
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import find_adapter_config_file

    with hub.model_errors(model):
        if find_adapter_config_file(model, revision=revision or "main"):
            what = f"MODEL = {model!r} is an adapter of peft, or has one beside its weights"
            raise UserError(what, "merge it first, by merge_and_unload() of peft")
        commit, tokenizer_file = _files(model, revision)
        options = {"trust_remote_code": False}
        # a local folder has no revision and is never looked up online
        options |= {"revision": commit} if commit else {"local_files_only": True}
        config = AutoConfig.from_pretrained(model, **options)
        _check_config(model, config, layer, context)
        tokenizer = AutoTokenizer.from_pretrained(model, **options)
        if tokenizer_file and tokenizer.is_fast:
            tokenizer = _as_its_file_says(tokenizer, tokenizer_file, model, options)
    # transformers makes an empty one, silently, where there is none
    known = set(tokenizer("a", add_special_tokens=False)["input_ids"])
    if not tokenizer.is_fast or not known - {tokenizer.unk_token_id}:
        what = f"MODEL = {model!r} has no fast tokeniser that knows the letter a"
        raise UserError(what, "wanted its tokenizer.json beside its config.json")
    if commit:
        return Opened(model, config, tokenizer, f"{model}@{commit}", options)
    files = [f for f in os.listdir(model) if f.endswith(WEIGHTS) and "generation" not in f]
    identity = storage.digest_of([os.path.join(model, f) for f in sorted(files)])
    return Opened(model, config, tokenizer, identity, options)


def _files(model: str, revision: str) -> tuple[str | None, str | None]:
    """-> the commit that a revision stands for, None of a folder; the path of tokenizer.json."""
    if os.path.isdir(model):
        path = os.path.join(model, "tokenizer.json")
        return None, path if os.path.isfile(path) else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    config = hf_hub_download(model, "config.json", revision=revision or "main")
    commit = os.path.basename(os.path.dirname(config))  # cache/.../snapshots/COMMIT/config.json
    try:
        return commit, hf_hub_download(model, "tokenizer.json", revision=commit)
    except EntryNotFoundError:
        return commit, None


def _as_its_file_says(tokenizer, path: str, model: str, options: dict):
    """The tokeniser, or where its class does not tokenise as its tokenizer.json does, a plain one.

    Some classes of transformers put pre-tokenisers of their own in the place of the file's."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer.from_file(path)
    raw.no_padding()
    wanted = raw.encode(PROBE, add_special_tokens=False).ids
    if tokenizer(PROBE, add_special_tokens=False)["input_ids"] == wanted:
        return tokenizer
    print(f"note: {type(tokenizer).__name__} does not tokenise as its file says; that is used")
    return PreTrainedTokenizerFast.from_pretrained(model, **options)


def _check_config(model: str, config, layer: int, context: int) -> None:
    text = config.get_text_config()
    if getattr(config, "quantization_config", None) is not None:
        hint = "wanted the checkpoint that it was made from, in bfloat16 or float32"
        raise UserError(f"MODEL = {model!r} is quantised, says its config.json", hint)
    if not 0 <= layer < text.num_hidden_layers:
        what = f"LAYER = {layer}: {model} has blocks 0 to {text.num_hidden_layers - 1}"
        raise UserError(what, "LAYER counts from 0; the SAE reads the residual after that block")
    longest = getattr(text, "max_position_embeddings", None)  # a state-space model has no limit
    if longest is not None and longest < context:
        what = f"CONTEXT = {context}: {model} reads {longest} tokens"
        raise UserError(what, "set CONTEXT to that or less")


@distributed.main_process_first
def load_lm(opened: Opened, *, dtype: str, device: str):
    """-> the frozen LM, with the attention that is chosen for it. Raises UserError."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.AttentionInterface.register(attention.NAME, attention.attention)
    with hub.model_errors(opened.name):
        lm, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            opened.name,
            dtype=getattr(torch, dtype),
            attn_implementation=attention.implementation(opened.config, device),
            output_loading_info=True,
            **opened.options,
        )
        if loaded["missing_keys"]:  # transformers makes them random, with a warning
            raise ValueError(f"it lacks {', '.join(sorted(loaded['missing_keys'])[:3])}")
    lm = lm.to(device).eval().requires_grad_(False)
    for name, p in lm.named_parameters():
        if not p.isfinite().all():
            what = f"MODEL = {opened.name!r} has numbers in {name} that are not finite"
            raise UserError(what, "the file is damaged, or was saved in too narrow a type")
    return lm
