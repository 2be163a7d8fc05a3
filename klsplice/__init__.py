"""The ground that everything else stands on. Nothing in here imports a module from outside it.

lm/        a language model of transformers: load it, run it clean, run it with an SAE spliced in
kernels/   arithmetic that a step spends its time in, each with a plain reference
formats/   SAE folders and text files: read and write them
tracking/  the run folder: constants, checkpoints, metrics, wandb
"""
