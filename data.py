"""Tokens -> batches: which sequences a run holds out and trains on, and in which order.

A sequence is an index into what journal.py has written, or into a .npy, so that runs on the same
text are paired by construction.
"""

import hashlib
from functools import partial

import numpy as np
import torch

import distributed
from errors import UserError, first_line
from journal import Journal, added_bos, file_digest, kind_of, local_files, special_ids

PIECE = 200_000_000  # tokens of a stream that are written before training goes on


class Tokens:
    """Held-out and training sequences of one run.

    val_SL: (S, CONTEXT) uint32, held out. order_S: indices into train_SL, in training order.
    more: sequences wanted -> a train_SL that has them, where it is written in pieces.
    special: ids of BOS, EOS and pad. bos: whether contexts start with BOS. steps: how many steps
    TOKENS x PASSES make. fingerprint: of text, tokeniser and packing. commit: of a Hub dataset.
    """

    def __init__(
        self,
        val_SL,
        train_SL,
        order_S,
        *,
        c,
        special,
        bos: bool,
        fingerprint: str,
        commit: str | None = None,
        more=None,
    ):
        self.val_SL, self.train_SL, self.order_S = val_SL, train_SL, order_S
        self.batch_size, self.keep, self.special = c.BATCH, c.KEEP, special
        self.bos, self.fingerprint, self.commit, self.more = bos, fingerprint, commit, more
        self.steps_a_pass = len(order_S) // c.BATCH
        self.steps = c.PASSES * self.steps_a_pass

    def batch(self, step: int) -> torch.Tensor:
        """-> (BATCH, CONTEXT) int64, on the CPU; of several processes, this one's part of it."""
        first = self.first(step) % (self.steps_a_pass * self.batch_size)
        return self.sequences(first, first + self.share)

    def first(self, step: int) -> int:
        """How many sequences come before those of `batch`, passes counted."""
        return step * self.batch_size + distributed.rank() * self.share

    @property
    def share(self) -> int:
        """Sequences a step in this process."""
        return self.batch_size // distributed.size()

    def sequences(self, first: int, end: int) -> torch.Tensor:
        """Training sequences [first, end) in this run's order -> int64, on the CPU."""
        wanted_S = self.order_S[first:end]
        if self.more is not None and wanted_S.max() >= len(self.train_SL):
            self.train_SL = self.more(int(wanted_S.max()) + 1)
        return torch.from_numpy(self.train_SL[wanted_S].astype(np.int64))

    def val(self, first: int, end: int) -> torch.Tensor:
        return torch.from_numpy(self.val_SL[first:end].astype(np.int64))

    def active(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """-> indices into B*L of the positions where the SAE stands in (KEEP says which do not)."""
        kept_BL = torch.zeros_like(tokens_BL, dtype=torch.bool)
        if self.keep == "first":
            kept_BL[:, 0] = True
        elif self.keep == "special":
            kept_BL = torch.isin(tokens_BL, torch.tensor(self.special))
        return (~kept_BL.flatten()).nonzero().squeeze(1)

    @property
    def tokens_a_step(self) -> int:
        return self.batch_size * self.val_SL.shape[1]

    @property
    def tokens(self) -> int:
        """Training tokens, rounded down to whole steps, passes counted."""
        return self.steps * self.tokens_a_step


@distributed.in_turn
def prepare(c, tokenizer, lm_config) -> Tokens:
    """Tokenise what the run needs (or find it done) -> Tokens.

    Raises UserError: dataset unreadable or shorter than VAL_TOKENS + SKIP_TOKENS + TOKENS.
    """
    n_val, n_skip = c.VAL_TOKENS // c.CONTEXT, c.SKIP_TOKENS // c.CONTEXT
    n_train = c.TOKENS // (c.BATCH * c.CONTEXT) * c.BATCH
    kind, more = kind_of(c.DATASET), None
    piece = max(1, PIECE // c.CONTEXT)
    if kind == "npy":
        val_SL, rest_SL, fingerprint = _pretokenised(c, n_val)
        finite = True
    else:
        journal = Journal(c, tokenizer, kind, n_val)
        finite = kind != "hub"
        everything = finite and c.SEED > 0  # to permute it
        wanted = n_skip + (c.SEED + 1) * n_train
        if not finite and wanted > piece:
            wanted, more = piece, partial(_further, c, journal, piece)
        journal.write(None if everything else wanted)
        more = None if journal.state["ended"] else more
        val_SL, rest_SL, fingerprint = journal.val(), journal.train(), journal.fingerprint
    slices = 1 if finite else c.SEED + 1
    needed = n_skip + slices * n_train
    if more is None and (len(val_SL) < n_val or len(rest_SL) < needed):
        have = (len(val_SL) + len(rest_SL)) * c.CONTEXT
        share = "TOKENS" if slices == 1 else "(SEED + 1) x TOKENS"
        wanted = (n_val + needed) * c.CONTEXT
        what = (
            f"DATASET = {c.DATASET} has {have:,} tokens in whole contexts; wanted {wanted:,} "
            f"(VAL_TOKENS + SKIP_TOKENS + {share})"
        )
        hint = "lower TOKENS, or set PASSES to train on fewer tokens more often"
        if len(val_SL) < n_val or len(rest_SL) <= n_skip:
            hint = "lower VAL_TOKENS and SKIP_TOKENS, or take a longer text"
        if kind == "text":
            hint = "a .txt is one document and is not split between held-out and training tokens"
        raise UserError(what, hint)
    largest = max(int(val_SL.max()), int(rest_SL.max()))
    vocabulary = lm_config.get_text_config().vocab_size
    if largest >= vocabulary:
        what = f"DATASET holds token {largest}, but {c.MODEL} knows only {vocabulary:,}"
        raise UserError(what, "the text was tokenised for another model")
    if not finite:  # seed s takes the s-th slice of a stream
        order_S = n_skip + c.SEED * n_train + np.arange(n_train)
    elif c.SEED == 0:
        order_S = n_skip + np.arange(n_train)
    else:  # its own permutation of a finite text
        order_S = (
            n_skip + np.random.default_rng(c.SEED).permutation(len(rest_SL) - n_skip)[:n_train]
        )
    special, bos = special_ids(tokenizer), added_bos(tokenizer) is not None
    if kind == "npy":
        bos = bool((val_SL[:n_val, 0] == tokenizer.bos_token_id).all())
    fit = {"c": c, "special": special, "bos": bos, "fingerprint": fingerprint, "more": more}
    commit = journal.source[1] if kind == "hub" else None
    tokens = Tokens(val_SL[:n_val], rest_SL, order_S, commit=commit, **fit)
    print(
        f"tokens: {tokens.tokens:,} to train on ({tokens.steps:,} steps), "
        f"{n_val * c.CONTEXT:,} held out"
    )
    return tokens


def _further(c, journal, piece: int, n: int) -> np.ndarray:
    """train_SL with n sequences at least, written a piece at a time."""
    journal.write(-(-n // piece) * piece)
    if len(journal.train()) < n:
        what = f"DATASET = {c.DATASET} ended after {journal.state['train'] * c.CONTEXT:,} tokens"
        hint = "the state is saved now and then (SAVE_EVERY); lower TOKENS in a run of its own"
        raise UserError(what, hint, code=1)
    return journal.train()


def _pretokenised(c, n_val):
    """A .npy of shape (sequences, CONTEXT): the first n_val sequences are held out."""
    (path, *more) = local_files(c.DATASET)
    hint = "wanted a plain integer array, np.save of (sequences, CONTEXT)"
    try:
        all_SL = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as e:  # numpy lets out OSError, ValueError, EOFError, TokenError ...
        cause = first_line(e, 100)
        cause = "it holds pickled objects" if "pickle" in cause else cause
        raise UserError(f"DATASET = {path} is not a readable .npy: {cause}", hint) from None
    if not isinstance(all_SL, np.ndarray):
        raise UserError(f"DATASET = {path} is an archive of arrays", hint)
    right = all_SL.ndim == 2 and all_SL.dtype.kind in "iu" and all_SL.shape[1] == c.CONTEXT
    if not right or more:
        what = f"DATASET = {c.DATASET} holds {all_SL.shape} {all_SL.dtype}"
        raise UserError(what, f"wanted one integer array (sequences, CONTEXT = {c.CONTEXT})")
    if all_SL.dtype.kind == "i" and len(all_SL) and int(all_SL.min()) < 0:
        raise UserError(f"DATASET = {path} holds negative tokens", "wanted token ids, without -100")
    digest = file_digest(path)
    return all_SL[:n_val], all_SL[n_val:], hashlib.sha256(digest.encode()).hexdigest()[:16]
