.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test check bench clean

help: ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

.venv/demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[cpu]'
	touch $@

.venv/test: pyproject.toml .venv/demo
	$(BIN)/pip install --quiet --editable '.[cpu,export,dev]'
	touch $@

demo: .venv/demo ## Prune the bundled model and print the evidence
	$(BIN)/corp-onnx demo

test: .venv/test check ## Run every test (all that CI runs)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: .venv/test ## Lint, format, types and import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/test ## Measure again what README and docs quote
	$(BIN)/python -m tools.fetch_assets
	$(BIN)/python -m benchmarks all

clean: ## Remove the environment and everything derived
	rm -rf .venv build dist *.egg-info
