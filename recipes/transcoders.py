"""Transcoders of several MLPs on what they do together: python run.py recipes/transcoders.py
SAE=a,b,c LAYER=..., LAYER being the lowest. Each says its block in its config or its path."""

SITE = "mlp.hook_in:hook_mlp_out"  # what Gemma Scope 2's read; klsplice/site.py has the others
LOSS = "kl+mse"
LR = 2e-4
