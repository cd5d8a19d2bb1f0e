# The environment is .venv with the versions of constraints.txt. Every target creates it where it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check fuzz lint docs dist setup clean

demo: $(VENV)/.core
	$(BIN)/kornia-tinyvit demo --out demo
	@echo "The sheets are in demo/: open them in any image viewer."

# One process per core, each with one thread: networks as small as the tests' gain nothing from more threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

# Style, types, unit tests and journeys. With line coverage, which takes longer: make test COVERAGE=--cov.
test: setup lint
	$(PYTEST) -m "not slow" $(COVERAGE)

# The slower checks: the documentation, its code blocks and commands, pages in a browser, examples, wheel, fuzz, and
# compilers and quantizers of other packages. A test builds the documentation as `make docs` does.
check: setup
	$(PYTEST) -m slow

# Inputs with known answers for images, checkpoints, data sets and modules, in two processes; 20 minutes are about
# 100,000 inputs. TARGETS=all adds the random invalid input for everything else, of which `make check` runs a part.
SEEDS ?= 0
MINUTES ?= 20
TARGETS ?= gates
fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz.py --seeds $(SEEDS) --minutes $(MINUTES) --targets "$(TARGETS)"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

# The source distribution and the wheel from it in dist/; the wheel then works in an environment that has nothing else,
# away from the checkout, and the packages of every extra can be had together.
dist:
	rm -rf dist build
	$(PYTHON) -m venv build/tools
	build/tools/bin/python -m pip install --quiet --disable-pip-version-check build twine
	build/tools/bin/python -m build --outdir dist .
	build/tools/bin/twine check --strict dist/*
	$(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	build/clean/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd build && PYTHONPATH= clean/bin/kornia-tinyvit demo --out demo
	cd build && PYTHONPATH= clean/bin/python -c \
	  "import kornia_tinyvit; print(kornia_tinyvit.__version__, kornia_tinyvit.__file__)"
	for extra in $$(build/clean/bin/python -c "import tomllib; \
	  print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies'])"); do \
	  build/clean/bin/python -m pip install --quiet --disable-pip-version-check --dry-run -c constraints.txt \
	    "$$(echo dist/*.whl)[$$extra]" || exit 1; \
	  echo "extra $$extra: all packages can be had"; \
	done
	ls -l dist

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
	rm -rf $(VENV) build dist demo docs/_build .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
