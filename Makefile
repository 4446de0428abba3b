# Targets set up what they need from a bare python3: a .venv, the pinned dependencies, the package.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help install docs train test test-avx2 test-slow test-all lint clean
help: ## show this
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

.venv/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

install: .venv/.ready ## set up .venv

train: runs/demo_plain/result.json ## learn the demo, then tune it with half of the frames dropped (makes its videos once)
	$(BIN)/python -m stts_lightning.train experiment=demo

runs/demo_plain/result.json: | .venv/.ready
	$(BIN)/python -m stts_lightning.train experiment=demo_plain

test: .venv/.ready ## the normal tests; those of a GPU run where there is one
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-avx2: .venv/.ready ## of those, what is arithmetic, as on a processor without AVX-512
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest -n 2 -m "not slow" \
		tests/kernels tests/selection tests/backbones tests/data/test_sampling.py tests/training/test_one_step.py

test-slow: .venv/.ready ## the heavy ones alone: kills, damaged files, clusters, long runs (docs/reliability.md)
	$(BIN)/python -m pytest -s -m slow

test-all: .venv/.ready ## all tests
	$(BIN)/python -m pytest

docs: .venv/.ready ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

lint: .venv/.ready ## ruff and pyright
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

clean: ## remove what these targets made (not runs/ and data/)
	rm -rf .venv build src/*.egg-info .pytest_cache .ruff_cache
