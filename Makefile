# `make` lists the targets. PYTHON, VENV, PIP_FLAGS and WORKERS can be set: make venv PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := DS_BUILD_OPS=0 $(BIN)/python -m pip --disable-pip-version-check
# One thread a process: small tensors are slower with two, and tests start several processes.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help venv demo test test-all lint bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

venv: $(VENV)/.package  ## make the virtual environment, install pinned requirements, build csrc

demo: venv  ## the whole thing on real text: data, teacher, three students, table and plot in work/demo
	$(BIN)/python -m distill.experiments.wiki_books --out work/demo

test: venv  ## the tests, without those marked slow
	$(PYTEST) -m "not slow"

test-all: venv  ## all tests
	$(PYTEST)

lint: venv  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: venv  ## kernels next to their peers; adds rows to a CSV. Other tests/bench scripts need data: see --help
	$(BIN)/python tests/bench/kernels.py

clean:  ## remove what was built and cached; the environment and work/ stay
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis distill/kernels/*.so $(VENV)/.package
	find distill data_prep tests -name __pycache__ -type d -exec rm -rf {} +

# An environment without pip is what Debian's Python without python3-venv leaves half-made: made anew.
$(VENV)/.requirements: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
		|| { echo "Python 3.10 to 3.13 is needed, $(PYTHON) is another: make venv PYTHON=python3.11"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(if $(wildcard $(VENV)/pyvenv.cfg),--clear) $(VENV) \
		|| { echo "No virtual environment could be made; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PIP) install -q $(PIP_FLAGS) --upgrade pip==26.3
	$(PIP) install $(PIP_FLAGS) -r requirements.txt
	touch $@

# Without isolation, so that csrc is built against the torch just installed.
$(VENV)/.package: $(VENV)/.requirements pyproject.toml setup.py $(wildcard csrc/*)
	$(PIP) install -qq $(PIP_FLAGS) --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m distill.kernels
	touch $@
