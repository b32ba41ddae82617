# `make repro` and `make test` work in a fresh clone: they create .venv and install what is needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PAPERS ?=
PAPER ?=
PROFILE ?=
JOBS ?=
INSTALLED := $(VENV)/.installed
READ_BY_TESTS := clip_art clip_art_titles xray_reports  # of shared data that no paper reads yet
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help install repro report site test test-faults study lint
help:
	@echo "make repro   fetch, build, and regenerate every table, figure and verdict"
	@echo "             (PAPERS=\"flexprefill zoology\" PROFILE=smoke|cpu|gpu JOBS=2 narrow it)"
	@echo "make study   open copies of the notebooks in JupyterLab (PAPER=zoology opens one)"
	@echo "make test    unit tests, notebook regression tests, one pass of the pipeline"
	@echo "make report  judge, and renew the claim matrix: figures/claims.svg and README.md"
	@echo "make site    build the browsable report into site/"
	@echo "make lint    ruff and import-linter"

# torch first and alone: nothing else may choose its build.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Reattend needs Python 3.11 or newer; set PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/reattend fingerprint  # `dvc repro --allow-missing` reads what only this makes
	touch $@

install: $(INSTALLED)

repro: install
	$(BIN)/reattend repro --force $(if $(PROFILE),--profile $(PROFILE)) $(if $(JOBS),--jobs $(JOBS)) $(PAPERS)

report: install
	$(BIN)/reattend report

site: install
	$(BIN)/reattend report --html

# One thread a worker and one notebook per worker: more threads than cores is many times slower.
test: install
	$(BIN)/reattend build --profile smoke
	$(BIN)/reattend fetch
	$(BIN)/reattend fetch $(READ_BY_TESTS)
	$(THREADS) $(BIN)/python -m pytest -n 2 --dist loadscope --nbval-lax --nbval-current-env \
		--nbval-kernel-startup-timeout 600 -m "not faults and not after_nbval"
	$(THREADS) $(BIN)/python -m pytest -m after_nbval tests/test_real_papers.py

test-faults: install
	$(THREADS) $(BIN)/python -m pytest -m faults tests

study: install
	$(BIN)/reattend study $(PAPER)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
