# Each target first creates .venv, or updates it if pyproject.toml or constraints.txt changed.
# `make PYTHON=python3.12 test` chooses the interpreter of a new .venv.

BIN := .venv/bin
# Two workers, one file at a time: most of the time goes into compiling, which uses one thread.
# tests/conftest.py puts the longest files first.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

# Huge pages for malloc (glibc 2.35 and later; ignored elsewhere). XLA on the CPU allocates fresh
# memory at every step, and touching it in pages of 4 KiB takes a third of a small step.
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1
# Where this is set, each of the processes that the tests start would compile the package again.
export PYTHONDONTWRITEBYTECODE :=
SHELL_SCRIPTS := .ci/run $(wildcard launch/*.sh benchmarks/*.sh tools/*.sh)

.PHONY: demo test test-slow test-all mutants lint bench plan-table package docs notebooks clean

demo: .venv/.installed
	$(BIN)/emu-jax demo

# Without LLVM's optimizations of XLA's CPU programs, tests that compile take 0.7 of the time.
# tests/conftest.py adds two flags.
UNOPTIMIZED := XLA_FLAGS="$$XLA_FLAGS --xla_backend_optimization_level=0"

test: .venv/.installed-dev
	$(UNOPTIMIZED) $(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

# The long tests. Those that compare with the release or with torch are compiled as users do. Tests
# that compare speeds run last and alone. Checking the shapes of every call takes time of its own, so
# it is left to `make test`.
test-slow: export EMU_JAX_CHECK_SHAPES := 0
test-slow: .venv/.installed-dev
	$(UNOPTIMIZED) $(BIN)/python -m pytest -m "slow and not optimized and not alone" $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m "slow and optimized and not alone" $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m "slow and alone"

# Everything, including what is too long for CI: hours. Run it before a release.
test-all: lint test demo
	EMU_JAX_REPEAT=5 $(MAKE) test-slow PYTEST_ARGS="$(PYTEST_ARGS) --timeout 3600"
	for topology in v5e:16x16 v5p:4x4x8 v6e:16x16 tpu7x:4x4x8; do \
	  $(BIN)/emu-jax plan --config configs/emu_14b.py --topology $$topology --json | tail -n 1 | \
	    $(BIN)/python -c 'import json, sys; sys.exit(not json.load(sys.stdin)["fits"])' || exit 1; \
	done
	$(BIN)/python tools/siege.py --checkpoint runs/demo
	$(BIN)/python tools/mutate.py

# Plants the bugs of tools/mutants.toml, each alone; the tests named there must fail.
mutants: .venv/.installed-dev
	$(BIN)/python tools/mutate.py --jobs 2 --write docs/notes/mutations.md

# Runs every benchmark and updates the tables of docs/performance.md.
bench: .venv/.installed-dev
	$(BIN)/emu-jax bench --write docs/performance.md

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/shellcheck $(SHELL_SCRIPTS)

# Builds the wheel and the source distribution into dist/, and runs the wheel from an empty folder.
package: .venv/.installed-dev
	rm -rf dist
	$(BIN)/hatchling build
	$(BIN)/python -m pytest -n 0 -m "slow or not slow" tests/test_package.py

# Builds the documentation site into site/. A broken link or anchor, or a page outside the navigation,
# is an error.
docs: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Executes the notebooks, some of which need the demo.
notebooks: .venv/.installed-notebooks demo
	$(BIN)/python tools/notebooks.py

# Compiles the 14B step for four kinds of TPU, and the 37B step for two, and updates docs/scaling.md: hours. It
# can be resumed.
plan-table: .venv/.installed-dev
	$(BIN)/emu-jax plan --config configs/emu_14b.py --sweep --out runs/plan --page docs/scaling.md \
	  --topology v5e:16x16,v5p:4x4x8,v6e:16x16,tpu7x:4x4x8
	$(BIN)/emu-jax plan --config configs/emu2_37b.py --sweep --out runs/plan_emu2 --page docs/scaling.md \
	  --topology v5p:4x4x8,v6e:16x16 --policies full --rows 4,2 --scaling weak

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache build dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The demo does not need the test dependencies, such as torch.
.venv/.installed: pyproject.toml constraints.txt | .venv/bin/pip
	$(BIN)/pip install --quiet -e . -c constraints.txt
	touch $@

.venv/.installed-dev: pyproject.toml constraints.txt | .venv/bin/pip
	$(BIN)/pip install --quiet -e '.[dev]' -c constraints.txt
	touch .venv/.installed $@

.venv/.installed-docs: pyproject.toml constraints.txt | .venv/bin/pip
	$(BIN)/pip install --quiet -e '.[docs]' -c constraints.txt
	touch .venv/.installed $@

.venv/.installed-notebooks: pyproject.toml constraints.txt | .venv/bin/pip
	$(BIN)/pip install --quiet -e '.[notebooks]' -c constraints.txt
	touch .venv/.installed $@

.venv/bin/pip:
	@python="$(PYTHON)"; \
	for p in $${python:-python3.11 python3.12 python3}; do \
	  if $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then \
	    echo "$$p -m venv .venv"; exec $$p -m venv .venv; \
	  fi; \
	done; \
	echo "no Python 3.11 or 3.12 found: make PYTHON=/path/to/python3.11 ..." >&2; exit 1
