"""What did a finetune change? The rows of the SAE, and the loss of each held-out token."""

import os

import numpy as np
import torch

from klsplice.errors import UserError
from klsplice.formats import read
from klsplice.storage import read_run_json
from report import tables


def turned(folder: str) -> dict[str, np.ndarray]:
    """-> {"encoder": (F,), "decoder": (F,)}: the cosine of each latent's row to that before.

    folder: a run's. Raises UserError where the SAE that it started from cannot be had.
    """
    about = _about(folder)
    c, source = about["constants"], about["source"]
    if c["ARCHITECTURE"] == "matryoshka" != source["architecture"]:
        raise UserError(f"the latents of {folder} were put in another order when it was converted")
    old = read.started_from(folder, about).weights()
    new = read.open_sae(os.path.join(folder, "sae"), "").weights()
    rows = {"encoder": "W_enc_FD", "decoder": "W_dec_FD"}
    return {
        part: torch.nn.functional.cosine_similarity(old[n], new[n], dim=1).numpy()
        for part, n in rows.items()
    }


def latents(folder: str) -> dict[str, np.ndarray]:
    """-> columns, a row a latent: its index, the cosines of its encoder's and decoder's rows to
    those before, its firing rate on the held-out tokens and its mean activation where it fires,
    before and after. Those that turned most come first. Raises UserError."""
    before, after = tables.losses_of(folder)
    if "fires" not in before:
        what = f"{folder}/before.npz has no firing rates"
        raise UserError(what, "it was written before they were; make the run again")
    columns = {f"cosine_{part}": found for part, found in turned(folder).items()}
    for name, title in (("fires", "rate"), ("mean", "mean")):
        columns |= {f"{title}_before": before[name], f"{title}_after": after[name]}
    order = np.argsort(columns["cosine_decoder"])
    return {"latent": order} | {name: column[order] for name, column in columns.items()}


def losses(folder: str, *, fell: int, rose: int) -> tuple[list[tuple], float]:
    """-> [(context, next token, clean, before, after)], losses in nats of the predictions that
    gained most and of those that lost most; and the share of all that gained.

    folder: a run's, whose before.npz and after.npz are compared. Raises UserError.
    """
    before, after = tables.losses_of(folder)
    if "tokens" not in before:
        raise UserError(f"{folder}/before.npz holds no tokens", "it was written before they were")
    gain_SL = (before["ce"] - after["ce"])[:, :-1]  # the last position predicts nothing
    order = np.argsort(-gain_SL, axis=None)
    text, found = _decoder(folder), []
    for at in (*order[:fell], *order[len(order) - rose :]):
        s, i = np.unravel_index(at, gain_SL.shape)
        ids = before["tokens"][s, max(0, i - 11) : i + 2]
        three = (float(x[s, i]) for x in (before["ce_clean"], before["ce"], after["ce"]))
        found.append((text(ids[:-1]), text(ids[-1:]), *three))
    return found, float((gain_SL > 0).mean())


def markdown(found: list[tuple], share: float) -> str:
    """`losses` as a table."""
    lines = ["| context | next token | clean | before | after |", "| --- | --- |" + " ---: |" * 3]
    for *texts, clean, before, after in found:
        cells = [f"`{text.replace('`', ' ').replace('|', '¦')}`" for text in texts]
        lines.append(
            "| " + " | ".join([*cells, f"{clean:.2f} | {before:.2f} | {after:.2f}"]) + " |"
        )
    return "\n".join([*lines, "", f"The loss fell on {share:.1%} of the held-out tokens.", ""])


def _about(folder: str) -> dict:
    return read_run_json(os.path.join(folder, "run.json"))


def _decoder(folder: str):
    """-> ids to one line of text, by the run's tokeniser; to the ids where that is not here."""
    import transformers

    c = _about(folder)["constants"]
    local = {"local_files_only": True, "revision": c["MODEL_REVISION"] or "main"}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(c["MODEL"], **local)
    except (OSError, ValueError):
        print(f"note: the tokeniser of {c['MODEL']} is not here; tokens are shown by their ids")
        return lambda ids: " ".join(map(str, ids))
    shown = {"\n": "↵", "\t": "⇥"}
    return lambda ids: "".join(
        x if x.isprintable() else shown.get(x, "·") for x in tokenizer.decode(ids)
    )
