# `make` alone lists the targets. Nothing is needed beforehand but make and Python 3.11 or newer.
PYTHON ?= python3
PYTEST_ARGS ?=
SLOWEST := --durations=25 --durations-min=5
MIN_PYTHON := 3.11
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# What depends on versions, and so is run on every corner; the rest (experiments, data) runs once.
CORE_TESTS := $(wildcard $(addprefix tests/*/test_,$(addsuffix .py,\
	solvers convergence fixed_point trace adjoints adjoint_family compact transforms trajectory warm_start nn transformer bad_input config own check doctests packaging \
	sharding axis_name gathers carried gram history_dtype linear root error_estimate stepwise notebooks)))

.DEFAULT_GOAL := help
.PHONY: help setup demo experiments studies figures bench gpu test lint mutants notebooks docs package corners corner-lowest corner-newest corner-kernels kernels constraints clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

# $(call venv,DIR,PYTHON,CONSTRAINTS,EXTRA,PACKAGES,SIZE): a virtual environment made with pip alone.
# One -q less would show pip's warnings, which on a machine with its own package mirror are hundreds of lines.
define venv
	@found=$$("$(2)" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || found=none; \
	major=$${found%%.*}; minor=$${found#*.}; minor=$${minor%%.*}; \
	if [ "$$found" = none ]; then \
		echo "error: '$(2)' does not run; deq_jax needs Python $(MIN_PYTHON) or newer." \
			"Name one, for example: make setup PYTHON=python3.12" >&2; exit 1; \
	elif [ "$$major" -lt 3 ] || { [ "$$major" -eq 3 ] && [ "$$minor" -lt "$(MIN_PYTHON:3.%=%)" ]; }; then \
		echo "error: '$(2)' is Python $$found; deq_jax needs $(MIN_PYTHON) or newer." \
			"Name one, for example: make setup PYTHON=python3.12" >&2; exit 1; \
	fi; \
	echo "$(1): installing for Python $$found (about $(or $(6),700 MB) on disk, a minute or two)"; \
	if ! $(1)/bin/python -m pip --version >/dev/null 2>&1; then \
		"$(2)" -m venv --clear $(1) || { \
			echo "error: '$(2) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; \
	fi
	@$(1)/bin/python -m pip install -qq --constraint $(3) --editable '.[$(4)]' $(5)
	@touch $(1)/.stamp
endef

.venv/.stamp: pyproject.toml constraints.txt
	$(call venv,.venv,$(PYTHON),constraints.txt,dev,,1.4 GB)

.venv-lowest/.stamp: pyproject.toml constraints-lowest.txt
	$(call venv,.venv-lowest,$(PYTHON),constraints-lowest.txt,test)

.venv-newest/.stamp: pyproject.toml constraints.txt
	$(call venv,.venv-newest,$(NEWEST),constraints.txt,test)

# The compilers for an H100, which need no driver and no GPU; libtpu, for a TPU, is left out where it has no wheel.
H100_COMPILER := jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm

.venv-gpu/.stamp: pyproject.toml constraints-gpu.txt
	$(call venv,.venv-gpu,$(NEWEST),constraints-gpu.txt,experiments,pytest $(H100_COMPILER),2.3 GB)
	@.venv-gpu/bin/python -m pip install -qq --constraint constraints-gpu.txt libtpu \
		|| echo "libtpu cannot be installed here: nothing is compiled for a TPU"

setup: .venv/.stamp ## make .venv with everything (another Python: make clean setup PYTHON=python3.12)

demo: .venv/.stamp ## train the small character model and draw its plot
	.venv/bin/python -m experiments.paper.char_lm demo

# What is finished is kept in runs/: after Ctrl-C the same command continues, and without runs/ it starts anew.
experiments: .venv/.stamp ## run all reduced experiments of the paper (82 minutes on one core; continues)
	.venv/bin/python -m experiments.suite run

studies: .venv/.stamp ## run the studies of solvers and gradients (29 minutes on one core; continues)
	.venv/bin/python -m experiments.suite run --library

figures: .venv/.stamp ## draw all figures and tables of the experiments from the results that are kept
	.venv/bin/python -m experiments.suite figures

test: .venv/.stamp ## run all tests (DEQ_JAX_DATA=folder for real data; PYTEST_ARGS='-k nn')
	.venv/bin/python -m pytest -n 2 $(SLOWEST) $(PYTEST_ARGS)

lint: .venv/.stamp ## ruff and pyright
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m pyright

mutants: .venv/.stamp ## check that the tests catch wrong versions of the library (10 minutes)
	.venv/bin/python -m tests.mutants

# Compared cell by cell: jupytext's own check looks at file times, which mean nothing in a fresh clone.
notebooks: .venv/.stamp ## check that every notebook and its .py twin hold the same cells
	@.venv/bin/python -c 'import pathlib, sys, jupytext; \
	cells = lambda p: p.exists() and [(c.cell_type, c.source) for c in jupytext.read(p).cells]; \
	bad = [str(p) for p in sorted(pathlib.Path("colabs").glob("*.ipynb")) if cells(p) != cells(p.with_suffix(".py"))]; \
	sys.exit(bad and "out of step: %s; run jupytext --sync on its .py" % ", ".join(bad) or None)'

# Strict: a warning, a link without a target and an example that fails stop the build, with their page.
docs: .venv/.stamp ## build the site in docs/_build/html, and run its examples (4 minutes)
	rm -rf docs/_build
	.venv/bin/python -m sphinx -q -W --keep-going -j auto docs docs/_build/html
	.venv/bin/python -m pytest tests/project/test_site.py
	.venv/bin/python docs/extensions/screenshots.py docs/_build/html docs/_build/screenshots

# $(call try_package,PYTHON,CONSTRAINTS): install each archive with that Python into an empty environment, and import it.
define try_package
	for archive in dist/*.whl dist/*.tar.gz; do \
		$(1) -m venv --clear build/empty && build/empty/bin/python -m pip install -qq $(2) "$$archive[flax]" && \
		(cd build && empty/bin/python -c 'import deq_jax as deq, deq_jax.nn, deq_jax.models, deq_jax.compat.jaxopt' && \
			empty/bin/python -m deq_jax) || exit 1; done
endef

package: .venv/.stamp ## build the wheel and the sdist in dist/, and try each in empty environments
	rm -rf dist build && mkdir -p build
	.venv/bin/python -m hatchling build
	$(call try_package,$(PYTHON))
	$(call try_package,$(PYTHON),--constraint constraints-lowest.txt)
	@if [ -z "$(NEWEST)" ]; then echo "no Python 3.12 or newer here: not tried on the newest"; fi
	$(if $(NEWEST),$(call try_package,$(NEWEST)))

# banax needs Python 3.12. A peer that cannot be installed is left out, and the table says so.
PEERS_PYTHON ?= $(shell for v in 3.12 3.13; do \
	for p in python$$v "$$(pyenv root 2>/dev/null)"/versions/$$v.*/bin/python$$v; do \
		if "$$p" --version >/dev/null 2>&1; then echo "$$p"; exit; fi; done; done; echo "$(PYTHON)")

.venv-peers/.stamp: constraints-peers.txt
	@echo ".venv-peers: installing the peers (PyTorch alone may take several GB)"
	@$(PEERS_PYTHON) -m venv --clear .venv-peers
	@for peer in torchdeq jaxopt optimistix banax; do \
		.venv-peers/bin/python -m pip install -qq --constraint constraints-peers.txt jax numpy $$peer \
			|| echo "$$peer cannot be installed here"; done
	@touch $@

bench: .venv/.stamp .venv-peers/.stamp ## time ours and each peer on the same work (an hour or more; BENCH_ARGS='--problems P1')
	.venv/bin/python -m experiments.benchmarks $(BENCH_ARGS)

# No environment is made: a machine with a GPU has its own JAX. What is done is not measured again.
GPU_PYTHON ?= python3

gpu: ## measure on one GPU, at most nine minutes a run; continues (GPU_ARGS='--wheels DIR --data DIR')
	$(GPU_PYTHON) -m experiments.gpu $(GPU_ARGS)

# On the corners compiling is most of the time, and what is asked is whether it works there, not how fast.
# (jax 0.7 spends most of that in a code generator that can be chosen; jax 0.12 has no choice, and no such flag.)
QUICKLY := --xla_backend_optimization_level=0
# Of each test as many cases as have every value of its parameters, half of them on each corner; `make test` runs all
# combinations. (All values on both: make corners CASES=--each-value=1/1; all combinations: CASES=.)
corner-lowest: CASES ?= --each-value=1/2
corner-newest: CASES ?= --each-value=2/2

corners: corner-lowest corner-newest ## run the core tests on the lowest and on the newest versions

corner-lowest: .venv-lowest/.stamp
	XLA_FLAGS="$(QUICKLY) --xla_cpu_use_fusion_emitters=false" \
		.venv-lowest/bin/python -m pytest -n 2 $(SLOWEST) $(CASES) $(PYTEST_ARGS) $(CORE_TESTS)

# A pyenv shim stands on PATH for versions that are not active, so a candidate counts only if it runs.
NEWEST ?= $(shell for v in 3.14 3.13 3.12; do \
	for p in python$$v "$$(pyenv root 2>/dev/null)"/versions/$$v.*/bin/python$$v; do \
		if "$$p" --version >/dev/null 2>&1; then echo "$$p"; exit; fi; done; done)

# There calls are held to their annotations, shapes included, but where it is a subject that a wrong value gets a
# message of ours, or where most of the code is not ours.
ANNOTATIONS := "--jaxtyping-packages=deq_jax,beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
OWN_MESSAGES := $(wildcard $(addprefix tests/*/test_,$(addsuffix .py,\
	bad_input config own packaging trajectory nn adjoint_family doctests transformer notebooks)))

corner-newest:
	@if [ -z "$(NEWEST)" ]; then echo "no Python 3.12 or newer here: the newest corner is left out"; \
	else $(MAKE) --no-print-directory .venv-newest/.stamp NEWEST="$(NEWEST)" && \
		XLA_FLAGS="$(QUICKLY)" .venv-newest/bin/python -m pytest -n 2 $(SLOWEST) $(CASES) $(ANNOTATIONS) $(PYTEST_ARGS) \
			$(filter-out $(OWN_MESSAGES),$(CORE_TESTS)) && \
		XLA_FLAGS="$(QUICKLY)" .venv-newest/bin/python -m pytest -n 2 $(CASES) $(PYTEST_ARGS) $(OWN_MESSAGES); fi

# $(call in_venv_gpu,ARGUMENTS): python in .venv-gpu, on a CPU whatever else the machine has.
define in_venv_gpu
	@if [ -z "$(NEWEST)" ]; then echo "no Python 3.12 or newer here: the kernels are left out"; \
	else $(MAKE) --no-print-directory .venv-gpu/.stamp NEWEST="$(NEWEST)" && \
		JAX_PLATFORMS=cpu .venv-gpu/bin/python -m $(1); fi
endef

kernels: ## read what the solvers launch on an H100 and send on a TPU, without either (7 minutes; KERNELS_ARGS=...)
	$(call in_venv_gpu,experiments.benchmarks.kernels $(KERNELS_ARGS))

corner-kernels: ## check that the solvers launch no more kernels than they did
	$(call in_venv_gpu,pytest $(PYTEST_ARGS) tests/experiments/test_kernels.py)

constraints: .venv/.stamp ## resolve constraints.txt anew, to the newest versions of everything
	.venv/bin/python -m pip install -qq uv
	sed '/^[^#]/,$$d' constraints.txt > constraints.new
	.venv/bin/uv pip compile -q --universal --no-header --no-annotate --no-cache \
		--python-version $(MIN_PYTHON) --extra dev pyproject.toml \
		| sed 's,python_full_version,python_version,' >> constraints.new
	mv constraints.new constraints.txt

clean: ## remove the environments and caches
	rm -rf .venv .venv-lowest .venv-newest .venv-peers .venv-gpu .pytest_cache .ruff_cache build dist docs/_build
