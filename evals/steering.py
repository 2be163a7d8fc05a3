"""Does pushing the model along a latent make it expect what the latent stands for, and only that?

    python -m evals.steering runs/<name>

For each latent strength x (mean residual norm at LAYER) x (its decoder row at norm 1) is added to
the residual after LAYER where KEEP does not leave it alone. What counts is the mean log-likelihood
of a text's tokens, nats a token, each position scored against the NEXT token. (The published code
of arXiv 2501.19406 scores a position against its own token; it also scales the residual's part
along the row where this adds to it.) Positive texts, the windows in which a latent is most active
before and after together, or those of --texts, should become likelier, evals/negatives.json not
less likely. Half of the latents turned most in the finetune, half are random; or --latents.

The strength is tuned per latent, before and after apart, for the gain of one half of the positives;
the numbers are from the other half, which shares no context with it, and from the negatives.
Intervals are 95 %, by resampling texts, for these latents and strengths. The LM is not spliced
unless --spliced, or LoRA on the LM learned.
"""

import sys

import numpy as np
import pandas as pd
import torch

from evals import common, texts
from evals.open import Finished
from klsplice import machine
from klsplice.errors import UserError
from klsplice.lm.splice import put, rows

WHEN = ("before", "after")
OWN = ("tuning", "positives")  # the halves of a latent's own texts; other kinds are negative sets
STRENGTHS = (0.0125, 0.025, 0.05, 0.1, 0.2)


@torch.no_grad()
def activations(run, learner, windows) -> tuple[torch.Tensor, float]:
    """-> each latent's largest activation in each window (W, F); the residual's mean norm."""
    largest, norms = [], []
    for tokens_BL, active_N in run.batches(windows.contexts):
        x_ND = rows(learner.splice.clean(tokens_BL, to_end=False).x_BLD, active_N)
        _, z_NF = learner.reconstruct(x_ND)
        largest.append(windows.largest(z_NF, active_N, tokens_BL.shape))
        norms.append(x_ND.float().norm(dim=1).cpu())
    return torch.cat(largest), float(torch.cat(norms).mean())


def choose(a, enough_F: torch.Tensor, cosine_F: torch.Tensor) -> tuple[list[int], str]:
    """-> latents, and the rule by which they were chosen. Raises UserError."""
    if a.latents:
        if not {*a.latents} <= {*range(len(cosine_F))}:
            raise UserError(f"--latents: the SAE has {len(cosine_F):,}", "they count from 0")
        return a.latents, "given"
    fit = enough_F.nonzero()[:, 0].tolist()
    if not fit:
        what = f"no latent is active in {a.texts_each} windows of each half, before and after"
        raise UserError(what, "lower --texts-each, or raise --contexts")
    turned = sorted(fit, key=lambda f: float(cosine_F[f]))[: a.n // 2]
    turned = [f for f in turned if cosine_F[f] < 1 - 1e-6]  # none where the SAE did not learn
    rest = [f for f in fit if f not in turned]
    some = np.random.default_rng(0).permutation(rest)[: a.n - len(turned)].tolist()
    rule = f"{len(turned)} whose decoder row turned most, {len(some)} at random"
    return turned + some, f"{rule}, of {len(fit)} active in {a.texts_each} windows of each half"


def strongest(a, windows, latent: int, active) -> dict[str, list]:
    """-> {"tuning", "positives": token ids of a latent's strongest windows}. Raises UserError.

    active: (W, F) before and after; each counts relative to its largest."""
    score_W = sum(z_WF[:, latent] / z_WF[:, latent].max().clamp(min=1e-9) for z_WF in active)
    both_W = np.minimum(*(z_WF[:, latent].numpy() for z_WF in active)) > 0
    order_W = score_W.argsort(descending=True, stable=True).numpy()
    order_W = order_W[both_W[order_W]]
    tunes_W = windows.tuning_W[order_W]
    halves = [half_W[: a.texts_each] for half_W in (order_W[tunes_W], order_W[~tunes_W])]
    sets = {name: windows.tokens_WL[half_W].tolist() for name, half_W in zip(OWN, halves)}
    if not all(sets.values()):
        what = f"latent {latent} is not active in windows of both halves, before and after"
        raise UserError(what, "choose another, raise --contexts, or give --texts")
    return sets


@torch.no_grad()
def gains(learner, batch, pushes_SD: torch.Tensor, *, spliced: bool) -> np.ndarray:
    """The change in each text's mean log-likelihood by each push (S, B)."""
    splice = learner.splice

    def likelihood(push_D) -> np.ndarray:
        def edit(x_BLD):
            y_ND = rows(x_BLD, batch.active_N)
            if spliced:
                y_ND, _ = learner.reconstruct(y_ND)
            return put(x_BLD, y_ND + push_D, batch.active_N)

        # with its LoRA, if any
        pushed = splice.edited(batch.tokens_BL, {splice.points[0][1]: edit})
        return batch.log_likelihood(pushed.h_BLD, splice.head)

    base_B = likelihood(0)
    return np.stack([likelihood(push_D) - base_B for push_D in pushes_SD])


def evaluate(a) -> dict:
    given = texts.from_json(a.texts) if a.texts else {}  # before the LM is loaded
    a.latents = [int(latent) for latent in given] or a.latents
    run = Finished(a.runs, a.device)
    spliced = a.spliced or run.cfg.TRAIN == "lm_lora"
    windows = texts.Windows(run, a.contexts, a.length)
    active, row, norms = [], [], []
    for _, learner in run.stages():
        z_WF, norm = activations(run, learner, windows)
        active.append(z_WF)
        norms.append(norm)
        row.append(torch.nn.functional.normalize(learner.sae.W_dec_FD.detach().float(), dim=1))
    both_WF = (active[0] > 0) & (active[1] > 0)
    halves = [both_WF[windows.tuning_W == tunes].sum(0) for tunes in (True, False)]
    cosine_F = (row[0].cpu() * row[1].cpu()).sum(1)
    latents, rule = choose(a, torch.minimum(*halves) >= a.texts_each, cosine_F)

    def tokenized(several: list[str]) -> list[list[int]]:
        return run.tokenizer(several, add_special_tokens=False)["input_ids"]

    negatives = {name: tokenized(x) for name, x in texts.from_json(texts.NEGATIVES).items()}
    kinds, batches, read = {}, {}, {}
    for f in latents:
        if a.texts:
            ids = tokenized(given[str(f)])
            sets = {"tuning": ids[0::2], "positives": ids[1::2]}
        else:
            sets = strongest(a, windows, f, active)
        read[str(f)] = run.tokenizer.batch_decode(sets["tuning"] + sets["positives"])
        sets |= negatives
        kinds[f] = np.repeat([*sets], [len(ids) for ids in sets.values()])
        batches[f] = texts.Batch(run, [x for ids in sets.values() for x in ids], a.length)
    size_S = norms[0] * torch.tensor(STRENGTHS, device=run.cfg.DEVICE)
    gain = {}
    for i, (when, learner) in enumerate(run.stages()):
        for f in latents:
            pushes_SD = size_S[:, None] * row[i][f].to(run.cfg.DEVICE)
            gain[when, f] = gains(learner, batches[f], pushes_SD, spliced=spliced)
    return {
        "rule": rule,
        "residual norm": norms[0],
        "spliced": spliced,
        "positives": read,
        "device": machine.device_name(run.cfg.DEVICE),
        **summary(gain, kinds),
    }


def bootstrap(groups: list[np.ndarray]) -> list[float]:
    """-> [mean of the groups' means, ends of its 95 % interval], resampling within each group."""
    rng = np.random.default_rng(0)
    means = [x_T[rng.integers(len(x_T), size=(2000, len(x_T)))].mean(1) for x_T in groups]
    ends = np.quantile(np.mean(means, axis=0), (0.025, 0.975))
    return [float(np.mean([x_T.mean() for x_T in groups])), *ends.tolist()]


def summary(gain: dict, kinds: dict) -> dict:
    """-> table, numbers and note. gain: {(when, latent): of each strength and text (S, T)}.
    kinds: {latent: what each text is (T,)}: tuning, positives, or a negative set's name."""
    best = {
        key: int(g_ST[:, kinds[key[1]] == "tuning"].mean(1).argmax()) for key, g_ST in gain.items()
    }

    def groups(when, latents, kind):
        """Gains at the tuned strength: a group a latent; negatives are the same texts for all
        latents, so there the mean over latents is one group."""
        values = []
        for f in latents:
            wanted_T = ~np.isin(kinds[f], OWN) if kind == "negatives" else kinds[f] == kind
            values.append(gain[when, f][best[when, f], wanted_T])
        return values if kind == "positives" else [np.mean(values, axis=0)]

    lines = [(str(f), [f], kind) for f in kinds for kind in ("positives", "negatives")]
    sets = [name for name in pd.unique(next(iter(kinds.values()))) if name not in OWN]
    lines += [("all", [*kinds], kind) for kind in ("positives", "negatives", *sets)]
    table = [["latent", "texts", "n", "before", "after", "after - before"]]
    numbers = {f"{f}, strength, {when}": STRENGTHS[i] for (when, f), i in best.items()}
    for label, latents, kind in lines:
        before, after = (groups(when, latents, kind) for when in WHEN)
        change = [b - a for a, b in zip(before, after)]
        table.append([label, kind, f"{sum(map(len, before)):,}"])
        for name, values in zip((*WHEN, "change"), (before, after, change)):
            mean, low, high = bootstrap(values)
            table[-1].append(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
            name = f"{label}, {kind}, {name}"
            numbers |= {name: mean, f"{name}, low": low, f"{name}, high": high}
    edge = sum(i in (0, len(STRENGTHS) - 1) for i in best.values())
    note = f"tuned at an end of the grid: {edge} of {len(best)} times" if edge else ""
    return {"note": note, "table": table, "numbers": numbers}


def options(parser) -> None:
    add = parser.add_argument
    common.one_run(parser)
    add("--latents", type=int, nargs="+", help="1 2 3")
    add("-n", type=int, default=4, help="how many latents are chosen")
    add("--texts", default="", metavar="FILE", help='positives: {"latent": ["text", ...]}')
    add("--texts-each", type=int, default=8, help="positives in each half")
    add("--length", type=int, default=24, help="tokens of a text, at most")
    add("--contexts", type=int, default=64, help="held-out contexts searched, at most")
    add("--spliced", action="store_true", help="steer the LM with the SAE spliced in")


def main(argv: list[str]) -> int:
    return common.command(argv, "steering", __doc__, options, evaluate)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
