# make replay   sets up .venv and replays a trace
# make test     sets up .venv and runs every check
# make test-all the same, about ten times deeper where tests take long
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# The conversation trace where it lies beside the checkout, else the built-in workload.
TRACE ?= $(wildcard ../shared/traces/conversation_trace.jsonl)
ARGS ?=

.PHONY: help setup replay test test-all lint fuzz server-matrix bench bench-sglang reference clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile
	@echo 'make lint     ruff and mypy'
	@echo 'make fuzz     random programs, interrupted calls, mutated files (ARGS="--minutes 60")'
	@echo 'make server-matrix  real SGLang servers, with ours and with its own cache (ARGS="NAMES")'
	@echo 'make bench    ours against SGLang, on the CPU (ARGS="--quick")'
	@echo 'make bench-sglang  the same inside SGLang, as its scheduler calls both'
	@echo 'make reference  every reference row of the conversation trace (ARGS=FOLDER)'
	@echo 'make clean    removes what make made'

$(VENV)/setup: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo 'Installing flatradix into $(VENV) (PyTorch is large: this may take minutes) ...'
	$(PIP) -e '.[plot]'
	touch $@

$(VENV)/setup-test: $(VENV)/setup requirements/peers.txt requirements/server.txt requirements/triton.txt
	$(PIP) -e '.[plot,prometheus,test,dev]'
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) -r requirements/triton.txt || \
	  echo 'Triton could not be installed: the tests of the GPU kernels will be skipped'
	@# The tree to compare with, and the package that ours must live beside. Without them, their tests are skipped.
	$(PIP) -r requirements/peers.txt && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .peers sglang==0.5.23 kernels==0.17.2 || \
	  echo 'SGLang could not be installed: the tests that compare with it will be skipped'
	$(PIP) -r requirements/server.txt || echo 'The test that runs servers of SGLang will be skipped'
	touch $@

setup: $(VENV)/setup

replay: setup
	mkdir -p out
	$(BIN)/flatradix replay $(TRACE) --json out/replay.json --plot out/replay.png $(ARGS)

# The second run is of the GPU's tests, in Triton's interpreter; 5 is what pytest returns where ARGS leaves none of them.
test: $(VENV)/setup-test lint
	$(BIN)/python -m pytest -n auto $(ARGS)
	TRITON_INTERPRET=1 HYPOTHESIS_PROFILE=interpreted $(BIN)/python -m pytest -n auto -m gpu $(ARGS) || test $$? -eq 5

# With THOROUGH=1, tests take ten times as many samples, and every variant runs in Triton's interpreter: tests/support/depth.py.
test-all:
	THOROUGH=1 $(MAKE) test

lint: $(VENV)/setup-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: $(VENV)/setup-test
	$(BIN)/python -m tests.fuzz $(ARGS)

server-matrix: $(VENV)/setup-test
	$(BIN)/python -m tests.sglang_server.matrix out/server-matrix $(ARGS)

bench: $(VENV)/setup-test
	$(BIN)/python -m bench.cpu $(ARGS)

bench-sglang: $(VENV)/setup-test
	$(BIN)/python -m bench.scheduler $(ARGS)

reference: setup
	$(BIN)/python -m bench.reference $(ARGS)

clean:
	rm -rf $(VENV) .peers build dist out *.egg-info
