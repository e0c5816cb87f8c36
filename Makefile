# `make help` lists what there is. Everything runs in .venv, which is made on first use.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
TESTS := .venv/.tests
TORCH := "torch>=2.10" "torchvision>=0.25"
CPU_INDEX := https://download.pytorch.org/whl/cpu
GPU := $(wildcard /dev/nvidiactl /dev/kfd /dev/dxg)# device files of NVIDIA, AMD and WSL

.PHONY: help setup wheel tune test coverage sanitize race lint types docs format bench counts aot clean
.DEFAULT_GOAL := help

help: ## List the targets.
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

setup: $(TESTS) ## Make .venv with the package, its C++ kernels and what the tests need.

# torch goes in before the package: a build in isolation would fetch a second one. On Linux that of PyPI needs gigabytes
# of CUDA's libraries, so without a GPU PyTorch's index of CPU builds comes first; it has five seconds to answer.
$(READY): pyproject.toml setup.py $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "skipkernels needs Python 3.10 or later; $(PYTHON) is $$($(PYTHON) -V). Use make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments; install its venv package (Debian: python3-venv)"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel ninja numpy
	@if test "$$(uname)" = Linux -a -z "$(GPU)$$PIP_EXTRA_INDEX_URL"; then \
	  echo "no GPU found: trying the CPU build of PyTorch from $(CPU_INDEX), then PyPI"; \
	  $(BIN)/python -m pip install --progress-bar=on --no-deps --index-url $(CPU_INDEX) --timeout 5 --retries 0 $(TORCH) || true; fi
	$(BIN)/python -m pip install --progress-bar=on $(TORCH)
	@echo "compiling the C++ kernels, one to three minutes"
	$(BIN)/python -m pip install --no-build-isolation --editable '.[cli]'
	@touch $(READY)

# The package is there already: an extra adds only what it asks for.
$(TESTS): $(READY)
	$(BIN)/python -m pip install --progress-bar=on 'skipkernels[test,test-integrations,dev]'
	@touch $@

wheel: $(READY) ## Build a wheel in dist/, with the C++ kernels if there is a compiler.
	$(BIN)/python -m pip wheel . --no-build-isolation --no-deps --wheel-dir dist

tune: $(READY) ## Tune the embedded model on the embedded data; prints a table, writes runs/pictograms-auto.
	$(BIN)/skipkernels tune --overwrite

# Two processes of one thread each, since most tests are one thread of Python. Tests of threads set their number.
# Bytecode is written: else each of the many processes compiles the package, and each run the tests.
test: export OMP_WAIT_POLICY = passive
test: export OMP_NUM_THREADS = 1
test: export PYTHONDONTWRITEBYTECODE =
test: $(TESTS) ## Run all tests and doctests.
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

coverage: $(TESTS) ## The same, with coverage, which slows the kernels in Triton's interpreter.
	$(BIN)/python -m pytest --cov

sanitize: export CXXFLAGS = -fsanitize=address,undefined -fno-sanitize-recover=undefined -O1 -g1
sanitize: export SKIPKERNELS_CPP = $(CURDIR)/build/sanitized.so
sanitize: export CXX := $(CXX)
sanitize: $(TESTS) ## Run the operators' tests on C++ kernels with AddressSanitizer and UBSan (g++).
	$(BIN)/skipkernels build --out $(SKIPKERNELS_CPP)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(BIN)/python -m pytest tests/ops -k "(cpp or not (interpreter or reference)) and not compile" -q --capture=sys

# SIMULATOR is the Python of an environment that has it; .venv may have an older one. Left out is what needs a driver
# (torch.compile, autocast, and opcheck, which compiles), and what is meant to fail or fills memory as the simulator does;
# also sgd_momentum_, whose kernel reads addresses from a table: the simulator knows only tensors that are arguments.
SIMULATOR ?= $(BIN)/python
race: export SKIPKERNELS_CPP = 0
race: $(if $(filter $(BIN)/python,$(SIMULATOR)),$(TESTS)) ## Run the Triton kernels in ttsem, which checks each access to memory and every pair of programs.
	@$(SIMULATOR) -c 'import hypothesis, pytest, triton, ttsem' 2>/dev/null || { \
	  echo "make race: $(SIMULATOR) has no ttsem, which needs Python 3.12 or later. In such an environment:"; \
	  echo "    pip install -r tools/race-requirements.txt"; \
	  echo "    make race SIMULATOR=/path/to/its/bin/python"; exit 2; }
	$(SIMULATOR) -m ttsem.sanitize pytest tests/ops --ignore=tests/ops/test_sgd_momentum.py \
	  -k "simulator and not (opcheck or compile or autocast or refuse or written)" -q

lint: $(TESTS) ## Check style, layout and English.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/check_language.py
	$(BIN)/python tools/check_generators.py

types: $(TESTS) ## Check types.
	$(BIN)/mypy

.venv/.docs: $(TESTS)
	$(BIN)/python -m pip install --quiet 'skipkernels[docs]'
	@touch $@

docs: export NO_MKDOCS_2_WARNING = 1
docs: .venv/.docs ## Build the documentation site in build/docs; a warning is an error.
	$(BIN)/mkdocs build --strict

format: $(TESTS) ## Put the code in the house style.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(TESTS) ## Compare steps, inference and operators with their peers, in 18 minutes; rows go to bench/results.
	$(BIN)/python -m bench.step --rounds 3 --classes 10 50 1000 --implementation skipkernels published
	$(BIN)/python -m bench.infer --images 25 --batch 25 --classes 100
	$(BIN)/python -m pytest bench/operators --minutes=6 --save bench/results -k 'not compiled'

counts: $(TESTS) ## Count what a step costs on any machine; compare with the table in bench/results.
	$(BIN)/python -m bench.counts --check

aot: $(TESTS) ## Compile every Triton kernel for GPUs that need not be here; compare with the table in bench/results.
	$(BIN)/python -m bench.aot --check
	$(BIN)/python -m bench.aot --sweep --target sm_90

clean: ## Remove .venv and what was built.
	rm -rf .venv build dist *.egg-info skipkernels/*.so
