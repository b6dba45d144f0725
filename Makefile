# Every target sets up what it needs in .venv, once. `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin
# Ranks share this machine's cores: one thread each keeps them from getting in each other's way.
ON_RANKS = OMP_NUM_THREADS=1 $(BIN)/composer -n $(1) -m pytest -m world_size -p no:cacheprovider -q $(2)
# Files of tests beside each other, in at most four processes of a thread and 2 GB each.
BESIDE = --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo bench test test-fast lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.installed ## install everything at the locked versions into .venv

.venv/.installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint requirements.lock --editable '.[dev,demo]'
	@touch $@

demo: setup ## train a connector between two real pretrained towers on real pairs, on a CPU
	$(BIN)/python -m vlm_composer.demo

bench: setup ## check every claim of benchmarks/ (two and a half hours on two cores; two_hosts.py needs root, full_size.py 21 GiB and bf16)
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/resume.py
	$(BIN)/python benchmarks/two_hosts.py
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/weak_scaling.py
	$(BIN)/python benchmarks/alignment.py
	$(BIN)/python benchmarks/full_size.py

test: setup ## run every test, on processes of their own, on two ranks and on four
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(BESIDE)
	$(call ON_RANKS,2)
	$(call ON_RANKS,4,tests/training)

test-fast: setup ## run the tests that take under ten seconds each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(BESIDE) -m 'not slow'

lint: setup ## check style, types and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## format and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove environment, demo and runs
	rm -rf .venv demo runs *.egg-info
