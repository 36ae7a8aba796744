# `make demo` shows a whole job; `make` alone lists the targets. GNU make 3.81 or newer.

SHELL := /bin/sh
.DEFAULT_GOAL := help

# Which interpreter `.venv` is made with: `make setup PYTHON=/path/to/python3.12` overrides the search.
PYTHON ?=
FITS := import sys, venv, ensurepip; sys.exit(not ((3, 11) <= sys.version_info < (3, 15) and sys.maxsize > 2**32))

# Where a shell forbids it, each of a thousand processes that the tests start would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

# Tests run side by side, each with a single torch thread (tests/conftest.py); who has none left takes some of another's.
TEST_ARGS ?= -n auto --maxprocesses 4 --dist worksteal

# A virtual environment is bound to its path: after the folder was moved or copied, it is made anew.
RUN := .venv/installed
DEV := .venv/installed-dev
ifneq ($(shell cat $(RUN) 2>/dev/null),$(realpath .venv))
.PHONY: $(RUN)
endif

# Bytecode is written at first import: compiling all that comes with torch takes longer than the rest of the install.
INSTALL := .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

.PHONY: help setup demo serve test check readme pictures clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1	\2/p' Makefile | expand -t 16

setup: $(DEV) ## make .venv with everything in it; quick when nothing changed

$(RUN): pyproject.toml constraints.txt
	@set -e; \
	if ! .venv/bin/python -c '$(FITS)' 2>/dev/null || [ "$$(cat $(RUN) 2>/dev/null)" != "$(realpath .venv)" ]; then \
	  found=; \
	  for candidate in "$(PYTHON)" python3 python3.13 python3.12 python3.11 python3.14; do \
	    if [ -n "$$candidate" ] && "$$candidate" -c '$(FITS)' 2>/dev/null; then found=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "Python 3.11 to 3.14 (64 bit) with the venv module is needed, and none was found. Install it with:"; \
	    if command -v brew >/dev/null; then echo "  brew install python@3.13"; \
	    elif command -v apt-get >/dev/null; then \
	      newest=$$(apt-cache search --names-only '^python3\.1[1-4]-venv$$' | sed 's/-venv.*//' | sort | tail -n 1); \
	      echo "  sudo apt-get install -y $${newest:-python3} $${newest:-python3}-venv"; \
	    elif command -v dnf >/dev/null; then echo "  sudo dnf install -y python3.13"; \
	    elif command -v pacman >/dev/null; then echo "  sudo pacman -S --needed python"; \
	    elif command -v zypper >/dev/null; then echo "  sudo zypper install -y python313"; \
	    elif [ "$$(uname)" = Darwin ]; then echo "  the installer from https://www.python.org/downloads/"; \
	    else echo "  your system's package manager"; fi; \
	    echo "then run make again, or name an interpreter: make setup PYTHON=/path/to/python3"; \
	    exit 1; \
	  fi; \
	  "$$found" -m venv --clear .venv; \
	fi; \
	echo "Installing into .venv, once: a minute or two, and longer where torch has to be downloaded ..." >&2; \
	$(INSTALL) -e .; \
	(cd .venv && pwd -P) > $(RUN)

$(DEV): $(RUN)
	@echo "Installing the tools for tests and checks ..." >&2
	@$(INSTALL) -e '.[dev]'
	@# Apart: its command line, which nobody here calls, wants an older typer.
	@$(INSTALL) --no-deps --upgrade --target .venv/openapi-python-client openapi-python-client
	@# Apart: of a hundred packages that it would bring, reading a task file needs none.
	@$(INSTALL) --no-deps --upgrade --target .venv/skypilot skypilot
	@touch $(DEV)

demo: $(RUN) ## train the example text, show its quarters, generate, stop
	@.venv/bin/nanomoe demo

serve: $(RUN) ## API and worker until Ctrl-C
	@.venv/bin/nanomoe serve

test: $(DEV) ## every test
	@# Before the tests, which would compile the same loops side by side.
	@.venv/bin/python -m nanomoe.training.steps & .venv/bin/python -m nanomoe.generation.kernels; wait
	.venv/bin/python -m pytest $(TEST_ARGS)

check: $(DEV) ## lint, format, types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

readme: $(DEV) ## write the tables of docs/ and .env.example from the code
	.venv/bin/python -m tests.documents

pictures: $(DEV) ## train two models, and take the README's pictures of them in Chromium
	.venv/bin/python docs/pictures.py

clean: ## remove what was built here; data/ stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
