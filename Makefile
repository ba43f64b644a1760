# Each target first makes the one .venv, if it is not there or pyproject.toml or
# constraints.txt changed since. `make PYTHON=python3.12 test` chooses the interpreter of a
# .venv that is yet to be made.

BIN := .venv/bin
# Two workers, a file at a time: compiling is most of the work, and one thread does it.
PYTEST_ARGS ?= -n 2 --dist loadfile

# Huge pages for malloc (glibc 2.35 and later; ignored elsewhere): XLA on the CPU takes fresh
# memory at every step, and touching it in pages of 4 KiB is a third of a small step's time.
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1
SHELL_SCRIPTS := .ci/run $(wildcard launch/*.sh)

.PHONY: demo test test-slow mutants lint bench plan-table clean

demo: .venv/.installed
	$(BIN)/emu-jax demo

# XLA's programs for the CPU without LLVM's optimisations: the tests take 0.7 of the time.
# `make test-slow` compiles as users do, and compares with the release again.
test: .venv/.installed-dev
	XLA_FLAGS="$$XLA_FLAGS --xla_backend_optimization_level=0" \
	  $(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

# A test that holds a measured ratio to a bound comes last, with nothing beside it.
test-slow: .venv/.installed-dev
	$(BIN)/python -m pytest -m "slow and not alone" $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m "slow and alone"

# Plants the bugs of tools/mutants.toml and says which test notices each.
mutants: .venv/.installed-dev
	$(BIN)/python tools/mutate.py --write docs/notes/mutations.md

# Everything that benchmarks/ measures, into the tables of docs/performance.md.
bench: .venv/.installed-dev
	$(BIN)/emu-jax bench --write docs/performance.md

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/shellcheck $(SHELL_SCRIPTS)

# Compiles the 14B step for four kinds of TPU: hours. It goes on where it was stopped.
plan-table: .venv/.installed-dev
	$(BIN)/emu-jax plan --config configs/emu_14b.py --sweep --out runs/plan --page docs/scaling.md \
	  --topology v5e:16x16,v5p:4x4x8,v6e:16x16,tpu7x:4x4x8

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The demo needs none of the tools that the tests need (torch among them).
.venv/.installed: pyproject.toml constraints.txt | .venv/bin/pip
	$(BIN)/pip install --quiet -e . -c constraints.txt
	touch $@

.venv/.installed-dev: pyproject.toml constraints.txt | .venv/bin/pip
	$(BIN)/pip install --quiet -e '.[dev]' -c constraints.txt
	touch .venv/.installed $@

.venv/bin/pip:
	@python="$(PYTHON)"; \
	for p in $${python:-python3.11 python3.12 python3}; do \
	  if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "$$p -m venv .venv"; exec $$p -m venv .venv; \
	  fi; \
	done; \
	echo "no Python 3.11 or later found: make PYTHON=/path/to/python3.11 ..." >&2; exit 1
