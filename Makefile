# What a person types in a clone. Every target makes the environment it needs: .ci/env.py says where and how.

PYTHON ?= python3
# How many test processes run at a time.
JOBS ?= 2
PY := .venv/bin/python

.PHONY: help demo test lint python clean env

help:  ## This list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: env  ## Train a small ViT on built-in scenes, on this machine, and judge it (minutes)
	$(PY) -m dinokit demo

test: env  ## Every test that needs no GPU and under ten seconds
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) -m "not gpu and not slow and not slurm"

lint: env  ## ruff and mypy
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

python: env  ## The path of the interpreter that demo and test use (with make -s: nothing else)
	@echo $(CURDIR)/$(PY)

clean:  ## Delete what was made here: .venv, caches, build folders; not runs/
	rm -rf .venv .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

env:
	@$(PYTHON) .ci/env.py >/dev/null
