PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
RUN = results/digits_lenet/bsam

# Trains bSAM on scikit-learn's digits and evaluates it over 32 samples of its posterior.
train: $(VENV)/requirements
	$(BIN)/python train.py --dataset digits --model lenet --optim bsam --alpha 0.5 --rho 0.01 --priorprec 1 \
	    --batchsize 50 --batchsplit 5 --epochs 40
	$(BIN)/python test.py --testmc 32 --resultsfolder "$$(ls -td $(RUN)/run_* | head -n 1)"

# Rewrites results/README.md and its pictures from the records in results/.
results: $(VENV)/requirements
	$(BIN)/python studies/report.py
	$(BIN)/python benchmarks/growth.py --plot results/growth.json results/growth.png

# Three workers on two cores, because some tests wait for processes and disks.
test: $(VENV)/test-requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 3 --dist worksteal

# Runs what takes too long for every change: the slow tests, and 10,000 damaged files for every reader.
test-slow: $(VENV)/test-requirements
	$(BIN)/python -m pytest -n 2 -m slow
	$(BIN)/python tests/fuzz.py --cases 10000

$(VENV)/requirements: requirements.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/test-requirements: $(VENV)/requirements tests/requirements.txt
	$(BIN)/python -m pip install --quiet -r tests/requirements.txt
	touch $@

.PHONY: train results test test-slow
