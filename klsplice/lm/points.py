"""Finds in a block where something is read or written (see klsplice/site.py), by measuring.

A point is a tensor that a module takes or returns. No family is named here: a block runs alone on a
few tokens, and what its modules do to one another's tensors tells which is which.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from klsplice.errors import UserError
from klsplice.site import RESIDUAL

TOKENS = 8
NEAR = 0.05  # of a change: rounding of 16 bits, but no other computation, comes below it


@dataclass(eq=False)
class Point:
    """module: whose input (is_input) or output it is. gain_D, shift_D: of a norm, to undo."""

    module: nn.Module
    is_input: bool = False
    gain_D: torch.Tensor | None = None
    shift_D: torch.Tensor | None = None

    def read(self, args: tuple, kwargs: dict, output) -> torch.Tensor:
        """The tensor, of what a hook is given."""
        t = taken(args, kwargs) if self.is_input else returned(output)
        if self.gain_D is None:
            return t
        return ((t.float() - self.shift_D) / self.gain_D).to(t.dtype)


@contextmanager
def hooked(handles: list):
    """While inside, hooks are on; handles: what registering each returned."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def taken(args: tuple, kwargs: dict) -> torch.Tensor:
    """The residual, or what is made of it, that a module is given."""
    return args[0] if args else kwargs["hidden_states"]


def with_taken(args: tuple, kwargs: dict, t: torch.Tensor) -> tuple[tuple, dict]:
    """What a module is given, with `t` in its place."""
    return ((t, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": t})


def returned(output) -> torch.Tensor:
    """It in a module's output, which may be in a tuple or list."""
    return output if torch.is_tensor(output) else output[0]


def with_returned(output, t: torch.Tensor):
    """The output with `t` in its place."""
    return t if torch.is_tensor(output) else type(output)((t, *output[1:]))


class Block:
    """One block of an LM, which is run alone.

    args, kwargs: what the LM gave it for a few tokens (1, L). Raises UserError, which names the
    point that is not there.
    """

    def __init__(self, block: nn.Module, name: str, args: tuple, kwargs: dict):
        self.block, self.name, self.args, self.kwargs = block, name, args, kwargs
        self.x_BLD = taken(args, kwargs)
        self.taken, self.returned, self.out_BLD = self._run()
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(self.x_BLD.shape, generator=generator).to(self.x_BLD)
        self.push_BLD = noise * self.out_BLD.float().std().to(noise.dtype)
        # those that do something, in the order in which they stand
        self.modules = [
            m for m in block.modules() if m in self.returned and self._does_something(m)
        ]

    def point(self, name: str) -> Point:
        """Raises UserError."""
        if name == RESIDUAL:
            return Point(self.block)
        if name == "hook_mlp_out":
            return Point(self.mlp_write)
        if name == "mlp.hook_out":
            return Point(self.mlp)
        if name in ("mlp.hook_in", "ln2.hook_normalized") and not self._mlp_reads_width():
            raise self._without(name, "an MLP that is one module")
        if name == "mlp.hook_in":
            return Point(self.mlp, True)
        if name == "hook_attn_out":
            return Point(self.attention_write)
        if name == "attn.hook_z":
            return Point(self.output_projection, True)
        norm = self.mlp_norm
        if norm is None:
            raise self._without(name, "a norm before its MLP")
        if name == "hook_resid_mid":
            return Point(norm, True)
        signs_D = torch.ones_like(self.taken[norm])[0, 0]
        signs_D[1::2] = -1.0  # of mean 0 and mean square 1: every norm leaves it as it is
        shift_D = norm(torch.zeros_like(signs_D)).float()
        gain_D = (norm(signs_D).float() - shift_D) * signs_D.float()
        if not gain_D.abs().min() > 1e-4 * gain_D.abs().max():
            raise UserError(f"{self.name}: the norm before the MLP has a gain with zeros", name)
        return Point(self.mlp, True, gain_D.detach(), shift_D.detach())

    @cached_property
    def mlp_write(self) -> nn.Module:
        """The module whose output is what is added to the residual, and moves nothing else."""
        inside = self._inside(self.mixing)
        found = [m for m in self.modules if m not in inside and self._adds(m, self.block)]
        return self._outermost(found, "hook_mlp_out", "one MLP, added to the residual as it is")

    @cached_property
    def mlp(self) -> nn.Module:
        made_by = self.mlp_write
        while is_norm(made_by):
            made_by = self._maker_of(self.taken[made_by])
            if made_by is None:
                raise self._without("mlp.hook_out", "an MLP before that norm")
        return made_by

    def _mlp_reads_width(self) -> bool:
        return self.taken[self.mlp].shape == self.x_BLD.shape

    @cached_property
    def mlp_norm(self) -> nn.Module | None:
        norm = self._maker_of(self.taken[self.mlp])
        return norm if norm is not None and is_norm(norm) else None

    @cached_property
    def mixing(self) -> nn.Module:
        """The module that carries something from one position to another: the attention."""
        other_BLD = self.x_BLD.clone()
        other_BLD[:, :1] += self.push_BLD[:, :1]
        given, gave, _ = self._run(x_BLD=other_BLD)
        found = [
            m
            for m in self.modules
            if torch.equal(given[m][:, 1:], self.taken[m][:, 1:])
            and not torch.equal(gave[m][:, 1:], self.returned[m][:, 1:])
        ]
        return self._outermost(found, "attn.hook_z", "one attention")

    @cached_property
    def attention_write(self) -> nn.Module:
        mlp = self._inside(self.mlp)
        # where attention and MLP are parallel the MLP's input does not depend on the attention
        _, _, moved = self._run(self.mixing, returns_taken_of=self.mlp)
        parallel = torch.equal(moved, self.taken[self.mlp])
        norm = None if parallel else self.mlp_norm
        if not parallel and norm is None:
            raise self._without("hook_attn_out", "a norm before its MLP")
        into = self.block if parallel else norm
        mlp |= self._inside(self.mlp_write)
        found = [m for m in self.modules if m not in mlp and m is not norm and self._adds(m, into)]
        wanted = "one attention, added to the residual as it is"
        return self._outermost(found, "hook_attn_out", wanted)

    @cached_property
    def output_projection(self) -> nn.Module:
        inside = self._inside(self.mixing)
        found = [m for m in self.modules if m in inside and has_matrix(m)]
        found = [m for m in found if torch.equal(self.returned[m], self.returned[self.mixing])]
        return self._outermost(found, "attn.hook_z", "an attention that ends in one matrix")

    # ---- measuring -----------------------------------------------------------------------------

    @torch.no_grad()
    def _run(self, pushed=None, *, returns_taken_of=None, x_BLD=None):
        """-> what each module that runs once, on (1, L, ·), takes and returns; and what the block
        returns, or what a module in it takes. pushed: whose output is moved by push_BLD. x_BLD:
        what the block is given, where it is not what the LM gave it."""
        given, gave, times = {}, {}, {}

        def note(module, args, kwargs, output):
            times[module] = times.get(module, 0) + 1
            if module is pushed:
                output = with_returned(output, returned(output) + self.push_BLD)
            first = next(iter(args), kwargs.get("hidden_states"))
            last = output[0] if isinstance(output, (tuple, list)) and output else output
            if all(torch.is_tensor(t) and t.shape[:-1] == (1, TOKENS) for t in (first, last)):
                given[module], gave[module] = first.clone(), last.clone()  # some add in place
            return output

        handles = [
            m.register_forward_hook(note, with_kwargs=True)
            for m in self.block.modules()
            if m is not self.block
        ]
        args, kwargs = self.args, self.kwargs
        if x_BLD is not None:
            args, kwargs = with_taken(args, kwargs, x_BLD)
        with hooked(handles):
            out = self.block(*args, **kwargs)
        once = [m for m in gave if times[m] == 1]
        given, gave = {m: given[m] for m in once}, {m: gave[m] for m in once}
        return given, gave, given[returns_taken_of] if returns_taken_of else returned(out)

    def _adds(self, module: nn.Module, into: nn.Module) -> bool:
        """Whether what moves its output moves by as much what `into` returns, the block, or takes,
        a norm."""
        if self.returned[module].shape != self.push_BLD.shape:
            return False
        before = self.out_BLD if into is self.block else self.taken[into]
        if same(self.returned[module], before):  # the sum itself, and no part of it
            return False
        _, _, after = self._run(module, returns_taken_of=None if into is self.block else into)
        off = (after - before).float() - self.push_BLD.float()
        return bool(off.norm() < NEAR * self.push_BLD.float().norm())

    def _does_something(self, module: nn.Module) -> bool:
        return not same(self.taken[module], self.returned[module])  # as a dropout does not

    def _maker_of(self, t: torch.Tensor) -> nn.Module | None:
        """The outermost module that returned just this tensor."""
        return next((m for m in self.modules if same(self.returned[m], t)), None)

    def _inside(self, module: nn.Module) -> set[nn.Module]:
        return {*module.modules()}

    def _outermost(self, found: list, point: str, wanted: str) -> nn.Module:
        outer = [m for m in found if not any(m in self._inside(o) for o in found if o is not m)]
        if len(outer) != 1:
            raise self._without(point, wanted)
        return outer[0]

    def _without(self, point: str, wanted: str) -> UserError:
        return UserError(f"{self.name} has no {point} that can be found", f"wanted {wanted}")


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def is_norm(module: nn.Module) -> bool:
    """Whether it has parameters, and vectors alone."""
    sizes = [p.ndim for p in module.parameters()]
    return bool(sizes) and max(sizes) == 1


def has_matrix(module: nn.Module) -> bool:
    return any(p.ndim == 2 for p in module.parameters(recurse=False))
