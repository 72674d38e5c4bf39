# make install            virtual environment .venv, dependencies, native build
# make serve              that, the default model, then the server on http://127.0.0.1:8000
# make serve MODEL=DIR_OR_HUB_ID TP=2 PP=2 PORT=8001 HOST=0.0.0.0 ARGS="--max-model-len 4096"
# make test, test-slow    the fast suite (under 10 minutes on 2 cores); the rest
# make bench             throughput, latency over HTTP, TP=2, PP=2 and start-up, as one table (a few minutes);
#                        MODEL=DIR_OR_HUB_ID, BENCH_OUT=docs/benchmarks writes it there, named after the CPU or GPU
# make lint, clean
#
# It needs Python 3.11 or newer and, for the native kernels, a C++ compiler. Every target does the set-up it lacks.

PYTHON ?= python3
MODEL ?=
TP ?= 1
PP ?= 1
PORT ?= 8000
# Not ?=: some shells export HOST as this machine's name, which would open the server to the network unasked.
HOST = 127.0.0.1
ARGS ?=
BENCH_OUT ?=

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
PIP := $(VENV_PYTHON) -m pip --disable-pip-version-check
DEFAULT_MODEL := models/SmolLM2-135M-Instruct

# Written last, so that an interrupted step is done again; older than a source, so that a changed one is, too.
REQUIREMENTS_STAMP := $(VENV)/.requirements-installed
PACKAGE_STAMP := $(VENV)/.package-installed
PACKAGE_SOURCES := setup.py pyproject.toml $(shell find kernels -type f 2>/dev/null)

CHECK_PYTHON = import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
    f"$(PYTHON) is Python {v.major}.{v.minor}; this needs 3.11 or newer: make install PYTHON=python3.11")

.PHONY: install model serve lint test test-slow bench clean
.DEFAULT_GOAL := install

install: $(PACKAGE_STAMP)

$(REQUIREMENTS_STAMP): requirements.txt requirements-dev.txt
	@# An environment without a working pip is half made: begin again. Any other is only brought up to date.
	@$(PIP) --version >/dev/null 2>&1 || { $(PYTHON) -c '$(CHECK_PYTHON)' && $(PYTHON) -m venv --clear $(VENV); }
	$(PIP) install --requirement requirements-dev.txt
	@touch $@

$(PACKAGE_STAMP): $(REQUIREMENTS_STAMP) $(PACKAGE_SOURCES)
	$(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@

model: install
	@$(VENV_PYTHON) scripts/fetch_default_model.py --output $(DEFAULT_MODEL)

# torchrun for one rank too: it restarts a rank that dies. The rendezvous is static, on a free port of the loopback
# interface (--standalone would be c10d, which unpickles what it finds in its store).
serve: install $(if $(MODEL),,model)
	@ranks=$$(( $(TP) * $(PP) )) && \
	master_port=$$($(VENV_PYTHON) -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])') && \
	exec $(VENV_PYTHON) -m torch.distributed.run \
	    --nnodes 1 --node-rank 0 --master-addr 127.0.0.1 --master-port $$master_port \
	    --nproc-per-node $$ranks --max-restarts 10 \
	    -m infer.serve --model '$(or $(MODEL),$(DEFAULT_MODEL))' -tp $(TP) -pp $(PP) --host $(HOST) --port $(PORT) $(ARGS)

lint: install
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m mypy

test: install model
	$(VENV_PYTHON) -m pytest $(ARGS)

test-slow: install model
	$(VENV_PYTHON) -m pytest -m slow $(ARGS)

bench: install $(if $(MODEL),,model)
	$(VENV_PYTHON) -m infer.bench suite --model '$(or $(MODEL),$(DEFAULT_MODEL))' \
	    $(if $(BENCH_OUT),--output-dir '$(BENCH_OUT)') $(ARGS)

# models/ stays: it is a download, not a product of the sources.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find infer tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
	find infer -name '*.so' -delete
