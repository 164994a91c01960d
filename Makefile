# Every target does its own set-up: a virtual environment in .venv, packages pinned by constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
export JAX_PLATFORMS ?= cpu
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE ?= 1

.PHONY: quickstart test lint docs bench peft-suite peft-suite-quick zero3 clean

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

# PEFT's own tests, run against this method
peft-suite: .venv/installed
	$(BIN)/python tools/peft_suite.py

peft-suite-quick: .venv/installed
	$(BIN)/python tools/peft_suite.py --quick

# DeepSpeed is no dependency of the tests: this installs it beside them and runs its one
zero3: .venv/installed
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/deepspeed \
		deepspeed==0.19.8 einops==0.8.2 hjson==3.1.0 ninja==1.13.2 py-cpuinfo==9.0.0
	PYTHONPATH=build/deepspeed DS_ACCELERATOR=cpu $(BIN)/python -m pytest tests/test_trainers.py -k zero3

# a site in build/site; links are checked
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: .venv/installed
	$(BIN)/python -m benchmarks.layer

clean:
	rm -rf .venv quickstart_output build dist *.egg-info
