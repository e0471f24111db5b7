# make quickstart   infect a classifier, purify it, show both: on embedded data, in a virtual environment of its own
# make test         the tests
# make check        format, lint, types
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# test,parity compares with torch as well, which is large
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
