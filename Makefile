# make demo   an SAE in SmolLM2-135M finetuned on KL + MSE, and its control; a CPU, no account
# make test   everything that needs no GPU and no hub
# Both make .venv first. `make clean` forgets runs and caches, `make readme` renews the tables.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
SMALL := $(PY) run.py recipes/small.py

.PHONY: demo test lint check-demo check-readme readme assets clean

$(VENV)/installed: requirements.txt requirements-demo.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -r requirements.txt -r requirements-dev.txt
	$(PY) -m pip install -q --no-deps -r requirements-demo.txt
	touch $@

assets: $(VENV)/installed
	@$(PY) assets.py

# A fresh SAE on MSE; KL + MSE from it; the control, MSE from it on the same tokens.
demo: assets
	$(SMALL) recipes/from_scratch_mse.py RUN_NAME=demo-sae TOKENS=100_000 EVAL_EVERY=1_000_000
	$(SMALL) recipes/kl_mse.py SAE=runs/demo-sae RUN_NAME=demo-kl_mse LR=$(LR_KL_MSE)
	$(SMALL) recipes/mse_only.py SAE=runs/demo-sae RUN_NAME=demo-mse LR=$(LR_MSE)
	@$(PY) plots.py runs/demo-kl_mse runs/demo-mse
	@$(PY) report.py runs/demo-sae runs/demo-kl_mse runs/demo-mse

# Each arm at its best learning rate (LOG.md).
LR_KL_MSE := 3e-4
LR_MSE := 3e-4

check-demo: demo
	@$(PY) report.py --require 0.25 3 runs/demo-kl_mse runs/demo-mse

test: $(VENV)/installed
	$(PY) -m pytest -q tests

lint: $(VENV)/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

readme: $(VENV)/installed
	$(PY) report.py --readme

check-readme: $(VENV)/installed
	@$(PY) report.py --check

clean:
	rm -rf runs cache figures assets wandb
