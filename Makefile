# The README's two commands: `make train` and `make test`. Both install into .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# machines with an NVIDIA driver take the CUDA set of pinned versions
CONSTRAINTS ?= $(if $(shell command -v nvidia-smi),constraints-cuda.txt,constraints.txt)
SOURCES := pyproject.toml setup.py $(CONSTRAINTS)

.PHONY: train test cuda lint types

train: $(VENV)/.installed
	$(BIN)/tli-engine train --recipe demo

test: $(VENV)/.installed-dev lint types
	$(BIN)/python -m pytest

# the CUDA C++ kernels for Hopper GPUs; needs nvcc
cuda: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet 'setuptools>=77'
	TLI_ENGINE_CUDA=1 $(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/tli-engine info

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable .
	touch $@

$(VENV)/.installed-dev: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev,triton]'
	touch $@ $(VENV)/.installed
