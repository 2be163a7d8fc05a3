"""The language model: found, and loaded frozen."""

import torch

from klsplice import distributed, hub, machine
from klsplice.errors import UserError
from klsplice.lm import attention


@distributed.main_process_first
def open_lm(model: str, revision: str, *, device: str, layer: int, context: int):
    """-> (config, tokenizer) of MODEL, without its weights. Raises UserError in seconds."""
    machine.check_device(device)
    hub.prefer_cache_if_unreachable(model)
    from transformers import AutoConfig, AutoTokenizer

    with hub.model_errors(model):
        options = hub.load_options(model, revision)
        config = AutoConfig.from_pretrained(model, **options)
        tokenizer = AutoTokenizer.from_pretrained(model, **options)
        known = set(tokenizer("a", add_special_tokens=False)["input_ids"])
        if not known - {tokenizer.unk_token_id}:  # transformers makes an empty one, silently
            raise ValueError("it has no tokeniser that knows the letter a")
    text = config.get_text_config()
    if not 0 <= layer < text.num_hidden_layers:
        what = f"LAYER = {layer}: {model} has blocks 0 to {text.num_hidden_layers - 1}"
        raise UserError(what, "LAYER counts from 0; the SAE reads the residual after that block")
    longest = getattr(text, "max_position_embeddings", None)  # a state-space model has no limit
    if longest is not None and longest < context:
        what = f"CONTEXT = {context}: {model} reads {longest} tokens"
        raise UserError(what, "set CONTEXT to that or less")
    return config, tokenizer


@distributed.main_process_first
def load_lm(model: str, revision: str, *, dtype: str, device: str):
    """-> the frozen LM, with our attention function. Raises UserError."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.AttentionInterface.register(attention.NAME, attention.attention)
    with hub.model_errors(model):
        lm, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            model,
            dtype=getattr(torch, dtype),
            attn_implementation=attention.NAME,
            output_loading_info=True,
            **hub.load_options(model, revision),
        )
        if loaded["missing_keys"]:  # transformers makes them random, with a warning
            raise ValueError(f"it lacks {', '.join(sorted(loaded['missing_keys'])[:3])}")
    return lm.to(device).eval().requires_grad_(False)
