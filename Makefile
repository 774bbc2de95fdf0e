# The README's two commands: `make train` and `make test`. Both install into .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# machines with an NVIDIA driver take the CUDA set of pinned versions
CONSTRAINTS ?= $(if $(shell command -v nvidia-smi),constraints-cuda.txt,constraints.txt)
SOURCES := pyproject.toml setup.py $(CONSTRAINTS)

# it would ask every install for the extension, `make cuda` says when
unexport TLI_ENGINE_CUDA

.PHONY: train test cuda lint types

train: $(VENV)/.installed
	$(BIN)/tli-engine train --recipe demo

test: $(VENV)/.installed-dev lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not long"

# the CUDA C++ kernels for Hopper GPUs; about a minute, each time
cuda: nvcc $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) 'setuptools>=77' --editable '.[triton]'
	TLI_ENGINE_CUDA=1 $(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/tli-engine info

.PHONY: nvcc
nvcc:
	@command -v "$${CUDA_HOME:+$$CUDA_HOME/bin/}nvcc" >/dev/null || \
	  { echo "make cuda: no nvcc; install CUDA 12.5 or newer, put nvcc on the path or set CUDA_HOME"; exit 1; }

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
