"""The LM, and the splice: one clean pass, then the blocks above LAYER again from an edit.

The blocks are plain modules of Hugging Face transformers. During the clean pass hooks keep the
residual after LAYER and the keyword arguments with which each upper block was called; the spliced
pass calls the upper blocks and the final norm again with those. The lower blocks run once.
"""

import os
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from safetensors import SafetensorError

import kernels
from errors import UserError

ATTENTION = "klsplice"  # the name under which transformers finds kernels.attention


def open_lm(c):
    """-> (config, tokenizer) of MODEL, without its weights. Raises UserError in seconds."""
    _check_device(c.DEVICE)
    from transformers import AutoConfig, AutoTokenizer

    with _hub_errors(c.MODEL):
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


def load_lm(c, tokens):
    """-> the frozen LM in DTYPE on DEVICE, with our attention function, its head checked."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.AttentionInterface.register(ATTENTION, kernels.attention)
    with _hub_errors(c.MODEL):
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


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as e:
        what = f"DEVICE = {name!r} is not there: {str(e).splitlines()[0][:120]}"
        hint = (
            "klsplice needs a CUDA device for this; `make demo` runs on any CPU, without an account"
        )
        raise UserError(what, hint) from None


@contextmanager
def _hub_errors(name: str):
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
            cause = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
            what = f"MODEL = {name!r} could not be loaded: {cause}"
            hint = "check the name, MODEL_REVISION and the network; `make demo` needs no hub"
        else:
            raise
        raise UserError(what, hint) from None


class Splice:
    """Runs a frozen LM clean and spliced at block `layer`.

    lm: a causal LM of transformers, loaded with attn_implementation=ATTENTION.
    layer: 0-based; the residual is read after this block.
    """

    def __init__(self, lm, layer: int, *, head_chunk: int):
        self.decoder = lm.get_decoder()
        self.layer = layer
        self.blocks = self.decoder.layers
        self.norm = getattr(self.decoder, "norm", None) or self.decoder.final_layer_norm
        text = lm.config.get_text_config()
        self.head = kernels.Head(
            lm.get_output_embeddings().weight,
            softcap=getattr(text, "final_logit_softcapping", None) or 0.0,
            chunk=head_chunk,
        )

    @torch.no_grad()
    def residual(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """-> x_BLD after block `layer`; the blocks above do not run."""

        class Reached(Exception):
            pass

        def stop(module, args, output):
            raise Reached(_tensor(output))

        handle = self.blocks[self.layer].register_forward_hook(stop)
        try:
            self.decoder(tokens_BL, use_cache=False)
        except Reached as reached:
            return reached.args[0]
        finally:
            handle.remove()

    @torch.no_grad()
    def clean(self, tokens_BL: torch.Tensor) -> SimpleNamespace:
        """One pass of the LM as it is.

        -> tokens_BL; x_BLD, the residual after block `layer`; h_BLD, after the final norm; calls,
        the keyword arguments of each upper block (valid for this sequence length, any batch size).
        """
        seen = SimpleNamespace(tokens_BL=tokens_BL, x_BLD=None, h_BLD=None, calls=[])

        def keep_residual(module, args, output):
            seen.x_BLD = _tensor(output)

        def keep_call(module, args, kwargs):
            if any(kwargs.get(name) is not None for name in ("past_key_values", "layer_past")):
                raise RuntimeError("a cache was passed to a block: a resumed pass would be wrong")
            seen.calls.append((args[1:], kwargs))

        handles = [self.blocks[self.layer].register_forward_hook(keep_residual)]
        for block in self.blocks[self.layer + 1 :]:
            handles.append(block.register_forward_pre_hook(keep_call, with_kwargs=True))
        try:
            seen.h_BLD = self.decoder(tokens_BL, use_cache=False).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def resume(self, y_BLD: torch.Tensor, calls: list) -> torch.Tensor:
        """The blocks above `layer` and the final norm from the residual y_BLD -> h_BLD."""
        h_BLD = y_BLD
        for block, (args, kwargs) in zip(self.blocks[self.layer + 1 :], calls, strict=True):
            h_BLD = _tensor(block(h_BLD, *args, **kwargs))
        return self.norm(h_BLD)

    def full(self, tokens_BL: torch.Tensor, edits: dict) -> torch.Tensor:
        """A whole pass with the residual after block i replaced by edits[i](x_BLD) -> h_BLD.

        For what cannot be resumed: several layers at once, or a LM that learns below `layer`.
        """

        def replace(edit):
            def hook(module, args, output):
                y_BLD = edit(_tensor(output))
                return (y_BLD, *output[1:]) if isinstance(output, tuple) else y_BLD

            return hook

        handles = [self.blocks[i].register_forward_hook(replace(f)) for i, f in edits.items()]
        try:
            return self.decoder(tokens_BL, use_cache=False).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()


def rows(x_BLD: torch.Tensor, active_N: torch.Tensor) -> torch.Tensor:
    """The positions active_N (indices into B*L) of x_BLD -> (N, D)."""
    return x_BLD.flatten(0, 1).index_select(0, active_N)


def put(x_BLD: torch.Tensor, y_ND: torch.Tensor, active_N: torch.Tensor) -> torch.Tensor:
    """x_BLD with the positions active_N replaced by y_ND, in x's dtype; differentiable in y."""
    flat = x_BLD.flatten(0, 1).index_copy(0, active_N, y_ND.to(x_BLD.dtype))
    return flat.view_as(x_BLD)


def _tensor(output) -> torch.Tensor:
    """A block's output: a Tensor in transformers 5, a tuple in 4."""
    return output[0] if isinstance(output, tuple) else output


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
