# Ballast: every target sets up what it needs by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ballast-stamp

# The machine picks the build of vLLM: an NVIDIA driver means `gpu`, anything else `cpu`.
EXTRA ?= $(shell if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then echo gpu; else echo cpu; fi)

# uv does not read pip's find-links variable; hand the same places on, separated as uv wants them.
# With none configured, uv picks the torch build that fits the machine.
ifdef PIP_FIND_LINKS
comma := ,
empty :=
space := $(empty) $(empty)
export UV_FIND_LINKS ?= $(subst $(space),$(comma),$(strip $(PIP_FIND_LINKS)))
TORCH_BACKEND :=
else
TORCH_BACKEND := --torch-backend=auto
endif

.PHONY: help setup demo test test-long check format clean
help:
	@echo "make demo       the main job on the embedded model, about 12 minutes on two CPU cores"
	@echo "make test       the whole test suite, real vLLM included"
	@echo "make test-long  tests that take longer: kills, loads, many seeds"
	@echo "make check      ruff, mypy, import-linter"
	@echo "make setup      only the environment in $(VENV)"

setup: $(STAMP)

$(STAMP): pyproject.toml overrides.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade uv
	$(BIN)/uv pip install --python $(BIN)/python $(TORCH_BACKEND) --override overrides.txt -e '.[$(EXTRA),embedded,dev]'
	touch $@

demo: setup
	$(BIN)/ballast demo

test: setup
	$(BIN)/pytest

test-long: setup
	$(BIN)/pytest -m long

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) dist .ruff_cache .mypy_cache .pytest_cache .hypothesis .import_linter_cache
