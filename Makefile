# Either `make demo` or `make test` does all the set-up on a fresh machine: Python 3.11-3.13, a C++ compiler, a package index.

VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)

.PHONY: demo test test-fast lint docs bench bench-gpu peers aot aot-newest aot-oldest clean

demo: $(VENV)/.ready
	$(BIN)/spt-fast demo --out demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# The quick tests of every room, by processor time: 90 seconds on two idle cores. Triton's interpreter and compilation
# take minutes.
FAST := $(addprefix tests/, test_architecture.py test_config.py test_library.py test_locks.py test_synonyms.py \
	$(addprefix data/test_, mixture.py order.py ring.py shards.py shuffle.py visits.py heldout.py) \
	$(addprefix kernels/test_, activation.py adamw.py cross_entropy.py norm.py rotary.py) \
	$(addprefix laws/test_, interface.py published.py) \
	$(addprefix model/test_, flops.py generate.py gpt.py memory.py parameters.py) \
	$(addprefix train/test_, evaluate.py lr.py price.py resume.py start.py state.py) \
	evaluation/test_tasks.py $(addprefix study/test_, compare.py study.py) advice/test_prior.py advice/test_tax.py)

test-fast: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile -k 'not triton and not compile' $(FAST)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in build/site; pages generated from the code are written again.
docs: $(VENV)/.ready
	$(BIN)/python docs/reference.py
	$(BIN)/python docs/figures.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

BENCHMARKS := $(basename $(notdir $(wildcard benchmarks/kernels/bench_*.py)))

bench: $(VENV)/.ready
	$(foreach benchmark,$(BENCHMARKS),$(BIN)/python -m benchmarks.kernels.$(benchmark) --seconds 60 &&) true
	$(BIN)/python -m benchmarks.loader
	$(BIN)/python -m benchmarks.prepare
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.distributed
	$(BIN)/python -m benchmarks.laws

# Uses the machine's own Python if it has torch; nothing is installed then. ARGUMENTS="--from FILE" continues.
bench-gpu:
	@python3 -c 'import torch' 2>/dev/null || $(MAKE) $(VENV)/.ready
	@python=python3; python3 -c 'import torch' 2>/dev/null || python=$(BIN)/python; \
	echo "$$python -m benchmarks.gpu $(ARGUMENTS)"; $$python -m benchmarks.gpu $(ARGUMENTS)

# The libraries to compare with, outside of the environment; those that cannot be installed are absent from the tables.
peers: $(VENV)/.ready
	-for peer in liger-kernel cut-cross-entropy flashoptim torchao; do \
	$(BIN)/python -m pip install -q --no-deps --target build/peers $$peer; done

OLDEST_TRITON := build/triton-3.6.0

aot: $(VENV)/.ready $(OLDEST_TRITON)/.ready
	$(MAKE) -j2 --output-sync aot-newest aot-oldest

aot-newest:
	env -u TRITON_INTERPRET $(BIN)/python -m tests.kernels.aot

aot-oldest:
	env -u TRITON_INTERPRET PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m tests.kernels.aot

$(OLDEST_TRITON)/.ready:
	$(BIN)/python -m pip install -q --no-deps --target $(@D) triton==3.6.0
	@touch $@

# torch goes in first: the extension is compiled against the torch that it will run with.
$(VENV)/.ready: constraints.txt pyproject.toml setup.py $(wildcard csrc/*)
	@test -n "$(PYTHON)" || { echo "spt_fast needs Python 3.11, 3.12 or 3.13; set PYTHON=/path/to/one"; exit 1; }
	@echo "setting up $(VENV) (once; about two minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch setuptools wheel
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info spt_fast/*.so demo
