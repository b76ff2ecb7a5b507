# make help lists the targets. Each one creates .venv if necessary, and changes nothing else on the machine.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
                      if $$p -c "" 2>/dev/null; then echo $$p; exit; fi; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# More Hydra overrides for `make run`, e.g. make run ARGS="block_size=16,32 layer.index=10"
ARGS ?=
# The same without ARGS: `make run block_size=32`. Settings are in small letters, make's variables in capitals.
comma := ,
small = $(filter a% b% c% d% e% f% g% h% i% j% k% l% m% n% o% p% q% r% s% t% u% v% w% x% y% z%,$(1))
SETTINGS = $(foreach name,$(sort $(call small,$(.VARIABLES))),$(if \
    $(filter command,$(firstword $(origin $(name)))),'$(name)=$($(name))'))
given = $(patsubst $(1)=%,%,$(filter $(1)=%,$(ARGS) $(subst ',,$(SETTINGS))))
# A sweep's default values, unless the command line has the key.
unless_given = $(if $(call given,$(1)),,$(1)=$(2))

.DEFAULT_GOAL := help
.PHONY: help setup lock run model paper test lint report figures bench notebooks docs clean clean-runs

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The stamp is written last, so that an interrupted set-up is done again.
$(READY): requirements.lock pyproject.toml
	@$(or $(PYTHON),false) -c "" 2>/dev/null || { \
	    echo "quantkit: found no Python$(if $(PYTHON), named $(PYTHON))."; \
	    echo "          Install Python 3.11, or name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	    echo "quantkit: $(PYTHON) is $$($(PYTHON) -V 2>&1); the locked packages need Python 3.11 to 3.13."; \
	    echo "          Name another one: make PYTHON=/path/to/python3.11"; exit 1; }
	@rm -f $(READY)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "Creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "Installing the versions of requirements.lock into $(VENV) (a few minutes, once)"
	@$(PIP) install --constraint requirements.lock setuptools wheel
	@$(PIP) install --no-build-isolation --requirement requirements.lock
	@$(PIP) install --no-build-isolation --no-deps --editable .
	@touch $(READY)

# The report of a dry run names all versions and downloads no wheel that it need not open.
lock: $(READY)  ## refresh requirements.lock: the newest versions that go together
	$(PIP) install --dry-run --ignore-installed --no-build-isolation --report - '.[dev]' setuptools wheel \
	    | $(BIN)/python .ci/lock.py

setup: $(READY)  ## create .venv at the locked versions

run: $(READY)  ## quantize a layer: 2 formats x 3 methods, then print the tables; settings may follow, as in make run block_size=32
	@status=0; \
	$(BIN)/python experiments/run.py -m $(call unless_given,format,nvfp4$(comma)mxfp4) \
	    $(call unless_given,method,naive$(comma)sse$(comma)hessian) $(SETTINGS) $(ARGS) || status=$$?; \
	$(BIN)/python experiments/report.py --runs $(call given,output_dir) || status=$$?; \
	exit $$status

# Calibration and evaluation take different sequences of the text: the first and the last ones of a seeded shuffle.
model: $(READY)  ## quantize a whole model (the offline twin), export it, then its KL to the original; settings may follow, as in make model method=descent
	@$(BIN)/python experiments/quantize_model.py $(call unless_given,model,smollm2_135m) $(call unless_given,data,python_docs) \
	    $(call unless_given,data.samples,64) $(call unless_given,export,compressed_tensors) $(SETTINGS) $(ARGS)
	@$(BIN)/python experiments/evaluate.py model.path=$(or $(call given,output_dir),results/models)/latest/model \
	    reference=$(or $(call given,model),smollm2_135m) data=$(or $(call given,data),python_docs) data.split=train \
	    data.samples=64 tracking=$(or $(call given,tracking),none)

# Quick experiments come first. An interrupted sweep continues where it stopped.
EXPERIMENTS := main block_size scale_distance global_scale calibration_size layers optimality timing \
	layer_methods layer_global_scale damping sweeps layer_calibration scale_grids

paper: $(READY)  ## run every experiment, collect its records, rebuild the report; can be resumed
	@status=0; \
	for name in $(EXPERIMENTS); do \
	    echo "== $$name"; \
	    $(BIN)/python experiments/run.py -m experiment=$$name $(SETTINGS) $(ARGS) || status=$$?; \
	    test $$status -ne 130 || exit 130; \
	    $(BIN)/python experiments/report.py --collect $$name --from results/runs/$$name --model all || status=$$?; \
	done; \
	$(BIN)/python experiments/report.py || status=$$?; \
	exit $$status

lint: $(READY)  ## ruff, mypy, and the contracts between import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

test: lint  ## lint, all tests, the notebooks, and the check that pages and CSV files follow from the records
	$(BIN)/python -m pytest -q -n logical --maxprocesses 8 --dist worksteal --nbmake notebooks tests
	$(BIN)/python experiments/report.py --check

figures: $(READY)  ## rebuild every table and figure from results/records, without torch
	$(BIN)/python experiments/report.py

report: figures

bench: $(READY)  ## time every kernel on this machine's GPU, beside PyTorch and a copy
	$(BIN)/python experiments/bench.py --backends triton,reference --block-hessians --out results/bench/local.csv

notebooks: $(READY)  ## run the notebooks and keep their outputs
	$(BIN)/python notebooks/execute.py

# The pages are built without torch, in a small environment of their own.
DOCS_READY := .venv-docs/.ready

$(DOCS_READY): docs/requirements.txt
	@test -n "$(PYTHON)" || { echo "quantkit: no Python found. Install Python 3.11, or name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@rm -f $(DOCS_READY)
	@.venv-docs/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv-docs
	@.venv-docs/bin/python -m pip --disable-pip-version-check --quiet install --requirement docs/requirements.txt
	@touch $(DOCS_READY)

docs: $(DOCS_READY)  ## build the documentation in docs/_build/html
	$(MAKE) -C docs html SPHINXBUILD="$(CURDIR)/.venv-docs/bin/python -m sphinx"

clean-runs:  ## remove the raw runs, failed ones included (caches and results/records stay)
	rm -rf results/runs

clean:  ## remove .venv, raw runs and tool caches (the activation cache stays)
	rm -rf $(VENV) .venv-docs docs/_build docs/_generated results/runs multirun outputs wandb build dist *.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
