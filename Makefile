# make quickstart   data to trained, sampled, exported model, in about six minutes on two cores
# make test         the tests; make test-cluster: launchers and faults on two hosts
# make help         the rest

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# DeepSpeed compiles nothing at install; every operator this project uses is torch's.
INSTALL = DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help quickstart test test-all test-cluster check format bench bench-gpu bench-checkpoints docs clean

help:
	@grep -E '^# make' Makefile | sed 's/^# //'
	@echo "make test-all     the slow tests too"
	@echo "make test-cluster every launcher on two hosts, which are namespaces of this machine; needs root and Debian"
	@echo "make check        formatting, lint and types only"
	@echo "make format       format the code"
	@echo "make bench        speed on this machine's CPU, against transformers"
	@echo "make bench-gpu    speed on one GPU, against transformers"
	@echo "make bench-checkpoints  memory and speed of conversions of a 6.9B checkpoint; 45 GB of disk"
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

# A worker for each core, but no more than memory holds of processes that have loaded torch; files in the order of
# tests/conftest.py.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: check
	$(PYTEST) -m "not slow"

test-all: check
	$(PYTEST)

# Says what it leaves out where there is no root, or where a package cannot be installed.
test-cluster: $(VENV)/installed-dev
	$(BIN)/python tests/cluster/run.py

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed-run
	$(BIN)/python benchmarks/cpu.py

bench-gpu: $(VENV)/installed-run
	$(BIN)/python benchmarks/gpu.py

bench-checkpoints: $(VENV)/installed-run
	$(BIN)/python benchmarks/checkpoints.py

docs: $(VENV)/installed-run
	$(BIN)/python -m neox.config docs

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache quickstart_run
