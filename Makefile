# make demo: refine the sample photos; make report: compare methods on them, a page with plots;
# make train-demo: train on them; make bench: speed and memory; make bench-gpu: is a GPU right, and
# how fast is it; make test, make lint: the checks.
# Each installs what it needs into .venv first, see requirements/.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(or $(shell for python in python3.11 python3.12 python3; do \
	$$python -c '$(SUPPORTED)' 2>/dev/null && echo $$python && break; done),python3)
BIN := .venv/bin

.PHONY: demo train-demo report test bench bench-gpu lint install clean

demo: .venv/installed-refine
	$(BIN)/python train_flexible_inference.py --config example_files/demo.json

report: .venv/installed-refine
	$(BIN)/python compare.py --config example_files/compare/demo.json --quick

train-demo: .venv/installed-train_folder
	$(BIN)/python train.py --config example_files/train_demo.json

bench: .venv/installed-training
	$(BIN)/python benchmark.py

bench-gpu: .venv/installed-refine
	$(BIN)/python benchmark.py gpu --json results/gpu.json

test: .venv/installed-dev
	$(BIN)/python -m pytest

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# everything
install: .venv/installed-dev

# A part adds to what is installed already. The parts include each other: each depends on all files.
.venv/installed-%: requirements/%.txt $(wildcard requirements/*.txt) | .venv/created
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

.venv/created:
	@$(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || \
		{ echo "error: Python 3.11 or 3.12 is needed: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	@touch $@

clean:
	rm -rf .venv results .pytest_cache .ruff_cache .hypothesis .mypy_cache
