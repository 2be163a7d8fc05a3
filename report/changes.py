"""What did a finetune change? Latent by latent."""

import os

import numpy as np
import pandas
import torch

from klsplice.errors import UserError
from klsplice.formats import read
from klsplice.storage import read_npz, read_run_json
from report import runs


def turned(folder: str) -> dict[str, np.ndarray]:
    """-> {"encoder": (F,), "decoder": (F,)}: the cosine of each latent's row to that before.

    folder: a run's. Raises UserError where the SAE that it started from cannot be had.
    """
    about = read_run_json(os.path.join(folder, "run.json"))
    if about["constants"]["ARCHITECTURE"] == "matryoshka" != about["source"]["architecture"]:
        raise UserError(f"the latents of {folder} were put in another order when it was converted")
    old = read.started_from(folder, about).weights()
    new = read.open_sae(os.path.join(folder, "sae"), "").weights()
    rows = {"encoder": "W_enc_FD", "decoder": "W_dec_FD"}
    cosine = torch.nn.functional.cosine_similarity  # in float64: most are near to 1
    return {p: cosine(old[n].double(), new[n].double(), dim=1).numpy() for p, n in rows.items()}


def latents(table: pandas.DataFrame) -> pandas.DataFrame:
    """A row a latent of each run: the cosines of its encoder's and decoder's rows to those before,
    and what is left to 1, its firing rate on the held-out tokens and its mean activation where it
    fires, before and after. Those that turned most come first. Raises UserError."""
    parts = []
    for _, run in table.iterrows():
        before, after = (read_npz(f"{run['folder']}/{when}.npz") for when in ("before", "after"))
        if before is None or after is None:
            raise UserError(f"{run['folder']} lacks before.npz or after.npz", "wanted a whole run")
        columns = {name: run[name] for name in ("name", *runs.varied(table))}
        columns |= {"latent": np.arange(len(before["fires"]))}
        for part, cosine_F in turned(run["folder"]).items():
            columns |= {f"cosine_{part}": cosine_F, f"turned_{part}": 1 - cosine_F}
        for array, name in (("fires", "rate"), ("mean", "mean")):
            columns |= {f"{name}_before": before[array], f"{name}_after": after[array]}
        parts.append(pandas.DataFrame(columns).sort_values("cosine_decoder"))
    return pandas.concat(parts, ignore_index=True)
