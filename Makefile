# One word a chore. The first use of any of them makes .venv and installs the pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test check bench chaos soak docs clean

demo: $(VENV)/.run            ## train the tasting room from nothing and open its report
	$(BIN)/palate run recipes/tasting_room.yaml

test: $(VENV)/.dev            ## the whole suite, offline
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/.dev           ## format, lint, types, laws
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest tests/laws

bench: $(VENV)/.dev           ## speed beside the peers (docs/bench.md), growth, memory, start-up, learning curves, the Adam ablation
	$(BIN)/python -m bench.speed
	$(BIN)/python -m bench.growth
	$(BIN)/python -m bench.memory
	$(BIN)/python -m bench.startup
	$(BIN)/python recipes/stories/prepare.py
	$(BIN)/python -m bench.curves
	$(BIN)/palate run bench/bigger.yaml
	$(BIN)/python -m bench.adam_ablation

chaos: $(VENV)/.dev           ## kill real runs 200 times at random, and at every exact moment
	$(BIN)/python -m bench.chaos --kills 200 --page bench/chaos.md

soak: $(VENV)/.dev            ## two thousand small PPO steps: memory, file handles, step time
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.soak --steps 2000 --page bench/soak.md --picture docs/img/soak.svg

docs: $(VENV)/.dev            ## the generated pages of docs/
	$(BIN)/python docs/build.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "palate needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:                        ## remove the environment (runs/ stays)
	rm -rf $(VENV)
