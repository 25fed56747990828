# Two commands: `make demo` sets up and runs the main job, `make test` sets up and passes every check.
PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Hundreds of processes are started; each would compile every module anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test setup lint types layers unit processes ray bench campaign clean

demo: setup
	$(BIN)/python examples/gpt/demo.py

test: setup lint types layers unit processes ray

setup: $(READY)

# torch first and pinned: a range would fetch gigabytes of CUDA packages. Compiled on all cores: pip uses one, and that
# is half of its time. (What cannot be compiled is for other Pythons.)
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	-$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib
	touch $(READY)

lint:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types:
	$(BIN)/mypy

layers:
	$(BIN)/lint-imports --no-cache

unit:
	$(BIN)/python -m pytest tests -m 'not processes and not ray' -n 2

# Two files at a time: they mostly wait. What measures times runs by itself. (Folders: to collect all takes long.)
processes:
	$(BIN)/python -m pytest tests/processes -m 'processes and not alone' -n 2 --dist loadfile
	$(BIN)/python -m pytest tests/processes -m 'processes and alone'

# Two files at a time here too, each with clusters of its own.
ray:
	$(BIN)/python -m pytest tests/ray tests/packaging -m ray -n 2 --dist loadfile

# Figures, not tests: they take long and depend on the machine.
bench: setup
	$(BIN)/python benchmarks/run_all.py

# All of the fault campaign; `make test` runs a slice of it.
campaign: setup
	$(BIN)/python -m tests.support.campaign --faults 200
	$(BIN)/python -m tests.support.campaign --faults 100 --ray
	$(BIN)/python -m tests.support.campaign --faults 30 --nodes

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .hypothesis
