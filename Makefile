# The two commands: `make compare` (is beta1 = beta2 better here?) and `make test` (is it right?).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
STATE := # of `make compare STATE=...`, not of whatever the environment calls so

.PHONY: help install compare test test-fast test-long bench drill lint clean

help: ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED) ## make .venv with the tested versions

$(INSTALLED): pyproject.toml constraints.txt balanced_adam/kernels/cpu.cpp balanced_adam/kernels/rule.h
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[train,test]'
	touch $@

compare: $(INSTALLED) ## compare beta settings on a small language model; with STATE=packed16, fp32 moments with packed ones
	$(BIN)/python -m train.compare --seeds 0 1 $(if $(STATE),--out runs/compare-$(STATE) --arms 0.9 0.9:$(STATE),--out runs/compare)

# Three at a time on two cores, since some tests wait; the costly values that many tests look at are shared (tests/session.py).
test: $(INSTALLED) ## run the tests
	$(BIN)/python -m pytest -n 3 --dist worksteal

test-fast: $(INSTALLED) ## run a quick part: optimizer, parity, layout, bad input, data (a minute)
	$(BIN)/python -m pytest -n 3 --dist worksteal -m "not ranks and not long" tests/optimizer tests/parity tests/packaging/test_layout.py \
		tests/harness/test_bad_input.py tests/harness/test_data.py tests/harness/test_dynamics.py

test-long: $(INSTALLED) ## run the tests that `make test` leaves out (an hour; as root with tests/cluster/install.sh, a Slurm too)
	$(BIN)/python -m pytest -m long

bench: $(INSTALLED) ## time the step against its peers, and measure memory (half an hour; DeepSpeed compiles its own first)
	$(BIN)/python -m tests.perf

drill: $(INSTALLED) ## kill one run sixty times and see that nothing is lost (a quarter of an hour)
	$(BIN)/python -m tests.fault_injection --faults 60 --seed 1

lint: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

clean: ## remove .venv and caches (not runs/)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info balanced_adam/kernels/*.so
