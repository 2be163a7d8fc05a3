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
"""

import sys

import numpy as np
import torch

from evals import common
from evals.finished import Finished
from evals.groups import groups
from klsplice import machine
from klsplice.lm.splice import rows
from report import runs


@torch.no_grad()
def downstream(run, learner, n: int):
    """-> relative L2 and cosine to the clean pass after LAYER and each block above (lists), which
    latents fired (F,), and on how many tokens."""
    splice = learner.splice
    splice.kept = tuple(range(run.cfg.LAYER + 1, len(splice.blocks)))
    sums, fired_F, total = 0.0, 0, 0
    for _, tokens_BL, active_N in run.batches(n):
        clean = learner.clean(tokens_BL)
        spliced, _, y_ND, z_NF = learner.spliced(clean, active_N)
        at = [rows(h_BLD, active_N) for h_BLD in (clean.x_BLD, *clean.after.values())]
        other = [y_ND, *(rows(h_BLD, active_N) for h_BLD in spliced.after.values())]
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
    run = Finished(a.runs, a.device)
    n = min(a.sequences, len(run.tokens.val_SL))
    loss = dict(zip(("before", "after"), runs.losses(run.folder)))
    clean_SP = loss["after"]["ce_clean"][:n, :-1].astype(float)
    cost = {when: x["ce"][:n, :-1].astype(float) - clean_SP for when, x in loss.items()}
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
            error = f" ± {errors[2]:.4f}" * bool(mask.sum() > 1)
            more = {"clean": f"{clean_SP[mask].mean():.3f}", "error": error}
            add(f"cost, {grouping}: {label}", mask.sum(), before, after, **more)
            figure["cost"].setdefault(grouping, {})[label] = [before, after, *errors[:2]]

    matrices, found = {}, {}
    for when, learner in run.stages():
        *found[when], total = downstream(run, learner, n)
        sae = learner.sae
        matrices[when] = [t.detach().cpu() for t in (sae.W_enc_FD, sae.W_dec_FD)]
    figure["first block"] = run.cfg.LAYER
    for i, name in enumerate(("relative L2", "cosine")):
        figure[name] = [found[when][i] for when in found]
        for block, pair in enumerate(zip(*figure[name]), run.cfg.LAYER):
            add(f"{name} after block {block}", total, *pair)
    for name, old_FD, new_FD in zip(("encoder", "decoder"), *matrices.values()):
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
    same = all(torch.equal(*pair) for pair in zip(*matrices.values()))
    return {
        "note": "the SAE itself did not learn: its rows are what they were" if same else "",
        "device": machine.device_name(run.cfg.DEVICE),
        "numbers": numbers,
        "table": table,
        "figure": figure,
    }


def options(parser) -> None:
    common.one_run(parser)
    help = "held-out contexts, at most"
    parser.add_argument("--sequences", type=common.positive, default=64, help=help)


def main(argv: list[str]) -> int:
    return common.command(argv, "tokens", __doc__, options, evaluate)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
