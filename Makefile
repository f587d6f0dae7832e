PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3,11),(3,12)))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
CONFIG ?= serve_config.yaml

.DEFAULT_GOAL := help
.PHONY: help setup prometheus prometheus-or-not serve monitor test unit integration lint format bench clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed: make PYTHON=/path/to/python3.12 ..."; exit 1; }
	@$(PYTHON) scripts/bootstrap.py

prometheus: setup
	@$(BIN)/python scripts/prometheus.py --into $(BIN)

# without Prometheus its tests are skipped; CI runs the target above first, which insists
prometheus-or-not: setup
	@$(BIN)/python scripts/prometheus.py --into $(BIN) --optional

serve: setup  ## set up, then serve on http://localhost:8000/v1 (CONFIG=serve_config.yaml)
	@$(BIN)/dflash-serve up $(CONFIG)

monitor: prometheus  ## Prometheus with our alerts for the running server, and Grafana where it is installed
	@$(BIN)/python -m dflash_serve.monitoring.local

test: prometheus-or-not  ## set up, then run every test
	$(BIN)/pytest tests

unit: prometheus-or-not  ## unit tests alone (seconds)
	$(BIN)/pytest tests/unit

integration: prometheus-or-not  ## tests against the real engine
	$(BIN)/pytest tests/integration

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## DFlash against autoregressive on this machine
	$(BIN)/dflash-serve bench run --pair --tasks sample --samples 6 --max-tokens 128 --concurrency 1,4 --rounds 2

clean:  ## remove the environment and caches
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache *.egg-info
