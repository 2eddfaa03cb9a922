# `make demo` and `make test` are all a newcomer needs: each sets up what it uses, once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH ?= 2.13.0
TORCHVISION ?= 0.28.0
CXX_FILES = $(shell find csrc tests/emulation -name "*.h" -o -name "*.cpp" -o -name "*.cu" -o -name "*.cuh")

.DEFAULT_GOAL := help
.PHONY: help venv demo bench test test-models wide gpu gpu-build gpu-measure gpu-dry lint format build
.PHONY: emulated512 cuda-emulated wheel
.PHONY: abi-check clean

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(READY) ## create .venv with torch, the test and lint tools and this package (editable)

# Modules are compiled when they are first imported: of torch's and transformers' few ever are.
PIP := $(BIN)/pip install --quiet --no-compile

# torch comes first and alone, so that nothing that depends on it can choose another one.
$(READY): pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "torch==$(TORCH)"
	$(PIP) "torchvision==$(TORCHVISION)"
	$(PIP) --upgrade "setuptools>=77" ninja pybind11
	$(PIP) --no-build-isolation -e ".[test,dev]"
	touch $@

demo: venv build ## run the demonstration
	$(BIN)/python -m hybridops demo

RESULTS := benchmarks/results/cpu
BENCH := $(BIN)/python -m hybridops bench

bench: venv build ## measure both suites and draw their report (10 minutes, on an idle machine)
	$(PIP) --no-build-isolation -e ".[models,peers]"
	$(BENCH) run benchmarks/hot_paths.toml --timeout 10 --json $(RESULTS)/hot_paths.json
	$(BENCH) run benchmarks/models.toml --timeout 10 --json $(RESULTS)/models.json
	$(BENCH) report $(RESULTS)/hot_paths.json $(RESULTS)/models.json -o $(RESULTS)/report.html

test: venv ## build and run all tests, but for wide and test-models
	$(MAKE) --no-print-directory -j 3 build emulated512 cuda-emulated
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not models and not wide" tests

test-models: venv build ## models at their real size against timm's (minutes, 8 GB of memory)
	$(BIN)/python -m pytest -q -m models tests

wide: venv build cuda-emulated ## the larger cases of the GPU kernels, without a GPU (an hour or more)
	$(BIN)/python -m pytest -n 2 -q tests -m wide

# With GPU_PYTHON=python3 an environment that is already there is used as it is: no venv, no network.
GPU_PYTHON ?= $(BIN)/python
# One clock for the build, the proof and the measuring, which has what those left, but a minute.
GPU_TOTAL_SECONDS ?= 530
GPU_PROVE_SECONDS ?= 170
GPU_END := $(shell expr $$(date +%s) + $(GPU_TOTAL_SECONDS))
GPU_JSON ?= gpu.json
# Compiling a kernel takes longer than running it; the largest calls want the GPU's memory alone.
GPU_XDIST = $(shell $(GPU_PYTHON) -c "import os, xdist; \
  print('--dist worksteal -n', min(16, os.cpu_count()))" 2>/dev/null)
GPU_RUN = TRITON_INTERPRET=0 $(GPU_PYTHON)
GPU_WITHIN = TRITON_INTERPRET=0 timeout --foreground -s INT -k 10
GPU_TESTS = $(GPU_PYTHON) -m pytest -q
GPU_BENCH = -m hybridops bench run benchmarks/gpu.toml --cache cold --min-time 0.002 --timeout 3 \
  --resume --json $(GPU_JSON)

ifeq ($(GPU_PYTHON),$(BIN)/python)
gpu-build: venv
endif

gpu: gpu-build ## prove the GPU kernels on the GPU of this machine, then measure (9 minutes)
	proven=0; \
	$(GPU_WITHIN) $(GPU_PROVE_SECONDS) $(GPU_TESTS) $(GPU_XDIST) -k "not 2_31" \
	  tests/test_gpu_models.py tests/test_gpu.py || proven=1; \
	$(GPU_WITHIN) 60 $(GPU_TESTS) -k 2_31 tests/test_gpu.py || proven=1; \
	left=$$(($(GPU_END) - $$(date +%s))); \
	$(GPU_RUN) $(GPU_BENCH) --stop-after $$((left > 60 ? left : 60)) && exit $$proven

gpu-measure: gpu-build ## the second half of make gpu: goes on where it stopped, to the end
	$(GPU_RUN) $(GPU_BENCH)

gpu-build:
	$(GPU_PYTHON) -c "import numpy, pytest, setuptools, torch, triton; \
	  assert int(setuptools.__version__.split('.')[0]) >= 77, 'setuptools 77 or newer is needed'"
	HYBRIDOPS_CUDA=1 $(GPU_PYTHON) setup.py --quiet build_ext --inplace

gpu-dry: ## rehearse that half without a GPU: every comparison, small, on the CPU (some minutes)
	$(GPU_PYTHON) $(subst $(GPU_JSON),gpu-dry.json,$(GPU_BENCH)) --dry-run

lint: venv ## ruff, clang-format and mypy; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

format: venv ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

build: venv ## compile what changed, in place; fails where an install would go on without
	$(BIN)/python setup.py --quiet build_ext --inplace --strict

emulated512: venv ## build build/_cpu_emulated512.so: the AVX-512 sources on AVX2, for tests
	$(BIN)/python setup.py --quiet build_emulated512

cuda-emulated: venv ## build build/_cuda_emulated.so: the CUDA kernels on the emulated GPU, for tests
	$(BIN)/python setup.py --quiet build_cuda_emulated

wheel: venv ## build the sdist, and the wheel from it, into dist/
	$(BIN)/python -m build --no-isolation

abi-check: venv ## prove that one binary serves this torch and 2.11.0 (downloads the latter)
	PYTHON=$(BIN)/python tests/abi_check.sh

clean: ## remove what was built, but keep .venv
	rm -rf build dist *.egg-info hybridops/*.so hybridops/_build_info.json
	rm -rf .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
