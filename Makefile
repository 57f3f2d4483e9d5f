# On a fresh machine with Python >= 3.11: `make demo`, then `make test`.
PYTHON ?= python3
# Each interpreter gets its own environment: make test PYTHON=python3.13
VENV ?= .venv$(if $(filter-out python3,$(notdir $(PYTHON))),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt
WORKDIR ?= runs/demo

.PHONY: help demo test test-slow check parity chaos bench bench-gpu study-smoke clean

help:
	@echo "make demo       pretrain a small T5 on real text (about 5 minutes), or resume"
	@echo "make test       all fast tests"
	@echo "make test-slow  several processes, SLURM where it is installed, pods (about an hour)"
	@echo "make check      ruff and pyright"
	@echo "make parity     live comparison with PyTorch/transformers (installs them)"
	@echo "make chaos      one run of two processes, killed 100 times at random (about half an hour)"
	@echo "make bench      ratios against PyTorch and plain NumPy, measured side by side"
	@echo "make bench-gpu  tokens/s and MFU on a GPU beside PyTorch's (installs CUDA wheels)"
	@echo "make study-smoke  every system, small, on the demo text (about an hour)"
	@echo "make clean      remove the environments and caches (not runs/)"

$(VENV)/installed: pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, $(PYTHON) is " + sys.version.split()[0] + "; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/parity-installed: $(VENV)/installed
	$(PIP) -e '.[dev,parity]'
	@touch $@

$(VENV)/gpu-installed: $(VENV)/parity-installed
	$(PIP) 'jax[cuda12]'
	@touch $@

demo: $(VENV)/installed
	$(BIN)/python -m t5x_lite.train --config=configs/demo.py --workdir=$(WORKDIR)

test: $(VENV)/installed
	$(BIN)/python -m pytest -m "not parity and not slow and not slurm"

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -n 0 -m "slow or slurm"

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

parity: $(VENV)/parity-installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m parity

chaos: $(VENV)/installed
	$(BIN)/python -m tests.chaos

bench: $(VENV)/parity-installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.bench.data
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.bench.train
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.bench.generate
	$(BIN)/python -m tests.bench.startup

bench-gpu: $(VENV)/gpu-installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.bench.gpu

study-smoke: $(VENV)/installed
	$(BIN)/python -m tests.study_smoke

clean:
	rm -rf .venv* build *.egg-info .pytest_cache .ruff_cache
