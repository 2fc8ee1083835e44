# The whole project in four words: `make install`, `make demo`, `make test`, `make lint`.

PYTHON ?= python3
REQUIREMENTS ?= requirements-dev.txt
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# One stamp a requirements file: what runs needs the core alone, what checks the code needs the test tools, too.
STAMP := .venv/installed-
CORE := $(STAMP)requirements.txt
DEV := $(STAMP)requirements-dev.txt

.PHONY: help install demo test suite test-fast test-long chromium lint

help:  ## Print the targets.
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-16s %s\n", $$1, $$2}'

install: $(STAMP)$(REQUIREMENTS)  ## Make .venv with the pinned packages (core alone: REQUIREMENTS=requirements.txt).

$(CORE): requirements.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 is needed: make PYTHON=…")'
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --editable .
	touch $@

$(DEV): requirements-dev.txt $(CORE)
	$(PIP) -r requirements-dev.txt
	touch $@

demo: $(CORE)  ## Build a small datastore and draw with it, plain and with retrieval, into demo/.
	$(BIN)/python -m arrag_jax.demo

test: $(DEV)  ## Run lint and every test that takes less than a minute or two (the others: make test-long).
	@$(MAKE) --no-print-directory --jobs=2 lint suite

suite: $(DEV)
	$(BIN)/python -m pytest -m "not long" --numprocesses=3 --dist=loadfile  # 3 on 2 cores: many tests wait for processes

test-fast: $(DEV)  ## Run the tests that are not marked slow or long, and name the slowest.
	$(BIN)/python -m pytest -m "not slow and not long" --numprocesses=auto --maxprocesses=4 --dist=loadfile --durations=15

chromium:  ## Install the browser of the studio's tests, as root on Debian; otherwise those tests skip.
	@command -v chromium > /dev/null || { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium > /dev/null; } || echo "no chromium: the studio's tests in a browser skip"

test-long: $(DEV) chromium  ## Run the tests that take minutes each.
	$(BIN)/python -m pytest -m long

lint: $(DEV)  ## Check style, format and types, change nothing.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
