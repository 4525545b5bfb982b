# Everything runs in .venv, which the first target makes. PYTHON is any Python from 3.11 on.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-all test-parity test-pods docs lint format clean

# Trains MobileNetV2 0.35 on the digits that come with scikit-learn; again: says that it is done.
quickstart: .venv/core
	$(BIN)/python -m mnv2_jax.main --config=configs/w0_35.py:data=digits --workdir=runs/quickstart

test: .venv/dev
	$(BIN)/python -m pytest -n 2 -m "not slow and not parity and not pods"

test-all: .venv/dev
	$(BIN)/python -m pytest -n 2 -m "not parity and not pods"

test-parity: .venv/parity
	$(BIN)/python -m pytest -n 2 -m parity

# One after the other: the compiler for TPUs uses every core.
test-pods: .venv/pods
	$(BIN)/python -m pytest -m pods

# The site of docs/, in site/; a broken link fails.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv site *.egg-info .mypy_cache .pytest_cache .ruff_cache

.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/dev: .venv/core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

.venv/parity: .venv/dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[parity]"
	touch $@

.venv/pods: .venv/dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[pods]"
	touch $@

.venv/docs: .venv/dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@
