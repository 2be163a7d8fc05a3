"""Does pushing the model along a latent make it expect what the latent stands for, and only that?

    python -m evals.steering runs/<name>

For each latent strength x (mean residual norm at LAYER) x (its decoder row at norm 1) is added to
the residual after LAYER at every position but those that KEEP leaves alone. What counts is the mean
log-likelihood of a text's tokens, nats a token: each position's logits are scored against the NEXT
token. (The published code of arXiv 2501.19406 scores a position against its own token; it also
scales the residual's part along the row where this adds to it.) Positive texts should become
likelier, the negative sets (evals/negatives.json) not less likely.

The strength is tuned per latent, before and after apart, for the gain of one half of the positives;
the numbers are from the other half and from the negatives, which tune nothing. Intervals are 95 %,
by resampling texts, for these latents and strengths.

Positives: windows of held-out text in which a latent is most active (latents.py); the halves share
no context. Or --texts, a JSON {"latent": [texts]}; or --endpoint and --model, an OpenAI-compatible
one, asked for texts like those windows. The LM is not spliced unless --spliced, or LoRA on the LM
learned: that is made for the splice, and there "after" is the LM with LoRA.
"""

import sys

import numpy as np
import torch

from evals import common, texts
from evals.finished import Finished
from evals.latents import Windows, choose, negatives, positives
from evals.scores import scorer
from klsplice import machine
from klsplice.errors import UserError

WHEN = ("before", "after")
STRENGTHS = (0.0125, 0.025, 0.05, 0.1, 0.2)


def tuned(gain_ST: np.ndarray, tuning_T: np.ndarray) -> tuple[int, np.ndarray]:
    """-> index of the strength that raises the tuning half most; the other half's gains (S, R)."""
    return int(gain_ST[:, tuning_T].mean(1).argmax()), gain_ST[:, ~tuning_T]


def evaluate(a) -> dict:
    given = texts.given(a)  # before the LM is loaded
    run = Finished(a.runs, a.device)
    spliced = a.spliced or run.cfg.TRAIN == "lm_lora"
    windows = Windows(run, a.contexts, a.length)
    active, row, norm = [], [], []
    for _, learner in run.stages():
        z_WF, mean_norm = windows.activations(learner)
        active.append(z_WF)
        norm.append(mean_norm)
        row.append(torch.nn.functional.normalize(learner.sae.W_dec_FD.detach().float(), dim=1))
    if wrong := [f for f in a.latents or () if f >= len(row[0])]:
        raise UserError(f"there is no latent {wrong[0]}", f"the SAE has {len(row[0]):,}, from 0")
    both_WF = (active[0] > 0) & (active[1] > 0)
    halves = [both_WF[windows.tuning_W == tunes].sum(0) for tunes in (True, False)]
    enough_F = torch.minimum(*halves) >= a.texts_each
    latents, rule = choose(a, enough_F, (row[0].cpu() * row[1].cpu()).sum(1))
    texts_of = positives(run, a, given, windows, latents, active)
    negative, set_T = negatives(run, a.length)

    size_S = norm[0] * torch.tensor(a.strengths, device=run.cfg.DEVICE)
    gain = {}  # (when, latent): strength index, positives (S, R), negatives (S, T)
    for i, (when, learner) in enumerate(run.stages()):
        of_negatives = scorer(learner, negative, spliced=spliced)
        for latent, (batch, tuning_T, _) in texts_of.items():
            pushes_SD = size_S[:, None] * row[i][latent].to(run.cfg.DEVICE)
            gain_ST = scorer(learner, batch, spliced=spliced)(pushes_SD)
            gain[when, latent] = *tuned(gain_ST, tuning_T), of_negatives(pushes_SD)
    kept = {str(latent): read for latent, (_, _, read) in texts_of.items()}
    about = {"rule": rule, "residual norm": norm[0], "spliced": spliced, "positives": kept}
    about["device"] = machine.device_name(run.cfg.DEVICE)
    return about | summary(gain, latents, set_T, a.strengths)


def summary(gain: dict, latents: list, set_T: np.ndarray, strengths) -> dict:
    """-> table, numbers and figure. gain: {(when, latent): (index of the tuned strength, reporting
    positives' gains (S, R), negatives' (S, T))}. set_T: which set a negative is of."""

    def groups(when, of, kind, at=None):
        """Gains at a strength, the tuned one by default: a group a latent; negatives are the same
        texts for all latents, so there the mean over latents is one group."""
        found = []
        for latent in of:
            best, positive_SR, negative_ST = gain[when, latent]
            of_kind = (set_T == kind) | (kind == "negatives")
            gain_ST = positive_SR if kind == "positives" else negative_ST[:, of_kind]
            found.append(gain_ST[best if at is None else at])
        return found if kind == "positives" else [np.mean(found, axis=0)]

    table = [["latent", "texts", "n", "strength", "before", "after", "after - before"]]
    numbers = {}

    def add(label, of, kind, strength):
        before, after = (groups(when, of, kind) for when in WHEN)
        change = [b - a for a, b in zip(before, after)]
        cells = []
        for name, values in zip((*WHEN, "change"), (before, after, change)):
            mean, low, high = common.bootstrap(values)
            cells.append(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
            name = f"{label}, {kind}, {name}"
            numbers.update({name: mean, f"{name}, low": low, f"{name}, high": high})
        table.append([label, kind, f"{sum(map(len, before)):,}", strength, *cells])

    for latent in latents:
        best = [strengths[gain[when, latent][0]] for when in WHEN]
        numbers |= {f"{latent}, strength, {when}": s for when, s in zip(WHEN, best)}
        for kind in ("positives", "negatives"):
            add(str(latent), [latent], kind, " / ".join(f"{s:g}" for s in best))
    for kind in ("positives", "negatives", *dict.fromkeys(set_T.tolist())):
        add("all", latents, kind, "")
    curves = {
        f"{kind}, {when}": [
            common.bootstrap(groups(when, latents, kind, at)) for at in range(len(strengths))
        ]
        for kind in ("positives", "negatives")
        for when in WHEN
    }
    figure = {"strengths": list(strengths), "curves": curves}
    edge = sum(best in (0, len(strengths) - 1) for best, *_ in gain.values())
    note = f"tuned at an end of the grid: {edge} of {len(gain)} times" if edge else ""
    return {"note": note, "table": table, "numbers": numbers, "figure": figure}


def options(parser) -> None:
    add = parser.add_argument
    common.one_run(parser)
    add("--latents", type=common.numbers, help="1,2,3")
    add("-n", type=common.positive, default=4, help="how many latents are chosen")
    add("--seed", type=common.whole, default=0, help="of the random ones")
    add("--texts", default="", metavar="FILE", help='positives: {"latent": ["text", ...]}')
    add("--endpoint", default="", metavar="URL", help=f"to ask for positives; key in ${texts.KEY}")
    add("--model", default="", help="the endpoint's model")
    add("--strengths", type=common.over_zero, nargs="+", default=STRENGTHS)
    add("--texts-each", type=common.positive, default=8, help="positives in each half")
    add("--length", type=common.positive, default=24, help="tokens of a text, at most")
    add("--contexts", type=common.positive, default=64, help="held-out contexts searched, at most")
    add("--spliced", action="store_true", help="steer the LM with the SAE spliced in")


def main(argv: list[str]) -> int:
    return common.command(argv, "steering", __doc__, options, evaluate)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
