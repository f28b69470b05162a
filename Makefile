# make demo       the whole flow on the pair that the package ships
# make lineage    four tiny checkpoints of one base, and prompts, into LINEAGE: one to three minutes of training
# make test-fast  the tests that are not marked slow
# make test       all tests
# make test-deep  and all random schedules and families, of which 'make test' takes some
# make check      ruff, mypy, clang-format
# make docs       the site, into site/; a broken link fails
#
# Each makes its own virtual environment, by one call of pip, which builds the native core once. torch is pinned there,
# so that nothing pulls in another build:
# make demo TORCH="torch==2.12.0"    another version
# make demo TORCH=                   whatever the package's own range gives

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
RUN    ?= runs/demo
LINEAGE ?= pairs/lineage
# More of pytest's arguments. Tests run side by side, one process per CPU.
PYTEST ?=

BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/*)

.PHONY: demo lineage test-fast test test-deep check docs clean

# One thread for each test process: two of them on two cores, each with two threads, are slower than with one. Tests of
# threads ask for theirs. A file's tests stay in one process, which makes what they share once. Bytecode is kept, whatever
# the environment says: else each process that a test starts compiles torch and transformers anew, which takes longer
# than the test.
RUN_TESTS := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

demo: $(VENV)/installed
	$(BIN)/actcache demo --out $(RUN)

lineage: $(LINEAGE)/prompts.jsonl

$(LINEAGE)/prompts.jsonl: | $(VENV)/installed
	$(BIN)/python scripts/train_demo_lineage.py --out $(LINEAGE)

test-fast: $(VENV)/installed-test
	$(RUN_TESTS) -m "not slow and not deep" $(PYTEST)

test: $(VENV)/installed-test
	$(RUN_TESTS) $(PYTEST)

test-deep: $(VENV)/installed-test
	$(RUN_TESTS) -m "deep or not deep" $(PYTEST)

check: $(VENV)/installed-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*

docs: $(VENV)/installed-docs
	$(BIN)/mkdocs build --strict

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# Compiled to bytecode when imported: most of what is installed never is.
INSTALL = $(BIN)/python -m pip install --quiet --no-compile $(if $(TORCH),"$(TORCH)") --editable

$(VENV)/installed: $(VENV)/bin/python $(SOURCES)
	$(INSTALL) .
	touch $@

$(VENV)/installed-test: $(VENV)/bin/python $(SOURCES)
	$(INSTALL) ".[test]"
	touch $(VENV)/installed $@

$(VENV)/installed-check: $(VENV)/bin/python $(SOURCES)
	$(INSTALL) ".[test,check]"
	touch $(VENV)/installed $(VENV)/installed-test $@

$(VENV)/installed-docs: $(VENV)/bin/python $(SOURCES)
	$(INSTALL) ".[docs]"
	touch $(VENV)/installed $@

clean:
	rm -rf $(VENV) build runs site *.egg-info actcache/*.so
