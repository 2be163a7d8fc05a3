"""The splice: one clean pass of the LM, then the blocks above LAYER again from an edit.

The blocks are plain modules of Hugging Face transformers. During the clean pass hooks keep the
residual after LAYER and the keyword arguments with which each upper block was called; the spliced
pass calls the upper blocks and the final norm again with those. The lower blocks run once.
"""

import functools
from types import SimpleNamespace

import torch
from torch.utils.checkpoint import checkpoint

import ops


class Splice:
    """Runs a frozen LM clean and spliced at block `layer`.

    lm: a causal LM of transformers, from language_model.load_lm: with ops.attention.
    layer: 0-based; the residual is read after this block, `name` in the LM.
    head_chunk: see ops.Head. compiled: torch.compile each block, apart for the two passes.
    checkpointed: where gradients are wanted, a block keeps its input only and runs again for them.
    """

    def __init__(
        self, lm, layer: int, *, head_chunk: int, compiled: bool = False, checkpointed: bool = False
    ):
        self.decoder = lm.get_decoder()
        self.layer = layer
        self.blocks = self.decoder.layers
        self.name = next(n for n, module in lm.named_modules() if module is self.blocks[layer])
        self.norm = getattr(self.decoder, "norm", None) or self.decoder.final_layer_norm
        text = lm.config.get_text_config()
        self.head = ops.Head(
            lm.get_output_embeddings().weight,
            softcap=getattr(text, "final_logit_softcapping", None) or 0.0,
            chunk=head_chunk,
        )
        self.again = list(self.blocks[layer + 1 :])  # what the spliced pass calls
        self.flex_windows = ()
        if compiled:
            self._compile()
            if self.head.W_VD.is_cuda and getattr(text, "attn_logit_softcapping", None):
                self.flex_windows = (None, getattr(text, "sliding_window", None))
        if checkpointed:
            for block in self.blocks:
                block.forward = functools.partial(_checkpointed, block.forward)
            if compiled:  # else they are those blocks
                self.again = [functools.partial(_checkpointed, again) for again in self.again]

    def _compile(self) -> None:
        """Each block on its own: one graph would be made anew for each batch size and grad mode."""
        self.again = [torch.compile(block.forward, dynamic=False) for block in self.again]
        compile_blocks(self.blocks)

    def close(self) -> None:
        """Give the blocks their own forward again."""
        restore_blocks(self.blocks)
        ops.forget_flex()

    def _decode(self, tokens_BL: torch.Tensor):
        """The LM without its head."""
        ops.prepare_flex(tokens_BL.shape[1], self.flex_windows, tokens_BL.device)
        return self.decoder(tokens_BL, use_cache=False).last_hidden_state

    @torch.no_grad()
    def residual(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """-> x_BLD after block `layer`; the blocks above do not run."""

        class Reached(Exception):
            pass

        def stop(module, args, output):
            raise Reached(_tensor(output))

        handle = self.blocks[self.layer].register_forward_hook(stop)
        try:
            self._decode(tokens_BL)
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
            seen.h_BLD = self._decode(tokens_BL)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def resume(self, y_BLD: torch.Tensor, calls: list) -> torch.Tensor:
        """The blocks above `layer` and the final norm from the residual y_BLD -> h_BLD."""
        h_BLD = y_BLD
        for block, (args, kwargs) in zip(self.again, calls, strict=True):
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
            return self._decode(tokens_BL)
        finally:
            for handle in handles:
                handle.remove()


def compile_blocks(blocks) -> None:
    """torch.compile each block's forward."""
    torch._dynamo.config.recompile_limit = 8 * len(blocks)  # blocks share their code
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False)


def restore_blocks(blocks) -> None:
    """Their own forward again."""
    for block in blocks:
        vars(block).pop("forward", None)


def rows(x_BLD: torch.Tensor, active_N: torch.Tensor) -> torch.Tensor:
    """The positions active_N (indices into B*L) of x_BLD -> (N, D)."""
    return x_BLD.flatten(0, 1).index_select(0, active_N)


def next_tokens(tokens_BL: torch.Tensor) -> torch.Tensor:
    """What each position predicts; a context's last, which has nothing to predict, itself."""
    return torch.cat([tokens_BL[:, 1:], tokens_BL[:, -1:]], 1)


def put(x_BLD: torch.Tensor, y_ND: torch.Tensor, active_N: torch.Tensor) -> torch.Tensor:
    """x_BLD with the positions active_N replaced by y_ND, in x's dtype; differentiable in y."""
    flat = x_BLD.flatten(0, 1).index_copy(0, active_N, y_ND.to(x_BLD.dtype))
    return flat.view_as(x_BLD)


def _checkpointed(forward, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _tensor(output) -> torch.Tensor:
    """A block's output: a Tensor in transformers 5, a tuple in 4."""
    return output[0] if isinstance(output, tuple) else output
