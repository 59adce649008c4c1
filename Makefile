# `make setup` once (the other goals do it for you), then `make demo`. Overrides: make demo RANKS=1 DEMO_ARGS="run.epochs=20"
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
# Named by content: a fresh checkout of the same files has nothing to install.
SOURCES := pyproject.toml setup.py constraints.txt $(sort $(shell find csrc -type f))
STAMP := .venv/.installed-$(shell cat $(SOURCES) | sha256sum | cut -c1-16)
RANKS ?= 2
RUN ?= runs/shapes
DEMO_ARGS ?=
SHORT_RUN := runs/shapes-short
SHORT_ARGS := run.epochs=4 sampling.pairs_per_epoch=12 sampling.block_pairs=6 evaluation.every=4 evaluation.count=32 checkpoint.every=2 log.tensorboard=false
PYTEST_ARGS ?=
TEST_PROCESSES ?= 2

# One thread a rank: two ranks on two cores do not fight over them. A free port: two runs on one machine do not either.
free_port = $$($(BIN)/python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
launch = PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/deepspeed --num_gpus $(RANKS) --master_port $(free_port) fdfo_engine/train.py --config configs/shapes.yaml

.PHONY: help setup build demo demo-short test test-all cuda-torch gpu-packages gpu-check lint clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(STAMP)  ## makes .venv and installs the pinned versions; nothing to do a second time

$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	rm -f .venv/.installed-*
	touch $@

build:  ## compiles what changed under csrc/ since the last `make build`
	$(BIN)/python setup.py -q build_ext --inplace

demo: setup  ## trains the bundled miniature on two CPU cores and writes its report; resumes, or says it is finished
	$(launch) run.dir=$(RUN) $(DEMO_ARGS)
	$(BIN)/fdfo report $(RUN)

demo-short: setup  ## the same in a minute: four small epochs, from the start each time
	rm -rf $(SHORT_RUN)
	$(launch) run.dir=$(SHORT_RUN) $(SHORT_ARGS)
	$(BIN)/fdfo report $(SHORT_RUN)

# A process a core: most tests keep one busy, and those that start ranks of their own mind no company.
test: setup  ## the tests
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

test-all: setup  ## the tests with the slow ones
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -m "slow or not slow" -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

# Beside the torch of .venv: 1.1 GB of it without NVIDIA's libraries, which tests/offgpu/recording_driver stands in for.
cuda-torch: setup  ## a CUDA build of torch in .cuda-torch, for tests that record what a GPU is asked; needs no GPU
	rm -rf .cuda-torch
	PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS= $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--target .cuda-torch --no-deps --no-compile -c constraints.txt torch

GPU_PACKAGES := diffusers peft accelerate pybind11 pydantic pydantic-core annotated-types typing-inspection pytest \
	pytest-timeout iniconfig pluggy tenacity jinja2 markupsafe tqdm
gpu-packages:  ## packages that a GPU machine of torch and transformers alone is brought, for its Python (GPU_PYTHON=3.12)
	rm -rf .gpu_packages
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target .gpu_packages --no-deps --no-compile \
		--only-binary=:all: --python-version $(or $(GPU_PYTHON),3.12) -c constraints.txt $(GPU_PACKAGES)

gpu-check:  ## everything that is to be measured on a GPU, in nine minutes; GPU_ARGS="--device cpu --minutes 2" in miniature
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_day --minutes 9 --out runs/gpu_day $(GPU_ARGS)

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## removes build products and caches; keeps .venv and runs/
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
