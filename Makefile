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
.PHONY: install-integrations test-integrations

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
# of no-deps.txt, where there is one, come without the packages that they in turn ask for. FOLDERS names some of them;
# RELEASES="trl==1.17.0" puts that release in the place of the one that they name, in an environment of its own, where
# the other frameworks are what goes with it (tests/watch.py). TRANSFORMERS=5.23.0 is short for such a RELEASES.
# install-integrations makes the environments and runs no test.
TRANSFORMERS ?=
RELEASES ?= $(TRANSFORMERS:%=transformers==%)
FOLDERS ?= $(if $(TRANSFORMERS),huggingface pipeline,*)
empty :=
RELEASED := $(subst $(empty) ,-,$(subst ==,-,$(RELEASES)))
test-integrations: TEST_FOLDER = "$$venv/bin/python" -m pytest -o addopts="--strict-markers --strict-config -ra" "$$folder"
install-integrations: TEST_FOLDER = true
test-integrations install-integrations: $(STAMP)
	@set -eu; found=; \
	for requirements in $(FOLDERS:%=tests/integrations/%/requirements.txt); do \
	  [ -e "$$requirements" ] || continue; \
	  found=yes; folder=$$(dirname "$$requirements"); venv=.venvs/$$(basename "$$folder")$(RELEASED:%=-%); pins=$$folder; \
	  if [ -n "$(RELEASES)" ]; then \
	    mkdir -p "$$venv"; pins=$$venv; requirements=$$venv/requirements.txt; \
	    for file in "$$folder/requirements.txt" "$$folder/no-deps.txt"; do \
	      [ -e "$$file" ] || continue; made=$$venv/$$(basename "$$file"); \
	      $(BIN)/python -m tests.watch --pins "$$file" $(RELEASES) > "$$made.new"; \
	      cmp -s "$$made.new" "$$made" || cp "$$made.new" "$$made"; \
	    done; \
	  fi; \
	  echo "== $$folder"; \
	  if ! [ "$$venv/.installed" -nt "$$requirements" ] || ! [ "$$venv/.installed" -nt $(STAMP) ]; then \
	    $(PYTHON) -m venv "$$venv"; \
	    "$$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools; \
	    if [ -e "$$pins/no-deps.txt" ]; then \
	      "$$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$$pins/no-deps.txt"; \
	    fi; \
	    "$$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$$requirements"; \
	    "$$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-build-isolation \
	      $(if $(RELEASES),,-c constraints.txt) -e '.[test]'; \
	    touch "$$venv/.installed"; \
	  fi; \
	  $(TEST_FOLDER); \
	done; \
	[ -n "$$found" ] || echo "$@: there is no tests/integrations/*/requirements.txt, nothing to run"

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
