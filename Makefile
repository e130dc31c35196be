PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Apart from the rest: torchmetrics imports transformers, where it is, in every process of the suite. With peft, whose
# tests wrap those models; what both need of torch is in the environment.
TRANSFORMERS := $(VENV)/transformers

.PHONY: quickstart test exhaustive lint format clean

quickstart: $(STAMP)  ## set up and train the quickstart recipe
	$(BIN)/swiftmoe train recipes=quickstart

# Ranks wait for each other: on two cores a third process fills the gaps.
test: lint $(TRANSFORMERS)/.installed  ## set up and run the checks
	$(BIN)/python -m pytest --numprocesses 3 --dist worksteal -m 'not exhaustive'
	PYTHONPATH=$(TRANSFORMERS) $(BIN)/python -m pytest --numprocesses 2 -m 'not exhaustive' tests/hf

exhaustive: $(TRANSFORMERS)/.installed  ## what these checks show, in more ways
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m exhaustive
	PYTHONPATH=$(TRANSFORMERS) $(BIN)/python -m pytest --numprocesses 2 -m exhaustive tests/hf

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

$(TRANSFORMERS)/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --target $(TRANSFORMERS) --upgrade transformers
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --target $(TRANSFORMERS) --no-deps peft accelerate
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info outputs multirun
