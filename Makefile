# Two commands: `make demo` and `make test`. Both set up everything they need in .venv.
PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
# all: the whole recipe, also if omitted; t2i: the text-to-image teacher alone, in minutes
STAGES ?=
# QUICK=1 runs the same stages in small
QUICK ?=
# processes that share the tests
WORKERS ?= 2
# LOCKED=1 installs exactly what requirements.lock pins, with hashes, instead of the newest versions in the ranges
LOCKED ?=
REQUIREMENTS = $(if $(LOCKED),requirements.lock,requirements.txt)
BIN = $(VENV)/bin
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

.PHONY: demo test test-all lint lock

$(VENV)/.installed: $(REQUIREMENTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(LOCKED),--require-hashes) -r $(REQUIREMENTS)
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m demo.run --seed $(SEED) $(if $(STAGES),--stages $(STAGES)) $(if $(QUICK),--quick) $(ARGS)

test: $(VENV)/.installed
	$(PYTEST) -m "not slow" $(ARGS)

# also what takes long: more kills and crashes, launchers, distributed variants, more stacks of configs
test-all: $(VENV)/.installed
	$(PYTEST) $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

# writes requirements.lock anew: the newest versions in the ranges, for all platforms
lock: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile requirements.txt --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate \
		--custom-compile-command "make lock" --quiet --output-file requirements.lock
