"""Finetune a sparse autoencoder (SAE) so that it is faithful to the language model it explains.

An SAE trained on mean squared error raises the LM's cross-entropy when its reconstruction stands in
for the residual stream. A short finetune on KL + MSE (arXiv 2503.17272, the last 25M tokens of
training) closes a good part of that gap. This program does it: edit the constants, type

    python run.py                                     # Gemma-2-2B, SAE Bench TopK 65k; one GPU
    python run.py recipes/relu.py LR=1e-4             # a recipe is a few constants in a file
    make demo                                         # SmolLM2-135M on a laptop CPU, no account

and read the result in the run's folder (runs/<name>/results.json) and in wandb.
"""

import signal
import sys

# ---- model -----------------------------------------------------------------------------------
MODEL = "google/gemma-2-2b"  # Hub id or local folder of a causal LM (paper)
MODEL_REVISION = "c5ebcd40d208330abc697524c919956e692655cf"  # "" for a local folder
DTYPE = "bfloat16"  # of the frozen LM and the SAE's products; the SAE's weights are float32
DEVICE = "cuda"  # or "cpu", "cuda:1"; never changed silently
LAYER = 12  # 0-based: the SAE reads the residual stream after this block (paper)

# ---- SAE -------------------------------------------------------------------------------------
# A folder on the Hub (owner/repo/folder), a local folder, an earlier run's folder, or "fresh".
SAE = (
    "canrager/saebench_gemma-2-2b_width-2pow16_date-0107/"
    "gemma-2-2b_top_k_width-2pow16_date-0107/resid_post_layer_12/trainer_2"
)
SAE_REVISION = "main"  # the commit it stood for is written to run.json
CHECK_SAE = True  # stop when the SAE does not seem to belong to this model, layer and scale
KEEP = "none"  # none, special, first: positions whose residual stays original and out of the loss
# Of a fresh SAE: topk (""), batchtopk, relu. A given TopK becomes batchtopk, jumprelu, matryoshka.
ARCHITECTURE = ""
D_SAE = 65_536  # latents of a fresh SAE
K = 80  # active latents a token of a fresh SAE; of a fresh ReLU the target

# ---- data ------------------------------------------------------------------------------------
DATASET = "monology/pile-uncopyrighted"  # Hub id, or local .jsonl .jsonl.zst .parquet .txt .npy
DATASET_REVISION = "3be90335b66f24456a5d6659d9c8d208c0357119"  # "" for local files
DATA_FILES = ""  # of a Hub dataset: which files (glob); "" = the default ones
SPLIT = "train"  # of a Hub dataset
TEXT_KEY = "text"  # field with the text, or with a list of chat messages
CONTEXT = 1024  # tokens a sequence (paper)
TOKENS = 25_000_000  # to train on (paper), rounded down to whole steps
PASSES = 1  # how often those tokens are trained on
SKIP_TOKENS = 0  # training tokens to leave out before the first one
VAL_TOKENS = 1_000_000  # held out, the first documents (paper), rounded down to whole contexts

# ---- method ----------------------------------------------------------------------------------
TRAIN = "sae"  # what learns: sae, adapter, sae_lora, lm_lora
LOSS = "kl+mse"  # kl+mse: 0.5 (MSE + alpha KL), alpha = MSE / KL detached; mse; kl
BATCH = 2  # sequences a step, over all processes (paper)
LR = 5e-5  # AdamW (paper)
SCHEDULE = "linear"  # linear: LR (1 - step / steps) (paper); constant
WARMUP = 0  # steps of linear warm-up
WEIGHT_DECAY = 0.01  # (paper)
CLIP = 1.0  # global norm of the gradients, the decoder's after projection (paper)
SEED = 0  # what is fresh, and which training sequences

# ---- variant ---------------------------------------------------------------------------------
SHUFFLE = 0  # LOSS = mse: sequences whose residuals are shuffled together; 0 = as they come
L1 = 0.01  # starting penalty of a ReLU SAE that is fresh, or whose file names none
AUXK = 0.0  # weight of the dead latents' share in a fresh SAE's loss (1/32 is usual)
DEAD_AFTER = 10_000_000  # tokens without firing after which a latent is dead (AUXK)
JUMPRELU_THRESHOLD = "frozen"  # frozen, or ste: straight-through gradients
ADAPTER = "linear"  # TRAIN = adapter: linear or mlp
FOLD = True  # a linear adapter is folded into the SAE that is saved
RANK = 16  # of adapters and LoRA
LORA_BLOCKS = "all"  # TRAIN = lm_lora: all, after (those above LAYER), one (the next block)
LORA_MODULES = "all"  # all, attention, mlp
LORA_ALPHA = 0  # 0: RANK, so that the update is not scaled (published LM runs); SAE runs: 32
LORA_DROPOUT = 0.1
MORE_SAES = ""  # TRAIN = lm_lora: further SAEs, "LAYER:folder,LAYER:folder"

# ---- speed -----------------------------------------------------------------------------------
MICRO_BATCH = 2  # sequences in one forward and backward pass
CLEAN_BATCH = 8  # sequences in one clean pass: of several steps, or of a part of one
EVAL_BATCH = 8  # sequences in one evaluation pass
LOGITS = "bfloat16"  # of the KL in a bfloat16 LM, less the next token's; or float32: more bytes
HEAD_CHUNK = 2048  # tokens whose full-vocabulary logits exist at a time
COMPILE = True  # on CUDA: torch.compile each block; a minute or two at the start
LOW_MEMORY = False  # blocks keep their inputs only; goes with MICRO_BATCH, CLEAN_BATCH = 1

# ---- record ----------------------------------------------------------------------------------
EVAL_EVERY = 5_000_000  # training tokens between evaluations on the held-out ones
LOG_EVERY = 10  # steps between lines of metrics.jsonl
SAVE_EVERY = 10.0  # minutes between checkpoints
RUN_NAME = ""  # "" = made of model, layer, SAE, loss, recipe or what learns, and seed
WANDB_PROJECT = "klsplice"  # "" = no wandb
RUNS = "runs"  # folder of the run folders
CACHE = "cache"  # folder of tokenised text, shared by runs


def main(argv: list[str]) -> int:
    """Run one experiment. -> exit code: 0 done, 1 failed on the way, 2 nothing was started, 128+N
    stopped by signal N with its state saved."""
    import distributed
    import recipe
    from errors import Stopped, UserError

    try:
        if {"-h", "--help"} & set(argv):
            print(__doc__.strip())
            return 0
        distributed.start()
        c = recipe.read(argv, {name: v for name, v in globals().items() if name.isupper()})
        experiment(c)
        distributed.stop()
        return 0
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    except Stopped as stop:
        return stop.code


def experiment(c) -> None:
    """The method, a line a phase. c: the constants after overrides, as attributes."""
    import adapters
    import data
    import eval as evaluation  # eval is a builtin too
    import export
    import finetune
    import formats
    import language_model
    import record

    with record.Run(c) as run:
        if run.finished:
            return run.say_finished()
        lm_config, tokenizer = language_model.open_lm(c)
        source = formats.open_source(c, lm_config)
        tokens = data.prepare(c, tokenizer, lm_config)
        lm = language_model.load_lm(c, tokens)
        learner = adapters.build(c, source, lm, tokens)
        measure = evaluation.Measure(c, tokens, learner)
        evaluation.check(measure, source, strict=c.CHECK_SAE)
        finetune.dry_step(c, learner, tokens)
        run.start(source, tokens, learner)

        before = run.once("before", measure)
        learner.begin(c, before)
        finetune.finetune(c, learner, tokens, run, measure)
        after = run.once("after", measure)
        learner.end(after)

        if run.writes:  # of several processes, the first
            block = learner.splice.name
            export.save(run.path("sae"), learner.sae, source, c, tokens, block=block)
            learner.save_rest(run.folder)
            run.finish(before, after, tokens)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save
    sys.exit(main(sys.argv[1:]))
