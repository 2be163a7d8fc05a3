"""The language model: found, loaded frozen, with ops.attention, and checked."""

import os
from contextlib import contextmanager

import torch
from safetensors import SafetensorError

import distributed
import ops
from errors import UserError, first_line, near_path
from splice import Splice

ATTENTION = "klsplice"  # the name under which transformers finds ops.attention


@distributed.in_turn
def open_lm(c):
    """-> (config, tokenizer) of MODEL, without its weights. Raises UserError in seconds."""
    check_device(c.DEVICE)
    look_for_hub(c)
    from transformers import AutoConfig, AutoTokenizer

    with hub_errors(c.MODEL):
        options = hub_options(c.MODEL, c.MODEL_REVISION)
        config = AutoConfig.from_pretrained(c.MODEL, **options)
        tokenizer = AutoTokenizer.from_pretrained(c.MODEL, **options)
        known = set(tokenizer("a", add_special_tokens=False)["input_ids"])
        if not known - {tokenizer.unk_token_id}:  # transformers makes an empty one, silently
            raise ValueError("it has no tokeniser that knows the letter a")
    text = config.get_text_config()
    if not 0 <= c.LAYER < text.num_hidden_layers:
        what = f"LAYER = {c.LAYER}: {c.MODEL} has blocks 0 to {text.num_hidden_layers - 1}"
        raise UserError(what, "LAYER counts from 0; the SAE reads the residual after that block")
    if text.max_position_embeddings < c.CONTEXT:
        what = f"CONTEXT = {c.CONTEXT}: {c.MODEL} reads {text.max_position_embeddings} tokens"
        raise UserError(what, "set CONTEXT to that or less")
    return config, tokenizer


@distributed.in_turn
def load_lm(c, tokens):
    """-> the frozen LM in DTYPE on DEVICE, with our attention function, its head checked."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.AttentionInterface.register(ATTENTION, ops.attention)
    with hub_errors(c.MODEL):
        lm, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            c.MODEL,
            dtype=getattr(torch, c.DTYPE),
            attn_implementation=ATTENTION,
            output_loading_info=True,
            **hub_options(c.MODEL, c.MODEL_REVISION),
        )
        if loaded["missing_keys"]:  # transformers makes them random, with a warning
            raise ValueError(f"it lacks {', '.join(sorted(loaded['missing_keys'])[:3])}")
    lm = lm.to(c.DEVICE).eval().requires_grad_(False)
    check_head(lm, Splice(lm, c.LAYER, head_chunk=c.HEAD_CHUNK), tokens.val(0, 1)[:, :64])
    return lm


def hub_options(name: str, revision: str) -> dict:
    """from_pretrained's keywords: a local folder has no revision and is never looked up online."""
    where = {"local_files_only": True} if os.path.isdir(name) else {"revision": revision or "main"}
    return where | {"trust_remote_code": False}


def check_device(name: str) -> None:
    """Raises UserError where there is no such device."""
    try:
        device = torch.device(name)
        distributed.check_device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as e:
        what = f"DEVICE = {name!r} is not there: {first_line(e, 120)}"
        hint = "wanted cuda, cuda:N or cpu; on a laptop set recipes/small.py after the recipe"
        raise UserError(what, f"{hint}, as `make demo` does, without an account") from None


def look_for_hub(c) -> None:
    """Without an answer within seconds, work from the hub's cache: its own retries take half a
    minute."""
    from huggingface_hub import constants, get_session

    names = [c.MODEL, *(name for name in (c.SAE, c.DATASET) if "/" in name)]
    if all(map(os.path.exists, names)) or constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as e:  # httpx's, whatever the proxy or the network make of it
        print(f"note: {constants.ENDPOINT} does not answer ({str(e)[:80]}); using its cache")
        constants.HF_HUB_OFFLINE = True


@contextmanager
def hub_errors(name: str):
    """Turns what the hub libraries raise into one line that helps."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        yield
    except Exception as e:
        chain, cause = [], e
        while cause is not None:
            chain.append(cause)
            cause = cause.__cause__ or cause.__context__
        if any(isinstance(x, GatedRepoError) for x in chain):
            what = f"{name} is gated and this machine may not read it"
            hint = (
                f"accept its licence at https://huggingface.co/{name}, then `hf auth login`; "
                "`make demo` needs no account"
            )
        elif any(isinstance(x, RepositoryNotFoundError) for x in chain):
            what = f"MODEL = {name!r} is neither a local folder nor a repository that can be read"
            hint = "check the spelling, or `hf auth login` if it is private"
        elif isinstance(e, (OSError, ValueError, KeyError, RuntimeError, SafetensorError)):
            cause = first_line(e, 200)
            what = f"MODEL = {name!r} could not be loaded: {cause}{near_path(name)}"
            hint = "check the name, MODEL_REVISION and the network; `make demo` needs no hub"
        else:
            raise
        raise UserError(what, hint) from None


@torch.no_grad()
def check_head(lm, splice: Splice, tokens_BL: torch.Tensor) -> None:
    """The head as we compute it must give the LM's own logits: no scale, bias or cap overlooked."""
    tokens_BL = tokens_BL.to(lm.device)
    theirs_BLV = lm(tokens_BL, use_cache=False).logits.float()
    h_ND = splice.clean(tokens_BL).h_BLD.flatten(0, 1)
    error = (splice.head.logits(h_ND, torch.float32).view_as(theirs_BLV) - theirs_BLV).abs().max()
    if not error < 0.05 * theirs_BLV.abs().max().clamp(min=1.0):
        what = (
            f"the head of {type(lm).__name__} is not as klsplice computes it (off by {error:.3g})"
        )
        raise UserError(what, "its logits are scaled, shifted or capped in a way not supported yet")
