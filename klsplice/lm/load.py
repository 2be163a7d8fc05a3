"""The language model: found, and loaded frozen."""

import os
from typing import NamedTuple

import torch

from klsplice import distributed, hub, machine, storage
from klsplice.errors import UserError
from klsplice.lm import attention

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

    with hub.model_errors(model):
        commit = hub.model_commit(model, revision)
        options = hub.load_options(model, commit)
        config = AutoConfig.from_pretrained(model, **options)
        _check_config(model, config, layer, context)
        tokenizer = _as_its_file_says(
            AutoTokenizer.from_pretrained(model, **options), model, commit
        )
    if not tokenizer.is_fast:
        what = f"MODEL = {model!r} has a tokeniser in Python alone ({type(tokenizer).__name__})"
        raise UserError(what, "wanted a fast one, whose tokenizer.json says all of it")
    known = set(tokenizer("a", add_special_tokens=False)["input_ids"])
    if not known - {tokenizer.unk_token_id}:  # transformers makes an empty one, silently
        what = f"MODEL = {model!r} has no tokeniser that knows the letter a"
        raise UserError(what, "wanted its tokenizer.json beside its config.json")
    identity = f"{model}@{commit}" if commit else _digest(model)
    return Opened(model, config, tokenizer, identity, options)


PROBE = "In 1998  we've  counted 1,234,567 tokens:\n\n\n  \tif x!=y "
PROBE += "\u00e9 ABCdef \uff21\u4e2d\u6587 ...\n"


def _as_its_file_says(tokenizer, model: str, commit: str | None):
    """The tokeniser, or where its class does not tokenise as its tokenizer.json does, a plain one.

    Some classes of transformers put pre-tokenisers of their own in the place of the file's."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    path = hub.tokenizer_file(model, commit)
    if path is None or not tokenizer.is_fast:
        return tokenizer
    raw = Tokenizer.from_file(path)
    raw.no_truncation()
    raw.no_padding()
    wanted = raw.encode(PROBE, add_special_tokens=False).ids
    if tokenizer(PROBE, add_special_tokens=False)["input_ids"] == wanted:
        return tokenizer
    print(
        f"note: {type(tokenizer).__name__} does not tokenise as tokenizer.json says; that is used"
    )
    return PreTrainedTokenizerFast.from_pretrained(model, **hub.load_options(model, commit))


def _digest(model: str) -> str:
    files = [f for f in os.listdir(model) if f.endswith(WEIGHTS) and "generation" not in f]
    return storage.digest_of([os.path.join(model, f) for f in sorted(files)])


def _check_config(model: str, config, layer: int, context: int) -> None:
    text = config.get_text_config()
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        what = f"MODEL = {model!r} is quantised ({method or 'its config.json says so'})"
        raise UserError(what, "wanted the checkpoint that it was made from, in bfloat16 or float32")
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
    if getattr(lm, "_hf_peft_config_loaded", False):
        what = f"MODEL = {opened.name!r} has an adapter of peft beside its weights"
        raise UserError(what, "merge it first: merge_and_unload() and save_pretrained() of peft")
    lm = lm.to(device).eval().requires_grad_(False)
    for name, p in lm.named_parameters():
        if not p.isfinite().all():
            what = f"MODEL = {opened.name!r} has numbers in {name} that are not finite"
            raise UserError(what, "the file is damaged, or was saved in too narrow a type")
    return lm
