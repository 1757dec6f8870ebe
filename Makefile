# make train    train the digits RevNet; flags of train.py: make train ARGS="--config.steps=100"
# make test     run the tests; flags of pytest: make test ARGS="-k coupling"
# make faults   kill runs and their processes, fill disks, soak, fuzz for long; see tests/faults/
# make bench    time the ways to a gradient, which is long; see benchmarks/speed.py
# make docs     build the documentation into site/; any warning is an error
# make notebooks    execute notebooks/ into build/notebooks; OUT=notebooks refreshes what is committed
# make lint     ruff and pyright
# make format   let ruff rewrite what it can
# make clean    remove the environments and what the tools left behind; training runs stay
#
# Each first makes its environment, once: .venv, or, with PYTHON=python3.12, .venv-python3.12.

comma := ,
VENV := .venv$(if $(PYTHON),-$(notdir $(PYTHON)))
RUN := $(VENV)/bin/python
# Tests run side by side; ARGS="-n 0" runs them in one process, for a debugger.
PYTEST := $(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
CORE := tests/test_coupling.py tests/test_reversible.py tests/test_conv.py tests/test_models.py \
	tests/test_batch_norm.py tests/test_recompute.py tests/test_training_compiler.py

.PHONY: help train test test-core faults bench docs notebooks environment lint format clean interpreter
.NOTPARALLEL:

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

train: $(VENV)/train.stamp
	$(RUN) train.py --config configs/digits_revnet.py $(ARGS)

test: $(VENV)/test.stamp
	$(PYTEST) $(ARGS)

# The tests of the rule, the networks and what the compiler is asked: what a further version of JAX has
# to pass.
test-core: $(VENV)/test.stamp
	$(PYTEST) $(CORE) $(ARGS)

# At the lowest priority; the tests marked slow and the damage of every file of a checkpoint are among it.
faults: $(VENV)/test.stamp
	FUZZ_TIMES=10 nice -n 19 $(PYTEST) -m "slow or not slow" tests/faults \
		tests/test_training_checkpoints.py
	nice -n 19 $(RUN) tests/faults/survive.py $(ARGS)

bench: $(VENV)/test.stamp
	$(RUN) benchmarks/speed.py $(ARGS)

# Not with --quiet, under which mkdocs counts no warning. The variable is for the theme's own, which says
# that mkdocs has no future; pyproject.toml has more.
docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build $(ARGS)
	@echo "open site/index.html"

# Two at a time; a cell that fails makes it fail. The kernel is that of the environment. It is reached by
# sockets in a folder: of two that start at once over TCP, one may be told the port that the other took.
OUT := build/notebooks
notebooks: $(VENV)/docs.stamp
	sockets=$$(mktemp -d) && trap 'rm -rf "$$sockets"' EXIT && mkdir "$$sockets/notebooks" && \
	printf '%s\n' notebooks/*.ipynb | xargs -P 2 -I {} $(RUN) -m nbconvert --log-level ERROR \
		--to notebook --execute --ExecutePreprocessor.record_timing=False --output-dir $(OUT) \
		--KernelManager.transport=ipc --KernelManager.ip="$$sockets/{}" $(ARGS) {}

# What the others make first, alone.
environment: $(VENV)/test.stamp

lint: $(VENV)/test.stamp
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m pyright --pythonpath $(RUN)

format: $(VENV)/test.stamp
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

clean:
	rm -rf .venv .venv-* build dist site .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Prints the interpreter for a new environment. A name on the PATH may be a pyenv shim, which fails
# unless a version that has it is selected: so a name that fails is tried with that version.
find_python := \
    for name in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
        for version in "$$PYENV_VERSION" "$$(pyenv whence $$name 2>/dev/null | tail -n 1)"; do \
            PYENV_VERSION=$$version $$name 2>/dev/null -c \
            'import sys; sys.version_info < (3, 11) and sys.exit(1); print(sys.executable)' \
            && exit 0; \
        done; \
    done; \
    echo "revjax needs Python 3.11 or newer, and $(or $(PYTHON),python3) is not:" \
        "install one, or name one with PYTHON=/path/to/python." >&2; \
    exit 1

interpreter:
	@$(find_python)

# A stamp says that an install is complete. None is there while one runs, and without one the
# environment starts from nothing, so an interrupted install leaves no trace.
define install
	@echo "installing revjax into $(VENV) (once; this takes some minutes)"
	@ls $(VENV)/*.stamp >/dev/null 2>&1 || { \
	    python=$$($(find_python)) && "$$python" -m venv --clear $(VENV); }
	@rm -f $(VENV)/*.stamp
	@$(RUN) -m pip install -qq --no-compile --disable-pip-version-check -e "$(1)"
endef

$(VENV)/train.stamp: pyproject.toml
	$(call install,.)
	@touch $@

$(VENV)/test.stamp: pyproject.toml
	$(call install,.[test])
	@touch $(VENV)/train.stamp $@

$(VENV)/docs.stamp: pyproject.toml
	$(call install,.[test$(comma)docs$(comma)notebooks])
	@touch $(VENV)/train.stamp $(VENV)/test.stamp $@
