# make install            virtual environment .venv, dependencies, native build
# make serve              that, the default model, then the server on http://127.0.0.1:8000
# make serve MODEL=DIR_OR_HUB_ID TP=2 PP=2 PORT=8001 HOST=0.0.0.0 ARGS="--max-model-len 4096"
# make test, test-slow    the fast suite (some 20 minutes on 2 cores); the rest
# make test-models       every family of models at every layout against transformers
# make test-survive      the part of test-slow that CI runs too: ranks are killed under load
# make soak              kills a rank 20 times in a row under load; every stream must end as if nothing had happened
# make bench             throughput, latency over HTTP, TP=2, PP=2 and start-up, as one table (a few minutes);
#                        MODEL=DIR_OR_HUB_ID, BENCH_OUT=docs/benchmarks writes it there, named after the CPU or GPU
# make lint, clean
# make gpu-check          on a machine with a GPU: build, GPU tests, GPU benchmark, docs/benchmarks/<gpu>.md; no network,
#                        PYTHON=python3 has torch with CUDA; make gpu-wheels, run elsewhere, fetches what it may lack
# make kernels-check     compiles the CUDA kernels, with warnings as errors; needs nvcc, but no GPU and no install
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
NVCC ?= nvcc
CUDA_ARCHS ?= 80 90
GPU_MODEL ?= configs/llama-3.1-8b
GPU_PYTHON_VERSION ?= 3.12

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

.PHONY: install model serve lint test test-slow test-models test-survive soak bench kernels-check gpu-check gpu-wheels clean
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

test-models: install model
	INFER_TEST_LAYOUT=all $(VENV_PYTHON) -m pytest tests/test_families.py $(ARGS)

# The part of test-slow that CI runs too: ranks killed under load, at several layouts.
test-survive: install model
	$(VENV_PYTHON) -m pytest -m slow -s tests/test_survive.py $(ARGS)

soak: install model
	INFER_TEST_KILLS=20 $(VENV_PYTHON) -m pytest -m slow -s tests/test_survive.py tests/test_faults.py \
	    -k "random_moments or restarts_leave_nothing" $(ARGS)

bench: install $(if $(MODEL),,model)
	$(VENV_PYTHON) -m infer.bench suite --model '$(or $(MODEL),$(DEFAULT_MODEL))' \
	    $(if $(BENCH_OUT),--output-dir '$(BENCH_OUT)') $(ARGS)

# The defines are those of torch's own builds. The binding is parsed where the environment has torch; a torch for CPUs has
# CUDA's headers but one, which the last define stands in for.
kernels-check:
	@command -v $(NVCC) >/dev/null || { echo "kernels-check: $(NVCC) is not found; install the CUDA toolkit or name it: \
	make kernels-check NVCC=/path/to/nvcc" >&2; exit 1; }
	@objects=$$(mktemp -d) && trap 'rm -rf "$$objects"' EXIT && \
	for source in kernels/cuda/*.cu; do \
	    echo "$$source for $(CUDA_ARCHS:%=sm_%)" && \
	    $(NVCC) -c -std=c++20 -O3 -Werror all-warnings -Xcompiler -Wall,-Wextra --threads 2 \
	        -D__CUDA_NO_HALF_OPERATORS__ -D__CUDA_NO_HALF_CONVERSIONS__ -D__CUDA_NO_HALF2_OPERATORS__ \
	        -D__CUDA_NO_BFLOAT16_CONVERSIONS__ $(foreach arch,$(CUDA_ARCHS),-gencode arch=compute_$(arch),code=sm_$(arch)) \
	        -o "$$objects/$$(basename "$$source").o" "$$source" || exit 1; \
	done
	@include=$$($(VENV_PYTHON) -c 'import torch; print(torch.__path__[0] + "/include")' 2>/dev/null) || \
	    { echo "kernels/cuda/binding.cpp is not checked: $(VENV) has no torch"; exit 0; }; \
	echo kernels/cuda/binding.cpp && \
	$(NVCC) -c -x c++ -std=c++20 -Xcompiler -fsyntax-only,-Wall,-Wextra,-Werror -DC10_CUDA_NO_CMAKE_CONFIGURE_FILE \
	    -isystem "$$include" -isystem "$$include/torch/csrc/api/include" -o /dev/null kernels/cuda/binding.cpp

# That machine's own Python is used as it is: its torch fits its driver. Nothing is fetched.
gpu-check:
	$(PYTHON) scripts/gpu_check.py --model '$(GPU_MODEL)' --output-dir docs/benchmarks $(ARGS)

# Wheels for the Python of the machine that runs gpu-check, in the versions that CI tests.
gpu-wheels:
	$(PYTHON) -m pip --disable-pip-version-check download --only-binary=:all: --no-deps --dest wheels \
	    --implementation cp --python-version $(GPU_PYTHON_VERSION) \
	    --platform manylinux_2_31_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
	    $(shell sed -n -E '/^(msgspec|llguidance)==/p' requirements.txt)

# models/ stays: it is a download, not a product of the sources.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find infer tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
	find infer -name '*.so' -delete
