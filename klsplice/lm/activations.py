"""What a training step reads of the LM: micro-batches, of clean passes or of residuals alone.

Each of these classes is called with a step and gives that step's micro-batches; which learner they
are for makes no difference to them. Passes are made for more sequences at a time than a step has,
since larger products are faster.
"""

from dataclasses import dataclass

import torch

from klsplice import distributed
from klsplice.lm.splice import Pass, Splice, both, next_tokens
from klsplice.progress import tracked

OUTLIER = 10


@dataclass
class MicroBatch:
    """A part of a step: N active tokens, those at which the SAE stands in."""

    # of each site what its SAE reads and what it stands in for, x_ND and o_ND
    sites: list[tuple[torch.Tensor, torch.Tensor]]
    seed: int  # of the dropout in it
    # None where the loss is of the residual alone:
    clean: Pass | None = None  # (B, L)
    active_N: torch.Tensor | None = None  # indices into B*L
    target_N: torch.Tensor | None = None  # the token after each; of a context's last, itself
    kept: dict | None = None  # the clean logits, where several learners share them

    @property
    def x_ND(self) -> torch.Tensor:
        """What the (first) SAE reads; the residual after block LAYER."""
        return self.sites[0][0]

    @property
    def o_ND(self) -> torch.Tensor:
        """What it stands in for; of an SAE what it reads."""
        return self.sites[0][1]


class Passes:
    """Micro-batches with the clean LM's pass, which is made of `clean_batch` sequences at a time:
    those of several steps, or of a part of one.

    tokens: data.Tokens. whole: the pass goes to the end of the LM, and not just to block LAYER.
    keep_head: the head's product of the clean pass is kept, for all learners held against it.
    """

    def __init__(self, splice, tokens, *, whole, micro_batch, clean_batch, seed, device, keep_head):
        self.splice, self.tokens, self.device, self.seed = splice, tokens, device, seed
        self.whole, self.keep_head = whole, keep_head
        self.micro_batch, self.clean_batch = micro_batch, clean_batch
        self.steps_a_pool = max(1, clean_batch // tokens.share)
        self.pool, self.first_step = [], None

    def __call__(self, step: int) -> list[MicroBatch]:
        first_step = step - step % self.steps_a_pool
        if self.first_step != first_step:
            self._fill(first_step)
        firsts = range(0, self.tokens.share, self.micro_batch)
        return [self._micro_batch(step, first) for first in firsts]

    def _fill(self, first_step: int) -> None:
        # also for steps after the last one: every pass then has the same shape
        steps = range(first_step, first_step + self.steps_a_pool)
        tokens_SL = torch.cat([self.tokens.batch(step) for step in steps])
        self.pool = []  # its memory goes before there is more
        for part_BL in tokens_SL.split(self.clean_batch):
            there_BL = moved(part_BL, self.device)
            self.pool.append((part_BL, self.splice.clean(there_BL, to_end=self.whole)))
        self.first_step = first_step

    def _micro_batch(self, step: int, first: int) -> MicroBatch:
        """The sequences [first, first + MICRO_BATCH) of the step's share in this process."""
        before = (step - self.first_step) * self.tokens.share + first
        which, start = divmod(before, self.clean_batch)
        mine = slice(start, start + min(self.micro_batch, self.tokens.share - first))
        tokens_BL, clean = self.pool[which]
        clean = clean.part(mine)
        active_N = active(self.tokens, tokens_BL[mine], clean.base_BLD)
        part = MicroBatch(
            sites=clean.rows(active_N),
            seed=seed_of(self.seed, self.tokens.first(step) + first),
        )
        if clean.h_BLD is not None:
            part.clean, part.active_N = clean, active_N
            part.target_N = next_tokens(clean.tokens_BL).flatten()[active_N]
            part.kept = {} if self.keep_head else None
        return part


class ShuffledResiduals:
    """Micro-batches of residuals, dealt in random order from a pool of `shuffle` sequences."""

    def __init__(
        self, splice: Splice, tokens, *, shuffle: int, batch: int, lm_batch: int, seed: int, device
    ):
        self.splice, self.tokens, self.device = splice, tokens, device
        self.batch, self.lm_batch, self.seed = batch, lm_batch, seed
        self.steps_a_pool = max(1, min(shuffle // batch, tokens.steps_a_pass))
        self.sites, self.first_step = None, None
        self.parts, self.which = None, None

    def __call__(self, step: int) -> list[MicroBatch]:
        which, within = divmod(step, self.steps_a_pool)
        first_step = which * self.steps_a_pool % self.tokens.steps_a_pass
        if self.first_step != first_step:  # one pool for all passes where the text fits in it
            self._fill(first_step)
        if self.which != which:
            self._deal(which)
        mine_N = self.parts[within].tensor_split(distributed.size())[distributed.rank()]
        mine_N = moved(mine_N, self.device)
        sites = [both(site, lambda t_ND: t_ND[mine_N]) for site in self.sites]
        return [MicroBatch(sites, seed_of(self.seed, step))]

    def _fill(self, first_step: int) -> None:
        steps = range(first_step, first_step + self.steps_a_pool)
        steps = [step % self.tokens.steps_a_pass for step in steps]
        firsts = [step * self.batch for step in steps]
        many_SL = torch.cat([self.tokens.sequences(i, i + self.batch) for i in firsts])
        parts = tracked(many_SL.split(self.lm_batch), "residuals to shuffle")
        self.sites = read_at_sites(self.splice, self.tokens, parts, self.device)
        self.first_step = first_step

    def _deal(self, which: int) -> None:
        generator = torch.Generator().manual_seed(seed_of(self.seed, which))
        order_N = torch.randperm(len(self.sites[0][0]), generator=generator)
        self.parts = order_N.split(len(order_N) // self.steps_a_pool)
        self.which = which


def read_at_sites(splice: Splice, tokens, parts, device) -> list:
    """parts: of (B, L), on the CPU. -> of each site x_ND and o_ND at the active positions."""
    found = []
    for tokens_BL in parts:
        clean = splice.clean(moved(tokens_BL, device), to_end=False)
        found.append(clean.rows(active(tokens, tokens_BL, clean.base_BLD)))
    sites = [tuple(zip(*pairs)) for pairs in zip(*found)]
    same = [xs[0] is os[0] for xs, os in sites]
    return [both((xs, xs if one else os), torch.cat) for (xs, os), one in zip(sites, same)]


def active(tokens, tokens_BL: torch.Tensor, x_BLD: torch.Tensor) -> torch.Tensor:
    """-> where the SAE stands in, indices into B*L on x_BLD's device. tokens_BL: on the CPU."""
    found_N = tokens.active(tokens_BL, x_BLD)
    return found_N if found_N.is_cuda else moved(found_N, x_BLD.device)


def outliers(x_BLD: torch.Tensor) -> torch.Tensor:
    """-> mask (B, L) of the residuals with over OUTLIER times their context's median norm."""
    norm_BL = x_BLD.float().norm(dim=-1)
    return norm_BL > OUTLIER * norm_BL.median(dim=1, keepdim=True).values


def moved(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """t on `device`; the host does not wait for the copy."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)


def seed_of(seed: int, sequence: int) -> int:
    return 1_000_003 * seed + sequence
