"""The sequences that a run holds out and those that it trains on, in their order.

A sequence is an index into the token cache, or into a .npy, so that runs on the same text are
paired by construction.

Shapes: S sequences, B sequences of a batch, L = CONTEXT positions.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from klsplice import distributed, hub
from klsplice.errors import UserError
from klsplice.lm.activations import outliers
from klsplice.storage import digest, mapped
from klsplice.text.documents import Documents, kind_of, local_files, special_ids
from klsplice.text.token_cache import TokenCache


@dataclass(eq=False)
class Tokens:
    """Held-out and training sequences of one run.

    val_SL: (S, CONTEXT) uint32, held out. order_S: indices into train_SL, in training order.
    special: ids of BOS, EOS and pad. bos: whether contexts start with BOS. fingerprint: of text,
    tokeniser and packing. commit: of a Hub dataset. skipped: documents without text.
    """

    val_SL: np.ndarray
    train_SL: np.ndarray
    order_S: np.ndarray
    cfg: object
    special: list[int]
    bos: bool
    fingerprint: str
    commit: str | None = None
    skipped: int = 0

    @property
    def steps_a_pass(self) -> int:
        return len(self.order_S) // self.cfg.BATCH

    @property
    def steps(self) -> int:
        """How many steps TOKENS x PASSES make."""
        return self.cfg.PASSES * self.steps_a_pass

    def batch(self, step: int) -> torch.Tensor:
        """-> (BATCH, CONTEXT) int64, on the CPU; of several processes, this one's part of it."""
        first = self.first(step) % (self.steps_a_pass * self.cfg.BATCH)
        return self.sequences(first, first + self.share)

    def first(self, step: int) -> int:
        """How many sequences come before those of `batch`, passes counted."""
        return step * self.cfg.BATCH + distributed.rank() * self.share

    @property
    def share(self) -> int:
        """Sequences a step in this process."""
        return self.cfg.BATCH // distributed.size()

    def sequences(self, first: int, end: int) -> torch.Tensor:
        """Training sequences [first, end) in this run's order -> int64, on the CPU."""
        return torch.from_numpy(self.train_SL[self.order_S[first:end]].astype(np.int64))

    def val(self, first: int, end: int) -> torch.Tensor:
        """Held-out sequences [first, end) -> int64, on the CPU."""
        return torch.from_numpy(self.val_SL[first:end].astype(np.int64))

    def active(self, tokens_BL: torch.Tensor, x_BLD: torch.Tensor) -> torch.Tensor:
        """-> indices into B*L of the positions where the SAE stands in: those not kept.

        x_BLD: their residual, which only KEEP = outliers needs; the host then waits for it."""
        kept_BL = kept_positions(tokens_BL, x_BLD, self.cfg.KEEP, self.special)
        return (~kept_BL.flatten()).nonzero().squeeze(1)

    @property
    def tokens_a_step(self) -> int:
        return self.cfg.BATCH * self.val_SL.shape[1]

    @property
    def tokens(self) -> int:
        """Training tokens, rounded down to whole steps, passes counted."""
        return self.steps * self.tokens_a_step


def kept_positions(tokens_BL, x_BLD, keep: str, special: list[int]) -> torch.Tensor:
    """KEEP -> mask (B, L) of the positions whose residual stays original and out of the loss."""
    if keep == "outliers":
        return outliers(x_BLD)
    kept_BL = torch.zeros_like(tokens_BL, dtype=torch.bool)
    if keep == "first":
        kept_BL[:, 0] = True
    elif keep == "special":
        kept_BL = torch.isin(tokens_BL, torch.tensor(special))
    return kept_BL


@distributed.main_process_first
def prepare(cfg, tokenizer, lm_config) -> Tokens:
    """Tokenise what the run needs (or find it done) -> Tokens.

    Raises UserError: dataset unreadable or shorter than VAL_TOKENS + SKIP_TOKENS + TOKENS.
    """
    n_val, n_skip = cfg.VAL_TOKENS // cfg.CONTEXT, cfg.SKIP_TOKENS // cfg.CONTEXT
    n_train = cfg.TOKENS // (cfg.BATCH * cfg.CONTEXT) * cfg.BATCH
    vocabulary = lm_config.get_text_config().vocab_size
    kind = kind_of(cfg.DATASET)
    finite = kind != "hub"  # a stream is taken to have no end
    needed = n_skip + (1 if finite else cfg.SEED + 1) * n_train
    if kind == "npy":
        val_SL, rest_SL, about = _pretokenised(cfg, tokenizer, n_val)
    else:
        all_of_it = finite and cfg.SEED > 0  # to permute it
        documents = Documents(cfg, kind, tokenizer)
        cache = TokenCache(documents, n_val=n_val, vocabulary=vocabulary)
        cache.write(None if all_of_it else needed)
        val_SL, rest_SL = cache.sequences("val"), cache.sequences("train")
        about = {"bos": cache.bos is not None, "fingerprint": cache.fingerprint}
        about |= {"commit": documents.commit, "skipped": cache.state["skipped"]}
    if len(val_SL) < n_val or len(rest_SL) < needed:
        there, wanted = len(val_SL) + len(rest_SL), n_val + needed
        what = f"DATASET = {cfg.DATASET} has {there * cfg.CONTEXT:,} tokens in whole contexts"
        hint = "lower VAL_TOKENS, TOKENS, SKIP_TOKENS or CONTEXT, or set PASSES; or see TEXT_KEY"
        raise UserError(f"{what}; wanted {wanted * cfg.CONTEXT:,}", hint)
    largest = max(int(part_SL.max()) for part_SL in (val_SL, rest_SL) if len(part_SL))
    if largest >= vocabulary:
        what = f"DATASET holds token {largest}, but {cfg.MODEL} knows only {vocabulary:,}"
        raise UserError(what, "the text was tokenised for another model")
    order_S = _order(cfg.SEED, n_skip, n_train, len(rest_SL) if finite else None)
    special = special_ids(tokenizer)
    tokens = Tokens(val_SL[:n_val], rest_SL, order_S, cfg=cfg, special=special, **about)
    of_steps = f"{tokens.tokens:,} to train on ({tokens.steps:,} steps)"
    print(f"tokens: {of_steps}, {n_val * cfg.CONTEXT:,} held out")
    if tokens.skipped:
        print(f"note: {tokens.skipped:,} documents without text are skipped")
    return tokens


def _order(seed: int, n_skip: int, n_train: int, n: int | None) -> np.ndarray:
    """Which training sequences a seed takes. n: how many there are, None in a stream."""
    if n is None:  # the seed-th slice
        return n_skip + seed * n_train + np.arange(n_train)
    if seed == 0:
        return n_skip + np.arange(n_train)
    return n_skip + np.random.default_rng(seed).permutation(n - n_skip)[:n_train]


def _pretokenised(cfg, tokenizer, n_val: int):
    """A .npy of shape (sequences, CONTEXT) -> val_SL, train_SL, {field of Tokens: value}."""
    path, *others = local_files(cfg.DATASET)[0]
    hint = f"wanted one .npy, np.save of an integer array (sequences, CONTEXT = {cfg.CONTEXT})"
    if others:
        raise UserError(f"DATASET = {cfg.DATASET} names {1 + len(others)} .npy files", hint)
    with hub.saying("DATASET", path, hint):
        all_SL = mapped(path)
        fingerprint = hashlib.sha256(digest(path).encode()).hexdigest()[:16]
    form = f"{getattr(all_SL, 'shape', 'several arrays')} {getattr(all_SL, 'dtype', '')}"
    integers = isinstance(all_SL, np.ndarray) and all_SL.dtype.kind in "iu"
    if not integers or all_SL.ndim != 2 or all_SL.shape[1] != cfg.CONTEXT:
        raise UserError(f"DATASET = {path} holds {form}", hint)
    if len(all_SL) and int(all_SL.min()) < 0:
        raise UserError(f"DATASET = {path} holds negative tokens", "wanted token ids, without -100")
    val_SL, rest_SL = all_SL[:n_val], all_SL[n_val:]
    bos = bool((val_SL[:, 0] == tokenizer.bos_token_id).all())
    if cfg.BOS != "tokenizer" and bos != (cfg.BOS == "always"):
        what = f"BOS = {cfg.BOS}, but the sequences of DATASET start otherwise"
        raise UserError(what, "a .npy is taken as it is; set BOS=tokenizer, or write another")
    ends = (None, tokenizer.bos_token_id, tokenizer.eos_token_id)
    if tokenizer.pad_token_id not in ends and tokenizer.pad_token_id in all_SL[: n_val + 64]:
        print("warning: DATASET is padded, and CE, FVU and the loss count that")
    return val_SL, rest_SL, {"bos": bos, "fingerprint": fingerprint}
