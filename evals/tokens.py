"""Which tokens pay for the SAE, and how far does what it changes travel?

    python -m evals.tokens runs/<name>

Before and after the finetune, on the run's held-out tokens:
- cost, the cross-entropy with the SAE spliced in minus the clean LM's (nats a token), by position
  in the context, by how often the predicted token is in the training text, and by class of the
  predicted token and of the token read. From before.npz and after.npz.
- distance of the residual from the clean pass after LAYER and after each block above, where the SAE
  stands in: mean over tokens of ||h - h_clean|| / ||h_clean|| (arXiv 2501.19406). With LoRA on the
  LM, after is the LM with LoRA, the clean pass the LM without.
"""

import re
import sys

import numpy as np
import pandas as pd
import torch

from evals import common
from evals.open import Finished
from klsplice import machine
from klsplice.errors import UserError
from klsplice.lm.splice import rows
from klsplice.storage import read_npz

POSITIONS = (0, 1, 4, 16, 64, 256, 1024, 4096)  # a range goes from one to the next
COUNTS = (0, 1, 10, 100, 1000, 10_000, 100_000, 1_000_000)
CLASSES = {  # of the text of a token
    "word": r"\s+[^\W\d_]+\s*",
    "piece": r"[^\W\d_]+\s*",  # letters without a space before them
    "digit": r"\s*\d+\s*",
    "space": r"\s+",
    "punctuation": r"(_|[^\w\ufffd\x00-\x08])+",
    "other": "",
}


def token_class(text: str) -> str:
    fits = (name for name, form in CLASSES.items() if re.fullmatch(form, text))
    return next(fits, "other")


def classes(run, tokens_SL: np.ndarray) -> np.ndarray:
    """The class of each token, in the shape of tokens_SL."""
    ids, where = np.unique(tokens_SL, return_inverse=True)
    (anchor,) = run.tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    start = len(run.tokenizer.decode([anchor]))  # a decoder may drop the space of a first token
    texts = run.tokenizer.batch_decode([[anchor, i] for i in ids])
    special = np.isin(ids, run.tokens.special)
    kinds = ["other" if s else token_class(text[start:]) for s, text in zip(special, texts)]
    return np.array(kinds)[where].reshape(tokens_SL.shape)


def ranges(values_N: np.ndarray, edges: tuple) -> pd.Categorical:
    labels = [f"from {edge:,}" for edge in edges]
    return pd.cut(values_N, [*edges, np.inf], right=False, labels=labels)


def groups(run, n: int) -> dict[str, pd.Categorical]:
    """{grouping: the label of each of the (CONTEXT - 1) n predictions}."""
    all_SL = np.asarray(run.tokens.val_SL[:n])
    train_SL = run.tokens.train_SL[np.sort(run.tokens.order_S)]
    counts_V = np.bincount(np.asarray(train_SL).ravel(), minlength=int(all_SL.max()) + 1)
    position_N = np.tile(np.arange(all_SL.shape[1] - 1), n)
    class_SL = classes(run, all_SL)
    return {
        "all": pd.Categorical(["predictions"] * len(position_N)),
        "position": ranges(position_N, POSITIONS),
        "count in training text": ranges(counts_V[all_SL[:, 1:].ravel()], COUNTS),
        "predicted": pd.Categorical(class_SL[:, 1:].ravel(), [*CLASSES]),
        "read": pd.Categorical(class_SL[:, :-1].ravel(), [*CLASSES]),
    }


@torch.no_grad()
def downstream(run, learner, n: int) -> list[float]:
    """-> relative L2 to the clean pass after LAYER and after each block above."""
    blocks = range(1, len(learner.splice.blocks) - run.cfg.LAYER)  # counted from LAYER
    learner.splice.kept = tuple(blocks)
    sums, total = 0.0, 0
    for tokens_BL, active_N in run.batches(n):
        clean = learner.splice.clean(tokens_BL)
        spliced, ((_, y_ND, _),) = learner.spliced(clean, active_N)
        clean_ND = [rows(x_BLD, active_N) for x_BLD in (clean.x_BLD, *map(clean.after.get, blocks))]
        other_ND = [y_ND, *(rows(spliced.after[i], active_N) for i in blocks)]
        distance_N = [
            (b_ND.float() - a_ND.float()).norm(dim=1) / a_ND.float().norm(dim=1)
            for a_ND, b_ND in zip(clean_ND, other_ND)
        ]
        sums = sums + torch.stack(distance_N).double().sum(1)
        total += len(active_N)
    return (sums / total).tolist()


def evaluate(a) -> dict:
    run = Finished(a.runs, a.device)
    n = min(a.sequences, len(run.tokens.val_SL))
    before, after = (read_npz(f"{run.folder}/{when}.npz") for when in ("before", "after"))
    if before is None or after is None:
        raise UserError(f"{run.folder} lacks before.npz or after.npz", "wanted a whole run")
    clean_SP, before_SP, after_SP = (
        x_SL[:n, :-1].astype(float).ravel()
        for x_SL in (after["ce_clean"], before["ce"], after["ce"])
    )
    costs = {"clean": clean_SP, "before": before_SP - clean_SP, "after": after_SP - clean_SP}
    frame = pd.DataFrame(costs | {"change": after_SP - before_SP})
    table = [["", "n", "clean", "before", "after", "after - before"]]
    numbers = {}
    for grouping, labels in groups(run, n).items():
        parts = frame.groupby(labels, observed=True)
        mean, error, size = parts.mean(), parts.sem().fillna(0.0), parts.size()
        for label in size.index:
            m, e, name = mean.loc[label], error.loc[label], f"cost, {grouping}: {label}"
            row = [name, f"{size[label]:,}", f"{m.clean:.3f}", f"{m.before:.4f}", f"{m.after:.4f}"]
            table.append([*row, f"{m.change:+.4f} ± {e.change:.4f}"])
            numbers |= {f"{name}, before": m.before, f"{name}, after": m.after}
    distances = [downstream(run, learner, n) for _, learner in run.stages()]
    for block, (old, new) in enumerate(zip(*distances), run.cfg.LAYER):
        label = f"relative L2 after block {block}"
        numbers |= {f"{label}, before": old, f"{label}, after": new}
        table.append([label, "", "", f"{old:.4f}", f"{new:.4f}", f"{new - old:+.4f}"])
    return {"device": machine.device_name(run.cfg.DEVICE), "numbers": numbers, "table": table}


def options(parser) -> None:
    common.one_run(parser)
    parser.add_argument("--sequences", type=int, default=64, help="held-out contexts, at most")


def main(argv: list[str]) -> int:
    return common.command(argv, "tokens", __doc__, options, evaluate)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
