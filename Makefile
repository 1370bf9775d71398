# `make pretrain` and `make test` are all that a fresh machine needs; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

INSTALLED := .venv/installed

# The first of these that is Python 3.11 or newer makes the environment; PYTHON=... names another.
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

.PHONY: help install pretrain test lint chaos bench learning clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## make .venv with the versions of constraints.txt

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@[ -n "$(PYTHON)" ] || { echo "error: no Python 3.11 or newer on the PATH: install one, or name it with PYTHON=..." >&2; exit 2; }
	command -v g++ >/dev/null || { echo "error: g++ is not installed: DeepSpeed compiles its operators with it" >&2; exit 2; }
	[ -x .venv/bin/pip ] || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[demo,mpi,test]'
	touch $@

pretrain: $(INSTALLED)  ## train the demonstration and its twin without layers, then compare them; resumes what was interrupted
	@. launch/env.sh
	for name in demo demo-nolayers; do launch/pretrain.sh launch/recipes/$$name.yaml; done
	python -m pipeline.report runs/demo --compare runs/demo-nolayers
	echo "make pretrain took $$SECONDS s, the installation apart"

lint: $(INSTALLED)  ## ruff's checks and format, as pre-commit has them
	@.venv/bin/ruff check .
	.venv/bin/ruff format --check .

test: lint  ## lint, then all tests
	@. launch/env.sh
	OMP_NUM_THREADS=1 python -m pytest

chaos: $(INSTALLED)  ## kill a run's processes fifty times, then compare its end with an undisturbed run's
	@. launch/env.sh
	python -m tests.chaos.chaos

bench: $(INSTALLED)  ## print times and memory of primitives, layer, step, plans and loader on this machine
	@. launch/env.sh
	python -m tests.bench.bench_ops
	python -m tests.bench.bench_layer
	python -m tests.bench.bench_step --layers 2
	python -m tests.bench.bench_memory
	python -m tests.bench.bench_plan
	python -m tests.bench.bench_loader
	python -m tests.bench.bench_remote

learning: $(INSTALLED)  ## train what the learning benchmark lacks, then print its tables
	@. launch/env.sh
	python -m tests.bench.bench_learning

clean:  ## remove caches and build leftovers; .venv, data/ and runs/ stay
	@rm -rf .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
