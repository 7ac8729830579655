# make quickstart   data to trained, sampled, exported model, in about six minutes on two cores
# make test         everything CI runs
# make help         the rest

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# DeepSpeed compiles nothing at install; every operator this project uses is torch's.
INSTALL = DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help quickstart test test-all check format bench bench-gpu docs clean

help:
	@grep -E '^# make' Makefile | sed 's/^# //'
	@echo "make test-all     the slow tests too"
	@echo "make check        formatting, lint and types only"
	@echo "make format       format the code"
	@echo "make bench        speed on this machine's CPU, against transformers"
	@echo "make bench-gpu    speed on one GPU, against transformers"
	@echo "make docs         rewrite the generated pages: docs/configuration.md, docs/layouts.md, configs/schema.json"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-run: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[hf]'
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/installed-run

quickstart: $(VENV)/installed-run
	$(BIN)/python tools/quickstart.py

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow"

test-all: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed-run
	$(BIN)/python benchmarks/cpu.py

bench-gpu: $(VENV)/installed-run
	$(BIN)/python benchmarks/gpu.py

docs: $(VENV)/installed-run
	$(BIN)/python -m neox.config docs

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache quickstart_run
