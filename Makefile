# The whole project in four words: `make install`, `make demo`, `make test`, `make lint`.
# A core-only install (no test tools): make install REQUIREMENTS=requirements.txt

REQUIREMENTS ?= requirements-dev.txt
PYTHON ?= python3
# One stamp per requirements file, so that a core install does not pass for a full one.
STAMP := .venv/installed-$(notdir $(REQUIREMENTS))
BIN := .venv/bin

.PHONY: help install demo test lint

help:  ## Print the targets.
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-15s %s\n", $$1, $$2}'

install: $(STAMP)  ## Make .venv with the pinned packages; does nothing when they are there.

$(STAMP): requirements.txt $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 is needed: make PYTHON=…")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

demo: install  ## Build a small datastore and draw with it, plain and with retrieval, into demo/.
	$(BIN)/python -m arrag_jax.build_datastore --config=configs/emoji_datastore.py --workdir=demo/store \
	  --config.source=emoji_scenes/small --config.num_images=12000
	$(BIN)/python -m arrag_jax.generate --config=configs/emoji_daid.py --workdir=demo/pictures \
	  --config.retrieval.store=demo/store --test_prompts=8 --provenance

test: lint  ## Run lint, then every test.
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile

lint: install  ## Check style and format, change nothing.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
