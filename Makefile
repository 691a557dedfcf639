# Everything sets up .venv by itself; only Python 3.11, git and make are needed.
PYTHON ?= python3.11
ARGS ?=
# tests at once: they mostly wait for real clocks
JOBS ?= 4
# how many seeds are simulated
SEEDS ?= 100
# how many markets
MARKETS ?= 10000
# seconds for each fuzzer
FUZZ_S ?= 600
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test simulate market fault fuzz check bench clean
.DEFAULT_GOAL := test

# Again when what is to be installed has changed. trio-typing (which libp2p pulls in) brings stubs of an
# old trio that would hide trio's own types from mypy.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	rm -rf .venv/lib/python*/site-packages/trio-stubs
	touch $@

demo: $(STAMP)
	$(BIN)/hypha demo $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

# every role, each way, at each phase of a round, with real processes: twenty minutes, as root
fault: $(STAMP)
	$(BIN)/python -m pytest -m cross $(ARGS)

# spoilt bytes for every decoder, and a hostile peer at real nodes: none may end, stall or grow
fuzz: $(STAMP)
	nice $(BIN)/python -m tests.fuzz.running $(FUZZ_S) $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_import_rows.py

# random schedules of faults in memory, under a virtual clock; what fails is shrunk and printed as a test
simulate: $(STAMP)
	$(BIN)/hypha chaos --simulated --seeds $(SEEDS) $(ARGS)

# random markets in memory: schedulers that compete for workers
market: $(STAMP)
	$(BIN)/python -m tests.market.search --seeds $(MARKETS) $(ARGS)

bench: $(STAMP)
	$(BIN)/python -m bench $(ARGS)

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
