# make demo   compress the built-in model with the default recipe and compare it with the original in a report
# make test   linters, type checker and tests
# make emulated  tests of the CPU kernels that this processor lacks (AVX-512, AMX), on emulated instructions
# make lint | format | slow | quality | clean
#
# The environment is made in .venv when there is none, with the versions of constraints.txt.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Index of torch's CPU builds, for Linux without an NVIDIA GPU, where pip would else fetch the CUDA build; see README.
TORCH_INDEX ?=
# More for the demo's compression, another recipe for example: DEMO_ARGS="--recipe s2q-vdit".
DEMO_ARGS ?=
COMPARE_ARGS ?=
PYTEST_ARGS ?=
# Processes that share the tests; 0 runs them in this one, as a debugger wants it.
TEST_PROCESSES ?= 2
QUALITY_ARGS ?=
EMULATED := $(addprefix tests/runtime/test_,cpu_kernels.py branch.py gelu.py attention.py) tests/quantize/test_compiled.py

.PHONY: help demo test lint types format slow emulated quality clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(VENV)/.core
	$(BIN)/attar compress digits-video --weights 4 --acts 6 -o demo/digits-w4a6 --overwrite $(DEMO_ARGS)
	$(BIN)/attar compare digits-video demo/digits-w4a6 -o demo/report $(COMPARE_ARGS)
	@echo
	@echo "The report: $(CURDIR)/demo/report/index.html"

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

slow: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow $(PYTEST_ARGS)

emulated: $(VENV)/.dev
	ATTAR_TEST_EMULATED=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist worksteal $(EMULATED)

quality: $(VENV)/.dev
	$(BIN)/python -m benchmarks.quality $(QUALITY_ARGS)

clean:
	rm -rf demo $(VENV)

# A stamp is written when the installation is complete, and is out of date when its inputs change.
$(VENV)/.core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "attar needs Python 3.10 or newer; name one with PYTHON=...")'
	@echo "Installing into $(VENV); the first time takes some minutes, torch is large"
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install -q -c constraints.txt --index-url $(TORCH_INDEX) torch)
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@
