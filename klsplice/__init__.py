"""With sae.py, the ground that everything else stands on: these import nothing of ours but it.

lm/        a language model of transformers: load it, run it clean, run it with an SAE spliced in
kernels/   arithmetic that a step spends its time in, each with a plain reference
formats/   SAE files: the layouts in which they lie, read and written
tracking/  the run folder: constants, checkpoints, metrics, wandb
"""
