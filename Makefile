PYTHON ?= python3
BIN := .venv/bin

.PHONY: help verify test lint format clean

help:
	@echo 'make verify [ARGS=...]   draw cases, run every implementation, compare with the oracle'
	@echo 'make test   [ARGS=...]   the test-suite'
	@echo 'make lint                ruff and mypy'
	@echo 'make format              let ruff rewrite what it can'
	@echo 'make clean               remove the environment and caches'

verify:
	@$(PYTHON) tools/bootstrap.py
	$(BIN)/nsa-verify run $(ARGS)

# Through -m: where a reused interpreter already has pytest, the environment has no script of that name.
# -P: the folder kernels/ must not become importable as the top-level package of that name.
test:
	@$(PYTHON) tools/bootstrap.py
	$(BIN)/python -P -m pytest -n auto --dist worksteal $(ARGS)

lint:
	@$(PYTHON) tools/bootstrap.py --extra dev
	$(BIN)/python -P -m ruff check
	$(BIN)/python -P -m ruff format --check
	$(BIN)/python -P tools/typecheck.py

format:
	@$(PYTHON) tools/bootstrap.py --extra dev
	$(BIN)/python -P -m ruff check --fix
	$(BIN)/python -P -m ruff format

clean:
	rm -rf .venv .typing build .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
