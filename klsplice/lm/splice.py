"""The splice: run the LM clean, then again with something else in place of one residual.

The spliced pass is the LM's own forward pass on the same tokens, in which the blocks below LAYER
return their input and block LAYER returns the new residual. So the LM itself makes masks, position
embeddings and whatever else its blocks are handed, and applies its own final norm; only the blocks
above LAYER do any work.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from klsplice.errors import UserError
from klsplice.lm import attention
from klsplice.lm.head import Head


@dataclass
class Pass:
    """What one pass of the LM leaves behind."""

    tokens_BL: torch.Tensor
    x_BLD: torch.Tensor  # the residual after block LAYER; in a spliced pass what stood in for it
    h_BLD: torch.Tensor | None  # after the final norm; None where only the residual was wanted
    # blocks after LAYER, counted from it (1 is the next) -> their residual
    after: dict[int, torch.Tensor] = field(default_factory=dict)

    def part(self, which: slice) -> "Pass":
        """Some of the sequences."""
        after = {i: r_BLD[which] for i, r_BLD in self.after.items()}
        h_BLD = None if self.h_BLD is None else self.h_BLD[which]
        return Pass(self.tokens_BL[which], self.x_BLD[which], h_BLD, after)


class Splice:
    """Runs a frozen LM clean and spliced at block `layer`.

    lm: a causal LM of transformers, in evaluation mode.
    layer: 0-based; the residual is read after this block, which is called `name` in the LM.
    head_chunk: see Head. compiled: torch.compile each block.
    checkpointed: where gradients are wanted, a block keeps only its input and runs again for them.
    kept: later blocks, counted from `layer`, whose residuals a Pass holds too.
    whole: the spliced pass is a whole pass with an edit. check.py sets it where upper blocks read
    what lower ones left behind (shared key-value layers), so that none can be skipped.
    checked: what check.py measured. as_it_is: a context, of the LM without what learns in it.

    Raises UserError where the LM is no plain stack of blocks.
    """

    def __init__(self, lm, layer, *, head_chunk, compiled=False, checkpointed=False):
        self.lm, self.layer, self.kept, self.whole = lm, layer, (), False
        self.compiled, self.checked, self.as_it_is = compiled, {}, nullcontext
        self.decoder, self.blocks = decoder_of(lm), blocks_of(lm)
        self.name = next(n for n, module in lm.named_modules() if module is self.blocks[layer])
        self._flex_windows = ()
        self._returns = returns_of(self.blocks, self._decode, lm.device)
        self.head = self._head(head_chunk)
        # The two passes have callables of their own, so that each is compiled for its own shapes.
        self._plain = [block.forward for block in self.blocks]
        self._clean, self._again = self._plain, self._plain[layer + 1 :]
        if compiled:
            # dynamic=False: one graph with symbolic sizes would be slower for every batch.
            self._clean = [torch.compile(f, dynamic=False) for f in self._clean]
            self._again = [torch.compile(f, dynamic=False) for f in self._again]
            self._flex_windows = attention.flex_windows(lm)
        if checkpointed:
            self._clean = [partial(_checkpointed, f) for f in self._clean]
            self._again = [partial(_checkpointed, f) for f in self._again]

    @torch.no_grad()
    def _head(self, chunk: int) -> Head:
        few_BL = torch.arange(1, 9, device=self.lm.device)[None]
        h_ND = self._decode(few_BL).flatten(0, 1)
        logits_NV = self.lm(few_BL, use_cache=False).logits.flatten(0, 1)
        return Head.of(self.lm, h_ND, logits_NV, chunk=chunk)

    @torch.no_grad()
    def residual(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """-> x_BLD after block `layer`; the blocks above do not run."""

        def stop(module, args, output):
            raise _Reached(_tensor(output))

        with self._forwards(self._clean), _hooks([(self.blocks[self.layer], stop)]):
            try:
                self._decode(tokens_BL)
            except _Reached as reached:
                return reached.args[0]
        raise RuntimeError(f"the LM never ran {self.name}")

    @torch.no_grad()
    def clean(self, tokens_BL: torch.Tensor) -> Pass:
        """One pass of the LM as it is."""
        with self.as_it_is(), self._forwards(self._clean), self._keep(0, *self.kept) as after:
            h_BLD = self._decode(tokens_BL)
        return Pass(tokens_BL, after.pop(0), h_BLD, after)

    @torch.no_grad()
    def zero_ablated(self, clean: Pass, active_N: torch.Tensor) -> Pass:
        """The LM as it is with the active positions' residual at zero."""
        nothing_ND = torch.zeros_like(rows(clean.x_BLD, active_N))
        with self.as_it_is():
            return self.spliced(clean.tokens_BL, put(clean.x_BLD, nothing_ND, active_N))

    def spliced(self, tokens_BL: torch.Tensor, y_BLD: torch.Tensor) -> Pass:
        """The LM from y_BLD, in place of the residual after block `layer`, on.

        Differentiable in y_BLD. tokens_BL: those of the clean pass."""
        if self.whole:
            return self.edited(tokens_BL, {self.layer: lambda x_BLD: y_BLD})
        skipped = [partial(_skip, further, None) for further in self._returns[: self.layer]]
        here = partial(_skip, self._returns[self.layer], y_BLD)
        with self._forwards([*skipped, here, *self._again]), self._keep(*self.kept) as after:
            h_BLD = self._decode(tokens_BL)
        return Pass(tokens_BL, y_BLD, h_BLD, after)

    def edited(self, tokens_BL: torch.Tensor, edits: dict) -> Pass:
        """A whole pass with the residual after block i replaced by edits[i](x_BLD).

        For what cannot skip blocks: several layers at once, or an LM that learns below `layer`.
        """

        def replace(edit, module, args, output):
            y_BLD = edit(_tensor(output))
            return y_BLD if torch.is_tensor(output) else type(output)((y_BLD, *output[1:]))

        hooks = [(self.blocks[i], partial(replace, edit)) for i, edit in edits.items()]
        # the edit's hook comes first, so that what is kept is the edited residual
        with self._forwards(self._clean), _hooks(hooks), self._keep(0, *self.kept) as after:
            h_BLD = self._decode(tokens_BL)
        return Pass(tokens_BL, after.pop(0), h_BLD, after)

    @contextmanager
    def plain(self):
        """While inside, nothing is compiled or checkpointed."""
        fast = self._clean, self._again, self._flex_windows
        self._clean, self._again = self._plain, self._plain[self.layer + 1 :]
        self._flex_windows = ()
        try:
            yield
        finally:
            self._clean, self._again, self._flex_windows = fast

    def _decode(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """The LM without its head -> h_BLD. Without a cache: some LMs would read a stale one."""
        if self.compiled:  # blocks share their code
            torch._dynamo.config.recompile_limit = 8 * len(self.blocks)
        attention.prepare_flex(tokens_BL.shape[1], self._flex_windows, tokens_BL.device)
        h_BLD = self.decoder(tokens_BL, use_cache=False).last_hidden_state
        return h_BLD.to(self.lm.dtype)  # of some LMs the residual is float32

    @contextmanager
    def _forwards(self, forwards: list):
        """While inside, block i runs forwards[i]."""
        own = [vars(block).get("forward") for block in self.blocks]
        try:
            for block, forward in zip(self.blocks, forwards, strict=True):
                vars(block)["forward"] = forward
            yield
        finally:
            for block, forward in zip(self.blocks, own):
                vars(block).pop("forward", None)
                if forward is not None:
                    vars(block)["forward"] = forward

    @contextmanager
    def _keep(self, *offsets: int):
        """Yields {offset: residual}, filled as the blocks that far after `layer` run."""
        found = {}

        def note(i, module, args, output):
            found[i] = _tensor(output)

        with _hooks([(self.blocks[self.layer + i], partial(note, i)) for i in offsets]):
            yield found


def decoder_of(lm) -> nn.Module:
    """The LM without its head. Raises UserError where it has no such part."""
    for module in (lm.get_decoder(), lm.base_model, getattr(lm, "model", None)):
        if module is not None and module is not lm:
            return module
    what = f"{type(lm).__name__} has no decoder beside its head"
    raise UserError(what, "wanted a causal LM that is a stack of blocks with a head on it")


def blocks_of(lm) -> nn.ModuleList:
    """The LM's blocks: the outermost list of num_hidden_layers modules in its decoder.

    Raises UserError where there is none."""
    wanted = lm.config.get_text_config().num_hidden_layers
    for module in decoder_of(lm).modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return module
    what = f"{type(lm).__name__} has no list of {wanted} blocks"
    raise UserError(what, "wanted a causal LM that is a stack of blocks")


@torch.no_grad()
def returns_of(blocks, decode, device) -> list[tuple | list | None]:
    """-> for each block what it returns beside the residual: None for a Tensor, else as many None
    in a tuple or list as it has further values.

    decode: tokens_BL -> h_BLD, the LM without its head. Raises UserError where the blocks do not
    hand on one residual stream."""
    found, shapes = [], set()

    def note(module, args, output):
        further = None if torch.is_tensor(output) else type(output)([None] * (len(output) - 1))
        found.append(further)
        shapes.add(tuple(_tensor(output).shape))

    with _hooks([(block, note) for block in blocks]):
        decode(torch.ones((1, 2), dtype=torch.int64, device=device))
    one_stream = len(shapes) == 1 and [*shapes][0][:2] == (1, 2) and len([*shapes][0]) == 3
    if len(found) != len(blocks) or not one_stream:
        what = "this LM is no plain stack of blocks on one residual stream"
        raise UserError(what, "wanted a causal LM whose blocks each hand on (B, L, D)")
    return found


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


class _Reached(Exception):
    """Ends a pass once the residual is there."""


@contextmanager
def _hooks(hooks: list):
    """While inside, each module has its forward hook."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _skip(further, y_BLD, *args, **kwargs):
    """What a skipped block returns: its input, or y_BLD, with `further` of returns_of after it."""
    if y_BLD is None:
        y_BLD = args[0] if args else kwargs["hidden_states"]
    return y_BLD if further is None else type(further)([y_BLD]) + further


def _checkpointed(forward, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _tensor(output) -> torch.Tensor:
    """The residual in a block's output, which may be in a tuple or list."""
    return output if torch.is_tensor(output) else output[0]
