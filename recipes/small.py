"""The overlay for a laptop: SmolLM2-135M on a CPU, with the text that comes with Python.

It sets model, device, data and sizes (RANK, BATCH and KEEP among them) and goes with every recipe,
after it, since some name a model of their own:
`python run.py recipes/kl_only.py recipes/small.py SAE=runs/demo-sae`. `make assets` builds what it
names. SmolLM2 packs without a BOS and has a sink at position 0 (a norm of 30,000 against a
median of 170); six of 441 contexts of topics.jsonl have a further one, of 2,500 to 26,000, at
positions 1 to 3, and a step with one of 26,000 had over 40 times the usual MSE. They keep theirs.
In runs this short no latent is dead (DEAD_AFTER), and AUXK does nothing.
"""

MODEL = "assets/smollm2"
MODEL_REVISION = ""
DEVICE = "cpu"
DTYPE = "float32"  # many CPUs have no bfloat16 instructions
LAYER = 15
D_SAE = 4096
K = 32
RANK = 16
KEEP = "outliers"
DATASET = "assets/topics.jsonl"  # 113k tokens; assets/text.jsonl has a million, of other kinds too
DATASET_REVISION = ""
CONTEXT = 256
TOKENS = 24_576
VAL_TOKENS = 4_096
BATCH = 4
MICRO_BATCH = 4
CLEAN_BATCH = 4
EVAL_BATCH = 8
HEAD_CHUNK = 1024
EVAL_EVERY = 12_288
LOG_EVERY = 5
WANDB_MODE = "offline"  # nothing is asked and nothing is sent; `wandb leet` shows it
