PY := .venv/bin/python
PIN := uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes -q

# Where a machine forbids it, every process would compile Feast anew: ten seconds each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup setup-bench demo test soak mutants lint docs site ci stack requirements wheel clean

help: ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

demo: ## simulated events become fresh embeddings that stock Feast reads (needs Python 3.11)
	@sh dev/setup.sh train
	$(PY) -m examples.demo

test: ## everything, against real Kafka and Redis
	@sh dev/setup.sh dev
	$(PY) -m pytest -n 2

soak: setup ## 200 seeded schedules of kills, lost stores and broken connections (about 25 minutes)
	$(PY) -m tests.integration.faults.soak

mutants: setup ## break the code in six ways on purpose, and see the fault suite fail
	$(PY) -m tests.faults.mutants

lint: setup site ## style, types, who may import whom, and the documentation's links
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy .
	.venv/bin/lint-imports

docs: setup site ## the documentation as a site, in build/site

site:
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

ci: lint test ## what CI runs

stack: setup ## Kafka and Redis on this machine, without Docker, until Ctrl-C
	@$(PY) -m dev.stack

setup: ## the environment for all of this
	@sh dev/setup.sh dev

setup-bench: ## the environment for python -m benchmarks.NAME
	@sh dev/setup.sh bench

requirements: setup ## pin requirements/*.txt anew; UP=--upgrade for newer versions
	. .venv/bin/activate && $(PIN) $(UP) --extra cpu --extra train --extra formats --extra otel --extra ray --extra dev -o requirements/dev.txt
	. .venv/bin/activate && $(PIN) --extra cpu --extra train --extra formats --extra otel --extra ray --extra dev --extra bench -o requirements/bench.txt
	. .venv/bin/activate && $(PIN) --extra cpu -c requirements/dev.txt -o requirements/cpu.txt
	. .venv/bin/activate && $(PIN) --extra gpu -c requirements/dev.txt -o requirements/gpu.txt
	. .venv/bin/activate && $(PIN) --extra cpu --extra train -c requirements/dev.txt -o requirements/train.txt

wheel: setup ## the distribution, in dist/
	.venv/bin/uv build --wheel -q

clean: ## forget what was built and cached, except .venv
	rm -rf build dist .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
