"""The splice: run the LM clean, then again with something else in place of a residual, or of what
a part of a block adds to it.

The spliced pass is the LM's own forward pass on the same tokens, in which the blocks below return
their input and one block returns the new residual: block LAYER, or, where a part of block LAYER is
replaced, the one before it. So the LM itself makes masks, position embeddings and whatever else its
blocks are handed, and applies its own final norm; only the blocks above do any work.
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
from klsplice.lm.points import (
    TOKENS,
    Block,
    Point,
    hooked,
    returned,
    taken,
    with_returned,
    with_taken,
)
from klsplice.site import Site


@dataclass
class Pass:
    """What one pass of the LM leaves behind."""

    tokens_BL: torch.Tensor
    base_BLD: torch.Tensor  # the residual from which a spliced pass goes on
    h_BLD: torch.Tensor | None  # after the final norm; None where it was not wanted
    # of each site what an SAE reads, and what it stands in for: one tensor where these are the same
    sites: list[tuple[torch.Tensor, torch.Tensor]]
    # blocks after LAYER, counted from it (1 is the next) -> their residual
    after: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def x_BLD(self) -> torch.Tensor:
        """What the (first) SAE reads; the residual after block LAYER."""
        return self.sites[0][0]

    def part(self, which: slice) -> "Pass":
        """Some of the sequences."""
        after = {i: r_BLD[which] for i, r_BLD in self.after.items()}
        h_BLD = None if self.h_BLD is None else self.h_BLD[which]
        sites = [both(site, lambda t: t[which]) for site in self.sites]
        return Pass(self.tokens_BL[which], self.base_BLD[which], h_BLD, sites, after)

    def rows(self, active_N: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """`sites` at those positions -> (x_ND, o_ND) each."""
        return [both(site, lambda t: rows(t, active_N)) for site in self.sites]


def both(site: tuple, function) -> tuple:
    """function of each of two tensors, once where they are one."""
    x, o = site
    first = function(x)
    return first, first if o is x else function(o)


class Splice:
    """Runs a frozen LM clean and spliced.

    lm: a causal LM of transformers, in evaluation mode.
    layer: 0-based; of the lowest site. Its block is called `name` in the LM.
    sites: where SAEs read and write; () is the residual after block `layer`.
    head_chunk: see Head. compiled: torch.compile each block, but for those with a site inside.
    checkpointed: where gradients are wanted, a block keeps only its input and runs again for them.
    kept: later blocks, counted from `layer`, whose residuals a Pass holds too.
    whole: the spliced pass is a whole pass with an edit. check.py sets it where upper blocks read
    what lower ones left behind (shared key-value layers), so that none can be skipped.
    checked: what check.py measured. as_it_is: a context, of the LM without what learns in it.

    Raises UserError where the LM is no plain stack of blocks, or has no such site.
    """

    def __init__(self, lm, layer, *, head_chunk, sites=(), compiled=False, checkpointed=False):
        self.lm, self.layer, self.kept, self.whole = lm, layer, (), False
        self.compiled, self.checked, self.as_it_is = compiled, {}, nullcontext
        self.decoder, self.blocks = decoder_of(lm), blocks_of(lm)
        self.name = next(n for n, module in lm.named_modules() if module is self.blocks[layer])
        self._flex_windows = ()
        self._returns = returns_of(self.blocks, self._decode, lm.device)
        self.head = self._head(head_chunk)
        self.sites = [*sites] or [Site(layer)]
        self.at_residual = self.sites == [Site(layer)]
        self._base = layer if self.at_residual else layer - 1  # -1: the embeddings
        self.points = points_of(self.blocks, self.sites, self._decode, lm.device)
        # The two passes have callables of their own, so that each is compiled for its own shapes.
        self._plain = [block.forward for block in self.blocks]
        inside = {site.layer for site in self.sites if not site.at_residual}

        def made(make, forwards: list, first: int = 0) -> list:
            return [f if i in inside else make(f) for i, f in enumerate(forwards, first)]

        self._clean, first = self._plain, self._base + 1
        self._again = self._plain[first:]
        if compiled:
            # dynamic=False: one graph with symbolic sizes would be slower for every batch.
            make = partial(torch.compile, dynamic=False)
            self._clean, self._again = made(make, self._clean), made(make, self._again, first)
            self._flex_windows = attention.flex_windows(lm)
        if checkpointed:
            make = partial(partial, _checkpointed)
            self._clean, self._again = made(make, self._clean), made(make, self._again, first)

    @torch.no_grad()
    def _head(self, chunk: int) -> Head:
        few_BL = torch.arange(1, 9, device=self.lm.device)[None]
        h_ND = self._decode(few_BL).flatten(0, 1)
        logits_NV = self.lm(few_BL, use_cache=False).logits.flatten(0, 1)
        return Head.of(self.lm, h_ND, logits_NV, chunk=chunk)

    @torch.no_grad()
    def clean(self, tokens_BL: torch.Tensor, *, to_end: bool = True) -> Pass:
        """One pass of the LM as it is; not to_end: no further than the last site."""
        base, found = [], {}
        points = [(self._before_sites(), base.append)]

        def note(key, t):  # a copy within a block, where some add in place
            found[key] = t if self.at_residual else t.clone()

        for m, pair in enumerate(self.points):
            points += [(point, partial(note, (m, point))) for point in {*pair}]

        def stop(t):
            raise _Reached

        if not to_end:  # last, so that the others have noted theirs
            points.append((self.after_block(max(site.layer for site in self.sites)), stop))
        h_BLD, context = None, self.as_it_is() if to_end else nullcontext()
        with context, self._forwards(self._clean), self._keep() as after, at(points):
            try:
                h_BLD = self._decode(tokens_BL)
            except _Reached:
                pass
        sites = [tuple(found[m, point] for point in pair) for m, pair in enumerate(self.points)]
        return Pass(tokens_BL, base[0], h_BLD, sites, after)

    def _before_sites(self) -> Point:
        """Where the residual is from which a spliced pass goes on."""
        return self.points[0][0] if self.at_residual else Point(self.blocks[self.layer], True)

    @torch.no_grad()
    def zero_ablated(self, clean: Pass, active_N: torch.Tensor) -> Pass:
        """The LM as it is with zero in place of what the SAEs stand in for."""
        zeros = [torch.zeros_like(o_ND) for _, o_ND in clean.rows(active_N)]
        with self.as_it_is():
            return self.spliced(clean, active_N, *zeros)

    def spliced(self, clean: Pass, active_N: torch.Tensor, *stand_ins) -> Pass:
        """The LM with something else at the sites, at the positions active_N (indices into B*L).

        stand_ins: of each site what stands there, (N, D); or a function of what is read there in
        this pass, x_ND -> y_ND; or None. Differentiable in what stands in."""
        if self.at_residual and not self.whole:
            y_BLD, points = put(clean.x_BLD, stand_ins[0], active_N), []
        else:
            y_BLD, points = clean.base_BLD, edits_of(self.points, active_N, stand_ins)
        forwards = self._clean
        if not self.whole:
            lower = self._returns[: self._base + 1]  # the last of them returns y_BLD
            forwards = [partial(_skip, further, None) for further in lower[:-1]]
            forwards += [partial(_skip, further, y_BLD) for further in lower[-1:]]
            forwards += self._again
        with self._forwards(forwards), at(points), self._keep() as after:
            h_BLD = self._decode(clean.tokens_BL)
        return Pass(clean.tokens_BL, y_BLD, h_BLD, clean.sites, after)

    def edited(self, tokens_BL: torch.Tensor, edits: dict) -> Pass:
        """A whole pass with the tensor at each point, or the residual after a block by its number,
        replaced by edits[point](it).

        For what cannot skip blocks: several layers at once, or an LM that learns below `layer`.
        """
        points = [(self.after_block(i) if isinstance(i, int) else i, f) for i, f in edits.items()]
        # the edits' hooks come first, so that what is kept is the edited residual
        with self._forwards(self._clean), at(points), self._keep() as after:
            h_BLD = self._decode(tokens_BL)
        return Pass(tokens_BL, None, h_BLD, [], after)

    def block_of(self, site: Site) -> str:
        """The LM's name of the block whose residual a site is; "" of one within a block."""
        stack = self.name.rpartition(".")[0]
        return f"{stack}.{site.layer}" if site.at_residual else ""

    def after_block(self, i: int) -> Point:
        """Where the residual is that block i returns."""
        return Point(self.blocks[i])

    @contextmanager
    def plain(self):
        """While inside, nothing is compiled or checkpointed."""
        fast = self._clean, self._again, self._flex_windows
        self._clean, self._again = self._plain, self._plain[self._base + 1 :]
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
    def _keep(self):
        """Yields {offset: residual} of `kept`, filled as the blocks that far after `layer` run."""
        found = {}
        note = [partial(found.__setitem__, i) for i in self.kept]
        points = [self.after_block(self.layer + i) for i in self.kept]
        with at([*zip(points, note)]):
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
        shapes.add(tuple(returned(output).shape))

    with hooked([block.register_forward_hook(note) for block in blocks]):
        decode(torch.ones((1, 2), dtype=torch.int64, device=device))
    one_stream = len(shapes) == 1 and [*shapes][0][:2] == (1, 2) and len([*shapes][0]) == 3
    if len(found) != len(blocks) or not one_stream:
        what = "this LM is no plain stack of blocks on one residual stream"
        raise UserError(what, "wanted a causal LM whose blocks each hand on (B, L, D)")
    return found


@torch.no_grad()
def points_of(blocks, sites: list[Site], decode, device) -> list[tuple[Point, Point]]:
    """Where each site reads and writes.

    decode: tokens_BL -> h_BLD, the LM without its head. Raises UserError."""
    if all(site.at_residual for site in sites):
        return [(point, point) for point in (Point(blocks[site.layer]) for site in sites)]
    given, wanted = {}, {site.layer for site in sites}

    def note(i, module, args, kwargs):
        given[i] = args, kwargs

    handles = [
        blocks[i].register_forward_pre_hook(partial(note, i), with_kwargs=True) for i in wanted
    ]
    with hooked(handles):
        decode(torch.arange(1, TOKENS + 1, device=device)[None])
    opened = {i: Block(blocks[i], f"block {i} of the LM", *given[i]) for i in wanted}
    found = []
    for layer, reads, writes in sites:
        read = opened[layer].point(reads)
        found.append((read, read if writes == reads else opened[layer].point(writes)))
    if len({(write.module, write.is_input) for _, write in found}) < len(found):
        raise UserError("two of the SAEs write the same tensor of this LM", "leave one out")
    return found


def places_of(splice: Splice) -> list[dict]:
    """Of each site the names of the modules, whether it is their input, and whether what is
    read is the tensor itself: without the gain of a norm it is not."""
    names = {module: name for name, module in splice.lm.named_modules()}
    return [
        {
            **{end: names[point.module] for end, point in zip(("reads", "writes"), pair)},
            "inputs": [point.is_input for point in pair],
            "itself": pair[0].gain_D is None,
        }
        for pair in splice.points
    ]


def edits_of(points: list, active_N: torch.Tensor, stand_ins) -> list:
    """What is edited in a spliced pass, for `at`. stand_ins: see Splice.spliced."""
    read, edits = {}, []

    def write(m, stand_in, o_BLD):
        y_ND = stand_in
        if callable(stand_in):
            y_ND = stand_in(rows(read.get(m, o_BLD), active_N))
        return put(o_BLD, y_ND, active_N)

    for m, ((reads, writes), stand_in) in enumerate(zip(points, stand_ins, strict=True)):
        if callable(stand_in) and reads is not writes:
            edits.append((reads, partial(read.__setitem__, m)))
        if stand_in is not None:
            edits.append((writes, partial(write, m, stand_in)))
    return edits


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
    """Ends a pass once all that was wanted is there."""


@contextmanager
def at(points: list):
    """While inside, the tensor at each of (point, edit) is given to edit, which returns another in
    its place, or None."""

    def before(point, edit, module, args, kwargs):
        t = edit(point.read(args, kwargs, None))
        return None if t is None else with_taken(args, kwargs, t)

    def after(point, edit, module, args, kwargs, output):
        t = edit(point.read(args, kwargs, output))
        return None if t is None else with_returned(output, t)

    def put_on(point, edit):
        if point.is_input:
            hook = partial(before, point, edit)
            return point.module.register_forward_pre_hook(hook, with_kwargs=True)
        return point.module.register_forward_hook(partial(after, point, edit), with_kwargs=True)

    with hooked([put_on(*one) for one in points]):
        yield


def _skip(further, y_BLD, *args, **kwargs):
    """What a skipped block returns: its input, or y_BLD, with `further` of returns_of after it."""
    if y_BLD is None:
        y_BLD = taken(args, kwargs)
    return y_BLD if further is None else type(further)([y_BLD]) + further


def _checkpointed(forward, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
