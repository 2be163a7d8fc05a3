"""What a run is called where RUN_NAME does not say it."""

import os
import re
from collections import Counter
from functools import partial
from hashlib import sha256

from klsplice.errors import UserError
from klsplice.settings import FREE, Config, name_part
from klsplice.site import RESIDUAL

PLAIN = {"small", "gemma3", "kl_mse", "kl_only", "mse_only"}  # recipes that a name tells
# Constants that a name tells, or that may differ within a run.
TOLD = {"MODEL", "LAYER", "SITE", "ARCHITECTURE", "D_SAE", "LOSS", "SEED", "RUN_NAME", *FREE}
LONGEST = 200  # bytes


def run_name(cfg: Config, find_source) -> str:
    """RUN_NAME, or model_layer_architecture_k_width_loss[_recipe or what learns][_words]_seed.

    words: of the command line, as far as the rest does not tell them. Never of a time, so that the
    same command finds its run again. find_source() -> the SAE's formats.read.Source; asked only
    where the name needs it. Raises what it raises.
    """
    if cfg.RUN_NAME:
        return cfg.RUN_NAME
    from sae import ARCHITECTURES  # here, since it loads torch

    fresh, trained = cfg.SAE == "fresh", cfg.TRAIN != "sae"
    architecture, k, width = cfg.ARCHITECTURE or "topk", cfg.K, cfg.D_SAE
    if not fresh:
        source = find_source()
        architecture, k, width = cfg.ARCHITECTURE or source.architecture, source.k, source.d_sae
    parts = [os.path.basename(os.path.normpath(cfg.MODEL)), f"l{cfg.LAYER}", architecture]
    if cfg.SITE != RESIDUAL:
        parts.insert(2, cfg.SITE.replace(":", "-").replace(",", "-"))
    if len(cfg.saes) > 1:
        parts.append(f"x{len(cfg.saes)}")
    told = set(TOLD)
    if k is not None and ARCHITECTURES[architecture].has_k:
        parts.append(f"k{k}")
        told.add("K")
    parts.append(str(width) if width % 1024 else f"{width // 1000}k")  # 4096 is 4k, and 4000 is not
    parts.append(cfg.LOSS.replace("+", "-"))
    recipes = [recipe for recipe in cfg.recipes if recipe not in PLAIN]
    parts += recipes
    if not recipes:
        told |= {"SAE", "TRAIN"} if fresh else {"TRAIN"}
        if fresh or trained:
            parts.append("fresh" if fresh else cfg.TRAIN)
    if trained:
        parts.append(f"r{cfg.RANK}")
        told.add("RANK")
    parts += [name_part(name, getattr(cfg, name)) for name in sorted(cfg.said - told)]
    return short("_".join(parts), f"_s{cfg.SEED}", longest=LONGEST)


def check_differ(configs: list[Config], find_source) -> None:
    """Raises UserError where two runs of one command have one name. find_source: of a Config."""
    names = [os.path.join(cfg.RUNS, run_name(cfg, partial(find_source, cfg))) for cfg in configs]
    name, times = Counter(map(os.path.realpath, names)).most_common(1)[0]
    if times > 1:
        hint = "leave one out, or give each a RUN_NAME, with its words after a --"
        raise UserError(f"two runs of this command are called {name}", hint)


def short(start: str, end: str = "", *, longest: int) -> str:
    """start + end, of `longest` bytes at most: a digest stands for what is cut off."""
    text, room = os.fsencode(start), longest - len(end)
    if len(text) > room:
        start = text[: room - 9].decode(errors="ignore") + "-" + sha256(text).hexdigest()[:8]
    return start + end


def without_seed(name: str) -> str:
    """A run's name without its seed: what seeds are called in common."""
    return re.sub(r"[-_]s\d+$|_SEED\d+(?=_|$)", "", name)
