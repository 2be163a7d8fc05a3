"""What constants say against each other."""

from klsplice import distributed

FILES = (".pt", ".pth", ".safetensors")  # may not say their k


def contradictions(cfg, of_fresh: set[str]) -> list[str]:
    """A line for each. cfg: settings.Config. of_fresh: what was set that a fresh SAE alone has."""
    from sae import ARCHITECTURES  # here, since it loads torch

    fresh, trained = cfg.SAE == "fresh", cfg.TRAIN != "sae"
    processes, shuffled, lm_alone = distributed.size(), cfg.SHUFFLE > 0, cfg.TRAIN == "lm_lora"
    parts = cfg.CLEAN_BATCH < cfg.BATCH and cfg.CLEAN_BATCH % cfg.MICRO_BATCH
    apart = cfg.KEEP == "outliers" and shuffled and processes > 1
    row = ARCHITECTURES[cfg.ARCHITECTURE or "topk"]
    needless = set() if fresh else of_fresh - ({"K"} if cfg.SAE.endswith(FILES) else set())
    table = [  # whether it is so, the constants that it is about, what is wrong
        (cfg.K > cfg.D_SAE, "K D_SAE", "a token cannot use more latents than there are"),
        (cfg.CONTEXT < 2, "CONTEXT", "wanted 2 or more, a prediction needs a next token"),
        (0 < cfg.TOKENS < cfg.BATCH * cfg.CONTEXT, "TOKENS BATCH CONTEXT", "not even one step"),
        (fresh and not cfg.TOKENS, "TOKENS SAE", "TOKENS = 0 measures an SAE that there is"),
        (cfg.VAL_TOKENS < cfg.CONTEXT, "VAL_TOKENS CONTEXT", "not even one context"),
        (cfg.BATCH % cfg.MICRO_BATCH, "BATCH MICRO_BATCH", "wanted a multiple of MICRO_BATCH"),
        (parts, "CLEAN_BATCH BATCH MICRO_BATCH", "wanted BATCH or a multiple of MICRO_BATCH"),
        (cfg.BATCH % processes, "BATCH", f"wanted a multiple of the {processes} processes"),
        (shuffled and cfg.LOSS != "mse", "SHUFFLE LOSS", "a KL needs whole contexts: LOSS=mse"),
        (shuffled and trained, "SHUFFLE TRAIN", "shuffled tokens train an SAE alone: TRAIN=sae"),
        (cfg.SHUFFLE % cfg.BATCH, "SHUFFLE BATCH", "wanted a multiple of BATCH"),
        (apart, "KEEP SHUFFLE", "they go together on one process alone: set KEEP=first"),
        (lm_alone and cfg.LOSS != "kl", "TRAIN LOSS", "the LM learns from the KL alone: LOSS=kl"),
        (fresh and not row.fresh, "SAE ARCHITECTURE", "none is trained; convert a TopK run's SAE"),
        (fresh and trained, "SAE TRAIN", "it needs a trained SAE"),
        (cfg.FREEZE != "none" and trained, "FREEZE TRAIN", "halves of an SAE, for TRAIN=sae"),
        (cfg.MSE_WEIGHT != 1 and cfg.LOSS != "kl+mse", "MSE_WEIGHT LOSS", "for LOSS=kl+mse alone"),
        (needless, " ".join(sorted(needless)), "for SAE=fresh alone; a loaded SAE has its own"),
    ]
    return [
        f"{', '.join(f'{name} = {getattr(cfg, name)}' for name in names.split())}: {problem}"
        for wrong, names, problem in table
        if wrong
    ]


def long_warm_up(cfg) -> str:
    """What to say of a warm-up that is longer than the run; "" of others."""
    steps = cfg.TOKENS // (cfg.BATCH * cfg.CONTEXT) * cfg.PASSES
    said = f"WARMUP = {cfg.WARMUP:,} is not over when the run ends, at step {steps:,}"
    return said if 0 < steps <= cfg.WARMUP else ""
