"""The same method on Pythia-160m, whose batches were 8 x 1024 in float32."""

MODEL = "EleutherAI/pythia-160m-deduped"
MODEL_REVISION = "main"
LAYER = 8
SAE = (
    "adamkarvonen/saebench_pythia-160m-deduped_width-2pow14_date-0108/"
    "TopK_pythia-160m-deduped__0108/resid_post_layer_8/trainer_2"
)
DTYPE = "float32"
BATCH = 8
MICRO_BATCH = 8
