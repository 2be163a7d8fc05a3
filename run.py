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
from functools import cache, partial
from typing import Literal

from klsplice import naming, settings
from klsplice.screen import keep_screen
from klsplice.settings import Count, Share, Text

# Types: a str is not empty, a Text may be; an int is 1 or more, a Count 0 or more; a float is more
# than 0, a Share 0 or more and less than 1.

# ---- model -----------------------------------------------------------------------------------
MODEL: str = "google/gemma-2-2b"  # Hub id or local folder of a causal LM (paper)
MODEL_REVISION: Text = "c5ebcd40d208330abc697524c919956e692655cf"  # "" for a local folder
DTYPE: Literal["bfloat16", "float32"] = "bfloat16"  # of the LM and of products; weights are float32
DEVICE: str = "cuda"  # or "cpu", "cuda:1"; never changed silently
LAYER: Count = 12  # 0-based: the SAE reads the residual stream after this block (paper)
# Where in or after that block, by TransformerLens' name; of a transcoder what it reads and what it
# stands in for: mlp.hook_in:hook_mlp_out. klsplice/site.py has all of them.
SITE: str = "hook_resid_post"

# ---- SAE -------------------------------------------------------------------------------------
# A folder on the Hub (owner/repo/folder), a local folder, an earlier run's folder, or "fresh".
SAE: str = (
    "canrager/saebench_gemma-2-2b_width-2pow16_date-0107/"
    "gemma-2-2b_top_k_width-2pow16_date-0107/resid_post_layer_12/trainer_2"
)
SAE_REVISION: Text = "main"  # the commit it stood for is written to run.json
CHECK_SAE: bool = True  # stop when the SAE does not seem to belong to this model, layer and scale
# Positions at which the SAE is not used: none, special (BOS, EOS and pad), a context's first, or
# outliers, whose residual has over 10 times its context's median norm.
KEEP: Literal["none", "special", "first", "outliers"] = "none"
# Of a fresh SAE: topk (also ""), batchtopk or relu. A TopK that is loaded can be converted to
# batchtopk, jumprelu or matryoshka; "" leaves it as it is. It says the class of a file of your own.
ARCHITECTURE: Literal["", "topk", "batchtopk", "relu", "jumprelu", "matryoshka"] = ""
D_SAE: int = 65_536  # latents of a fresh SAE
K: int = 80  # active latents a token of a fresh SAE (a ReLU's target), or of a file of your own

# ---- data ------------------------------------------------------------------------------------
DATASET: str = "monology/pile-uncopyrighted"  # Hub id; or .jsonl .jsonl.zst .parquet .txt .npy
DATASET_REVISION: Text = "3be90335b66f24456a5d6659d9c8d208c0357119"  # "" for local files
DATA_FILES: Text = ""  # of a Hub dataset: which files (glob); "" = the default ones
SPLIT: str = "train"  # of a Hub dataset
TEXT_KEY: str = "text"  # field with the text, or with a list of chat messages
CONTEXT: int = 1024  # tokens a sequence (paper)
# Whether each sequence starts with BOS; tokenizer: where the tokeniser adds one (Gemma, Llama).
BOS: Literal["tokenizer", "always", "never"] = "tokenizer"
# To train on (paper), rounded down to whole steps; 0: the SAE is measured, and nothing learns.
TOKENS: Count = 25_000_000
PASSES: int = 1  # how often those tokens are trained on
SKIP_TOKENS: Count = 0  # training tokens to leave out before the first one
VAL_TOKENS: int = 1_000_000  # held out, the first documents (paper), rounded down to whole contexts

# ---- method ----------------------------------------------------------------------------------
TRAIN: Literal["sae", "adapter", "sae_lora", "lm_lora"] = "sae"  # what learns
# kl+mse is 0.5 (MSE + alpha KL), alpha = MSE / KL without gradient; mse and kl are those alone.
# kl+mse+later has the error of the residual 4 and 8 blocks above, too: the mean of all four.
LOSS: Literal["kl+mse", "kl+mse+later", "mse", "kl"] = "kl+mse"
# What the MSE counts beside the KL: 0.5 (MSE_WEIGHT MSE + alpha KL); 1 is the paper's.
MSE_WEIGHT: float = 1.0
# What stays as it is (TRAIN = sae): with its encoder each latent fires where it did before.
FREEZE: Literal["none", "encoder", "decoder"] = "none"
BATCH: int = 2  # sequences a step, over all processes (paper)
LR: float = 5e-5  # AdamW (paper)
SCHEDULE: Literal["linear", "constant"] = "linear"  # linear: LR (1 - step / steps) (paper)
WARMUP: Count = 0  # steps of linear warm-up
WEIGHT_DECAY: Share = 0.01  # (paper)
CLIP: float = 1.0  # global norm of the gradients, the decoder's after projection (paper)
SEED: Count = 0  # what is fresh, and which training sequences

# ---- variant ---------------------------------------------------------------------------------
SHUFFLE: Count = 0  # LOSS = mse: sequences whose residuals are shuffled together; 0 = as they come
L1: float = 0.01  # starting penalty of a ReLU SAE that is fresh, or whose file names none
AUXK: Share = 0.0  # weight of the dead latents' share in a fresh SAE's loss (1/32 is usual)
DEAD_AFTER: int = 10_000_000  # tokens without firing after which a latent is dead (AUXK)
JUMPRELU_THRESHOLD: Literal["frozen", "ste"] = "frozen"  # ste: straight-through gradients
ADAPTER: Literal["linear", "mlp"] = "linear"  # TRAIN = adapter
RANK: int = 16  # of adapters and LoRA
# TRAIN = lm_lora: all blocks, those after LAYER, or the one next to it.
LORA_BLOCKS: Literal["all", "after", "one"] = "all"
LORA_ALPHA: Count = 0  # 0: RANK, so that the update is not scaled (published LM runs); SAE runs: 32
LORA_DROPOUT: Share = 0.1

# ---- speed -----------------------------------------------------------------------------------
MICRO_BATCH: int = 2  # sequences in one forward and backward pass
CLEAN_BATCH: int = 8  # sequences in one clean pass: of several steps, or of a part of one
EVAL_BATCH: int = 8  # sequences in one evaluation pass
# Precision of the KL's logits. bfloat16: rounded after the next token's logit is subtracted, which
# keeps float32's accuracy. A float32 LM always has float32 logits.
LOGITS: Literal["bfloat16", "float32"] = "bfloat16"
HEAD_CHUNK: int = 2048  # tokens whose full-vocabulary logits exist at a time
TOGETHER: Count = 0  # runs of a sweep in one clean pass; 0: as many as there are
COMPILE: bool = True  # on CUDA: torch.compile each block; a minute or two at the start
LOW_MEMORY: bool = False  # blocks keep their inputs only; goes with MICRO_BATCH, CLEAN_BATCH = 1

# ---- record ----------------------------------------------------------------------------------
EVAL_EVERY: int = 5_000_000  # training tokens between evaluations on the held-out ones
EVAL_TOKENS: int = 250_000  # of those, how many: metrics.jsonl has them; results are of all
LOG_EVERY: int = 10  # steps between lines of metrics.jsonl
SAVE_EVERY: float = 10.0  # minutes between checkpoints
RUN_NAME: Text = ""  # "" = made of model, layer, SAE, loss, recipe, NAME=value words, and seed
WANDB_PROJECT: Text = "klsplice"  # "" = no wandb
WANDB_MODE: Literal["online", "offline"] = "online"  # without a key it is offline, too
RUNS: str = "runs"  # folder of the run folders
CACHE: str = "cache"  # folder of tokenised text, shared by runs


def main(argv: list[str]) -> int:
    """Run one experiment, or several. -> exit code: 0 done, 1 failed on the way, 2 nothing was
    started, 128+N stopped by signal N with its state saved. 1 too where some of several failed."""
    from klsplice import distributed
    from klsplice.errors import Stopped, UserError

    try:
        if {"-h", "--help"} & set(argv):
            print(__doc__.strip(), "\n\nThe constants, which run.py explains:\n")
            print(*(f"{n} = {v!r}" for n, v in settings.defaults().items()), sep="\n")
            return 0
        distributed.start()
        code = train(settings.read(argv, sys.modules[__name__]))
        if code == 0:
            distributed.stop()
        return code
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    except Stopped as stop:
        return stop.code


def train(configs: list) -> int:
    """All runs of a command -> exit code. Those that see the same tokens through the same LM go
    together, as many as memory allows; the others come after them."""
    from klsplice import distributed, machine
    from klsplice.progress import Signals
    from klsplice.tracking.loop import Live
    from klsplice.tracking.run_folder import Run
    from learners import start
    from report import end

    machine.note_code()
    several, groups, cfg = len(configs) > 1, start.worlds(configs), configs[0]
    if several:
        naming.check_differ(configs, start.find_source)
        print(f"{len(configs)} runs; groups of the same tokens and LM: {len(groups)}")
    codes, folders = [], []
    with Signals() as signals:
        while groups:
            group = groups.pop(0)
            size = cfg.TOGETHER or len(group)
            runs = [Run(one, several=several) for one in group[:size]]
            with Live(runs, signals, alone=not several or distributed.size() > 1) as live:
                experiment(live, folders)
            codes += live.codes
            if left := live.late + group[size:]:
                groups.insert(0, left)
    failed = sum(code > 0 for code in codes)
    if several:
        end.show_sweep(folders, f"{cfg.RUNS}/figures/{cfg.sweep}", failed)
    if failed:
        return 1 if {0, 1} & {*codes} else 2  # 2: nothing was started
    return 0


def experiment(live, folders: list[str]) -> None:
    """The experiment, a line a phase, of runs on the same tokens and LM.

    live: tracking.loop.Live. folders: those of runs that are finished are added."""
    import eval as evaluation  # eval is a builtin too
    import finetune
    from learners import start
    from report import end

    def source_of(run):
        run.source = run.source or start.find_source(run.cfg)
        return run.source

    def leave(run) -> None:
        folders.append(run.folder)
        live.leave(run, 0)

    def open_folder(run) -> None:
        if run.open(naming.run_name(run.cfg, partial(source_of, run))):
            end.show_finished(run)
            leave(run)

    def set_up(run) -> None:
        run.learner = start.open_learner(run.cfg, run.source, world.splice, tokens)
        if not run.begun:
            strict = run.cfg.CHECK_SAE and run.cfg.TOKENS > 0  # else the numbers are what is wanted
            evaluation.check_sae(measure, run.learner, run.source, strict=strict)
        finetune.dry_step(run.cfg, run.learner, batches())

    @cache
    def batches():  # of the first one, for all
        run = live.runs[0]
        return finetune.batches_of(run.cfg, run.learner, tokens, world.losses)

    def begin(run) -> None:
        if not tokens.steps:
            end.show_measured(run, run.evaluations["before"])
            return leave(run)
        run.learner.begin(run.evaluations["before"])
        run.training = finetune.Training(run.cfg, run.learner, tokens, run)

    def end_of(run) -> None:
        finish(run, tokens)
        leave(run)

    live.each(open_folder)
    world = start.World([run.cfg for run in live.runs])
    live.each(lambda run: start.read_source(run.cfg, source_of(run), world.opened.config))
    world.load(source_of(live.runs[0]))
    tokens, measure = world.tokens, world.evaluation
    live.each(set_up)
    together = len(live.runs)
    live.each(lambda run: run.start(world.opened, tokens, together))

    live.once("before", measure, step=0)
    live.each(begin)
    finetune.finetune(live, batches(), measure)
    live.once("after", measure, step=tokens.steps)
    live.each(end_of)


def finish(run, tokens) -> None:
    """Of a run that is trained and measured: the SAE, results.json, card, figures and table.

    run: tracking.run_folder.Run."""
    from klsplice.metrics import results
    from report import end

    loop, before, after = run.training.loop, run.evaluations["before"], run.evaluations["after"]
    loop.check_worth(after, loop.total)
    run.learner.end(after)
    if run.writes:  # of several processes, the main one
        run.learner.save(run.path("sae"), run.source, run.constants, bos=tokens.bos)
        run.learner.save_rest(run.folder)
        of_run = run.totals(loop.total * loop.tokens_a_step, loop.seconds)
        end.show(run, results(before, after) | of_run)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save
    keep_screen()
    code = main(sys.argv[1:])
    if code == 128 + signal.SIGINT:  # a shell's loop around it ends only if it dies of it
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    sys.exit(code)
