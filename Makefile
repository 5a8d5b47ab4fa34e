# What a contributor and CI run. Needs Python >= 3.11 and make; everything else is installed into .venv.

# The interpreter that makes .venv, more options for pip (CONTRIBUTING.md: PyTorch's CPU build), the port of `make ui`.
PYTHON ?= python3
PIP_ARGS ?=
PORT ?= 5000

BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint format ui screenshots lock audit wheel clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## make .venv and install into it; a second call does nothing

$(INSTALLED): pyproject.toml requirements.lock
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not installed; expected Python 3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $$($(PYTHON) --version) is too old; expected 3.11 or newer (make PYTHON=python3.11 ...)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) has no venv module; expected one (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_ARGS) --constraint requirements.lock --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)  ## a page of photographs at nine budgets, then every stage on photographs, in minutes on two CPU cores
	$(BIN)/python jobs/show.py --output runs/show
	$(BIN)/python jobs/demo.py

test: $(INSTALLED)  ## fast tests and those on a local Ray, in minutes
	$(BIN)/pytest -m "not slow and not gpu and not browser"

test-all: $(INSTALLED)  ## every test there is; lists passes, and skips with their reasons
	$(BIN)/pytest -rfEpsx

lint: $(INSTALLED)  ## format, lint, types and the direction of imports
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)  ## format the code and repair what ruff can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

ui: $(INSTALLED)  ## MLflow on this checkout's runs, for this machine only (PORT=5000)
	@$(BIN)/python -c 'from pipeline.tracking.address import ui_page; print("open", ui_page("mlflow.db", "tatok", "http://127.0.0.1:$(PORT)"), "(Ctrl-C ends the server)")'
	$(BIN)/mlflow server --host 127.0.0.1 --port $(PORT) --workers 1 --backend-store-uri sqlite:///mlflow.db

screenshots: $(INSTALLED)  ## pictures of MLflow's pages for docs/, of a sweep on the samples (needs Chromium)
	rm -rf build/screenshots
	$(BIN)/python jobs/sweep.py sweep_smoke run.output=build/screenshots tracking.uri=sqlite:///build/screenshots/mlflow.db
	TATOK_STORE=sqlite:///$(CURDIR)/build/screenshots/mlflow.db TATOK_SCREENSHOTS=$(CURDIR)/docs/images \
		$(BIN)/pytest -m browser tests/pipeline/sweeps/test_pages.py

lock:  ## resolve the dependencies afresh and write requirements.lock
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/python -m pip install $(PIP_ARGS) --editable '.[dev]'
	sed '/^[^#]/d' requirements.lock >build/requirements.lock
	build/lock/bin/python -m pip freeze --all --exclude-editable | \
		sed -E '/^(pip==|cuda|nvidia|triton)/d; s/^torch==.*/torch>=2.9,<2.14/' >>build/requirements.lock
	mv build/requirements.lock requirements.lock

audit: $(INSTALLED)  ## ask the advisory database about every installed version (needs a network)
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet $(PIP_ARGS) pip-audit
	$(BIN)/python -m pip list --format=freeze --exclude-editable | sed 's/+.*//' >build/audit.txt
	build/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement build/audit.txt

wheel: $(INSTALLED)  ## build dist/*.whl
	rm -rf build/lib
	$(BIN)/python -m build --wheel --no-isolation

clean:  ## remove what was built and cached; runs and .venv stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
