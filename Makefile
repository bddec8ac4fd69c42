# make demo · make test · make test-all · make docs · make bench. Each makes .venv first if it is missing.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_REQUIRE_VIRTUALENV := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all docs bench

demo: .venv/installed
	$(BIN)/dualreal demo

# Records what of the toy benchmark is missing in data/results (all of it: half a day on two cores), then shows its tables.
bench: .venv/installed
	$(BIN)/dualreal bench run --workers 2
	$(BIN)/dualreal bench report

# A file at a time, the longest first (tests/conftest.py): what a file's tests share is made once.
PYTEST := python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# Two notebooks, or files of tests, at a time with one thread each: figures do not depend on the machine, and two
# cores suffice.
test test-all docs: export OMP_NUM_THREADS := 1
# What travels with the package is all a test may use.
test test-all: export HF_HUB_OFFLINE := 1

# The browser tests read the site, so its tools are needed too. They use Debian's chromium, and skip without one.
test: .venv/installed-docs
	$(BIN)/python tools/check_clean.py
	$(BIN)/python tools/readme.py --check
	$(BIN)/ruff check dualreal tests tools
	$(BIN)/nbdev_test --n_workers 2 --timing
	$(BIN)/$(PYTEST)

# Also the cells and tests flagged slow; those that record results, need a GPU or downloaded weights stay out.
test-all: test .venv/installed-ray
	$(BIN)/nbdev_test --n_workers 2 --timing --flags slow
	$(BIN)/$(PYTEST) -m "slow and not cuda and not weights"

docs: .venv/installed-docs
	$(BIN)/python tools/docs.py

# pip runs again when the requirements change.
.venv/installed: settings.ini setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip --version || $(BIN)/python -m ensurepip
	$(BIN)/python -m pip install -e ".[dev]"
	touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install -e ".[docs]"
	touch $@

# One slow test runs the benchmark on a local Ray cluster.
.venv/installed-ray: .venv/installed
	$(BIN)/python -m pip install -e ".[ray]"
	touch $@
