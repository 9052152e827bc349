# Two commands: `make demo` (set-up, then Table 6's four ablations on real images) and `make test`.
SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= python3.11
RUN := $(VENV)/bin/python
# One test process per core, four at most: each needs about 1 GB.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist worksteal
# What ffcv's build and the JPEG decoders need from the system.
SYSTEM := libopencv-dev libturbojpeg0-dev libjpeg-dev pkg-config build-essential python3-dev python3-venv

.PHONY: help demo test test-slow test-all lint format types setup peers system clean
help:
	@echo "make demo      set up, then train the four ablations of Table 6 on handwritten digits (CPU, minutes)"
	@echo "make test      set up, then the tests that take seconds"
	@echo "make test-slow those that take minutes; make test-all: both"
	@echo "make lint      ruff; make types: mypy; make format: ruff format"
	@echo "make peers     timm, for benchmark.py --against timm"
	@echo "make setup     system libraries, $(VENV), pinned packages"

demo: setup
	$(RUN) src/train.py -m ablation=plain,id,1x1,full data=digits model=repvgg_a0 trainer=cpu recipe=quick logger=wandb_offline

test: setup
	$(RUN) -m pytest -m "not slow" $(PARALLEL)

# Those of a real Slurm one after another: they share its ports.
test-slow: setup
	$(RUN) -m pytest -m slow --numprocesses auto --maxprocesses 2 --dist worksteal --durations=15 --ignore tests/cluster
	$(RUN) -m pytest -m slow tests/cluster

test-all: test test-slow

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: setup
	$(VENV)/bin/mypy

setup: $(VENV)/.installed

# What `benchmark.py … --against timm` compares with. Apart from $(VENV), which must not see this torchvision: PyPI's is
# of CUDA's build. The three are those of repvgg.bench.sides.INSTALL_TIMM.
peers: setup
	$(RUN) -m pip install --quiet --no-deps --upgrade --target .peers timm==1.0.31 torchvision==0.28.0 huggingface_hub==1.0.0

# Made anew when a pin or a compiled extension changes.
$(VENV)/.installed: pyproject.toml constraints.txt src/repvgg/data/_decode.c src/repvgg/model/_normsum.cpp | system
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

system:
	@PYTHON=$(PYTHON) scripts/system-packages $(SYSTEM)

clean:
	rm -rf $(VENV) data/digits
