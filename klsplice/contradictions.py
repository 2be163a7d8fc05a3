"""What constants say against each other."""

from klsplice import distributed

FILES = (".pt", ".pth", ".safetensors")  # may not say their k


def contradictions(cfg) -> list[str]:
    """A line for each. cfg: settings.Config."""
    found = []
    if cfg.K > cfg.D_SAE:
        found.append(
            f"K = {cfg.K} is more than D_SAE = {cfg.D_SAE}: a token cannot use so many latents"
        )
    if cfg.CONTEXT < 2:
        found.append(f"CONTEXT = {cfg.CONTEXT}: wanted 2 or more, a prediction needs a next token")
    if cfg.TOKENS and cfg.TOKENS < cfg.BATCH * cfg.CONTEXT:
        step = cfg.BATCH * cfg.CONTEXT
        found.append(f"TOKENS = {cfg.TOKENS:,} is less than one step (BATCH x CONTEXT = {step:,})")
    if not cfg.TOKENS and cfg.SAE == "fresh":
        found.append("TOKENS = 0 measures an SAE as it is: set SAE (it is fresh)")
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
    if cfg.KEEP == "outliers" and cfg.SHUFFLE and distributed.size() > 1:
        found.append("KEEP = outliers and SHUFFLE go together on one process alone: set KEEP=first")
    row = ARCHITECTURES.get(cfg.ARCHITECTURE or "topk")
    needless = set() if fresh else of_fresh - ({"K"} if cfg.SAE.endswith(FILES) else set())
    table = [  # whether it is so, the constants that it is about, what is wrong
        (cfg.K > cfg.D_SAE, "K D_SAE", "a token cannot use more latents than there are"),
        (cfg.CONTEXT < 2, "CONTEXT", "wanted 2 or more, a prediction needs a next token"),
        (0 < cfg.TOKENS < cfg.BATCH * cfg.CONTEXT, "TOKENS BATCH CONTEXT", "not even one step"),
        (fresh and not cfg.TOKENS, "TOKENS SAE", "TOKENS = 0 measures an SAE that there is"),
        (cfg.VAL_TOKENS < cfg.CONTEXT, "VAL_TOKENS CONTEXT", "not even one context"),
        (cfg.BATCH % cfg.MICRO_BATCH, "BATCH MICRO_BATCH", "wanted a multiple of MICRO_BATCH"),
        (
            cfg.CLEAN_BATCH < cfg.BATCH and cfg.CLEAN_BATCH % cfg.MICRO_BATCH,
            "CLEAN_BATCH BATCH MICRO_BATCH",
            "wanted BATCH or more, or a multiple of MICRO_BATCH",
        ),
        (cfg.BATCH % processes, "BATCH", f"wanted a multiple of the {processes} processes"),
        (shuffled and cfg.LOSS != "mse", "SHUFFLE LOSS", "a KL needs whole contexts: LOSS=mse"),
        (shuffled and trained, "SHUFFLE TRAIN", "shuffled tokens train an SAE alone: TRAIN=sae"),
        (cfg.SHUFFLE % cfg.BATCH, "SHUFFLE BATCH", "wanted a multiple of BATCH"),
        (
            cfg.KEEP == "outliers" and shuffled and processes > 1,
            "KEEP SHUFFLE",
            "they go together on one process alone: set KEEP=first",
        ),
        (
            cfg.TRAIN == "lm_lora" and cfg.LOSS != "kl",
            "TRAIN LOSS",
            "LoRA on the LM learns from the KL alone: set LOSS=kl",
        ),
        (
            fresh and not (row and row.fresh),
            "SAE ARCHITECTURE",
            "no fresh one is trained; a TopK run, SAE=runs/NAME, can be converted",
        ),
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


def doubtful(cfg) -> list[str]:
    """A line for each constant that cannot be meant so: one that was set and is unused in this run,
    a warm-up longer than the run."""
    idle = {}
    of_others = {name for row in TRAIN.values() for name in row.constants}
    for name in of_others - set(TRAIN[cfg.TRAIN].constants):
        idle[name] = f"TRAIN = {cfg.TRAIN}"
    if cfg.LOSS == "mse":
        idle |= dict.fromkeys(("LOGITS", "HEAD_CHUNK"), "LOSS = mse but in evaluations")
    if cfg.DTYPE == "float32":
        idle["LOGITS"] = "DTYPE = float32"
    if cfg.TRAIN != "sae" or cfg.ARCHITECTURE not in ("", "jumprelu"):
        idle["JUMPRELU_THRESHOLD"] = "what learns here"
    if cfg.SAE == "fresh":
        idle |= dict.fromkeys(("SAE_REVISION", "CHECK_SAE"), "SAE = fresh")
        if cfg.ARCHITECTURE != "relu":
            idle["L1"] = f"ARCHITECTURE = {cfg.ARCHITECTURE or 'topk'}"
    if os.path.exists(cfg.DATASET) or glob.glob(cfg.DATASET):
        here = dict.fromkeys(("DATASET_REVISION", "DATA_FILES", "SPLIT"), "a local DATASET")
        idle |= {name: why for name, why in here.items() if getattr(cfg, name)}
    if not cfg.TOKENS:
        trained = (
            "LR",
            "LOSS",
            "SCHEDULE",
            "WARMUP",
            "WEIGHT_DECAY",
            "CLIP",
            "PASSES",
            "SKIP_TOKENS",
        )
        idle |= dict.fromkeys((*trained, "EVAL_EVERY", "SAVE_EVERY", "LOG_EVERY"), "TOKENS = 0")
    if not cfg.WANDB_PROJECT:
        idle["WANDB_MODE"] = "WANDB_PROJECT empty"
    found = [f"{name} has no effect with {idle[name]}" for name in sorted(idle.keys() & cfg.SAID)]
    steps = cfg.TOKENS // (cfg.BATCH * cfg.CONTEXT) * cfg.PASSES
    if not 0 < steps <= cfg.WARMUP:
        return ""
    return f"WARMUP = {cfg.WARMUP:,} is not over when the run ends, at step {steps:,}"
