# Every target does its own set-up: a virtual environment in .venv, packages pinned by constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
export JAX_PLATFORMS ?= cpu
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE ?= 1

.PHONY: quickstart test lint docs notebooks notebooks-outputs bench bench-peers effect peft-suite peft-suite-quick trust scale plan fuzz zero3 tunix compat current vllm package audit clean

quickstart: .venv/installed
	$(BIN)/moe-lora quickstart

# with the first two notebooks (the rest takes longer: make notebooks), and the short form of make current
test: .venv/installed lint
	$(BIN)/python -m pytest -n 2 --dist loadfile tests
	$(BIN)/nox -s current -- --quick

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all]'
	touch $@

# the long form of the robustness tests: faults, kills, flipped bits, hostile files; what was tried is counted at the end
trust: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --full \
		tests/test_trust_*.py tests/test_golden.py tests/test_interrupt.py tests/test_train_loop.py tests/test_verbs_train.py

# meshes of 8 forced devices, and 2 and 4 processes, against one device; the largest differences at the end
scale: .venv/installed
	$(BIN)/python -m pytest --full tests/test_mesh.py tests/test_processes.py

# the table of docs/scale.md: 15 steps compiled for TPUs and GPUs that are not here. It takes hours; stopped, it goes on
plan: .venv/installed build/cuda
	PYTHONPATH=build/cuda $(BIN)/python tools/plan_table.py

build/cuda: | .venv/installed
	$(BIN)/pip install --quiet --no-deps --target $@ jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2

# atheris looks for bytes that reach new code in the readers; it is installed beside the project
fuzz: .venv/installed
	$(BIN)/pip install --quiet --no-deps --target build/atheris atheris==3.0.0
	mkdir -p build/fuzz-corpus
	PYTHONPATH=.:build/atheris $(BIN)/python tools/fuzz.py --minutes 10 build/fuzz-corpus

# PEFT's own tests, run against this method
peft-suite: .venv/installed
	$(BIN)/python tools/peft_suite.py

peft-suite-quick: .venv/installed
	$(BIN)/python tools/peft_suite.py --quick

# the round trips with the oldest versions that pyproject.toml claims, and with the newest; each has an environment of its own
compat: .venv/installed
	$(BIN)/nox -s compat

# today's jax and flax on a newer Python, without torch; `make test` has the short form
current: .venv/installed
	$(BIN)/nox -s current

# a server of vLLM 0.32 on the CPU (3.5 GB, in an environment of its own): mixtures beside plain LoRAs and the base,
# and exports. With build/smollm2 (make build/smollm2/config.json) also a real model
vllm: .venv/installed
	$(BIN)/nox -s vllm

# the wheel, alone and with each extra in a clean environment
package: .venv/installed
	$(BIN)/nox -s package

# needs the network
audit: .venv/installed
	$(BIN)/nox -s audit

# DeepSpeed is no dependency of the tests: this installs it beside them and runs its one
zero3: .venv/installed
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/deepspeed \
		deepspeed==0.19.8 einops==0.8.2 hjson==3.1.0 ninja==1.13.2 py-cpuinfo==9.0.0
	PYTHONPATH=build/deepspeed DS_ACCELERATOR=cpu $(BIN)/python -m pytest tests/test_trainers.py -k zero3

# a model and the trainer of google-tunix, installed beside the project: it asks for packages that the project does not
# want. `make current` does the same on a newer jax
tunix: .venv/installed
	$(BIN)/pip install --quiet --no-deps --target build/tunix -r tools/tunix.txt
	PYTHONPATH=build/tunix $(BIN)/python -m pytest tests/test_tunix.py

# a site in build/site; links are checked (with --quiet MkDocs would not count its warnings)
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# the notebooks, from top to bottom, with their parameters and with others: a claim that does not hold fails.
# New outputs: make notebooks-outputs
notebooks: .venv/installed
	$(BIN)/python -m pytest --full tests/test_notebooks.py

notebooks-outputs: export TQDM_DISABLE = 1
notebooks-outputs: export PYTHONWARNINGS = ignore:IProgress not found,ignore:`is_gradient_checkpointing` is deprecated
notebooks-outputs: .venv/installed
	$(BIN)/python tools/notebook_outputs.py notebooks/*.ipynb

# every CPU benchmark, one table
bench: .venv/installed bench-peers
	$(BIN)/python -m benchmarks --markdown build/bench.md

# MixLoRA's own package, installed beside the project to be compared with
bench-peers: build/bench-peers/mixlora

build/bench-peers/mixlora: | .venv/installed
	$(BIN)/pip install --quiet --no-deps --target build/bench-peers mixlora==0.2.3

# does a mixture beat one LoRA? Hours on a CPU; stopped, the same command goes on. benchmarks/effect/RESULTS.md
effect: .venv/installed build/effect/packages build/smollm2/config.json
	PYTHONPATH=.:build/effect/packages $(BIN)/python -m benchmarks.effect build/smollm2

build/effect/packages: | .venv/installed
	$(BIN)/pip install --quiet --no-deps --target $@ \
		num2words==0.5.14 lemminflect==0.2.3 babel==2.18.0 pycountry==26.2.16 chatterbot-corpus==1.3.3

build/smollm2/config.json: | .venv/installed
	$(BIN)/pip install --quiet --no-deps --target build/gguf gguf==0.19.0
	PYTHONPATH=build/gguf $(BIN)/python tools/smollm2.py build/smollm2

clean:
	rm -rf .venv quickstart_output notebooks/output build dist *.egg-info
