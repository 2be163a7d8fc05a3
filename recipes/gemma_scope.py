"""Gemma Scope's JumpReLU SAEs, thresholds frozen; they were not trained on BOS."""

SAE = "google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"
SAE_REVISION = "main"
KEEP = "special"
