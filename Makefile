# `make demo` and `make test` each set up all they need, in .venv; Python 3.10 and make are enough.
# Another Python: make PYTHON=python3.12. More for pip, a mirror say: make PIP_ARGS='...'.

PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
BASELINE := tests/baselines/0001_baseline.json

.PHONY: demo test attack crash lint bench baseline peers clean help
.NOTPARALLEL: # all share .venv

demo: .venv/installed ## check the caches, then measure them and plot out/bench.png
	mkdir -p out
	$(BIN)/kvtool verify-cache
	$(BIN)/kvtool bench --plot out/bench.png

# Bytecode is made of what is imported, when it is, and kept: pip would make it of all of PyTorch,
# and a hundred processes of a test run would each make it again.
export PYTHONDONTWRITEBYTECODE :=

test: .venv/installed-test ## run the tests, each benchmark once and untimed
	$(PYTEST) -q --benchmark-disable

crash: .venv/installed-test ## kill training at 50 random moments, resume, compare the bytes
	$(PYTEST) -v --benchmark-disable --kills 50 tests/training/test_crash.py

attack: .venv/installed-test ## attack it by the files of strangers, into docs/security.md
	$(BIN)/python tests/attack/run.py

lint: .venv/installed-dev ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed-test ## time the benchmarks and compare with the baseline
	$(PYTEST) tests/benchmarks --benchmark-only --benchmark-compare

# pytest-benchmark saves into a folder named after the machine, and looks there first. Flat in
# tests/baselines, a file is found on every machine.
baseline: .venv/installed-test ## time the benchmarks and make that the baseline
	rm -rf out/baseline
	$(PYTEST) tests/benchmarks --benchmark-only --benchmark-save=baseline \
		--benchmark-storage=file://./out/baseline
	mkdir -p $(dir $(BASELINE))
	mv out/baseline/*/0001_baseline.json $(BASELINE)

peers: .venv/installed-test ## time kvtool, transformers and llama.cpp in turns, into docs/peers.md
	$(BIN)/python tests/benchmarks/peers/run.py

clean: ## remove .venv and everything made by the other targets
	rm -rf .venv out build dist .pytest_cache .hypothesis .ruff_cache .mypy_cache .benchmarks
	find kvtool tests -name __pycache__ -exec rm -rf {} +

help: ## say what the targets do
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1	\2/p' Makefile

.venv/installed-test: EXTRA := [test]
.venv/installed-dev: EXTRA := [dev]
.venv/installed .venv/installed-test .venv/installed-dev: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install --no-compile -c constraints.txt $(PIP_ARGS) -e '.$(EXTRA)'
	touch $@

# bin/pip comes last in the making of an environment, so one that was cut short is made again.
$(BIN)/pip:
	$(require_python)
	$(PYTHON) -m venv .venv

require_python = $(if $(shell $(PYTHON) -c $(NEW_ENOUGH) 2>/dev/null),,$(error \
	kvtool needs Python 3.10 or newer, and $(PYTHON) is not: try make PYTHON=python3.12))
NEW_ENOUGH := 'import sys; print("yes" if sys.version_info >= (3, 10) else "")'
