# make demo         check and time decode on this GPU (without one: the reference, and the kernels compiled)
# make test         lint, types, CPU tests, and the GPU tests where there is a Hopper GPU
# make quick        lint, types, and the CPU tests but for the compiles and other slow ones: under two minutes
# make bench        the benchmark grid, with a JSON record
# make docs         the documentation as a site, in site/; needs neither torch nor a GPU
# make wheel        the source distribution and the wheel, in dist/, as twine wants them; needs no torch either
# make check-wheel  that wheel in an environment of its own: its files, calls on CPU tensors, the commands
#
# Each needs only Python >= 3.10 and makes its own .venv. TORCH=torch==X.Y.Z chooses the torch installed first,
# PYTHON=python3.12 the interpreter, BENCH_ARGS="..." what `mla-cute bench` is given.

TORCH ?= torch
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo $$p; exit; }; done; echo python3)
# The compile tests need about 1 GB each.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 8 ] && n=8; echo $$n)

VENV := .venv
BIN := $(VENV)/bin
# What is imported is compiled then. Compiling all of torch and its like at once takes 40 s.
# pip draws a bar for each download in a terminal and prints a line elsewhere: torch with CUDA is gigabytes.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --no-compile
TORCH_STAMP := $(VENV)/.torch-$(shell printf %s '$(TORCH)' | tr -c 'A-Za-z0-9.' _)
DEMO_STAMP := $(VENV)/.installed-demo
DEV_STAMP := $(VENV)/.installed-dev
DOCS_STAMP := $(VENV)/.installed-docs
WHEEL_STAMP := $(VENV)/.installed-wheel
# What is installed there is the wheel and what it asks for.
WHEEL_VENV := .venv-wheel

.PHONY: demo test quick lint format bench docs wheel check-wheel clean
.DELETE_ON_ERROR:

demo: $(DEMO_STAMP)
	$(BIN)/mla-cute demo

bench: $(DEMO_STAMP)
	$(BIN)/mla-cute bench $(BENCH_ARGS)

test: lint
	@if ls tests/gpu/test_*.py >/dev/null 2>&1; then $(BIN)/pytest tests/gpu; fi
	$(BIN)/pytest tests/cpu -n $(JOBS) --dist worksteal

quick: lint
	$(BIN)/pytest tests/cpu -n $(JOBS) --dist worksteal -m "not compiles and not slow"

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy mla_cute

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The wheel is built from the source distribution, which shows that nothing is missing there.
wheel: $(WHEEL_STAMP)
	rm -rf build dist
	$(BIN)/pyproject-build
	$(BIN)/twine check --strict dist/*

check-wheel: wheel
	rm -rf $(WHEEL_VENV)
	$(BIN)/python -m venv $(WHEEL_VENV)
	$(INSTALL:$(BIN)/%=$(WHEEL_VENV)/bin/%) '$(TORCH)'
	$(INSTALL:$(BIN)/%=$(WHEEL_VENV)/bin/%) "$$(ls "$$PWD"/dist/*.whl)[cli]"
	$(WHEEL_VENV)/bin/mla-cute info
	$(WHEEL_VENV)/bin/python tests/installed_wheel.py $(WHEEL_VENV)

clean:
	rm -rf $(VENV) $(WHEEL_VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find mla_cute tests tune -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "mla-cute needs Python 3.10 or newer; '$(PYTHON)' is not: $$($(PYTHON) --version 2>&1 | head -1)" >&2; \
		echo "Name another with PYTHON=..., e.g. make PYTHON=python3.12 demo" >&2; exit 1; }
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu install python3-venv." >&2; exit 1; }

$(TORCH_STAMP): | $(BIN)/python
	@echo "installing $(TORCH) into $(VENV) (a CUDA build is a download of some GB)"
	@$(INSTALL) '$(TORCH)'
	@rm -f $(VENV)/.torch-*
	@touch $@

$(DEMO_STAMP): pyproject.toml $(TORCH_STAMP)
	@echo "installing mla-cute into $(VENV)"
	@$(INSTALL) --editable '.[cli,bench]'
	@touch $@

$(DEV_STAMP): pyproject.toml $(TORCH_STAMP)
	@echo "installing mla-cute and the development tools into $(VENV)"
	@$(INSTALL) --editable '.[dev]'
	@touch $@ $(DEMO_STAMP)

# Older releases of pip know no dependency groups.
$(DOCS_STAMP): pyproject.toml | $(BIN)/python
	@echo "installing what builds the documentation into $(VENV)"
	@$(INSTALL) --upgrade 'pip>=25.1'
	@$(INSTALL) --group docs
	@touch $@

$(WHEEL_STAMP): pyproject.toml | $(BIN)/python
	@echo "installing what builds the wheel into $(VENV)"
	@$(INSTALL) --upgrade 'pip>=25.1'
	@$(INSTALL) --group wheel
	@touch $@
