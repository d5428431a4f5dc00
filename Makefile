# davae: `make demo` shows the whole method, `make test` proves it. Both set up `.venv` by themselves.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Threads used by one process; the demo and the trainings follow it.
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)

.PHONY: help setup demo test lint docs links clean

help:
	@echo "make demo   train both stages on the embedded base and write runs/demo/report.html (5 to 7 minutes)"
	@echo "make test   run the tests"
	@echo "make lint   ruff and mypy"
	@echo "make docs   the documentation as a site, site/index.html"
	@echo "make links  ask the network whether the addresses in the documentation are still there"
	@echo "make setup  create .venv with the pinned dependencies (the others do it by themselves)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "davae needs Python 3.11 or newer; this is %s. Set PYTHON=python3.11" % sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==$(shell sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: setup
	$(BIN)/davae demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

links: setup
	$(BIN)/python -m tests.links

clean:
	rm -rf $(VENV) runs build dist site .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
