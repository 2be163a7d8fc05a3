"""The LM as a run uses it, held against the LM itself on whole contexts of the held-out text.

"Itself" is transformers' own code: eager attention, one sequence at a time, every block, and a hook
for the edit. A run has something faster: another attention, compiled blocks, batches, skipped ones.
"""

from contextlib import contextmanager, suppress
from functools import cached_property
from typing import NamedTuple

import torch

from klsplice.errors import UserError
from klsplice.lm.head import score_head
from klsplice.lm.splice import Splice, next_tokens

# Tokens to compare on, in whole contexts: 16 bits make noise, float32 hardly any.
TOKENS_16_BITS, TOKENS = 512, 256
LONGEST = 4096  # tokens of a context: eager attention holds (heads, L, L)
FEW = 64  # tokens whose logits are compared number by number

# Nats a token that either of KL and mean CE may be off. bfloat16 alone makes a KL of 0.0004 to
# 0.0011 and a mean CE of 0.003 (SmolLM2-135M, 4 contexts of 256); see also _noise.
OFF_16_BITS, OFF = 0.01, 1e-3


class Difference(NamedTuple):
    """Of ours to the LM itself, nats a token: KL(itself || ours), mean CE and that one's error."""

    kl: float = float("inf")
    ce: float = float("inf")
    ce_error: float = 0.0

    def within(self, most: float) -> bool:
        """Whether both are less than that; the CE may be by chance what four errors explain."""
        return self.kl < most and abs(self.ce) < max(most, 4 * self.ce_error)


def contexts(tokens, batch: int) -> torch.Tensor:
    """Those to compare on, after one more that only makes the batch larger.

    tokens: data.Tokens. -> tokens_BL."""
    length = min(tokens.val_SL.shape[1], LONGEST)
    n = max(batch, 1 + -(-TOKENS_16_BITS // length))
    return tokens.val(0, n)[:, :length]


@torch.no_grad()
def check(splice: Splice, tokens_BL: torch.Tensor, micro_batch: int = 0) -> dict:
    """Find the fastest passes that are the LM's own -> what was measured, for run.json.

    tokens_BL: see `contexts`. micro_batch: the sequences of a "learning" pass, a spliced one with
    gradients, for which other code may run than without; 0: there is none. The LM is given eager
    attention where the one that it was loaded with is another, and splice.whole is set where no
    block can be skipped. Raises UserError where that does not help, or where the LM is not causal
    or its head not as Head computes it.
    """
    tokens_BL = tokens_BL.to(splice.lm.device)
    if len(tokens_BL) == 1:
        tokens_BL = tokens_BL.repeat(2, 1)
    enough = TOKENS_16_BITS if splice.head.W_VD.dtype.itemsize == 2 else TOKENS
    n = min(len(tokens_BL) - 1, -(-enough // tokens_BL.shape[1]))
    if not splice.compiled:
        tokens_BL = tokens_BL[-n - 1 :]
    itself = Itself(splice, tokens_BL[-n:])
    itself.check_head()
    clean = splice.clean(tokens_BL)
    found = {"clean": itself.difference(clean.h_BLD)}
    attention = splice.lm.config._attn_implementation
    if not itself.agrees(found["clean"]) and attention != "eager":
        print(f"note: {attention} attention is not this LM's own: eager")
        splice.lm.set_attn_implementation("eager")
        clean = splice.clean(tokens_BL)
        found["clean"] = itself.difference(clean.h_BLD)
    # about what SAEs make of it
    ys = [o_BLD * (1 + 0.3 * _random_like(o_BLD)) for _, o_BLD in clean.sites]
    itself.edit([y_BLD[-n:] for y_BLD in ys])
    h_BLD, given = None, (clean, *_everywhere(ys))
    with suppress(Exception):  # whatever an upper block makes of what is missing
        h_BLD = splice.spliced(*given).h_BLD
    found["spliced"] = itself.difference(h_BLD)
    if not itself.agrees(found["spliced"]):
        splice.whole = True
        print("note: upper blocks of this LM read what lower ones leave: no block is skipped")
        found["spliced"] = itself.difference(splice.spliced(*given).h_BLD)
    if micro_batch:
        last = clean.part(slice(-n, None)), [y_BLD[-n:] for y_BLD in ys]
        found["learning"] = itself.difference(_learning(splice, micro_batch, *last))
    for name, difference in found.items():
        if not itself.agrees(difference):
            off = f"a KL of {difference.kl:.3g} and a CE of {difference.ce:+.3g} nats a token"
            what = f"the {name} pass of {type(splice.lm).__name__} is off by {off}"
            raise UserError(what, "from the LM as transformers runs it, one sequence at a time")
    about = {"tokens": itself.tokens_BL.numel(), "whole": splice.whole}
    about["attention"] = splice.lm.config._attn_implementation
    return about | {name: {"kl": d.kl, "ce": d.ce} for name, d in found.items()}


class Itself:
    """The LM as transformers runs it, on some contexts: clean, or with an edit."""

    def __init__(self, splice: Splice, tokens_BL: torch.Tensor):
        self.splice, self.lm, self.tokens_BL = splice, splice.lm, tokens_BL
        self.most = OFF_16_BITS if splice.head.W_VD.dtype.itemsize == 2 else OFF
        self.h_BLD = self._run(lambda i: {})

    def edit(self, ys: list[torch.Tensor]) -> None:
        """From here on with each y_BLD in the place of what its SAE stands in for."""
        writes = [write for _, write in self.splice.points]

        def edits_of(i):
            return {w: lambda o_BLD, y=y: y[i : i + 1] for w, y in zip(writes, ys)}

        self.h_BLD = self._run(edits_of)

    def _run(self, edits_of) -> torch.Tensor:
        with self._eager():
            one_each = enumerate(self.tokens_BL.split(1))
            return torch.cat([self.splice.edited(one, edits_of(i)).h_BLD for i, one in one_each])

    @contextmanager
    def _eager(self):
        """While inside, the LM runs with eager attention and nothing is compiled."""
        configs = [m.config for m in self.lm.modules() if hasattr(m, "config")]
        before = [(config, config._attn_implementation) for config in configs]
        self.lm.set_attn_implementation("eager")
        try:
            with self.splice.plain():
                yield
        finally:
            for config, implementation in before:  # parts of a multimodal LM may have others
                config._attn_implementation = implementation

    def difference(self, ours_BLD: torch.Tensor | None, theirs_BLD=None) -> Difference:
        """ours_BLD: h_BLD of a batch that ends in these contexts, or is the end of them, or None.
        theirs_BLD: where it is not that of the LM itself."""
        if ours_BLD is None:
            return Difference()
        theirs_BLD = self.h_BLD if theirs_BLD is None else theirs_BLD
        n = min(len(theirs_BLD), len(ours_BLD))
        pair = (h_BLD[-n:].flatten(0, 1) for h_BLD in (theirs_BLD, ours_BLD))
        tokens_BL = self.tokens_BL[-n:]
        target_N = next_tokens(tokens_BL).flatten()
        kl_N, theirs_N, ours_N = score_head(*pair, target_N, self.splice.head)
        off_BL = (ours_N - theirs_N).view_as(tokens_BL)[:, :-1]  # the last has no next token
        error = off_BL.std() / off_BL.numel() ** 0.5
        return Difference(kl_N.mean().item(), off_BL.mean().item(), error.item())

    def agrees(self, difference: Difference) -> bool:
        """Whether it is no more than rounding explains."""
        if difference.within(self.most) or self.most == OFF:
            return difference.within(self.most)
        return difference.within(max(self.most, 4 * self.noise))

    @cached_property
    def noise(self) -> float:
        """The KL of this LM with each block's output rounded otherwise to the LM itself."""
        edits = {i: _rounded_otherwise for i in range(len(self.splice.blocks))}
        return self.difference(self._run(lambda i: edits), self._run(lambda i: {})).kl

    def check_head(self) -> None:
        """Raises UserError where the LM is not causal, or its head not as Head computes it."""
        few_BL = self.tokens_BL[-1:, :FEW]
        with self._eager():
            theirs_NV = self.lm(few_BL, use_cache=False).logits[0].float()
            h_BLD = self.splice.clean(few_BL).h_BLD
            other_BL = torch.cat([few_BL[:, :-1], (few_BL[:, -1:] + 1) % theirs_NV.shape[1]], 1)
            other_BLD = self.splice.clean(other_BL).h_BLD
        name, ours_NV = type(self.lm).__name__, self.splice.head.logits(h_BLD[0], torch.float32)
        off = (other_BLD - h_BLD)[:, :-1].abs().max()
        if not off < 0.05 * h_BLD.abs().max():
            what = f"{name} reads tokens that come after the one that it reads from"
            raise UserError(what, "wanted a causal LM; a BERT-like one is causal with is_decoder")
        p_NV, q_NV = theirs_NV.log_softmax(-1), ours_NV.log_softmax(-1)
        kl = (p_NV.exp() * (p_NV - q_NV)).sum(-1).mean().item()
        if not kl < self.most:
            what = f"the head of {name} is not as klsplice computes it (KL {kl:.3g} nats a token)"
            raise UserError(what, "its logits are scaled, shifted or capped in an unknown way")


@torch.enable_grad()
def _learning(splice: Splice, micro_batch: int, clean, ys) -> torch.Tensor:
    """h_BLD of a spliced pass as a step makes it, in as many sequences; the last ones are these."""
    which = torch.arange(-micro_batch, 0) % len(clean.tokens_BL)
    ys = [y_BLD[which].requires_grad_() for y_BLD in ys]
    return splice.spliced(clean.part(which), *_everywhere(ys)).h_BLD.detach()


def _everywhere(ys: list[torch.Tensor]) -> list[torch.Tensor]:
    """-> all positions, and the residuals at them: what a spliced pass is given."""
    flat = [y_BLD.flatten(0, 1) for y_BLD in ys]
    return [torch.arange(len(flat[0]), device=flat[0].device), *flat]


def _random_like(x: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(x.shape, generator=generator).to(x.device, x.dtype)


def _rounded_otherwise(x_BLD: torch.Tensor) -> torch.Tensor:
    return x_BLD * (1 + torch.finfo(x_BLD.dtype).eps * _random_like(x_BLD))
