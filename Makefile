# Two commands on a fresh machine with Python 3.11 or later: `make demo` and `make test`. Each sets up .venv by itself.
# The first that runs and is new enough: a name on PATH may be a pyenv shim without a version behind it.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

.PHONY: demo test lint types oracle smoke long clean

demo: .venv/installed
	$(BIN)/opd demo

test: .venv/installed-dev
	$(BIN)/pytest -n auto --dist loadfile -m "not torch and not gpu and not smollm2 and not exhaustive and not long"

# The same numbers from other systems, live (transformers' models and their GGUF loading), and every combination.
oracle: .venv/installed-torch
	$(BIN)/pytest -n auto --dist loadfile --durations 20 -m "(torch or smollm2 or exhaustive) and not long"

# `opd paper --preset smoke`: every experiment's code, two to four minutes of two cores.
smoke: .venv/installed-dev
	$(BIN)/pytest -n 0 --durations 1 -k test_smoke_runs_every_experiment tests/test_paper_suite.py

# What CI has no time for, about three quarters of an hour.
long: .venv/installed-dev
	$(BIN)/pytest -n auto --dist worksteal -m long

lint: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/installed-dev
	$(BIN)/pyright

.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/uv || ($(PYTHON) -m venv .venv && $(BIN)/pip install --quiet uv)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[dev]'
	@touch $@

# pip, not uv: TORCH_INDEX may name the CPU index of pytorch.org
.venv/installed-torch: .venv/installed-dev
	$(BIN)/pip install --quiet 'torch==2.13.0' $(TORCH_INDEX)
	@touch $@

clean:
	rm -rf .venv .cache runs
