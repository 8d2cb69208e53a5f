# Needs Python >= 3.11, make and git; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test lint docs bench clean

demo: .venv/installed
	$(BIN)/denoscope demo

test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2

lint: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: .venv/installed-docs
	$(BIN)/mkdocs build --strict

bench: .venv/installed-dev
	$(BIN)/python benchmarks/dift.py

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "denoscope needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) install -q -c constraints.txt -e '.[test,lint,train]'
	touch $@

.venv/installed-docs: .venv/installed
	$(PIP) install -q -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf .venv out
