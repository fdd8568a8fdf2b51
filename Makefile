# make demo    the main job on the built-in example: real model, real sentences (about two minutes after installation)
# make test    static checks and the tests
# Both create .venv first, with the exact versions of constraints.txt, and install nothing on a second run.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
JOBS ?= auto
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo test test-slow test-variation lint format docs docs-check bench clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# make/make/p' Makefile

$(VENV)/python: Makefile
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/demo: pyproject.toml constraints.txt | $(VENV)/python
	@echo "installing the pinned dependencies into $(VENV) (once; minutes) ..."
	$(INSTALL) '.[demo]'
	touch $@

$(VENV)/test: pyproject.toml constraints.txt | $(VENV)/python
	@echo "installing the pinned dependencies into $(VENV) (once; minutes) ..."
	$(INSTALL) '.[test]'
	touch $@ $(VENV)/demo

$(VENV)/bench: pyproject.toml constraints.txt | $(VENV)/test
	$(INSTALL) '.[test]' pytest-benchmark
	touch $@

# make demo
demo: $(VENV)/demo
	$(BIN)/attnrobust demo

$(VENV)/docs: pyproject.toml constraints.txt | $(VENV)/python
	@echo "installing the site's builder into $(VENV) (once) ..."
	$(INSTALL) '.[docs]'
	touch $@

# make test
test: lint $(VENV)/test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# make test-slow  the tests that take longer (marked slow): stronger attacks, more problems, the demo; an hour or more
test-slow: $(VENV)/test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m slow

# make test-variation  fast tests of attacks and certificates on other numbers: inputs a few ulp away, two threads, plain BLAS
VARIED := tests/soundness/test_last_bit.py tests/soundness/test_rounding.py tests/certify/test_radius.py \
	tests/test_comparison.py tests/attacks/test_token_moving.py::test_linear_layer_margin_is_the_dual_norm
ATTNROBUST_ULP ?= 1
test-variation: $(VENV)/test
	ATTNROBUST_ULP=$(ATTNROBUST_ULP) OMP_NUM_THREADS=2 MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default \
	  $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(VARIED)

# make lint    ruff, mypy, import-linter
lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# make format  rewrite the code in the project's layout
format: $(VENV)/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# make docs-check  links and code of README and docs
docs-check: $(VENV)/test
	$(BIN)/python -m pytest tests/test_docs.py

# make docs    the documentation as a site, in site/; a link that leads nowhere is an error
docs: $(VENV)/docs
	DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

# make bench   speed and tightness
bench: $(VENV)/bench
	$(BIN)/python -m pytest benchmarks --benchmark-only -o addopts=

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks build dist site
