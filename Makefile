PYTHON ?= python3
BIN := .venv/bin

help:  ## List these verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

.venv/.serve: FORCE
	@sh .ci/environment serve

.venv/.dev: FORCE
	@sh .ci/environment dev

FORCE:

install: .venv/.dev  ## Create the environment in .venv, with everything for development

serve: .venv/.serve  ## Serve the shipped checkpoint on port 8000; UNSTIR_PORT=8001 make serve takes another
	$(BIN)/unstir serve

# Tests of signals and connections have time limits, and run alone; all others in two processes.
ALONE := tests/app/api/test_server.py tests/app/api/test_limits.py
USUAL := not slow and not programs and not stress
BESIDE := -n 2 --dist loadfile --no-loadscope-reorder

test: .venv/.dev  ## Run the tests
	$(BIN)/python -m pytest -m '$(USUAL)' $(BESIDE) $(addprefix --ignore=,$(ALONE))
	$(BIN)/python -m pytest -m '$(USUAL)' $(ALONE)

test-programs: .venv/.dev  ## Run every command that the pages show, generated clients, and the GPU check without a GPU
	$(BIN)/python -m pytest -m 'programs and not slow' $(BESIDE) tests/test_readme.py tests/test_clients.py tests/test_gpu_check.py

test-slow: .venv/.dev  ## Run the tests that take minutes, too
	$(BIN)/python -m pytest

stress: .venv/.dev  ## Run the stress tests: minutes of heavy load; tests/stress/__init__.py has their sizes
	$(BIN)/python -m pytest -m stress tests/stress

check: .venv/.dev  ## Format, lint, types, layers and docs: all must be clean
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/test_docs.py

golden: .venv/.dev  ## Rewrite golden files and the README's tables; git diff then shows what moved
	$(BIN)/python -m tests.golden
	$(BIN)/python -m tests.readme

images: .venv/.serve  ## Draw the images of the README and docs/ from the shipped checkpoints
	$(BIN)/python -m bench.images

.venv-peers/.ready: pyproject.toml bench/peers/requirements.txt
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --editable . --requirement bench/peers/requirements.txt
	touch $@

# The generators of the clients that tests/test_clients.py calls the service with; it makes both.
.venv-clients/.ready: tests/clients/requirements.txt
	test -x .venv-clients/bin/python || $(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install --quiet --requirement tests/clients/requirements.txt
	touch $@

tests/clients/node_modules/.ready: tests/clients/package-lock.json
	cd tests/clients && npm ci --no-audit --no-fund
	touch $@

bench-peers: .venv-peers/.ready  ## Measure docs/performance.md again, beside other servers: over three hours; RESUME=--resume goes on
	.venv-peers/bin/python -m bench.performance $(RESUME)

bench: .venv/.dev  ## Measure what the engine costs and what it saves
	$(BIN)/python -m bench.engine

gpu-check: .venv/.dev  ## Test and measure the CUDA path on this machine's card; stops after 8 minutes
	$(BIN)/python -m bench.gpu

fuzz: .venv/.dev  ## Feed 20,000 mutated files to what reads uploads
	$(BIN)/python -m tests.fuzz_uploads --files 20000

contract: .venv/.dev  ## Send a running service thousands of requests made from its OpenAPI document
	$(BIN)/python -m tests.contract

.PHONY: help install serve test test-programs test-slow stress check golden images bench bench-peers gpu-check fuzz contract
