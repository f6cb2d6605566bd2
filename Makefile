# `make demo` and `make test` do all of their own set-up in .venv, given Python 3.11, a C++ compiler
# and make. The first run takes minutes and says what it does; later ones start at once.

PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTEST ?= -q
# As many workers as a small machine has cores; one that is done takes over tests of the other.
WORKERS ?= -n 2 --dist worksteal
OUT ?= gpu-report

# Threads that wait for one another sleep instead of spinning: on a busy machine that is twice as fast.
export OMP_WAIT_POLICY ?= PASSIVE

BIN := .venv/bin
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h')
NATIVE := setup.py pyproject.toml $(shell find csrc -type f)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help demo test bench gpu-report lint format ctest sanitize clean

help:
	@echo 'make demo      train, pack, save, reload and time a masked network, write demo/report.html'
	@echo 'make test      linters, C++ tests, Python tests'
	@echo 'make bench     short form of the benchmarks, under 5 minutes'
	@echo 'make gpu-report  tests and benchmarks on the GPU of this machine, into OUT=gpu-report'
	@echo 'make lint      ruff, mypy, clang-format'
	@echo 'make format    format Python and C++'
	@echo 'make sanitize  C++ tests under the address and undefined-behaviour sanitizers'
	@echo 'make clean     remove everything that these made'

demo: .venv/.package
	@echo '── Demo: a masked network from training to a packed file'
	@time $(BIN)/python examples/demo.py

test: lint ctest
	@echo '── Python tests'
	@time $(BIN)/python -m pytest $(PYTEST) $(WORKERS) --require-backend=cpu,reference
	@echo '── Triton kernels in the interpreter: the same tests, each pair of parameter values'
	@time TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST) $(WORKERS) \
	  --require-backend=triton --backend=triton --pairwise -k 'not large_layer'

bench: .venv/.package
	@echo '── Benchmarks, short form'
	@time env -u OMP_WAIT_POLICY $(BIN)/python -m bench --quick

# Uses the Python, torch and Triton that are already there, and no network.
gpu-report:
	@$(PYTHON) -m bench.gpu_report --out $(OUT)

lint: .venv/.package
	@echo '── Linters: ruff, mypy, clang-format'
	@time { $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy \
	  && $(BIN)/clang-format --dry-run --Werror $(CXX_FILES); }

format: .venv/.package
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix . && $(BIN)/clang-format -i $(CXX_FILES)

ctest: .venv/.package
	@echo '── C++ tests'
	@time { $(BIN)/cmake -S . -B build/ctest -DCMAKE_BUILD_TYPE=Release > build/ctest-configure.log \
	  || { cat build/ctest-configure.log; exit 1; } ; \
	  $(BIN)/cmake --build build/ctest --parallel && $(BIN)/ctest --test-dir build/ctest --output-on-failure; }

sanitize: .venv/.tools
	@echo '── C++ tests under the address and undefined-behaviour sanitizers'
	@mkdir -p build
	@time { $(BIN)/cmake -S . -B build/sanitize -DMASKED_KERNELS_SANITIZE=ON > build/sanitize-configure.log \
	  || { cat build/sanitize-configure.log; exit 1; } ; \
	  $(BIN)/cmake --build build/sanitize --parallel && $(BIN)/ctest --test-dir build/sanitize --output-on-failure; }

.venv/.tools:
	@echo '── .venv with build tools'
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer: make PYTHON=...")'
	@$(PYTHON) -m venv .venv
	@time $(BIN)/python -m pip install --quiet 'setuptools>=77' wheel ninja cmake pybind11 numpy
	@touch $@

.venv/.torch: .venv/.tools
	@echo '── $(TORCH)'
	@time $(BIN)/python -m pip install --quiet '$(TORCH)'
	@touch $@

# Editable, so Python changes need no second install; native sources do.
.venv/.package: .venv/.torch $(NATIVE)
	@echo '── masked_kernels: native build and dependencies'
	@time $(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev,examples]'
	@mkdir -p build && touch $@

clean:
	rm -rf .venv build demo runs *.egg-info masked_kernels/*.so .pytest_cache .ruff_cache .mypy_cache
