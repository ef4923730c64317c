# make bench: correctness check, then the reference against this package, as a table; under three minutes.
# make test:  the core of the tests: every public function and kernel, on both backends; then, compiled, every kernel.
# make test-long: those, and the long tail: more cases, all combinations, more examples, planted faults. .ci/run calls it.
# make test-all: those, all tests of kernels with a GPU's tiles in the interpreter (make test-shapes), and the table of
#             tests that run compiled, for sm_80, sm_90 and sm_100; hours.
# make test-compiled: that table alone. RECORD=build/compiled keeps what docs/compiled.md is written from; TABLE="" runs
#             all tests that can run compiled.
# make watch: which frameworks have a newer release than was tested; RUN=yes runs the tests against it.
# make theory: the documents' claims measured, docs/theory-report.md and its figures written; under ten minutes.
# make demo:  a small real model and itself with a hint: texts side by side, files, a page with pictures; a few minutes.
# All need Python >= 3.10 and make, nothing else.
PYTHON ?= python3
PYTEST_ARGS ?= -n 2 --dist worksteal
BENCH_ARGS ?= --budget 120
THEORY_ARGS ?=
CONSTRAINTS ?= constraints.txt
DEMO_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)

.PHONY: bench demo test test-long test-all test-shapes test-compiled theory watch lint types format clean
.PHONY: install-integrations test-integrations test-between pin-integrations

bench: $(STAMP)
	$(BIN)/python -m bench $(BENCH_ARGS)

# The environment of tests/integrations/demo, without what only the tests need.
DEMO := .venvs/demo
DEMO_STAMP := $(DEMO)/.demo-installed
DEMO_INSTALL := $(DEMO)/bin/python -m pip install --quiet --disable-pip-version-check
demo: $(DEMO_STAMP)
	@$(DEMO)/bin/optsample demo --output-dir build/demo $(DEMO_ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)
	$(BIN)/python -m pytest --compiled $(PYTEST_ARGS)

test-long: $(STAMP)
	$(BIN)/python -m pytest -m "" $(PYTEST_ARGS)
	$(BIN)/python -m pytest --compiled $(PYTEST_ARGS)
	$(BIN)/python -m pytest --compiled -m "" $(PYTEST_ARGS) tests/test_ptx_kernels.py

test-all: test-long test-shapes test-compiled

# Kernels as a GPU reads rows, in the interpreter.
test-shapes: $(STAMP)
	$(BIN)/python -m pytest --shapes cuda -m "" $(PYTEST_ARGS)

TABLE ?= not deeper
RECORD ?=
test-compiled: $(STAMP)
	for arch in 80 90 100; do \
	  $(BIN)/python -m pytest --compiled --arch $$arch $(RECORD:%=--record=%) -m "$(TABLE)" $(PYTEST_ARGS) || exit 1; \
	done

theory: $(STAMP)
	$(BIN)/python -m bench.theory $(THEORY_ARGS)

# Each folder of tests/integrations names its packages in requirements.txt and gets an environment of its own; packages
# of no-deps.txt, where there is one, come without the packages that they in turn ask for. pins.txt has the exact
# release of all that is installed: pin-integrations makes the environments anew, without it, and writes it.
# FOLDERS names some of them; RELEASES="trl==1.17.0" puts that release in the place of the one that they name, in an
# environment of its own, where the other frameworks are what goes with it (tests/watch.py), and the pins those of
# pins-trl-1.17.0.txt if there is one. TRANSFORMERS=5.23.0 is short for such a RELEASES.
# install-integrations makes the environments and runs no test. make -j 2 -O works at two folders at a time.
TRANSFORMERS ?=
RELEASES ?= $(TRANSFORMERS:%=transformers==%)
FOLDERS ?= $(if $(TRANSFORMERS),huggingface pipeline,*)
REQUIREMENTS_OF = $(wildcard $(1:%=tests/integrations/%/requirements.txt))
INTEGRATIONS := $(patsubst tests/integrations/%/requirements.txt,%,$(call REQUIREMENTS_OF,$(FOLDERS)))
UNKNOWN := $(strip $(foreach name,$(FOLDERS),$(if $(call REQUIREMENTS_OF,$(name)),,$(name))))
ifneq ($(and $(UNKNOWN),$(filter %-integrations,$(MAKECMDGOALS)),$(wildcard tests/integrations)),)
  $(error no folder of tests/integrations is called $(UNKNOWN))
endif
empty :=
RELEASED := $(subst $(empty) ,-,$(subst ==,-,$(RELEASES)))
FOLDER_PINS := pins$(RELEASED:%=-%).txt
NAME_FOLDER = folder=tests/integrations/$*; venv=.venvs/$*$(RELEASED:%=-%); named=$(if $(RELEASES),$$venv,$$folder); \
	pip="$$venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check"

test-integrations: $(INTEGRATIONS:%=test-in-%)
install-integrations: $(INTEGRATIONS:%=install-in-%)
pin-integrations: $(INTEGRATIONS:%=pin-in-%)
test-integrations install-integrations pin-integrations:
	@$(if $(INTEGRATIONS),,echo "$@: there is no folder in tests/integrations, nothing to run")

test-in-%: install-in-%
	@set -eu; $(NAME_FOLDER); \
	"$$venv/bin/python" -m pytest -o addopts="--strict-markers --strict-config -ra" "$$folder"

install-in-%: $(STAMP)
	@set -eu; $(NAME_FOLDER); echo "== $$folder"; \
	if [ -n "$(RELEASES)" ]; then \
	  mkdir -p "$$venv"; \
	  for file in "$$folder/requirements.txt" "$$folder/no-deps.txt"; do \
	    [ -e "$$file" ] || continue; made=$$venv/$$(basename "$$file"); \
	    $(BIN)/python -m tests.watch --pins "$$file" $(RELEASES) > "$$made.new"; \
	    cmp -s "$$made.new" "$$made" || cp "$$made.new" "$$made"; \
	  done; \
	fi; \
	pins=$$folder/$(FOLDER_PINS); [ -e "$$pins" ] || pins=; \
	if ! [ -e "$$venv/.installed" ] || [ "$$(find "$$named"/*.txt $$pins $(STAMP) -newer "$$venv/.installed")" ]; then \
	  pins=$${pins:+-c $$pins}; \
	  $(PYTHON) -m venv "$$venv"; \
	  $$pip -c constraints.txt torch setuptools; \
	  if [ -e "$$named/no-deps.txt" ]; then $$pip --no-deps -r "$$named/no-deps.txt"; fi; \
	  $$pip $$pins -r "$$named/requirements.txt"; \
	  $$pip $$pins --no-build-isolation $(if $(RELEASES),,-c constraints.txt) -e '.[test]'; \
	  touch "$$venv/.installed"; \
	fi

pin-in-%: $(STAMP)
	@$(NAME_FOLDER); rm -rf "$$venv"
	@$(MAKE) --no-print-directory install-in-$* FOLDER_PINS=none
	@set -eu; $(NAME_FOLDER); \
	$(BIN)/python -m tests.watch --freeze "$$venv" > "$$venv/pins"; \
	$$pip --dry-run -c "$$venv/pins" -r "$$named/requirements.txt"; \
	cp "$$venv/pins" "$$folder/$(FOLDER_PINS)"; touch "$$venv/.installed"

# The folders have the oldest and the newest transformers; this is one between.
test-between:
	@$(MAKE) test-integrations TRANSFORMERS=5.10.4 FOLDERS=huggingface

# What the frameworks have released since they were tested; RUN=yes also runs the tests against it. No part of .ci/run.
RUN ?=
watch: $(STAMP)
	$(BIN)/python -m tests.watch $(if $(filter-out no,$(RUN)),--run)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and alone: the pin takes a CPU build where one is at hand, and nothing later replaces it.
$(STAMP): $(CONSTRAINTS) pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"Python >= 3.10 is needed, {sys.executable} is {sys.version.split()[0]}: set PYTHON")'
	@echo "setting up $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) torch setuptools
	@$(PIP_INSTALL) --no-build-isolation --editable '.[test,dev]'
	@touch $@

$(DEMO_STAMP): tests/integrations/demo/requirements.txt constraints.txt pyproject.toml
	@echo "setting up $(DEMO) from your package index: torch (for CPUs alone some 200 MB; PyPI's build for Linux brings"
	@echo "CUDA's libraries, several GB), transformers and what else the demo needs"
	@$(PYTHON) -m venv $(DEMO)
	@$(DEMO_INSTALL) --constraint constraints.txt torch setuptools
	@$(DEMO_INSTALL) --requirement $<
	@$(DEMO_INSTALL) --no-build-isolation --editable '.[demo]'
	@touch $@

clean:
	rm -rf $(VENV) .venvs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
