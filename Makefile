# Each target sets itself up: it needs Python 3.11 or newer and make only.
#   make demo SEED=1          make bench PEERS=DIR PEERS_PYTHON=VENV/bin/python
#   make demo PYTHON=/path/to/python3.12

PYTHON ?= python3
PEERS_PYTHON ?= python3
SEED ?= 0
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
FAST := not slow and not tpu and not tpu_smoke
SLOW := slow and not tpu and not tpu_smoke
# Two folders of tests run at a time, those that take longest first.
LONGEST := pallas_kernels recipe experiments parallel model
FOLDERS := $(LONGEST) $(filter-out $(LONGEST) __pycache__, \
  $(notdir $(patsubst %/,%,$(wildcard tests/*/)))) top
# Each folder's output in one piece, where make can (4.0).
TESTS = @$(MAKE) --no-print-directory -k -j2 \
  $(if $(filter output-sync,$(.FEATURES)),-O) \
  $(addprefix tests-in-,$(FOLDERS)) TIER='$(1)'
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
RUFF_PATHS := $(wildcard configs experiments pallas_kernels r1jax tests)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-slow test-tpu test-tpu-smoke lint format \
	bench setup setup-tpu

help:
	@echo 'make demo [SEED=0]        train and evaluate R1-Zero in miniature'
	@echo 'make test                 fast tests'
	@echo 'make test-all             fast and slow tests'
	@echo 'make test-tpu             compile for real TPUs (downloads libtpu)'
	@echo 'make lint | format        check or mend the style'
	@echo 'make bench [PEERS=DIR PEERS_PYTHON=VENV/bin/python]'
	@echo '                          speed, beside other projects if given'

demo: .venv/.installed
	$(BIN)/python -m experiments.demo --workdir=runs/demo --seed=$(SEED)

bench: .venv/.installed
	$(BIN)/python -m experiments.bench $(if $(PEERS),--peers=$(PEERS) \
	  --peers_python=$(PEERS_PYTHON))

test: .venv/.installed
	$(call TESTS,$(FAST))

test-slow: .venv/.installed
	$(call TESTS,$(SLOW))

test-all: .venv/.installed
	$(call TESTS,not tpu and not tpu_smoke)

# pytest's exit status 5, nothing to run here, is no failure.
tests-in-%:
	@echo "$(if $(filter top,$*),tests,tests/$*):"
	@$(PYTEST) -q -m '$(TIER)' $(if $(filter top,$*),$(wildcard \
	  tests/*_test.py),tests/$*) || test $$? = 5

test-tpu: .venv/.installed-tpu
	$(PYTEST) -q -m 'tpu or tpu_smoke'
	$(BIN)/python -m tests.tpu.compiling > experiments/results/tpu.md

test-tpu-smoke: .venv/.installed-tpu
	$(PYTEST) -q -m tpu_smoke

lint: .venv/.installed
	$(BIN)/ruff check $(RUFF_PATHS)
	$(BIN)/ruff format --check $(RUFF_PATHS)

format: .venv/.installed
	$(BIN)/ruff check --fix $(RUFF_PATHS)
	$(BIN)/ruff format $(RUFF_PATHS)

setup: .venv/.installed
setup-tpu: .venv/.installed-tpu

# The stamp is written last, so an installation cut short starts again.
.venv/.installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  2>/dev/null || { \
	  echo "error: r1jax needs Python 3.11 or newer, and '$(PYTHON)' is not;" \
	    "name another: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo 'Installing r1jax into .venv (a few minutes, once).'
	@$(PIP) install -e '.[dev]'
	@touch $@

# libtpu is fitted to one jax: the one that is already there.
.venv/.installed-tpu: .venv/.installed
	@echo 'Installing libtpu into .venv (a large download, once).'
	@$(PIP) install "jax[tpu]==$$($(BIN)/python -c \
	  'import jax; print(jax.__version__)')"
	@touch $@
