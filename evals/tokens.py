"""Which tokens pay for the SAE, and how far does what it changes travel?

    python -m evals.tokens runs/<name>

Before and after the finetune, on the run's held-out tokens:
- cost, the cross-entropy with the SAE spliced in minus the clean LM's (nats a token), by position
  in the context, by how often the predicted token is in the training text, and by class of the
  predicted token and of the token read. From before.npz and after.npz.
- distance of the residual stream from the clean pass after LAYER and after each block above, at the
  positions where the SAE stands in: mean over tokens of ||h - h_clean|| / ||h_clean||, and of the
  cosine. With LoRA on the LM, after is the LM with LoRA, the clean pass the LM without
  (arXiv 2501.19406).
- cosine of the SAE's encoder and decoder rows, before to after; latents that fired before and no
  longer do (died), or the other way (woke), on these tokens.
A piece is a token of letters without a space before it: a part of a word, or a word after "(".
"""

import os
import sys
from contextlib import contextmanager

import numpy as np
import torch
from matplotlib.figure import Figure

import machine
from evals import common

QUESTION = "Which tokens pay for the SAE, and how far does what it changes travel?"
POSITIONS = (0, 1, 4, 16, 64, 256, 1024, 4096)
COUNTS = (0, 1, 10, 100, 1000, 10_000, 100_000, 1_000_000)
CLASSES = ("word", "piece", "digit", "punctuation", "space", "other")


def token_class(text: str) -> str:
    """One of CLASSES for the text of one token, its leading space included."""
    bare = text.strip()
    if not bare:
        return "space" if text else "other"
    if bare.isdigit():
        return "digit"
    if bare.isalpha():
        return "word" if text[0].isspace() else "piece"
    if bare.isprintable() and "\ufffd" not in bare and not any(map(str.isalnum, bare)):
        return "punctuation"
    return "other"


def classes(tokenizer, special, tokens_SL: np.ndarray) -> np.ndarray:
    """The class of each token, as an index into CLASSES, in the shape of tokens_SL."""
    ids, where = np.unique(tokens_SL, return_inverse=True)
    (anchor,) = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    start = len(tokenizer.decode([anchor]))  # a decoder may drop the space of a first token
    texts = tokenizer.batch_decode([[anchor, i] for i in ids])
    of_id = [
        CLASSES.index("other" if i in special else token_class(text[start:]))
        for i, text in zip(ids.tolist(), texts)
    ]
    return np.array(of_id)[where].reshape(tokens_SL.shape)


def ranges(values: np.ndarray, edges) -> dict[str, np.ndarray]:
    """{"4 to 15": mask of values} for each range between edges that holds any."""
    found = {}
    for low, high in zip(edges, (*edges[1:], None)):
        label = f"{low:,}+" if high is None else f"{low:,} to {high - 1:,}"
        label = str(low) if high == low + 1 else label
        mask = (values >= low) & (values < (high or np.inf))
        if mask.any():
            found[label] = mask
    return found


def groups(run, n: int) -> dict[str, dict[str, np.ndarray]]:
    """{grouping: {label: mask_SP}} over the P = CONTEXT - 1 predictions of n sequences."""
    tokens = run.tokens
    all_SL = np.asarray(tokens.val_SL[:n])
    read_SP, predicted_SP = all_SL[:, :-1], all_SL[:, 1:]
    counts_V = np.bincount(np.asarray(tokens.train_SL[np.sort(tokens.order_S)]).ravel())
    counts_V = np.pad(counts_V, (0, max(0, int(all_SL.max()) + 1 - len(counts_V))))
    class_SL = classes(run.tokenizer, tokens.special, all_SL)
    position_SP = np.broadcast_to(np.arange(read_SP.shape[1]), read_SP.shape)
    by_class = {
        name: {label: part == i for i, label in enumerate(CLASSES) if (part == i).any()}
        for name, part in (("predicted", class_SL[:, 1:]), ("read", class_SL[:, :-1]))
    }
    return {
        "all": {"predictions": np.ones_like(read_SP, bool)},
        "position": ranges(position_SP, POSITIONS),
        "count in training text": ranges(counts_V[predicted_SP], COUNTS),
        **by_class,
    }


@contextmanager
def outputs(blocks):
    """Yields a list that is filled with what each of the blocks gives, in their order."""
    found = []

    def keep(module, args, output):
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def downstream(run, learner, n: int):
    """-> relative L2 and cosine to the clean pass after LAYER and each block above (lists), which
    latents fired (F,), and on how many tokens."""
    blocks = learner.splice.blocks[run.c.LAYER + 1 :]
    sums, fired_F, total = 0.0, 0, 0
    for _, tokens_BL, active_N in run.batches(n):
        with outputs(blocks) as clean:
            seen = learner.clean(tokens_BL)
        with outputs(blocks) as spliced:
            _, _, y_ND, z_NF = learner.spliced(seen, active_N)
        at = [h.flatten(0, 1)[active_N] for h in (seen.x_BLD, *clean)]
        other = [y_ND] + [h.flatten(0, 1)[active_N] for h in spliced]
        part = []
        for a_ND, b_ND in zip(at, other, strict=True):
            a_ND, b_ND = a_ND.float(), b_ND.float()
            relative_N = (b_ND - a_ND).norm(dim=1) / a_ND.norm(dim=1)
            cosine_N = torch.nn.functional.cosine_similarity(a_ND, b_ND, dim=1)
            part.append(torch.stack((relative_N.double().sum(), cosine_N.double().sum())))
        sums = sums + torch.stack(part)
        fired_F, total = fired_F + (z_NF != 0).sum(0), total + len(active_N)
    relative, cosine = (sums / total).T.tolist()
    return relative, cosine, (fired_F > 0).cpu(), total


def _mean(values_N: np.ndarray) -> tuple[float, float]:
    """-> mean and its standard error over tokens."""
    spread = values_N.std(ddof=1) if len(values_N) > 1 else 0.0
    return float(values_N.mean()), float(spread / len(values_N) ** 0.5)


def evaluate(a) -> dict:
    run = common.Finished(a.runs, a.device)
    n = min(a.sequences, len(run.tokens.val_SL))
    loss = {}
    for when in ("before", "after"):
        with np.load(os.path.join(run.folder, f"{when}.npz"), allow_pickle=False) as arrays:
            loss[when] = arrays["ce"][:n, :-1].astype(float)
            clean_SP = arrays["ce_clean"][:n, :-1].astype(float)
    cost = {when: ce_SP - clean_SP for when, ce_SP in loss.items()}
    table = [["", "n", "clean", "before", "after", "after - before"]]
    numbers, figure = {}, {"cost": {}}

    def add(label, n, before, after, *, clean="", error=""):
        change = f"{after - before:+.4f}{error}"
        table.append([label, f"{n:,}", clean, f"{before:.4f}", f"{after:.4f}", change])
        numbers.update({f"{label}, before": before, f"{label}, after": after})

    for grouping, labels in groups(run, n).items():
        for label, mask in labels.items():
            parts = [cost[when][mask] for when in ("before", "after")]
            (before, after, _), errors = zip(*map(_mean, (*parts, parts[1] - parts[0])))
            more = {"clean": f"{clean_SP[mask].mean():.3f}", "error": f" ± {errors[2]:.4f}"}
            add(f"cost, {grouping}: {label}", mask.sum(), before, after, **more)
            figure["cost"].setdefault(grouping, {})[label] = [before, after, *errors[:2]]

    rows, found = {}, {}
    for when, learner in run.stages():
        *found[when], total = downstream(run, learner, n)
        sae = learner.sae
        rows[when] = [t.detach().cpu() for t in (sae.W_enc_FD, sae.W_dec_FD)]
    figure["first block"] = run.c.LAYER
    for i, name in enumerate(("relative L2", "cosine")):
        figure[name] = [found[when][i] for when in found]
        for block, pair in enumerate(zip(*figure[name]), run.c.LAYER):
            add(f"{name} after block {block}", total, *pair)
    for name, old_FD, new_FD in zip(("encoder", "decoder"), *rows.values()):
        cosine_F = torch.nn.functional.cosine_similarity(old_FD, new_FD, dim=1)
        label, low = f"{name} rows, cosine before to after", float(cosine_F.quantile(0.05))
        shown = ["", "", f"{cosine_F.mean():.4f}", f"lowest 5 %: {low:.4f}"]
        table.append([label, f"{len(cosine_F):,}", *shown])
        numbers |= {f"{label}, mean": float(cosine_F.mean()), f"{label}, lowest 5 %": low}
    old_F, new_F = (found[when][2] for when in found)
    silent = [float((~fired_F).double().mean()) for fired_F in (old_F, new_F)]
    add("latents that never fire, fraction", total, *silent)
    died, woke = int((old_F & ~new_F).sum()), int((~old_F & new_F).sum())
    table.append(["latents that died, woke", f"{total:,}", "", "", "", f"{died:,}, {woke:,}"])
    numbers |= {"latents that died": died, "latents that woke": woke, "tokens": total}
    same = all(torch.equal(*pair) for pair in zip(*rows.values()))
    return {
        "question": QUESTION,
        "note": "the SAE itself did not learn: its rows are what they were" if same else "",
        "device": machine.device_name(run.c.DEVICE),
        "numbers": numbers,
        "table": table,
        "figure": figure,
    }


def draw(found: dict, path: str) -> None:
    """Cost by class of the predicted token, count and position; distance by block."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2)
    shown = found["figure"]
    titles = {
        "predicted": "class of the predicted token",
        "count in training text": "its count in the training text",
        "position": "position in the context",
    }
    for panel, (grouping, title) in zip(axes.flat, titles.items()):
        labels, of_label = zip(*shown["cost"][grouping].items())
        before, after, *errors = zip(*of_label)
        for i, values in enumerate((before, after)):
            at = np.arange(len(labels)) + 0.4 * (i - 0.5)
            style = {"color": ("0.75", "0.3")[i], "label": ("before", "after")[i]}
            panel.bar(at, values, 0.4, yerr=errors[i], error_kw={"linewidth": 0.8}, **style)
        panel.set_xticks(range(len(labels)), labels, rotation=25, ha="right", fontsize=8)
        panel.set(title=title, ylabel="cost, nats per token")
        panel.axhline(0, color="black", linewidth=0.8)
    for values, when, style in zip(shown["relative L2"], ("before", "after"), ("s--", "o-")):
        colour = {"before": "0.6", "after": "0.1"}[when]
        at = np.arange(len(values)) + shown["first block"]
        axes[1, 1].plot(at, values, style, color=colour, label=when, markersize=4)
    axes[1, 1].set(title="distance from the clean pass", xlabel="after block", ylabel="relative L2")
    axes[1, 1].xaxis.get_major_locator().set_params(integer=True)
    axes[1, 1].set_ylim(0, 1.1 * max(map(max, shown["relative L2"])))
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False)
    axes[1, 1].legend(frameon=False)
    figure.savefig(path, dpi=150)


def options(parser) -> None:
    parser.add_argument("runs", metavar="runs/NAME", help="a finished run")
    parser.add_argument(
        "--sequences", type=common.positive, default=64, help="held-out contexts, at most"
    )
    parser.add_argument("--device", default="", help="default: the run's own")


def main(argv: list[str]) -> int:
    parts = {"options": options, "evaluate": evaluate, "draw": draw}
    return common.command(argv, name="tokens", doc=__doc__, **parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
