# Every target does its own set-up: a virtual environment in .venv, packages pinned by constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
export JAX_PLATFORMS ?= cpu
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE ?= 1

.PHONY: quickstart test lint clean

quickstart: .venv/installed
	$(BIN)/moe-lora quickstart

test: .venv/installed lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all]'
	touch $@

clean:
	rm -rf .venv quickstart_output build dist *.egg-info
