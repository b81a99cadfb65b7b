# make run · make test · make check · make bench: each makes the virtual environment that it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help run test check format lint types imports packaging bench bench-state failover sim constraints clean

help:
	@echo 'make run      a demonstration on loopback: no root, ends by itself after about a minute'
	@echo 'make test     every test that this machine allows'
	@echo 'make check    format, lint, types, imports, packaging'
	@echo 'make bench    Sapin beside direct, nginx and pen; results under build/'
	@echo 'make failover a pair between real tunnels, 20 rounds of each failure, beside keepalived: an hour, root'
	@echo 'make sim      a pair under faults and virtual time, by 2,000 seeds; SEED=… N=… for others, N=1 tells one'
	@echo 'make bench-state  a million pins in memory, on disk and to a peer: bytes, time, the longest step'

run: $(VENV)/run.stamp
	$(BIN)/sapin demo

test: $(VENV)/dev.stamp
	@deploy/install-apt.sh deploy/apt-packages.txt || echo 'The tests that need them are skipped, or fail where CI is set.'
	$(BIN)/pytest

check: format lint types imports packaging

format: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .

types: $(VENV)/dev.stamp
	$(BIN)/mypy

imports: $(VENV)/dev.stamp
	$(BIN)/lint-imports --no-logo

packaging: $(VENV)/dev.stamp
	$(BIN)/pytest tests/unit/test_packaging.py

bench: $(VENV)/bench.stamp
	@deploy/install-apt.sh deploy/apt-packages.txt deploy/apt-packages-bench.txt || echo 'Peers that are missing are left out.'
	$(BIN)/python tests/bench/run.py

bench-state: $(VENV)/bench.stamp
	$(BIN)/python tests/bench/affinity.py
	$(BIN)/python tests/bench/journal.py
	$(BIN)/python tests/bench/resync.py

# FAILOVER='--rounds 3 --scenarios power,kill' for less; -h tells more.
failover: $(VENV)/bench.stamp
	@deploy/install-apt.sh deploy/apt-packages.txt
	$(BIN)/python -m tests.net.pair.measure $(FAILOVER)

# SEED: the first one, by chance if it is not given; N: how many.
sim: $(VENV)/dev.stamp
	$(BIN)/python -m tests.sim.pair $(if $(SEED),--seed $(SEED)) $(if $(N),--count $(N))

# The versions of a fresh environment, to be committed after `make check test` passed with them.
constraints:
	rm -rf build/constraints
	PYTHON='$(PYTHON)' deploy/make-venv.sh build/constraints
	build/constraints/bin/python -m pip install --quiet '.[dev,bench]'
	echo '# The versions that were tested together, written by: make constraints' > constraints.txt
	build/constraints/bin/python -m pip freeze --all --exclude pip --exclude sapin >> constraints.txt

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(BIN)/pip:
	@echo 'Making $(VENV), which takes about half a minute; this happens once.'
	@PYTHON='$(PYTHON)' deploy/make-venv.sh $(VENV)

# Without build isolation, so that setuptools too is the version that was tried.
$(VENV)/run.stamp: pyproject.toml constraints.txt | $(BIN)/pip
	@$(INSTALL) setuptools
	@$(INSTALL) --no-build-isolation --editable .
	@touch $@

$(VENV)/%.stamp: $(VENV)/run.stamp
	@$(INSTALL) --no-build-isolation --editable '.[$*]'
	@touch $@
