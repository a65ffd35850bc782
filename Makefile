# Ballast: every target sets up what it needs by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ballast-stamp

# The machine picks the build of vLLM: an NVIDIA driver means `gpu`, anything else `cpu`.
EXTRA ?= $(shell if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then echo gpu; else echo cpu; fi)

# uv does not read pip's find-links setting: hand the same places on, separated as uv wants them. Where none of
# them holds a build of torch, uv picks the one that fits the machine.
FIND_LINKS := $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
comma := ,
empty :=
space := $(empty) $(empty)
ifneq ($(strip $(FIND_LINKS)),)
export UV_FIND_LINKS ?= $(subst $(space),$(comma),$(strip $(FIND_LINKS)))
endif
TORCH_BACKEND := $(if $(wildcard $(addsuffix /torch-*,$(FIND_LINKS))),,--torch-backend=auto)

.PHONY: help setup demo test test-long check format clean
help:
	@echo "make demo       the main job on the embedded model, about 12 minutes on two CPU cores"
	@echo "make test       the whole test suite, real vLLM included"
	@echo "make test-long  tests that take longer: kills, loads, many seeds"
	@echo "make check      ruff, mypy, import-linter, and the tests that need no model"
	@echo "make setup      only the environment in $(VENV)"

setup: $(STAMP)

$(STAMP): pyproject.toml overrides.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] < (3, 14) else "Ballast needs Python 3.11 to 3.13, this is %d.%d: set PYTHON=python3.11" % sys.version_info[:2])'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV) (about 3.5 GB; half a minute with a warm cache)"
	$(BIN)/python -m pip install --quiet --upgrade uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python $(TORCH_BACKEND) --override overrides.txt -e '.[$(EXTRA),embedded,dev]'
	touch $@

demo: setup
	$(BIN)/ballast demo

# Two processes with a thread each: most tests compute too little for two threads to pay.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup

test-long: setup
	$(BIN)/pytest -m long

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup -m "not long and not vllm and not model"

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) dist .ruff_cache .mypy_cache .pytest_cache .hypothesis .import_linter_cache
