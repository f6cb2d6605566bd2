# `make demo` and `make test` do all of their own set-up, from nothing but Python 3.11, a C++
# compiler and CMake (installed into .venv if the machine has none). `make help` lists the rest.

PYTHON ?= python3
TORCH ?= torch==2.13.0
# Where pip finds torch. On Linux this is the CPU build; set it empty for PyPI's CUDA build.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

VENV := .venv
BIN := $(VENV)/bin
NATIVE := setup.py pyproject.toml $(shell find csrc -type f)
say = @printf '\n\033[1m%s\033[0m\n' "$(1)"

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test bench lint format ctest clean help

help:
	@printf '%s\n' 'make demo    train, pack, save, reload and time a masked network; see demo/report.html' \
	  'make test    linters, C++ tests, Python tests' 'make bench   the benchmarks in bench/' \
	  'make lint    ruff and mypy' 'make clean   remove .venv, build/ and caches'

demo: $(VENV)/.installed
	$(call say,Demo)
	@time $(BIN)/python examples/demo.py

test: lint ctest
	$(call say,Python tests)
	@time $(BIN)/python -m pytest -q -n 2 --dist loadfile

bench: $(VENV)/.installed
	$(call say,Benchmarks)
	@time $(BIN)/python -m bench.run

lint: $(VENV)/.installed
	$(call say,Linters)
	@time ( $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy )

ctest: $(VENV)/.installed
	$(call say,C++ tests)
	@time ( $(BIN)/cmake -S . -B build/ctest -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	  -DCMAKE_BUILD_TYPE=Release > build-ctest.log ) ; rm -f build-ctest.log
	@time $(BIN)/cmake --build build/ctest
	@$(BIN)/ctest --test-dir build/ctest --output-on-failure

