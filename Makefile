# One environment in .venv serves every target; nothing is installed twice unless its inputs changed.
#   PYTHON=python3.12        interpreter the environment is made from (3.11 or newer)
#   TORCH=torch==2.11.0      torch to install before everything that depends on it
#   ARGS='-k pack'           extra arguments of pytest for `make test`; '--seed 7' draws other random inputs
#   TRITON=3.6               another Triton than the newest for `make aot` and `make test`
#   JOBS=4                   processes that run the tests, each with one thread

SHELL := bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --quiet --quiet --disable-pip-version-check
READY := $(VENV)/ready
TYPING := build/typing/peftdyno
TRITON_AT := $(if $(TRITON),$(CURDIR)/build/triton-$(TRITON))

SANITIZED := build/sanitize
CHECKED = OMP_NUM_THREADS=1 PYTHONPATH=$(SANITIZED)/lib \
  LD_PRELOAD="$(foreach library,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(library).so))" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1

# What the other packages must leave as it is: torch, and a NumPy that the interpreter of a Triton before 3.7 can convert.
define CONSTRAINTS
from importlib.metadata import distributions
found = {d.name: d.version for d in distributions()}
print("torch==" + found["torch"])
if "triton" in found and tuple(map(int, found["triton"].split(".")[:2])) < (3, 7):
    print("numpy<2.4")
endef
export CONSTRAINTS

define KERNELS_SANITIZED
import torch
from peftdyno.kernels import _cpu
assert "$(SANITIZED)" in _cpu.__file__, _cpu.__file__
endef
export KERNELS_SANITIZED

define KERNELS_IN_USE
from peftdyno.kernels.cpu import AVAILABLE
print("CPU kernels:", "compiled C++" if AVAILABLE else "PyTorch operations, as the C++ extension was not built")
endef
export KERNELS_IN_USE

.PHONY: run test golden sanitize compilers lint check tree bench-cpu bench-tiles bench-dots aot gpu clean FORCE

run: $(READY)
	$(BIN)/peftdyno demo

test: $(READY) $(TRITON_AT)
	$(if $(TRITON),PYTHONPATH="$(TRITON_AT)") OMP_NUM_THREADS=1 $(BIN)/pytest tests --numprocesses=$(JOBS) $(ARGS)

# The tests of kernels and tapes on a copy of the package whose C++ watches its addresses and for undefined behaviour.
# Leaks are not looked for: Python keeps much until it exits. AddressSanitizer looks for libstdc++'s exceptions as it
# starts, before Python has loaded it; so that is loaded first too.
sanitize: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" PEFTDYNO_SANITIZE=address,undefined $(BIN)/python setup.py --quiet build \
	  --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	$(CHECKED) $(BIN)/python -P -c "$$KERNELS_SANITIZED"
	$(CHECKED) $(BIN)/pytest tests/kernels tests/engine/test_tape.py tests/engine/test_sized_tape.py --ignore tests/kernels/triton --capture=sys --numprocesses=$(JOBS) $(ARGS)

# The C++ built from nothing by each compiler, timed, and the kernel tests on what it made. Clang brings OpenMP's headers
# apart (libomp-dev). COMPILERS=clang++ for one.
COMPILERS ?= g++ clang++
compilers: $(READY)
	@for compiler in $(COMPILERS); do \
	  at="build/compilers/$$compiler"; rm -rf "$$at"; mkdir -p "$$at"; SECONDS=0; \
	  PATH="$(CURDIR)/$(BIN):$$PATH" CC="$$compiler" CXX="$$compiler" $(BIN)/python setup.py --quiet build \
	    --build-base "$$at" --build-lib "$$at/lib" >"$$at/log" 2>&1; \
	  ls "$$at"/lib/peftdyno/kernels/_cpu*.so >/dev/null; \
	  echo "$$("$$compiler" --version | head -1): built in $$SECONDS s on $$(nproc) processors"; \
	  OMP_NUM_THREADS=1 PYTHONPATH="$$at/lib" $(BIN)/pytest tests/kernels --ignore tests/kernels/triton --numprocesses=$(JOBS); \
	done

# The losses that tests/test_tiny.py holds later versions to.
golden: $(READY)
	PEFTDYNO_GOLDEN=write $(BIN)/pytest tests/test_tiny.py

# Every Triton kernel compiled for sm_80 to sm_120 without a GPU: registers, spills, shared memory, limits.
# TRITON=3.6 compiles with that version instead, kept beside the environment.
aot: $(READY) $(TRITON_AT)
ifdef TRITON
	PYTHONPATH="$(TRITON_AT)" $(BIN)/python -P -m peftdyno.kernels.triton.ahead --json build/aot-triton-$(TRITON).json
else
	$(BIN)/python -P -m peftdyno.kernels.triton.ahead --json build/aot.json
endif

# With a NumPy that the interpreters of Triton before 3.7 can convert.
$(CURDIR)/build/triton-%: | $(READY)
	@mkdir -p build && rm -rf $@.part
	$(PIP) install --no-deps --target $@.part 'triton==$*.*' 'numpy==2.3.*'
	@mv $@.part $@

gpu:
	bench/gpu.sh $(ARGS)

# Side by side with transformers + PEFT and the HF Trainer; ARGS='--only step-128' for a part.
bench-cpu: $(READY)
	$(BIN)/python -P -m peftdyno.bench.compare $(ARGS)

# What a product of tiles costs on this processor, by how many tiles are in use.
bench-tiles:
	@mkdir -p build
	$(CXX) -O2 -std=c++20 -mavx512f -mamx-tile -mamx-bf16 -Wno-attributes bench/micro/tiles.cpp -o build/tiles
	build/tiles

# What a processor without tiles multiplies at most.
bench-dots:
	@mkdir -p build
	$(CXX) -O2 -std=c++20 -pthread bench/micro/dots.cpp -o build/dots
	build/dots

lint check: $(READY) $(TYPING)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	MYPYPATH=build/typing $(BIN)/mypy -p peftdyno.kernels -p peftdyno.engine | sed 's|^$(TYPING)/||'
	$(BIN)/pytest tests/test_style.py tests/test_security.py

tree:
	$(PYTHON) docs/tree.py

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info $(READY)
	find engine kernels bench tests docs -name __pycache__ -prune -exec rm -rf {} +
	find engine kernels bench -name '*.so' -delete

$(READY): pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*) $(VENV)/torch-requirement
	@echo "Installing $(TORCH) and peftdyno into $(VENV) ..."
	$(PIP) install "$$(cat $(VENV)/torch-requirement)"
	@$(BIN)/python -c "$$CONSTRAINTS" >$(VENV)/constraints
	$(PIP) install -c $(VENV)/constraints 'setuptools>=77' wheel ninja
	$(PIP) install -c $(VENV)/constraints --no-build-isolation -e '.[hf,peft,dev]'
	@$(BIN)/python -P -c "$$KERNELS_IN_USE"
	@touch $@

# Rewritten only when TORCH changes, so that another torch reinstalls and rebuilds.
$(VENV)/torch-requirement: FORCE | $(BIN)/python
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' >$@

# Some distributions split ensurepip off from Python; the interpreter's own pip then fills the environment.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "peftdyno needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.11"; exit 1; }
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv $(VENV); else \
	  $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --quiet --quiet --python $@ install pip; fi

# mypy cannot follow the mapping of folders to import names; it reads this mirror of links instead.
$(TYPING):
	@mkdir -p $@
	@for name in engine kernels bench; do ln -sfn "../../../$$name" "$@/$$name"; done
