# `make help` lists what there is. Everything runs in .venv, which is made on first use.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help setup tune test lint types format bench aot clean
.DEFAULT_GOAL := help

help: ## List the targets.
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

setup: $(READY) ## Make .venv, install the package there and build its C++ kernels.

# torch goes in before the package: a build in isolation would fetch a second one.
$(READY): pyproject.toml setup.py $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "skipkernels needs Python 3.10 or later; $(PYTHON) is $$($(PYTHON) -V). Use make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments; install its venv package (Debian: python3-venv)"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel ninja numpy
	$(BIN)/python -m pip install --progress-bar=on "torch>=2.10" "torchvision>=0.25"
	$(BIN)/python -m pip install --no-build-isolation --editable '.[test,dev]'
	@touch $(READY)

tune: $(READY) ## Tune the embedded model on the embedded data; prints a table, writes runs/glyphs-skip.
	$(BIN)/skipkernels tune --overwrite

test: $(READY) ## Run all tests and doctests, with coverage.
	$(BIN)/python -m pytest --cov

lint: $(READY) ## Check style and layout.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## Check types.
	$(BIN)/mypy

format: $(READY) ## Put the code in the house style.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## Compare a training step with the published one; appends to bench/results.
	$(BIN)/python -m bench.step

aot: $(READY) ## Compile every Triton kernel for GPUs that need not be here; compare with the table in bench/results.
	$(BIN)/python -m bench.aot --check

clean: ## Remove .venv and what was built.
	rm -rf .venv build dist *.egg-info skipkernels/*.so
