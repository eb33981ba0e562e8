# Two commands: `make train` and `make test`. Each sets up .venv first, with the tested versions.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/first
# Processes that share the tests; one per core is best.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.PHONY: install dev train test test-lowest test-newest noise slow examples lint docs matrix matrix-whole

install: .venv/installed
dev: .venv/installed-dev

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e .
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev]"
	touch .venv/installed $@

.venv/installed-docs: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[docs]"
	touch .venv/installed $@

# Half-cheetah learns to adapt to either direction in one step; stopped, it goes on where it was.
train: install
	if [ -e $(RUN) ]; then $(BIN)/metarl train --resume $(RUN); else \
	$(BIN)/metarl train half-cheetah-dir --preset metarl2026 --iterations 40 --out $(RUN); fi
	$(BIN)/metarl evaluate $(RUN)

test: dev
	$(PYTEST) -m "not slow and not learning"

# The default tests with the lowest versions that pyproject.toml admits, but torch 2.13.0; and with
# the newest versions of today, but the torch of TORCH.
test-lowest: .venv-lowest/installed
	.venv-lowest/bin/python -m pytest -n $(JOBS) --dist worksteal -m "not slow and not learning"

.venv-lowest/installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --disable-pip-version-check -q -c constraints-lowest.txt -e ".[dev]"
	touch $@

TORCH ?= 2.13.0
test-newest:
	rm -rf .venv-newest && $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --disable-pip-version-check -q -e ".[dev]" torch==$(TORCH)
	.venv-newest/bin/python -m pytest -n $(JOBS) --dist worksteal -m "not slow and not learning"

# The default tests again, with results rounded as another processor might round them.
SEED ?= 1
noise: dev
	$(PYTEST) -m "not slow and not learning" --rounding-noise $(SEED)

slow: dev
	$(PYTEST) -m "slow or learning"

# All scripts of examples/. `make test` runs the short ones.
examples: dev
	$(PYTEST) tests/test_docs.py -k test_examples_run

# pyright sees the package as it is shipped, with envs inside.
lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typecheck && mkdir -p build/typecheck
	cp -r metarl build/typecheck/metarl && cp -r envs build/typecheck/metarl/envs
	$(BIN)/pyright

# The strict tests as nine other processors would run them; all default tests as two would.
matrix: dev
	JOBS=$(JOBS) PYTHON=$(BIN)/python scripts/matrix.sh

matrix-whole: dev
	JOBS=$(JOBS) PYTHON=$(BIN)/python scripts/matrix.sh whole

# The documentation site, build/docs/index.html. Warnings are errors: broken links, missing names.
docs: .venv/installed-docs
	rm -rf build/docs
	$(BIN)/python -m sphinx -b html -d build/doctrees -E -W --keep-going -q docs build/docs
