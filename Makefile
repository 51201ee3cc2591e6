# make demo | benchmark | test | check. Each makes .venv on the first call; a second call starts at once.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready
PEERS  := $(VENV)/.peers
ALL    := -e '.[explorer,finetune,slurm,dev]'
TESTED := -e '.[explorer,finetune,slurm,test,peers,docs]'

RUNS   ?= runs/grid
WORKERS ?= 3
RUN    ?= *

.PHONY: help install demo benchmark grid status monoloss apps explore test test-fast test-slurm wheel-check docs docs-serve notebooks check lint types format clean bench \
	bench-features bench-monoscore bench-evaluate bench-packed

help:
	@echo "make demo      train SAEs on the bundled pictures, score them, write reports/report.html"
	@echo "make benchmark two SAEs on each of five backbones, scored by all of ViSAEBench: reports/benchmark.html"
	@echo "make grid      ViSAEBench's sixty SAEs at the scale of the demo, scored, with the paper's analyses: reports/grid.html"
	@echo "make status    how far the grid is, at any time; RUNS=folder for other runs"
	@echo "make monoloss  the same SAEs without and with MonoLoss, compared in reports/monoloss.html"
	@echo "make apps      name, search, steer and match dictionaries, and look for bias: reports/apps.html"
	@echo "make explore   browse the latents of trained SAEs in the web browser; RUN=folder or pattern"
	@echo "make test      run all tests; test-fast: those that start no processes; test-slurm: jobs under a real SLURM that it starts itself (root)"
	@echo "make wheel-check  build the wheel, install it elsewhere into an empty environment, and train, evaluate and report there"
	@echo "make docs      the site: reports/site/index.html; docs-serve: the same, anew whenever a page changes;"
	@echo "               notebooks: run those of docs/notebooks and keep what they show"
	@echo "make bench     time training steps against other packages; bench-features: reading and extraction;"
	@echo "               bench-monoscore: scoring, and steps with MonoLoss; bench-evaluate: the benchmark's pass;"
	@echo "               bench-packed: twelve SAEs side by side against in turn"
	@echo "make check     lint, types and tests"
	@echo "make format    sort imports and format"
	@echo "make clean     remove stores, runs and reports (not .venv)"

install: $(READY)

define INSTALL
if command -v uv >/dev/null 2>&1; then UV=uv; \
elif $(PY) -m pip install -q uv >/dev/null 2>&1; then UV=$(VENV)/bin/uv; \
else UV=; fi; \
if [ -n "$$UV" ]; then $$UV pip install -q --python $(PY) -c constraints.txt $(1); \
else $(PY) -m pip install -q -c constraints.txt $(1); fi
endef

# uv from the path, else from inside the new environment, else plain pip
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 …"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) …"
	@$(call INSTALL,$(ALL))
	@touch $(READY)

# what tests run with, and other SAE packages, which converters and benchmarks are compared with
$(PEERS): $(READY)
	@echo "Installing what tests need …"
	@$(call INSTALL,$(TESTED))
	@touch $(PEERS)

demo: $(READY)
	$(PY) train.py -m experiment=demo
	$(PY) evaluate.py
	$(PY) report.py

benchmark: $(READY)
	$(PY) train.py -m experiment=benchmark
	$(PY) evaluate.py metrics=visaebench 'metrics.protocol=[paper,released]' devices=2 paths.runs=runs/benchmark
	$(PY) report.py paths.runs=runs/benchmark out=reports/benchmark.html detailed=10

grid: $(READY)
	$(PY) train.py -m experiment=visaebench_grid paths.runs=runs/grid
	$(PY) evaluate.py metrics=visaebench paths.runs=runs/grid
	$(PY) report.py grid='*' paths.runs=runs/grid out=reports/grid.html

status: $(READY)
	$(VENV)/bin/sae-lightning runs $(RUNS)

monoloss: $(READY)
	$(PY) train.py -m experiment=monoloss/demo paths.runs=runs/monoloss
	$(PY) evaluate.py paths.runs=runs/monoloss
	$(PY) report.py paths.runs=runs/monoloss out=reports/monoloss.html

# what dictionaries are used for: naming, search, bias, steering, stability, people's judgements
apps: $(READY)
	$(PY) train.py -m experiment=apps/embedding paths.runs=runs/apps
	$(PY) train.py -m experiment=apps/patches paths.runs=runs/apps
	$(PY) train.py backbone=clip sae=batchtopk k=4 expansion=2 paths.runs=runs/apps
	$(PY) explore.py app=naming run='topk-*' paths.runs=runs/apps
	$(PY) explore.py app=search run='topk-clip-*' paths.runs=runs/apps
	$(PY) explore.py app=bias run='topk-clip-*' app.positive=automobile app.negative=truck paths.runs=runs/apps
	$(PY) explore.py app=steering run='batchtopk-clip-x2-k4-*' paths.runs=runs/apps
	$(PY) explore.py app=stability run='batchtopk-*-k16-*' paths.runs=runs/apps
	$(PY) explore.py app=agreement run='batchtopk-clip-x8-*-s42-*' paths.runs=runs/apps
	$(PY) evaluate.py paths.runs=runs/apps
	$(PY) report.py paths.runs=runs/apps out=reports/apps.html

explore: $(READY)
	$(PY) explore.py app=explorer run='$(RUN)'

# in WORKERS processes of one thread each, one more than cores, as some wait for what they have started; with compiled
# files, as each process would compile all tests by itself
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal

test: $(PEERS)
	$(PYTEST)

test-fast: $(PEERS)
	TESTS_FAST=1 $(PYTEST) -m "not slow"

test-slurm: $(READY)
	$(PY) -m experiments.slurm.test

# the whole of what tests/commands/test_wheel.py does in seconds: with an empty environment
wheel-check: $(READY)
	$(PY) -m tests.commands.installed

docs: $(READY)
	@$(call INSTALL,-e '.[docs]')
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build -q --strict

docs-serve: $(READY)
	@$(call INSTALL,-e '.[docs]')
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs serve

notebooks: $(READY)
	@$(call INSTALL,-e '.[docs]')
	$(PY) -m jupyter nbconvert --to notebook --execute --inplace docs/notebooks/*.ipynb

bench: $(PEERS)
	$(PY) -m experiments.bench.train_step --memory --json reports/bench/train_step.json

bench-features: $(PEERS)
	$(PY) -m experiments.bench.formats --json reports/bench/formats.json
	$(PY) -m experiments.bench.features --json reports/bench/features.json

bench-monoscore: $(READY)
	$(PY) -m experiments.bench.monoscore --memory --json reports/bench/monoscore.json --plot reports/bench/monoscore.png

bench-evaluate: $(READY)
	$(PY) -m experiments.bench.evaluate --json reports/bench/evaluate.json

bench-packed: $(READY)
	$(PY) -m experiments.bench.packed --memory --json reports/bench/packed.json

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(READY)
	$(VENV)/bin/mypy

check: lint types test

format: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf stores runs reports outputs multirun
