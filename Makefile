# make demo   the whole flow on the pair that the package ships
# make test   the test suite
# make test-deep  all random schedules of writers, readers and compactions, of which 'make test' runs some
# make check  ruff, mypy, clang-format
#
# Each makes its own virtual environment. torch is installed first and pinned, so that nothing pulls in another build:
# make demo TORCH="torch==2.12.0"    another version
# make demo TORCH=                   whatever the package's own range gives

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
RUN    ?= runs/demo
# More of pytest's arguments. Tests run side by side, one process per CPU.
PYTEST ?=

BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/*)

.PHONY: demo test test-deep check clean

demo: $(VENV)/installed
	$(BIN)/actcache demo --out $(RUN)

test: $(VENV)/installed-test
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto $(PYTEST)

test-deep: $(VENV)/installed-test
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto tests/test_schedules.py -m "deep or not deep" $(PYTEST)

check: $(VENV)/installed-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(if $(TORCH),$(BIN)/python -m pip install --quiet "$(TORCH)")

$(VENV)/installed: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

$(VENV)/installed-check: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --editable ".[test,check]"
	touch $@

clean:
	rm -rf $(VENV) build runs *.egg-info actcache/*.so
