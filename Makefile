# Targets for a clone. Each makes the environment that it needs with .ci/env.py.

PYTHON ?= python3
# How many test processes run at a time.
JOBS ?= 2
PY := .venv/bin/python

.PHONY: help demo test gpu-check lint docs types python clean env

help:  ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: env  ## Train a small ViT on built-in scenes, on this machine, and evaluate it (minutes)
	$(PY) -m dinokit demo

test: env  ## Every test that needs no GPU and under ten seconds
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) -m "not gpu and not slow and not slurm"

gpu-check: env  ## On a machine with a GPU: its tests and benches in ten minutes, and a page gpu-check.md
	$(PY) tests/gpu/check.py --out gpu-check.md

lint: env types  ## ruff and mypy
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

docs: env types  ## The documentation site in build/site; a warning is an error
	$(PY) docs/pages.py
	$(PY) -m zensical build --strict --clean

types:  # For mypy and the documentation, links that give the files the places that they have once installed: dinokit.eval is eval/
	@rm -rf build/types && mkdir -p build/types/dinokit
	@for path in $(CURDIR)/dinokit/[!_.]* $(CURDIR)/dinokit/__*.py $(addprefix $(CURDIR)/,eval slurm configs); do \
	    ln -s "$$path" build/types/dinokit/; done

python: env  ## The path of the interpreter that demo and test use (with make -s: nothing else)
	@echo $(CURDIR)/$(PY)

clean:  ## Delete what was made here: .venv, caches, build folders; not runs/
	rm -rf .venv .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

env:
	@$(PYTHON) .ci/env.py >/dev/null
