# The environment is .venv with the versions of constraints.txt; everything below sets it up first where needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint docs setup clean

demo: $(VENV)/.core
	$(BIN)/kornia-tinyvit demo --out demo
	@echo "The sheets are in demo/: open them in any picture viewer."

# A process a core, each with one thread: networks as small as the tests' gain nothing from more.
test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal --cov

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

setup: $(VENV)/.all

# torch first and alone: with it in place, nothing that needs it pulls another build.
$(VENV)/.core: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.all: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,docs]'
	touch $@

clean:
	rm -rf $(VENV) demo docs/_build .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
