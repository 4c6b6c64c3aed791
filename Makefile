# `make demo` and `make test` work on a fresh checkout: each creates .venv and installs what it needs, once.
PYTHON ?= python3

.DEFAULT_GOAL := help
.PHONY: help setup demo test check lint types layers doctest docs package matrix stress bench gpu libraries clean

VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python
INSTALLED := $(VENV)/.installed
INSTALLING := $(VENV)/.installing

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s  %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "PYTHON=python3.12 picks the interpreter of a new .venv (make clean removes the old one)."

setup: $(INSTALLED) ## create .venv and install the package for development

demo: $(INSTALLED) ## train on the digits, with the spectrum in TensorBoard
	$(RUN) examples/digits.py

# To explain failures, pytest rewrites all assertions, which takes each process seven seconds. So only the tests that have
# failed run with it, a second time.
test: $(INSTALLED) ## run the tests, and once more those that fail, to explain why
	$(RUN) -m pytest -n 3 --dist worksteal --assert=plain \
	|| { $(RUN) -m pytest --last-failed --last-failed-no-failures=none; false; }

check: lint types layers test doctest docs package ## run everything that a change must pass

lint: $(INSTALLED) ## check style and formatting
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(INSTALLED) ## check types
	$(RUN) -m mypy

layers: $(INSTALLED) ## check that imports go downward only
	$(BIN)/lint-imports

doctest: $(INSTALLED) ## run the examples in docstrings
	$(RUN) -m pytest --doctest-modules lightning_hesd

docs: $(INSTALLED) ## build the documentation in site/, strictly
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build

package: $(INSTALLED) ## build the distributions, and use the wheel outside of the repository
	$(RUN) -m tests.packaging.check_wheel

matrix: $(INSTALLED) ## run a part of the tests with other versions of Python and of what it needs
	$(RUN) -m tests.packaging.check_matrix --out benchmarks/results/matrix.md

bench: $(INSTALLED) ## compare with other packages: time, memory, accuracy
	$(RUN) -m pip install --no-deps -r benchmarks/requirements.txt
	$(RUN) -m benchmarks

gpu: ## check on a GPU what tests cannot see on a CPU, with the torch and Lightning of $(PYTHON): some minutes
	$(PYTHON) -m benchmarks.gpu

libraries: $(INSTALLED) ## train models of other libraries, each in an environment of its own: an hour, 1.5 GB for each
	$(RUN) -m benchmarks.libraries

stress: $(INSTALLED) ## run everything that can go wrong, and all tests that take long: an hour
	$(RUN) -m tests.stress
	$(RUN) -m pytest --slow -m slow
	HESD_FUZZ=100 $(RUN) -m pytest tests/test_fuzz.py

clean: ## remove .venv, caches and builds; logs of runs stay
	rm -rf $(VENV) build dist site .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name .git -prune -o -type d -name __pycache__ -exec rm -rf {} +

# $(INSTALLING) marks an unfinished installation: parts of one look complete to pip, so the next try starts afresh.
# It becomes the stamp with the time at which pip started: a pin edited meanwhile leads to another installation.
# The constraints come from the environment because `pip install -c` would not bind the build backend;
# newer pips read the second variable for that.
$(INSTALLED): export PIP_CONSTRAINT = constraints.txt
$(INSTALLED): export PIP_BUILD_CONSTRAINT = constraints.txt
$(INSTALLED): pyproject.toml constraints.txt
	@rm -f $@
	@if [ -e $(INSTALLING) ] || ! $(RUN) -m pip --version >/dev/null 2>&1; then \
		echo "Creating $(VENV)"; rm -f $(RUN); rm -rf $(VENV); \
		mkdir $(VENV) && touch $(INSTALLING) && $(PYTHON) -m venv $(VENV); fi
	@touch $(INSTALLING)
	$(RUN) -m pip install -e '.[dev]'
	@mv $(INSTALLING) $@
