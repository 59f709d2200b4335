# make setup   a virtual environment in .venv with the versions of constraints.txt
# make run     fine-tune a 124M-parameter model in 40 % of the memory it asks for
# make test    the tests that need seconds; .ci/run runs the longer ones too
# make lint    style, types, layers
# make clean   remove what the build and the tools left

PYTHON ?= python3
# Extra arguments for the installation of torch. A machine without an NVIDIA GPU gets torch's CPU
# build where pip can find one. The default package index has none on Linux, only the CUDA build of
# several GB; add the index of PyTorch's CPU builds: make setup TORCH_PIP_ARGS="--extra-index-url <URL>"
TORCH_PIP_ARGS ?=
# Extra arguments for pytest, for example: make test PYTEST_ARGS="-k store -x"
PYTEST_ARGS ?=
# Processes that run tests, each with one thread, or 0: all tests in the one process of pytest.
# "logical" is one for each processor, up to 4 of them, for each may take 2 GiB of memory.
TEST_WORKERS ?= logical
# Extra arguments for the quickstart, for example: make run RUN_ARGS="--steps 40"
RUN_ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)
NVIDIA := $(wildcard /dev/nvidiactl /dev/dxg)

.PHONY: setup run test lint format clean

setup: .venv/.installed

# A broken environment (an interrupted one, or one whose Python has gone) is made anew.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Offload needs Python 3.11 or newer: make setup PYTHON=python3.11" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "Installing torch and the other dependencies into .venv ..." >&2
	@$(if $(NVIDIA),false,$(PIP) $(TORCH_PIP_ARGS) '$(TORCH)+cpu' 2>/dev/null) || \
	  $(PIP) $(TORCH_PIP_ARGS) '$(TORCH)'
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

run: setup
	$(BIN)/python recipes/quickstart.py $(RUN_ARGS)

test: setup
	$(BIN)/python -m pytest --numprocesses=$(TEST_WORKERS) --maxprocesses=4 --dist=worksteal \
	  $(PYTEST_ARGS)

# Types and layers are checked in the type tree, where the mapped packages stand inside offload/.
lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python tools/typetree.py
	cd build/typetree && ../../$(BIN)/mypy --config-file ../../pyproject.toml --package offload
	cd build/typetree && ../../$(BIN)/mypy --config-file ../../pyproject.toml ../../tools
	cd build/typetree && ../../$(BIN)/lint-imports --config ../../pyproject.toml

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find allocator offload recipes swap tests tiers tools -name __pycache__ -prune -exec rm -rf {} +
