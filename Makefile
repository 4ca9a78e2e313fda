# From a fresh checkout: `make demo` and `make test`. Needs Python 3.11 or newer, make and a C
# compiler; everything else is installed into $(VENV).
#
# Variables, all overridable (`make test VENV=/tmp/venv PYTHON=python3.12`):
#   VENV         where the virtual environment goes
#   PYTHON       interpreter it is made with
#   TORCH_INDEX  package index for torch only; empty takes pip's own. Without an NVIDIA GPU,
#                the CPU wheels of PyTorch (their address: "Get started" on pytorch.org) are
#                a much smaller download
#   OUT          where `make demo` puts its runs; must not exist yet
#   PYTEST_ARGS  passed on to pytest
#   DIFF_GAMES, DIFF_STEPS  games, and commands per game, of `make differential`
VENV ?= .venv
PYTHON ?= python3
TORCH_INDEX ?=
OUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
PYTEST_ARGS ?=
DIFF_GAMES ?= 300
DIFF_STEPS ?= 68

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
REQUIREMENTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-scienceworld smoke test test-all differential lint format docs bench clean

help: ## list the targets
	@echo "Targets (VENV=$(VENV), PYTHON=$(PYTHON)):"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | \
		while IFS='|' read -r target text; do printf '  %-18s %s\n' "$$target" "$$text"; done

demo: $(VENV)/.installed-demo ## cold start, GRPO and GRPO+GCD on ALFWorld, table and report
	$(BIN)/untwine demo --out $(OUT)

demo-scienceworld: $(VENV)/.installed-scienceworld ## the same on ScienceWorld
	$(BIN)/untwine demo --recipe recipes/scienceworld-demo.yaml --out $(OUT)

smoke: $(VENV)/.installed-demo ## the whole pipeline on the built-in rooms, in under a minute
	@run=runs/smoke-$$(date +%Y%m%d-%H%M%S); set -x; \
		$(BIN)/untwine train recipes/smoke.yaml --run "$$run" && $(BIN)/untwine report "$$run"

test: $(VENV)/.installed-dev ## the tests, without those marked slow
	$(BIN)/pytest -m "not slow" $(PYTEST_ARGS)

test-all: $(VENV)/.installed-dev ## all tests
	$(BIN)/pytest $(PYTEST_ARGS)

differential: $(VENV)/.installed-alfworld ## native against real ALFWorld: 300 games, 20 400 steps
	UNTWINE_DIFF_GAMES=$(DIFF_GAMES) UNTWINE_DIFF_STEPS=$(DIFF_STEPS) \
		$(BIN)/pytest -s -m alfworld tests/envs/alfworld/test_differential.py $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev ## formatting, lint and types; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## format the code and apply safe lint fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.installed-docs ## build the documentation into site/
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.installed-alfworld ## run every benchmarks/*.py; with TRL if .[bench] is installed
	@set -- benchmarks/*.py; \
	if [ ! -e "$$1" ]; then echo "no benchmarks yet: benchmarks/*.py does not exist"; exit 0; fi; \
	for file; do echo "== $$file"; $(BIN)/python "$$file" || exit 1; done

clean: ## remove caches and build products; keeps .venv and runs/
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps below make installing happen once, and again when the requirements change.

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: untwine needs Python 3.11 or newer, and '$(PYTHON)' is" \
			"$$($(PYTHON) --version 2>/dev/null || echo missing);" \
			"name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; \
		exit 1; }

$(VENV)/.installed-torch: $(REQUIREMENTS) | $(BIN)/python
	@echo "installing into $(VENV); the first time this takes a few minutes"
	$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@touch $@

$(VENV)/.installed-demo: $(VENV)/.installed-torch
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-scienceworld: $(VENV)/.installed-demo
	$(PIP) install -c constraints.txt -e '.[scienceworld]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-torch
	$(PIP) install -c constraints.txt -e '.[scienceworld,dev]'
	@touch $@ $(VENV)/.installed-demo $(VENV)/.installed-scienceworld

$(VENV)/.installed-alfworld: $(VENV)/.installed-dev
	@echo "installing alfworld, which builds a planner: needs cmake and g++, takes some minutes"
	$(PIP) install -c constraints.txt -e '.[alfworld]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	$(PIP) install -c constraints.txt -e '.[docs]'
	@touch $@
