# All set-up happens in the virtual environment .venv of this clone, and only when something it
# depends on has changed. Nothing asks a question. `make help` lists the targets.

PYTHON ?= python3
TORCH ?=
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
ARGS ?=
OPS ?= all_reduce matmul_all_reduce reduce_scatter all_gather verify

# The machine's own Python and compiler: a GPU machine may have no network to make .venv from, and
# a g++ of another toolkit on PATH may link the C++ library statically, which setup.py refuses.
GPU_PYTHON ?= python3
GPU_CC ?= /usr/bin/gcc
GPU_CXX ?= /usr/bin/g++
GPU_RANKS ?= 2,4,8
GPU_OPS ?=
GPU_SECONDS ?= 540
OUT ?= build/gpu-rows
START := $(shell date +%s)

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc')
# Folders are listed too: their time changes when a file in them is deleted.
BUILD_INPUTS := $(shell find csrc) $(wildcard triton_kernels/__init__.py bench/__init__.py)
GPU_PATH := $(CURDIR)/build/gpu-path
GPU_RUN = env PYTHONPATH="$(GPU_PATH)" PYTHONUNBUFFERED=1 "$(GPU_PYTHON)"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup model demo test test-long lint format bench clean distclean FORCE
.PHONY: gpu-setup gpu-test gpu-bench

help:
	@echo 'make demo        set everything up and generate text with a model split over two processes;'
	@echo '                 on a machine with a GPU there, against torch and transformers (ARGS="--device cpu")'
	@echo 'make test        set everything up and run the tests (at most 10 minutes on 2 cores)'
	@echo 'make test-long   the soaks and the large statistical tests'
	@echo 'make bench       check and time the ops: make bench OPS=all_reduce ARGS="--ranks 2 --json"'
	@echo 'make lint        ruff and clang-format, without changing a file'
	@echo 'make format      the same, changing files'
	@echo 'make gpu-test    build for this machine'"'"'s GPU, with its own Python, and run the tests of GPUs'
	@echo 'make gpu-bench   the same for commfuse tune and the benchmarks; all that they find goes to'
	@echo '                 OUT=build/gpu-rows, the most important first, in GPU_SECONDS=540 at most'
	@echo 'make setup       the set-up alone'
	@echo 'make clean       remove what was built; make distclean: the environment too'
	@echo
	@echo 'PYTHON=python3.12       the Python of the environment (3.10 or later)'
	@echo 'TORCH="torch==2.13.0"   the torch to install; by default the newest from 2.11 on, as a CPU'
	@echo '                        build where there is no NVIDIA GPU'
	@echo 'TORCH_CPU_INDEX=        (empty) take torch from the sources that pip is configured for alone'
	@echo 'GPU_PYTHON=python3      the Python of gpu-test and gpu-bench: with torch for CUDA, triton, ninja,'
	@echo '                        pytest, typer, rich, tokenizers, jinja2; and nvcc on PATH. GPU_CC, GPU_CXX:'
	@echo '                        its compiler'
	@echo 'GPU_RANKS=2,4,8         the numbers of ranks of gpu-bench; GPU_OPS="all_reduce": its ops'
	@echo 'ARGS=...                more arguments for demo, test, test-long, bench, gpu-test, gpu-bench'

# Holds the torch that was asked for last. It changes, and with it everything that is built on it,
# only when another one is asked for: plain `make` keeps the torch that is installed.
$(VENV)/.torch: FORCE
	@mkdir -p $(VENV)
	@if [[ ! -e $@ || ( -n "$(TORCH)" && "$$(< $@)" != "$(TORCH)" ) ]]; then echo "$(TORCH)" > $@; fi

$(VENV)/.dependencies: pyproject.toml tools/setup_environment.py $(VENV)/.torch
	@command -v "$(PYTHON)" > /dev/null || { echo 'setup: no $(PYTHON) was found; it is chosen by' \
	  'make PYTHON=...; on Debian or Ubuntu: sudo apt-get install -y python3 python3-dev python3-venv'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo 'setup: commfuse needs' \
	  "Python 3.10 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1); choose with make PYTHON=..."; exit 1; }
	@$(PYTHON) tools/setup_environment.py --torch "$(TORCH)" --cpu-index "$(TORCH_CPU_INDEX)" $(VENV)
	@touch $@

$(VENV)/.extension: $(VENV)/.dependencies setup.py pyproject.toml $(BUILD_INPUTS)
	@echo 'setup: compiling commfuse (minutes at first; only what changed afterwards)'
	@mkdir -p build
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --disable-pip-version-check --verbose \
	  --no-build-isolation --no-deps -e . > build/pip.log 2>&1 || { cat build/pip.log; exit 1; }
	@$(BIN)/python -m commfuse._extension
	@touch $@

setup: $(VENV)/.extension

model: setup
	@$(BIN)/python -c 'from commfuse.models.smollm2 import ensure_smollm2; ensure_smollm2()'

demo: model
	@$(BIN)/commfuse demo $(ARGS)

test: model
	@$(BIN)/python -m pytest $(ARGS)

test-long: model
	@$(BIN)/python -m pytest -m 'long and not gpu' $(ARGS)

bench: setup
	@set -e; for op in $(OPS); do $(BIN)/commfuse bench $$op $(ARGS); done

# Nothing is installed: the extension lies in the source tree, and links give the folders of the top
# level their places in the package.
gpu-setup:
	@"$(GPU_PYTHON)" tools/check_gpu.py
	@mkdir -p build
	@CC="$(GPU_CC)" CXX="$(GPU_CXX)" COMMFUSE_CUDA=1 "$(GPU_PYTHON)" setup.py build_ext --inplace \
	  > build/gpu-build.log 2>&1 || { tail -n 100 build/gpu-build.log; exit 1; }
	@rm -rf "$(GPU_PATH)" && mkdir -p "$(GPU_PATH)/commfuse"
	@ln -s "$(CURDIR)"/python/commfuse/* "$(CURDIR)/triton_kernels" "$(CURDIR)/bench" "$(GPU_PATH)/commfuse/"
	@"$(GPU_PYTHON)" setup.py --quiet egg_info --egg-base "$(GPU_PATH)" >> build/gpu-build.log 2>&1
	@$(GPU_RUN) -m commfuse._extension

# addopts and the time limit of pyproject.toml are for plugins that the machine may not have.
gpu-test: gpu-setup
	@$(GPU_RUN) -m pytest -o addopts= --import-mode=importlib --strict-markers -p no:cacheprovider \
	  -m 'gpu and not long' tests/gpu $(ARGS)

gpu-bench: gpu-setup
	@$(GPU_RUN) -m commfuse.bench.gpu_session --out "$(OUT)" --until $$(($(START) + $(GPU_SECONDS))) \
	  --ranks $(GPU_RANKS) $(if $(GPU_OPS),--ops $(GPU_OPS)) -- $(ARGS)

lint: $(VENV)/.dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.dependencies
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist python/commfuse.egg-info .pytest_cache .ruff_cache .hypothesis $(VENV)/.extension
	rm -f python/commfuse/_C.*.so python/commfuse/_C.build.json
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
