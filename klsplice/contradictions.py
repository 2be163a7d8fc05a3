"""What two constants say against each other."""

from klsplice import distributed
from klsplice.architectures import ARCHITECTURES


def contradictions(cfg) -> list[str]:
    """A line for each. cfg: settings.Config."""
    found = []
    if cfg.K > cfg.D_SAE:
        found.append(
            f"K = {cfg.K} is more than D_SAE = {cfg.D_SAE}: a token cannot use so many latents"
        )
    if cfg.CONTEXT < 2:
        found.append(f"CONTEXT = {cfg.CONTEXT}: wanted 2 or more, a prediction needs a next token")
    if cfg.TOKENS < cfg.BATCH * cfg.CONTEXT:
        step = cfg.BATCH * cfg.CONTEXT
        found.append(f"TOKENS = {cfg.TOKENS:,} is less than one step (BATCH x CONTEXT = {step:,})")
    if cfg.VAL_TOKENS < cfg.CONTEXT:
        found.append(f"VAL_TOKENS = {cfg.VAL_TOKENS:,} is less than one context ({cfg.CONTEXT:,})")
    if cfg.BATCH % cfg.MICRO_BATCH:
        found.append(f"BATCH = {cfg.BATCH} is not a multiple of MICRO_BATCH = {cfg.MICRO_BATCH}")
    if cfg.CLEAN_BATCH < cfg.BATCH and cfg.CLEAN_BATCH % cfg.MICRO_BATCH:
        what = f"CLEAN_BATCH = {cfg.CLEAN_BATCH} is no multiple of MICRO_BATCH = {cfg.MICRO_BATCH}"
        found.append(what)
    if cfg.BATCH % distributed.size():
        found.append(f"BATCH = {cfg.BATCH} is not a multiple of the {distributed.size()} processes")
    if cfg.SHUFFLE and (cfg.LOSS != "mse" or cfg.TRAIN != "sae"):
        found.append("SHUFFLE mixes residuals across contexts: it needs LOSS = mse and TRAIN = sae")
    if cfg.SHUFFLE and cfg.SHUFFLE % cfg.BATCH:
        found.append(f"SHUFFLE = {cfg.SHUFFLE} is not a multiple of BATCH = {cfg.BATCH}")
    if cfg.TRAIN == "lm_lora" and cfg.LOSS != "kl":
        found.append(f"TRAIN = lm_lora learns from the KL alone: set LOSS=kl (found {cfg.LOSS})")
    if cfg.KEEP == "outliers" and cfg.MORE_SAES:
        found.append("KEEP = outliers looks at one residual, MORE_SAES has several")
    if cfg.KEEP == "outliers" and cfg.SHUFFLE and distributed.size() > 1:
        found.append("KEEP = outliers and SHUFFLE do not go together on several processes")
    if cfg.MORE_SAES and cfg.TRAIN != "lm_lora":
        found.append("MORE_SAES (several layers at once) needs TRAIN = lm_lora")
    fresh = {name for name, row in ARCHITECTURES.items() if row.fresh}
    if cfg.SAE == "fresh" and cfg.ARCHITECTURE not in {"", *fresh}:
        what = f"ARCHITECTURE = {cfg.ARCHITECTURE}: no fresh one is trained here"
        found.append(what + "; start from a TopK run, SAE=runs/NAME, which is converted")
    if cfg.SAE == "fresh" and cfg.TRAIN != "sae":
        found.append(f"TRAIN = {cfg.TRAIN} needs a trained SAE, found SAE = fresh")
    return found
