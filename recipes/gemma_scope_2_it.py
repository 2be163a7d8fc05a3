"""A Gemma Scope 2 SAE in an instruction-tuned Gemma 3, on chats, BOS, EOS and padding kept out."""

MODEL = "google/gemma-3-1b-it"
MODEL_REVISION = "main"
LAYER = 13
SAE = "google/gemma-scope-2-1b-it/resid_post/layer_13_width_16k_l0_medium"
DATASET = "HuggingFaceH4/ultrachat_200k"
DATASET_REVISION = "main"
SPLIT = "train_sft"
TEXT_KEY = "messages"
KEEP = "special"
