# make quickstart   infects a classifier, purifies it and shows both, on embedded data, in its own virtual environment
# make test         runs the tests
# make check        checks format, lint and types
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# EXTRAS=test,parity also compares with torch, which is a large installation
EXTRAS ?= test

.PHONY: quickstart test check clean

quickstart: $(VENV)/.quickstart
	$(BIN)/python -m aft_jax.main --config=configs/quickstart.py --workdir=runs/quickstart $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.quickstart: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,report]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@
