# Two commands for a newcomer: `make demo` and `make test`. Both set up .venv from nothing first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test lint format

setup: $(VENV)/.complete

$(VENV)/.complete: pyproject.toml constraints.txt
	@echo "setting up $(VENV): about 1.5 GB, two to four minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Two processes on the CPU, whatever the machine has: the set is small and the point is to see them walk in step.
demo: setup
	@OMP_NUM_THREADS=1 $(BIN)/lockstep launch --cpu --processes-per-node 2 -- $(ARGS)

test: setup
	$(BIN)/python -m pytest -n auto --dist loadfile -m "slow or not slow" $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
