# gpumesh: `make help` prints every target.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV ?= .venv
PY := $(VENV)/bin/python
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
PYTEST_ARGS ?=

.PHONY: help up down setup setup-dev clients lock locks-check test test-unit test-integration test-e2e conformance lint format type protos protos-check docs docs-check bench bench-link bench-ledger model clean

help: ## Print every target
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  \033[1m%-18s\033[0m %s\n", $$1, $$2}'

up: setup ## Set up and run the whole mesh on this machine (DETACH=1: in the background)
	@$(VENV)/bin/gpumesh-local up $(if $(DETACH),--detach) $(UP_ARGS)

down: ## End the mesh that `make up` started
	@if [ -x $(VENV)/bin/gpumesh-local ]; then $(VENV)/bin/gpumesh-local down; else echo "nothing to end: the mesh was never set up here"; fi

setup: $(VENV)/.installed-all ## Install what the product needs into .venv
setup-dev: $(VENV)/.installed-dev ## Install what development and tests need into .venv

$(VENV)/.installed-all: requirements/all.lock pyproject.toml
	@deploy/local/setup.sh $(VENV) all
$(VENV)/.installed-dev: requirements/dev.lock pyproject.toml
	@deploy/local/setup.sh $(VENV) dev

clients: .venv-openai2/.installed .venv-openai3/.installed ## Install the official clients, each into an environment of its own
.venv-%/.installed: requirements/clients/%.lock
	@deploy/local/setup.sh .venv-$* clients/$* bare && touch $@

lock: ## Renew the lock files from pyproject.toml
	requirements/lock.sh
locks-check: setup-dev ## Fail when a lock file names an index, a host or a path
	$(PY) -m pytest tests/unit/test_house.py

test: setup-dev clients ## Set up and run every test of the fast suites
	$(PY) -m pytest $(PYTEST_ARGS)
test-unit: setup-dev ## Only the pure tests
	$(PY) -m pytest tests/unit tests/contract $(PYTEST_ARGS)
test-integration: setup-dev ## Only the tests over real sockets and PostgreSQL
	$(PY) -m pytest tests/integration $(PYTEST_ARGS)
test-e2e: setup-dev ## Only the tests of the whole mesh
	$(PY) -m pytest tests/e2e tests/chaos $(PYTEST_ARGS)
conformance: setup-dev clients ## Only other people's clients and schemas
	$(PY) -m pytest tests/conformance $(PYTEST_ARGS)

lint: setup-dev ## ruff, import-linter, buf
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/buf lint
	$(VENV)/bin/buf format --diff --exit-code > /dev/null
format: setup-dev ## Format everything
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/buf format -w
type: setup-dev ## mypy, strict
	$(VENV)/bin/mypy libs services node deploy/local/src tests benchmarks

protos: ## Regenerate protos/gen
	protos/generate.sh
protos-check: ## Fail when protos/gen is not what the protos say
	@out=$$(mktemp -d) && protos/generate.sh $$out && diff -r $$out/gpumesh protos/gen/python/gpumesh && rm -r $$out && echo "protos: generated code is current"

docs: setup-dev ## Regenerate docs/reference from the protos
	$(PY) docs/generate_reference.py
docs-check: setup-dev ## Fail when docs/reference is not what the protos say
	$(PY) docs/generate_reference.py --check

bench: setup-dev ## The whole path against a bare aiohttp proxy -> benchmarks/out/bench.json
	$(PY) -m benchmarks.path
bench-link: setup-dev ## The link alone -> benchmarks/out/link.json
	$(PY) -m benchmarks.link
bench-ledger: setup-dev ## Settlement alone -> benchmarks/out/ledger.json
	$(PY) -m benchmarks.ledger

model: ## Make the shipped model again (about an hour of one core)
	deploy/local/model/make.sh

clean: ## Remove environments and caches (not the mesh's data)
	rm -rf .venv .venv-* .mypy_cache .ruff_cache .pytest_cache .import_linter_cache dist build
