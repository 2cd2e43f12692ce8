# Two commands do everything on a fresh Linux machine with Python >= 3.10 and g++:
#   make demo   the main job on a real model
#   make test   the tests
PYTHON ?= python3
BIN := .venv/bin
# One version that CPU machines get without CUDA packages where an index offers it.
TORCH ?= torch==2.13.0

.PHONY: demo test test-slow test-peers packages check check-native bench gpu dev extension format clean

demo: .venv/demo extension
	@$(BIN)/python -m bert_fast.demo

# Two processes, since most tests keep one core busy; threads that wait for work must not spin on the other's core.
test: .venv/dev extension
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m "not slow and not gpu and not peers" -n 2 --dist loadfile --no-loadscope-reorder

test-slow: .venv/dev extension
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m "slow and not gpu" -n 2

# What bert_fast is timed against: no part of CI, and before every `make bench`.
test-peers: .venv/dev .venv/bench extension
	$(BIN)/python -m pytest -m peers

# The package as people install it, in each of the ways.
packages: .venv/dev extension
	.ci/packages

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc benchmarks tests -name '*.h' -o -name '*.cpp')

# The C++ part without torch, fuzzed under AddressSanitizer, UBSan and ThreadSanitizer.
check-native:
	$(MAKE) --no-print-directory -j 2 -C tests/native

bench: test-peers
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.train
	$(BIN)/python -m pytest benchmarks --benchmark-only

# With the packages of $(PYTHON), which need torch, Triton and transformers: no .venv, no network.
# GPU="--seconds 300 --output FOLDER --parts kernels train" narrows it down.
gpu:
	$(PYTHON) -m benchmarks.gpu $(GPU)

dev: .venv/dev extension

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc benchmarks tests -name '*.h' -o -name '*.cpp')

# The environment, in three steps, each done once. The extension is compiled once, by `extension`, and not by each pip.
INSTALL := BERT_FAST_NO_EXTENSION=1 $(BIN)/python -m pip install --quiet --no-build-isolation --editable
.venv/base: setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet "$(TORCH)" numpy pybind11 ninja
	@touch $@

.venv/demo: .venv/base
	$(INSTALL) ".[demo]"
	@touch $@

# seqeval is a source distribution whose build tool, setuptools_scm, must not be there when ours is built.
.venv/dev: .venv/base
	$(BIN)/python -m pip install --quiet "seqeval>=1.2"
	$(INSTALL) ".[dev]"
	@touch $@

.venv/bench: .venv/base
	$(INSTALL) ".[bench]"
	@touch $@

# Incremental: only what changed is compiled.
extension: .venv/base
	@$(BIN)/python setup.py --quiet build_ext --inplace

clean:
	rm -rf .venv build dist *.egg-info bert_fast/_C*.so
