"""What a run is called where RUN_NAME does not say it."""

import os
import re
from hashlib import sha256

from klsplice.architectures import ARCHITECTURES
from klsplice.settings import FREE, Config, word

PLAIN = {"small", "gemma3", "kl_mse", "kl_only", "mse_only"}  # recipes that a name tells
# Constants that a name tells, or that may differ within a run.
TOLD = {"MODEL", "LAYER", "ARCHITECTURE", "LOSS", "SEED", "RUN_NAME", *FREE}
LONGEST = 200  # bytes


def run_name(cfg: Config, find_source) -> str:
    """RUN_NAME, or model_layer_architecture_k_width_loss[_recipe or what learns][_words]_seed.

    words: of the command line, as far as the rest does not tell them, so that each run of a sweep
    has a name of its own. Never of a time, so that the same command finds its run again.
    find_source() -> the SAE's formats.read.Source; it is asked only where the name needs it, and
    may raise UserError.
    """
    if cfg.RUN_NAME:
        return cfg.RUN_NAME
    architecture, k, width = cfg.ARCHITECTURE or "topk", cfg.K, cfg.D_SAE
    if cfg.SAE != "fresh":
        source = find_source()
        architecture, k, width = cfg.ARCHITECTURE or source.architecture, source.k, source.d_sae
    parts, told = [os.path.basename(os.path.normpath(cfg.MODEL)), f"l{cfg.LAYER}"], {*TOLD}
    parts.append(architecture)
    if k is not None and ARCHITECTURES[architecture].has_k:
        parts.append(f"k{k}")
        told.add("K")
    parts.append(f"{width // 1000}k" if width >= 1000 else str(width))
    if width < 1000 or width % 1000 == 0 or width.bit_count() == 1:  # 4100 is not told by 4k
        told.add("D_SAE")
    parts.append(cfg.LOSS.replace("+", "-"))
    recipes = [recipe for recipe in cfg.RECIPES if recipe not in PLAIN]
    if recipes:
        parts += recipes
    elif cfg.SAE == "fresh":  # TRAIN is sae
        parts.append("fresh")
        told |= {"TRAIN", "SAE"}
    else:
        parts += [cfg.TRAIN] if cfg.TRAIN != "sae" else []
        told.add("TRAIN")
    if cfg.TRAIN != "sae":
        parts.append(f"r{cfg.RANK}")
        told.add("RANK")
    parts += [word(name, getattr(cfg, name)) for name in sorted({*cfg.SAID} - told)]
    return short("_".join(parts), f"_s{cfg.SEED}", longest=LONGEST)


def short(start: str, end: str = "", *, longest: int) -> str:
    """start + end, of `longest` bytes at most: a digest stands for what is cut off."""
    text, room = os.fsencode(start), longest - len(end)
    if len(text) > room:
        start = text[: room - 9].decode(errors="ignore") + "-" + sha256(text).hexdigest()[:8]
    return start + end


def without_seed(name: str) -> str:
    """A run's name without its seed: what the seeds of an experiment have in common."""
    return re.sub(r"[-_]s\d+$", "", name)
