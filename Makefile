# Every target does its own set-up in .venv; PYTHON names the interpreter to build it from.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup quickstart test lint types check bench clean

setup:
	@$(PYTHON) tools/setup.py

quickstart: setup
	@$(BIN)/hrm-text quickstart

# One thread a process: the two test workers would fight for the cores otherwise. Compiled modules
# are kept even where the machine says not to: some hundred processes of the tests would compile.
test: setup
	@OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: setup
	@$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

check: lint types test

bench: setup
	@$(BIN)/python benchmarks/train_step.py
	@$(BIN)/python benchmarks/generate.py

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
