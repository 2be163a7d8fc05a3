"""Are they the same features? Latent by latent, before and after the finetune.

    python -m evals.features runs/<name> [--out latents.csv]

On held-out tokens, each read off the clean LM's residual: cosine of a latent's decoder row, and of
its encoder row, to the one before; Jaccard overlap of the tokens on which it fires; which share of
the ten contexts in which it is strongest is the same; latents that fired before and no longer do
(died), or the other way (woke). Where the encoder does not learn, what fires is the same by
definition.

And is the SAE's error worse for the LM than any error of its size? KL(clean || spliced), nats a
token, with the SAE's error, and with one of its norm at each position in a random direction, the
same one before and after.

--out has a row a latent, those whose decoder row turned most first; it fires on so many tokens.
"""

import sys

import numpy as np
import pandas as pd
import torch
from torch import nn

from evals import common
from evals.open import Finished
from klsplice import machine
from klsplice.lm.head import score_head
from klsplice.lm.splice import next_tokens, rows

SAME = ("decoder cosine", "encoder cosine", "Jaccard of tokens", "strongest contexts")
ENCODER_STAYS = ("adapter", "lm_lora")  # TRAIN


class RandomError(nn.Module):
    """An SAE's stand-in that errs by as much at each position, in a random direction."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.rng = model, torch.Generator().manual_seed(0)

    def forward(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y_ND, z_NF = self.model(x_ND)
        norm_N1 = (y_ND.float() - x_ND.float()).norm(dim=1, keepdim=True)
        e_ND = torch.randn(x_ND.shape, generator=self.rng).to(x_ND.device)
        return x_ND.float() + nn.functional.normalize(e_ND, dim=1) * norm_N1, z_NF


@torch.no_grad()
def measure(run, learner, n: int) -> dict:
    """On n contexts -> KL of the SAE's error and of a random one; fired, token x F + latent of all
    that fire; largest_SF, a latent's largest in each context; decoder and encoder, rows (F, D)."""
    sae, tokens, fired, largest = learner.sae, 0, [], []
    models = {"SAE": learner.model, "random": RandomError(learner.model)}
    kl = {name: [] for name in models}
    for tokens_BL, active_N in run.batches(n):
        clean, target_N = learner.splice.clean(tokens_BL), next_tokens(tokens_BL).flatten()
        _, z_NF = learner.reconstruct(rows(clean.x_BLD, active_N))
        fired.append(z_NF.flatten().nonzero()[:, 0].cpu() + tokens * sae.d_sae)
        context_N = active_N // tokens_BL.shape[1]
        largest += [z_NF[context_N == b].amax(0).cpu() for b in range(len(tokens_BL))]
        tokens += len(z_NF)
        for name, learner.model in models.items():
            h_ND = learner.spliced(clean, active_N)[0].h_BLD.flatten(0, 1)
            scores = score_head(clean.h_BLD.flatten(0, 1), h_ND, target_N, learner.splice.head)
            kl[name].append(scores[0].cpu())
        learner.model = models["SAE"]
    return {
        "kl": {name: float(torch.cat(kl_N).mean()) for name, kl_N in kl.items()},
        "fired": torch.cat(fired).numpy(),
        "largest_SF": torch.stack(largest),
        "decoder": sae.W_dec_FD.detach().float().cpu(),
        "encoder": sae.W_enc_FD.detach().float().cpu(),
    }


def strongest(z_SF: torch.Tensor) -> torch.Tensor:
    """Mask (S, F) of the contexts in which a latent is strongest, ten or as many as it fires in."""
    top = z_SF.topk(min(10, len(z_SF)), dim=0)
    return torch.zeros_like(z_SF, dtype=torch.bool).scatter_(0, top.indices, top.values > 0)


def compare(before: dict, after: dict) -> pd.DataFrame:
    """What `measure` gives of two -> a row a latent; NaN for what one that never fires has not."""
    frame = pd.DataFrame(index=pd.RangeIndex(len(before["decoder"]), name="latent"))
    for part in ("decoder", "encoder"):
        cosine_F = nn.functional.cosine_similarity(before[part], after[part], dim=1)
        frame[f"{part} cosine"] = cosine_F.double().numpy()
    both = np.intersect1d(before["fired"], after["fired"], assume_unique=True)
    for name, x in (("before", before["fired"]), ("after", after["fired"]), ("both", both)):
        frame[f"fires {name}"] = np.bincount(x % len(frame), minlength=len(frame))
    either_F = frame["fires before"] + frame["fires after"] - frame["fires both"]
    frame["Jaccard of tokens"] = frame["fires both"] / either_F
    old_SF, new_SF = strongest(before["largest_SF"]), strongest(after["largest_SF"])
    most_F = torch.maximum(old_SF.sum(0), new_SF.sum(0))
    frame["strongest contexts"] = ((old_SF & new_SF).sum(0) / most_F).double().numpy()
    return frame.sort_values("decoder cosine", kind="stable")


def evaluate(a) -> dict:
    run = Finished(a.runs, a.device)
    n = min(a.contexts, len(run.tokens.val_SL))
    before, after = (measure(run, learner, n) for _, learner in run.stages())
    if run.cfg.TRAIN in ENCODER_STAYS or run.cfg.FREEZE == "encoder":
        after |= {name: before[name] for name in ("fired", "largest_SF")}
    frame = compare(before, after)
    if a.out:
        frame.to_csv(a.out)
    table, numbers = [["", "mean", "lowest 5 %", "before", "after"]], {}
    for name in SAME:
        mean, low = float(frame[name].mean()), float(frame[name].quantile(0.05))
        table.append([name, f"{mean:.4f}", f"{low:.4f}", "", ""])
        numbers |= {f"{name}, mean": mean, f"{name}, lowest 5 %": low}
    old_F, new_F = frame["fires before"] > 0, frame["fires after"] > 0
    pairs = {"latents that fire": (int(old_F.sum()), int(new_F.sum()))}
    for name, label in (("SAE", "KL, the SAE's error"), ("random", "KL, a random error")):
        pairs[label] = before["kl"][name], after["kl"][name]
    pairs["KL, ratio"] = tuple(x["kl"]["SAE"] / x["kl"]["random"] for x in (before, after))
    for label, pair in pairs.items():
        table.append([label, "", "", *(f"{value:.5g}" for value in pair)])
        numbers |= {f"{label}, before": pair[0], f"{label}, after": pair[1]}
    numbers |= {"died": int((old_F & ~new_F).sum()), "woke": int((new_F & ~old_F).sum())}
    note = f"latents that died: {numbers['died']:,}, that woke: {numbers['woke']:,}"
    answer = {"note": note, "numbers": numbers, "table": table}
    return answer | {"device": machine.device_name(run.cfg.DEVICE)}


def options(parser) -> None:
    common.one_run(parser)
    parser.add_argument("--out", default="", metavar="FILE", help="a .csv with a row a latent")
    parser.add_argument("--contexts", type=int, default=64, help="held-out contexts, at most")


def main(argv: list[str]) -> int:
    return common.command(argv, "features", __doc__, options, evaluate)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
