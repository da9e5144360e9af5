# Everything is set up by the first target that needs it: a fresh machine wants Python, pip and make, and nothing else.

PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH_READY := $(VENV)/.ready-bench
PROOFS_READY := $(VENV)/.ready-proofs

.PHONY: help demo examples test test-slow test-all core proofs bench bench-quick lint types diagram clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

# Made anew when what it was made of changes, and when an installation broke off half-way.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[test,dev,examples]"
	@touch $@

# The peers of the benchmarks, which the tests should not pay for.
$(BENCH_READY): $(READY)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[bench]"
	@touch $@

# The libraries that the proofs train with, which the other tests should not pay for.
$(PROOFS_READY): $(READY)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[proofs]"
	@touch $@

demo: $(READY)  ## training on two local nodes, through a killed worker, a killed node and a new node
	$(BIN)/python examples/demo.py

examples: $(READY)  ## the small examples
	$(BIN)/python examples/hello_ranks.py
	$(BIN)/python examples/ddp_digits.py
	$(BIN)/python examples/distutils_digits.py
	$(BIN)/python examples/torchrun_api.py
	folder=$$(mktemp -d) && $(BIN)/raylaunch run --standalone --nproc-per-node=2 --max-restarts=3 \
		examples/torchrun_digits.py $$folder/digits.pt && rm -r $$folder
	$(BIN)/python examples/elastic_launcher.py
	$(BIN)/python examples/elastic_launcher.py --eager

test: $(READY)  ## the tests, without the slow ones: at most 10 minutes on 2 cores
	$(BIN)/pytest -m "not slow and not proof"

test-slow: $(READY)  ## the slow ones
	$(BIN)/pytest -m slow

test-all: $(READY)  ## all tests but the proofs
	$(BIN)/pytest

core: $(READY)  ## only the coordinator's tests: no Ray, no torch, seconds
	$(BIN)/pytest tests/coordinator -m "not slow"

proofs: $(PROOFS_READY)  ## training with Accelerate, Trainer, Lightning, DeepSpeed, DCP, FSDP2: under 6 minutes on 2 cores
	$(BIN)/pytest -m proof

bench: $(BENCH_READY)  ## raylaunch beside torchrun, Ray Train and bare actors: under 25 minutes on 2 quiet cores
	$(BIN)/python -m benchmarks.bench --write

bench-quick: $(BENCH_READY)  ## the same once, to see that it works
	$(BIN)/python -m benchmarks.bench --quick

lint: $(READY)  ## style, formatting, and who may import whom
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

types: $(READY)  ## strict types, of the package, the examples and the benchmarks
	$(BIN)/mypy raylaunch _raylaunch_pytest_plugin.py
	$(BIN)/mypy examples docs benchmarks

diagram: $(READY)  ## draw the diagram of docs/state-machine.md anew, from the table
	$(BIN)/python docs/make_state_diagram.py

clean:  ## remove all that was made here, the virtual environment too
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
