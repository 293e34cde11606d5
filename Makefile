# `make demo` and `make test` set up everything they need on a fresh machine (Python 3.11+) in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
PARALLEL := -n auto --dist loadfile  # a file's tests share what they train

.PHONY: demo test test-all faults lint format bench docs clean

demo: $(INSTALLED)  ## the main job on the built-in scenes: teacher, plain student, GSKD student, table and picture
	$(BIN)/gskd demo --output runs/demo

test: $(INSTALLED)  ## the fast suite
	$(BIN)/python -m pytest -q $(PARALLEL)

test-all: $(INSTALLED) lint  ## with the slow tests
	$(BIN)/python -m pytest -q $(PARALLEL) -m "slow or not slow"

faults: $(INSTALLED)  ## every fault that is tested: bad input, a failing machine, kills; with exit code and message
	GSKD_FAULTS_TABLE=1 $(BIN)/python -m pytest -q $(PARALLEL) -m "slow or not slow" tests/faults

lint: $(INSTALLED)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## losses, input pipeline and, with CAMVID=folder TEACHER=run, whole steps
	$(BIN)/python benchmarks/loss_cost.py
	$(BIN)/python benchmarks/input_pipeline.py
	test -z "$(CAMVID)" || $(BIN)/python benchmarks/step_cost.py camvid_gskd data.root=$(CAMVID) teacher.run=$(TEACHER) data.workers=1
	test -z "$(CAMVID)" || $(BIN)/python benchmarks/scaling.py camvid_gskd data.root=$(CAMVID) teacher.run=$(TEACHER)

docs: $(INSTALLED)  ## the documentation as a site: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'gskd needs Python 3.11 or newer')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
