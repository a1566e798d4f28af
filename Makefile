# make demo: refine the sample photos; make train-demo: train on them; make test: run the tests;
# make report: compare methods on the sample photos, a page with plots; make bench: speed and memory.
# All install first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo train-demo report test bench lint install clean

demo: install
	$(BIN)/python train_flexible_inference.py --config example_files/demo.json

train-demo: install
	$(BIN)/python train.py --config example_files/train_demo.json

report: install
	$(BIN)/python compare.py --config example_files/compare/demo.json --quick

test: install
	$(BIN)/python -m pytest

bench: install
	$(BIN)/python benchmark.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: .venv/installed

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
		{ echo "error: Python 3.11 or 3.12 is needed: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

clean:
	rm -rf .venv results .pytest_cache .ruff_cache .hypothesis
