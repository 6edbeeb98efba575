# Two commands: `make demo` and `make test`. Both set up everything they need in .venv.
PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
# t2i: the text-to-image teacher alone; all: the whole recipe
STAGES ?= t2i
# QUICK=1 runs the same stages in small
QUICK ?=
BIN = $(VENV)/bin

.PHONY: demo test test-all lint

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m demo.run --seed $(SEED) --stages $(STAGES) $(if $(QUICK),--quick) $(ARGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

# also what takes long: more kills and crashes, launchers, distributed variants, more stacks of configs
test-all: $(VENV)/.installed
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
