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

Positives: the windows of held-out text in which a latent is most active, before and after together,
each relative to its largest; halves share no context. Or --texts, a JSON {"latent": [texts]}; or
--endpoint and --model, an OpenAI-compatible one, asked for texts like those windows. Latents: half
are those whose decoder row turned most in the finetune, half are drawn at random (--seed), out of
those active in enough windows; or --latents. The LM is not spliced unless --spliced, or LoRA on the
LM learned: that is made for the splice, and there "after" is the LM with LoRA.
"""

import argparse
import os
import sys

import numpy as np
import torch
from matplotlib.figure import Figure

import machine
from errors import UserError
from evals import common, texts
from splice import put, rows

QUESTION = "Does pushing along a latent make the model expect what it stands for, and only that?"
WHEN = ("before", "after")
STRENGTHS = (0.0125, 0.025, 0.05, 0.1, 0.2)
NEGATIVES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "negatives.json")


class Batch:
    """Texts as one batch: tokens_BL, padded on the right, which causal attention does not see.

    scored_BL: positions whose next token belongs to the text. target_N: those next tokens.
    """

    def __init__(self, run, ids: list[list[int]], length: int):
        bos = [int(run.tokens.val_SL[0, 0])] if run.tokens.bos else []
        ids = [(bos + list(x))[: length + len(bos)] for x in ids]
        if min(map(len, ids)) < 2:
            raise UserError("a text of fewer than two tokens", "there is no next token in it")
        width = max(map(len, ids))
        self.tokens_BL = torch.tensor([x + x[-1:] * (width - len(x)) for x in ids])
        self.scored_BL = torch.arange(width) < torch.tensor([[len(x) - 1] for x in ids])
        self.target_N = self.tokens_BL.roll(-1, dims=1)[self.scored_BL]
        self.active_N = run.tokens.active(self.tokens_BL)
        for name in ("tokens_BL", "scored_BL", "target_N", "active_N"):
            setattr(self, name, getattr(self, name).to(run.c.DEVICE))

    def log_likelihood(self, h_BLD, head) -> np.ndarray:
        """Mean over each text's tokens, from the final hidden state -> (B,) float64."""
        h_ND, parts = h_BLD[self.scored_BL], []
        for some_ND, target_N in zip(h_ND.split(head.chunk), self.target_N.split(head.chunk)):
            logits_NV = head.logits(some_ND, torch.float32)
            parts.append(-torch.nn.functional.cross_entropy(logits_NV, target_N, reduction="none"))
        text_N = self.scored_BL.nonzero()[:, 0]
        sum_B = torch.zeros(len(self.tokens_BL), dtype=torch.float64, device=h_ND.device)
        sum_B.index_add_(0, text_N, torch.cat(parts).double())
        return (sum_B / self.scored_BL.sum(1)).cpu().numpy()


@torch.no_grad()
def scorer(learner, batch: Batch, *, spliced: bool):
    """-> a function from pushes_SD to the change in each text's mean log-likelihood (S, B)."""
    splice = learner.splice
    seen = splice.clean(batch.tokens_BL)
    y_ND = rows(seen.x_BLD, batch.active_N)
    if spliced:
        y_ND, _ = learner.reconstruct(y_ND)

    @torch.no_grad()
    def score(push_D):
        h_BLD = splice.resume(put(seen.x_BLD, y_ND + push_D, batch.active_N), seen.calls)
        return batch.log_likelihood(h_BLD, splice.head)

    base_B = score(0)
    return lambda pushes_SD: np.stack([score(push_D) - base_B for push_D in pushes_SD])


def choose(a, enough_F: torch.Tensor, cosine_F: torch.Tensor) -> tuple[list[int], str]:
    """-> latents, and the rule by which they were chosen."""
    if a.latents:
        return a.latents, "given"
    fit = enough_F.nonzero()[:, 0].tolist()
    if not fit:
        what = f"no latent is active in {a.texts_each} windows of each half, before and after"
        raise UserError(what, "lower --texts-each, or raise --contexts")
    turned = sorted(fit, key=lambda f: float(cosine_F[f]))[: a.n // 2]
    turned = [f for f in turned if cosine_F[f] < 1 - 1e-6]  # none where the SAE did not learn
    rest = [f for f in fit if f not in turned]
    some = np.random.default_rng(a.seed).permutation(rest)[: a.n - len(turned)].tolist()
    rule = f"{len(turned)} whose decoder row turned most, {len(some)} at random"
    return turned + some, f"{rule}, of {len(fit)} active in {a.texts_each} windows of each half"


def positives(run, a, windows, latents, active) -> dict[int, tuple[Batch, np.ndarray, list]]:
    """{latent: (texts, which of them tune, the texts as read)}."""
    given = texts.from_json(a.texts) if a.texts else {}
    found = {}
    for latent in latents:
        score_W = sum(z_WF[:, latent] / z_WF[:, latent].max().clamp(min=1e-9) for z_WF in active)
        both_W = np.minimum(*(z_WF[:, latent].numpy() for z_WF in active)) > 0
        order_W = score_W.argsort(descending=True, stable=True).numpy()
        order_W = order_W[both_W[order_W]]
        halves = [order_W[windows.tuning_W[order_W] == tunes] for tunes in (True, False)]
        best_W = np.concatenate([half_W[: a.texts_each] for half_W in halves])
        ids, tuning_T = windows.tokens_WL[best_W].tolist(), windows.tuning_W[best_W]
        if a.texts or a.endpoint:
            read = given.get(str(latent)) if a.texts else None
            if a.endpoint:
                passages = run.tokenizer.batch_decode(ids)
                size = {"n": 2 * a.texts_each, "words": max(1, a.length // 2)}
                read = texts.from_endpoint(a.endpoint, a.model, passages, **size)
            if read is None:
                raise UserError(f"{a.texts} has no texts for latent {latent}", texts.SHAPE)
            ids = run.tokenizer(read, add_special_tokens=False)["input_ids"]
            tuning_T = np.arange(len(read)) % 2 == 0
        if tuning_T.all() or not tuning_T.any():
            what = f"latent {latent} is not active in windows of both halves, before and after"
            raise UserError(what, "choose another, raise --contexts, or give --texts")
        batch = Batch(run, ids, a.length)
        found[latent] = batch, tuning_T, run.tokenizer.batch_decode(ids)
    return found


def tuned(gain_ST: np.ndarray, tuning_T: np.ndarray) -> tuple[int, np.ndarray]:
    """-> index of the strength that raises the tuning half most; the other half's gains (S, R)."""
    return int(gain_ST[:, tuning_T].mean(1).argmax()), gain_ST[:, ~tuning_T]


def evaluate(a) -> dict:
    run = common.Finished(a.runs, a.device)
    spliced = a.spliced or run.c.TRAIN == "lm_lora"
    if run.c.MORE_SAES:
        raise UserError("steering with SAEs at several layers is not done", "wanted no MORE_SAES")
    windows = texts.Windows(run, a.contexts, a.length)
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
    texts_of = positives(run, a, windows, latents, active)
    sets = texts.from_json(NEGATIVES)
    everything = [t for of_set in sets.values() for t in of_set]
    ids = run.tokenizer(everything, add_special_tokens=False)["input_ids"]
    negative, set_T = Batch(run, ids, a.length), np.repeat([*sets], [*map(len, sets.values())])

    size_S = norm[0] * torch.tensor(a.strengths, device=run.c.DEVICE)
    gain = {}  # (when, latent): strength index, positives (S, R), negatives (S, T)
    for i, (when, learner) in enumerate(run.stages()):
        of_negatives = scorer(learner, negative, spliced=spliced)
        for latent, (batch, tuning_T, _) in texts_of.items():
            pushes_SD = size_S[:, None] * row[i][latent].to(run.c.DEVICE)
            gain_ST = scorer(learner, batch, spliced=spliced)(pushes_SD)
            gain[when, latent] = *tuned(gain_ST, tuning_T), of_negatives(pushes_SD)
    kept = {str(latent): read for latent, (_, _, read) in texts_of.items()}
    about = {"rule": rule, "residual norm": norm[0], "spliced": spliced, "positives": kept}
    about |= {"question": QUESTION, "device": machine.device_name(run.c.DEVICE)}
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


def draw(found: dict, path: str) -> None:
    """Gain against strength, mean over latents, with its interval."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    strengths = found["figure"]["strengths"]
    for panel, kind in zip(axes, ("positives", "negatives")):
        for when, style, colour in zip(WHEN, ("s--", "o-"), ("0.55", "0.1")):
            mean, low, high = zip(*found["figure"]["curves"][f"{kind}, {when}"])
            panel.plot(strengths, mean, style, color=colour, label=when, markersize=4)
            panel.fill_between(strengths, low, high, color=colour, alpha=0.2, linewidth=0)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_xticks(strengths, [f"{s:g}" for s in strengths])
        panel.set(title=kind, xlabel="strength, mean residual norms")
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("log-likelihood gained, nats per token")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def options(parser) -> None:
    def strength(text):
        value = float(text)
        if not 0 < value < 1e3:
            raise argparse.ArgumentTypeError(f"{text}: wanted a number over 0")
        return value

    add = parser.add_argument
    add("runs", metavar="runs/NAME", help="a finished run")
    add("--latents", type=lambda text: [int(x) for x in text.split(",")], help="1,2,3")
    add("-n", type=common.positive, default=4, help="how many latents are chosen")
    add("--seed", type=int, default=0, help="of the random ones")
    add("--texts", default="", metavar="FILE", help='positives: {"latent": ["text", ...]}')
    add("--endpoint", default="", metavar="URL", help=f"to ask for positives; key in ${texts.KEY}")
    add("--model", default="", help="the endpoint's model")
    add("--strengths", type=strength, nargs="+", default=STRENGTHS)
    add("--texts-each", type=common.positive, default=8, help="positives in each half")
    add("--length", type=common.positive, default=24, help="tokens of a text, at most")
    add("--contexts", type=common.positive, default=64, help="held-out contexts searched, at most")
    add("--spliced", action="store_true", help="steer the LM with the SAE spliced in")
    add("--device", default="", help="default: the run's own")


def main(argv: list[str]) -> int:
    parts = {"options": options, "evaluate": evaluate, "draw": draw}
    return common.command(argv, name="steering", doc=__doc__, **parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
