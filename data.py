"""The sequences that a run holds out and those that it trains on, in their order.

A sequence is an index into the token cache, or into a .npy, so that runs on the same text are
paired by construction.

Shapes: S sequences, B sequences of a batch, L = CONTEXT positions.
"""

import hashlib

import numpy as np
import torch

from klsplice import distributed
from klsplice.errors import UserError, first_line
from klsplice.text.documents import (
    Documents,
    bos_of,
    file_digest,
    kind_of,
    local_files,
    special_ids,
)
from klsplice.text.token_cache import TokenCache

OUTLIER = 10  # times the median norm of its context's residuals
PIECE = 200_000_000  # tokens of a stream that are written before training goes on


class Tokens:
    """Held-out and training sequences of one run.

    val_SL: (S, CONTEXT) uint32, held out. order_S: indices into train_SL, in training order.
    more: sequences wanted -> a train_SL that has them, where it is written in pieces.
    special: ids of BOS, EOS and pad. bos: whether contexts start with BOS. steps: how many steps
    TOKENS x PASSES make. fingerprint: of text, tokeniser and packing. commit: of a Hub dataset.
    skipped: documents without text.
    """

    def __init__(
        self,
        val_SL,
        train_SL,
        order_S,
        *,
        cfg,
        special,
        bos: bool,
        fingerprint: str,
        commit: str | None = None,
        skipped: int = 0,
        more=None,
    ):
        self.val_SL, self.train_SL, self.order_S = val_SL, train_SL, order_S
        self.batch_size, self.keep, self.special = cfg.BATCH, cfg.KEEP, special
        self.bos, self.fingerprint, self.commit, self.more = bos, fingerprint, commit, more
        self.skipped = skipped
        self.steps_a_pass = len(order_S) // cfg.BATCH
        self.steps = cfg.PASSES * self.steps_a_pass

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
        """Held-out sequences [first, end) -> int64, on the CPU."""
        return torch.from_numpy(self.val_SL[first:end].astype(np.int64))

    def active(self, tokens_BL: torch.Tensor, x_BLD: torch.Tensor) -> torch.Tensor:
        """-> indices into B*L of the positions where the SAE stands in: those not kept.

        x_BLD: their residual, which only KEEP = outliers needs; the host then waits for it."""
        kept_BL = kept_positions(tokens_BL, x_BLD, self.keep, self.special)
        return (~kept_BL.flatten()).nonzero().squeeze(1)

    @property
    def tokens_a_step(self) -> int:
        return self.batch_size * self.val_SL.shape[1]

    @property
    def tokens(self) -> int:
        """Training tokens, rounded down to whole steps, passes counted."""
        return self.steps * self.tokens_a_step


def kept_positions(tokens_BL, x_BLD, keep: str, special: list[int]) -> torch.Tensor:
    """KEEP -> mask (B, L) of the positions whose residual stays original and out of the loss."""
    if keep == "outliers":
        norm_BL = x_BLD.float().norm(dim=-1)
        return norm_BL > OUTLIER * norm_BL.median(dim=1, keepdim=True).values
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
    kind = kind_of(cfg.DATASET)
    finite = kind != "hub"  # a stream is taken to have no end
    slices = 1 if finite else cfg.SEED + 1
    needed = n_skip + slices * n_train
    more, commit, skipped = None, None, 0
    if kind == "npy":
        val_SL, rest_SL, fingerprint = _pretokenised(cfg, n_val)
        _warn_of_padding(val_SL[:n_val], rest_SL[:64], tokenizer)
        with_bos = bool((val_SL[:n_val, 0] == tokenizer.bos_token_id).all())
        _check_bos(cfg.BOS, with_bos)
    else:
        cache = _open_cache(cfg, tokenizer, kind, n_val)
        piece = max(1, PIECE // cfg.CONTEXT)
        if finite and cfg.SEED > 0:
            cache.write(None)  # all of it, to permute it
        elif not finite and needed > piece:
            cache.write(piece)
            if not cache.state["ended"]:
                more = lambda n: _further(cfg, cache, piece, n)  # noqa: E731
        else:
            cache.write(needed)
        val_SL, rest_SL, fingerprint = cache.val(), cache.train(), cache.fingerprint
        commit, with_bos = cache.documents.commit, cache.bos is not None
        skipped = cache.state["skipped"]
        if skipped and skipped == cache.state["documents"]:
            raise _no_text(cfg, kind, skipped)
    if more is None and (len(val_SL) < n_val or len(rest_SL) < needed):
        raise _too_short(cfg, len(val_SL), len(rest_SL), n_val + needed, slices)
    largest = max(int(part_SL.max()) for part_SL in (val_SL, rest_SL) if len(part_SL))
    vocabulary = lm_config.get_text_config().vocab_size
    if largest >= vocabulary:
        what = f"DATASET holds token {largest}, but {cfg.MODEL} knows only {vocabulary:,}"
        raise UserError(what, "the text was tokenised for another model")
    tokens = Tokens(
        val_SL[:n_val],
        rest_SL,
        _order(cfg.SEED, n_skip, n_train, len(rest_SL) if finite else None),
        cfg=cfg,
        special=special_ids(tokenizer),
        bos=with_bos,
        fingerprint=fingerprint,
        commit=commit,
        skipped=skipped,
        more=more,
    )
    without = f"{skipped:,} document{'s' if skipped > 1 else ''} without text"
    print(
        f"tokens: {tokens.tokens:,} to train on ({tokens.steps:,} steps), "
        f"{n_val * cfg.CONTEXT:,} held out" + (f", {without} skipped" if skipped else "")
    )
    return tokens


def _order(seed: int, n_skip: int, n_train: int, n: int | None) -> np.ndarray:
    """Which training sequences a seed takes. n: how many there are, None in a stream."""
    if n is None:  # the seed-th slice
        return n_skip + seed * n_train + np.arange(n_train)
    if seed == 0:
        return n_skip + np.arange(n_train)
    return n_skip + np.random.default_rng(seed).permutation(n - n_skip)[:n_train]


def _open_cache(cfg, tokenizer, kind: str, n_val: int) -> TokenCache:
    if tokenizer.eos_token_id is None:
        what = f"the tokeniser of {cfg.MODEL} has no EOS token"
        raise UserError(what, "documents are joined by it")
    documents = Documents(
        cfg.DATASET,
        kind=kind,
        revision=cfg.DATASET_REVISION,
        split=cfg.SPLIT,
        data_files=cfg.DATA_FILES,
        text_key=cfg.TEXT_KEY,
        tokenizer=tokenizer,
        bos=bos_of(tokenizer, cfg.BOS),
        model=cfg.MODEL,
    )
    sizes = {"bos": documents.bos, "context": cfg.CONTEXT, "n_val": n_val}
    return TokenCache(documents, tokenizer, text_key=cfg.TEXT_KEY, folder=cfg.CACHE, **sizes)


def _warn_of_padding(val_SL, some_SL, tokenizer) -> None:
    pad = tokenizer.pad_token_id
    if pad in (None, tokenizer.bos_token_id, tokenizer.eos_token_id):
        return
    share = float(
        np.mean([(part_SL == pad).mean() for part_SL in (val_SL, some_SL) if len(part_SL)])
    )
    if share > 0:
        print(
            f"warning: DATASET is padded ({share:.0%} of it is token {pad}); CE, FVU and the loss "
            "count that: wanted packed contexts"
        )


def _check_bos(wanted: str, found: bool) -> None:
    """Raises UserError where a .npy does not start as BOS says."""
    if wanted != "tokenizer" and found != (wanted == "always"):
        what = f"BOS = {wanted}, the sequences of DATASET start {'with' if found else 'without'} it"
        raise UserError(what, "a .npy is taken as it is; set BOS=tokenizer, or write another")


def _no_text(cfg, kind: str, n: int) -> UserError:
    what = f"DATASET = {cfg.DATASET} has no text in any of its documents ({n:,})"
    hint = f"set TEXT_KEY to the field with the text (it is {cfg.TEXT_KEY!r})"
    return UserError(what, "take a text that is not empty" if kind == "text" else hint)


def _too_short(cfg, n_val: int, n_train: int, wanted: int, slices: int) -> UserError:
    """n_val, n_train: sequences that there are. wanted: in all."""
    share = "TOKENS" if slices == 1 else "(SEED + 1) x TOKENS"
    what = (
        f"DATASET = {cfg.DATASET} has {(n_val + n_train) * cfg.CONTEXT:,} tokens in whole "
        f"contexts; wanted {wanted * cfg.CONTEXT:,} (VAL_TOKENS + SKIP_TOKENS + {share})"
    )
    hint = "lower TOKENS, or set PASSES to train on fewer tokens more often"
    too_few = n_val < cfg.VAL_TOKENS // cfg.CONTEXT or n_train <= cfg.SKIP_TOKENS // cfg.CONTEXT
    if too_few:
        hint = "lower VAL_TOKENS and SKIP_TOKENS, or take a longer text"
    return UserError(what, hint)


def _further(cfg, cache: TokenCache, piece: int, n: int) -> np.ndarray:
    """train_SL with n sequences at least, written a piece at a time."""
    cache.write(-(-n // piece) * piece)
    if len(cache.train()) < n:
        what = f"DATASET = {cfg.DATASET} ended after {cache.state['train'] * cfg.CONTEXT:,} tokens"
        hint = "the state is saved now and then (SAVE_EVERY); lower TOKENS in a run of its own"
        raise UserError(what, hint, code=1)
    return cache.train()


def _pretokenised(cfg, n_val):
    """A .npy of shape (sequences, CONTEXT): the first n_val sequences are held out."""
    (path, *more) = local_files(cfg.DATASET)
    if more:
        raise UserError(f"DATASET = {cfg.DATASET} names {1 + len(more)} .npy files", "name one")
    hint = "wanted a plain integer array, np.save of (sequences, CONTEXT)"
    try:
        all_SL = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as e:  # numpy lets out OSError, ValueError, EOFError, TokenError ...
        cause = first_line(e, 100)
        cause = "it holds pickled objects" if "pickle" in cause else cause
        raise UserError(f"DATASET = {path} is not a readable .npy: {cause}", hint) from None
    if not isinstance(all_SL, np.ndarray):
        raise UserError(f"DATASET = {path} is an archive of arrays", hint)
    right = all_SL.ndim == 2 and all_SL.dtype.kind in "iu" and all_SL.shape[1] == cfg.CONTEXT
    if not right:
        what = f"DATASET = {cfg.DATASET} holds {all_SL.shape} {all_SL.dtype}"
        raise UserError(what, f"wanted one integer array (sequences, CONTEXT = {cfg.CONTEXT})")
    if all_SL.dtype.kind == "i" and len(all_SL) and int(all_SL.min()) < 0:
        raise UserError(f"DATASET = {path} holds negative tokens", "wanted token ids, without -100")
    digest = file_digest(path)
    return all_SL[:n_val], all_SL[n_val:], hashlib.sha256(digest.encode()).hexdigest()[:16]
