# Two commands: `make train` and `make test`. Each sets up .venv first, with the tested versions.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/first

.PHONY: install train test slow lint matrix

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev]"
	touch $@

# Half-cheetah learns to adapt to either direction in one step; stopped, it goes on where it was.
train: install
	if [ -e $(RUN) ]; then $(BIN)/metarl train --resume $(RUN); else \
	$(BIN)/metarl train half-cheetah-dir --preset icml2017 --policy.hidden 64 64 \
	  --policy.activation tanh --advantage.trace 0.95 --iterations 40 --seed 1 --out $(RUN); fi
	$(BIN)/metarl evaluate $(RUN)

test: install
	$(BIN)/python -m pytest -m "not slow and not learning"

slow: install
	$(BIN)/python -m pytest -m "slow or learning"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Numerically strict tests once more, as other processors would run them.
matrix: install
	PYTHON=$(BIN)/python scripts/matrix.sh
