# Everything that a fresh Debian or Ubuntu machine with Python 3.11+ needs: make demo, make test.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,\
            $(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $(p))) python3)
BIN := .venv/bin
PYTEST_FLAGS ?= -n 2 --durations=15
FUZZ_RUNS ?= 2000
FUZZ_RUNS_FULL ?= 200000
FUZZ_CAPI_RUNS_FULL ?= 40000
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The environment's cmake and ninja, whether it is activated or not.
export PATH := $(CURDIR)/$(BIN):$(PATH)

CXX_FILES := $(shell find runtime_ext/include runtime_ext/src runtime_ext/tools third_party -name '*.h' -o -name '*.cc' 2>/dev/null)
CXX_TEST_FILES := $(wildcard tests/cpp/*)
FORMATTED := $(shell find runtime_ext tests/cpp benchmarks -name '*.h' -o -name '*.cc' -o -name '*.c' 2>/dev/null)

.PHONY: help
help: ## list what can be done
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

.PHONY: setup
setup: ## install the system packages that are missing (as root), or list them
	@scripts/system_packages.sh "$(PYTHON)"

# Dependencies first and apart, so that a change of C++ rebuilds the runtime only.
.venv/.dependencies: pyproject.toml scripts/requirements.py | setup
	[ -x $(BIN)/python ] || "$(PYTHON)" -m venv .venv
	$(BIN)/python scripts/requirements.py > .venv/requirements.txt
	$(BIN)/python -m pip install --quiet -r .venv/requirements.txt
	touch $@

.venv/.installed: .venv/.dependencies CMakeLists.txt $(CXX_FILES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

.PHONY: install
install: .venv/.installed ## create ./.venv with everything and build the runtime

.PHONY: demo
demo: .venv/.installed ## compile the embedded model and run it at three memory budgets
	$(BIN)/cfmoe demo

.PHONY: test
test: lint test-cpp test-python ## every check: lint, C++ under sanitizers, Python (at most 15 minutes on two cores)

.PHONY: test-full
test-full: lint test-cpp test-tsan fuzz android-tools ## test, with ThreadSanitizer, long fuzzing and the slow tests
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not cross and not swift"

.PHONY: test-python
test-python: .venv/.installed gpu-tools ## the Python tests, but for the slow ones
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not slow and not cross and not swift"

.PHONY: test-cross
test-cross: .venv/.installed ## what is built for other platforms and is not in test-full: the archives for iOS
	$(BIN)/python -m pytest -m cross

.PHONY: test-swift
test-swift: .venv/.installed build/asan/.built ## CFMoEKit and the iOS app's sources, in a Debian trixie root of 2.7 GB (needs root)
	$(BIN)/python -m pytest -m swift

CMAKE_TESTS = cmake -S . -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DCFMOE_BUILD_TESTS=ON \
              -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG="-O1 -g"

build/asan/.built: .venv/.dependencies CMakeLists.txt $(CXX_FILES) $(CXX_TEST_FILES)
	$(CMAKE_TESTS) -B build/asan -DCFMOE_SANITIZE=address > /dev/null
	cmake --build build/asan
	touch $@

build/tsan/.built: .venv/.dependencies CMakeLists.txt $(CXX_FILES) $(CXX_TEST_FILES)
	$(CMAKE_TESTS) -B build/tsan -DCFMOE_SANITIZE=thread > /dev/null
	cmake --build build/tsan --target cfmoe_tests
	touch $@

.PHONY: test-cpp
test-cpp: build/asan/.built gpu-tools ## the C++ tests under AddressSanitizer and UBSan, short fuzzing
	build/asan/cfmoe_tests
	build/asan/cfmoe_fuzz_load $(FUZZ_RUNS)
	build/asan/cfmoe_fuzz_capi $(FUZZ_RUNS)

.PHONY: test-tsan
test-tsan: build/tsan/.built gpu-tools ## the C++ tests under ThreadSanitizer
	build/tsan/cfmoe_tests

.PHONY: fuzz
fuzz: build/asan/.built ## long fuzzing of the loader and of the C API
	build/asan/cfmoe_fuzz_load $(FUZZ_RUNS_FULL)
	build/asan/cfmoe_fuzz_capi $(FUZZ_CAPI_RUNS_FULL)

.PHONY: gpu-tools
gpu-tools: ## what compiles GPU targets and tests them (as root): shader compiler, drivers that run on the CPU
	@scripts/system_packages.sh "$(PYTHON)" gpu

.PHONY: android-tools
android-tools: .venv/.installed ## what makes an APK without Google's tools: system packages (as root), Kotlin, R8, Android's API
	@scripts/system_packages.sh "$(PYTHON)" android
	CFMOE_ANDROID_TOOLS=build/android-tools $(BIN)/python -m cfmoe.package.android_tools

.PHONY: lint
lint: .venv/.installed ## ruff, mypy, clang-format
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/mypy

.PHONY: format
format: .venv/.dependencies ## put Python and C++ into the project's form
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(FORMATTED)

.PHONY: docs
docs: .venv/.installed ## write docs/cli.md anew from the commands' --help
	$(BIN)/python scripts/cli_docs.py

.PHONY: bench
bench: .venv/.installed ## the benchmarks; writes JSON under build/bench, prints the tables of docs/performance.md
	$(BIN)/python benchmarks/run.py

.PHONY: dist
dist: .venv/.installed ## the source distribution and the wheel made of it, under dist
	rm -rf dist
	$(BIN)/python -c "from scikit_build_core.build import build_sdist; build_sdist('dist')"
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist dist/cfmoe-*.tar.gz

.PHONY: clean
clean: ## remove what was built, but not ./.venv
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .venv/.installed
