# `make help` lists what can be done. Needs Python 3.11 or newer and make; everything else goes into .venv.

PYTHON ?= python3
PIP_ARGS ?=
RUN ?= runs/demo
STAGE ?= sft

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# A file goes to one worker as a whole, for what its tests share; tests/conftest.py says in which order. Three workers keep
# two cores busy where some tests wait.
PYTEST := $(PY) -m pytest -n 3 --dist loadfile --no-loadscope-reorder
DEMO_STAGES := tokenizer,pretrain,midtrain,sft,grpo
DEMO_EVAL := eval.tokens=32768 eval.max_per_task=200 eval.max_new_tokens=160 eval.batch_size=100

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-rl bench-rl test test-full test-guide docs browser check bench bench-optimizers bench-serve soak abuse check-data gpu-check chaos llama-cpp triton
.PHONY: table report inspect show-data clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## create .venv and install the pinned versions (PIP_ARGS is passed to pip)

# Done once, and again when the requirements change; the stamp comes last, so a broken installation is repeated.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is missing or older than Python 3.11; use: make setup PYTHON=/path/to/python3.12" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "error: $(PYTHON) lacks its venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

# Stages and evaluations that are done are not done again: a second `make demo` only says so.
demo: $(STAMP) ## the whole pipeline on the embedded world, in minutes: train, evaluate, say how to chat
	$(PY) train.py -m experiment=demo stage=$(DEMO_STAGES)
	@for stage in sft grpo; do \
	  scores=runs/demo/$$stage/eval.json; \
	  if [ $$scores -nt runs/demo/$$stage/run.json ]; then echo "demo/$$stage is evaluated: $$scores"; \
	  else echo "$(PY) evaluate.py run=demo stage=$$stage $(DEMO_EVAL)"; \
	    $(PY) evaluate.py run=demo stage=$$stage $(DEMO_EVAL) || exit 1; fi; \
	done
	@echo
	@echo "Report:  runs/demo/report.md"
	@echo "Chat:    $(PY) serve.py run=demo              in the browser"
	@echo "         $(PY) serve.py run=demo ui=cli       in the terminal"

demo-rl: demo ## four methods of post-training from the demo's sft, in a quarter of an hour: a table and a plot
	$(PY) bench/rl.py --quick $(ARGS)

bench-rl: demo ## all methods with three seeds each, for hours; goes on where it was stopped (ARGS="--methods ppo")
	$(PY) bench/rl.py $(ARGS)

test: $(STAMP) ## the tests that need no more than minutes (FATHOM_SHARED=folder: with data from outside)
	$(PYTEST) -m 'not slow'

test-full: $(STAMP) browser ## all tests, also the slow ones and the chat in a real browser
	$(PYTEST)

test-guide: $(STAMP) ## the commands of docs/guide, each in a copy of the project, against their tables (ARGS="05 07")
	$(PY) tests/run_guide.py $(ARGS)

# The full disk needs the right to mount a tmpfs.
chaos: $(STAMP) ## kill, starve and damage real trainings, in 45 minutes; compare with ones left alone (ARGS="--quick")
	$(PY) tests/chaos.py $(ARGS)

# What the browser test drives. It is left out, and pytest says so, where these cannot be had.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
	  { command -v apt-get >/dev/null && apt-get update -q && apt-get install -y -q --no-install-recommends chromium; } || \
	  echo "no Chromium and no way to install it (apt-get install chromium needs root): the browser test is skipped" >&2
	@[ -d tests/browser/node_modules/playwright-core -a -d tests/browser/node_modules/axe-core ] || \
	  { command -v npm >/dev/null && npm install --no-audit --no-fund --prefix tests/browser; } || \
	  echo "no playwright-core and no npm to install it: the browser test is skipped" >&2

check: $(STAMP) ## style (ruff check, ruff format) and the floors of the packages (import-linter)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports

bench: $(STAMP) ## the benchmarks in bench/ that need nothing more; each prints a table and a last line of JSON
	@for script in $(filter-out bench/gpu_check.py bench/serve.py bench/rl.py bench/gap.py bench/optimizers.py bench/switches.py bench/core.py,$(wildcard bench/[a-z]*.py)); do echo "== $$script"; $(PY) $$script || exit 1; done

bench-optimizers: $(STAMP) ## steps of each optimizer to one target, tuned, with three seeds, for hours; goes on where it was stopped
	$(PY) bench/optimizers.py $(ARGS)

bench-serve: $(STAMP) ## 32 streams over HTTP beside the engine alone, and transformers serve where it is there
	$(PY) bench/serve.py $(ARGS)

soak: $(STAMP) ## 64 clients for 10 minutes: cancels, bad requests, slow readers (ARGS="--seconds 60")
	$(PY) tests/soak.py $(ARGS)

# Schemathesis has packages of its own, which ours need not fit.
SCHEMATHESIS := $(VENV)/schemathesis/bin/schemathesis
$(SCHEMATHESIS):
	$(PYTHON) -m venv $(VENV)/schemathesis
	$(VENV)/schemathesis/bin/pip install --disable-pip-version-check $(PIP_ARGS) 'schemathesis>=4,<5'

LLAMA_CPP := $(VENV)/llama-cpp/bin/python
llama-cpp: $(STAMP) $(LLAMA_CPP) ## llama.cpp, compiled in minutes, and the tests that hold it against our engine
	$(PY) -m pytest tests/export/test_llama_cpp.py
$(LLAMA_CPP):
	$(PYTHON) -m venv $(VENV)/llama-cpp
	$(VENV)/llama-cpp/bin/pip install --disable-pip-version-check $(PIP_ARGS) 'llama-cpp-python>=0.3.16' || \
	  { rm -rf $(VENV)/llama-cpp; exit 1; }

# torch for GPUs brings Triton, torch for CPUs does not.
TRITON := $(VENV)/triton
triton: $(STAMP) $(TRITON)/triton ## Triton, 1 GB, and the tests that run Muon's kernels for GPUs by its interpreter
	PYTHONPATH=$(TRITON) TRITON_INTERPRET=1 $(PY) -m pytest tests/optim/test_muon_gpu.py
$(TRITON)/triton:
	$(PY) -m pip install --disable-pip-version-check $(PIP_ARGS) --no-deps --target $(TRITON) 'triton>=3.4'

abuse: $(STAMP) $(SCHEMATHESIS) ## 10,000 requests made from the server's own /openapi.json (ARGS="--requests 1000")
	$(PY) tests/abuse.py --schemathesis $(SCHEMATHESIS) $(ARGS)

# Exits with 1 if something is not equal to its reference or a part crashed.
# An environment that has what it needs is used as it is: a GPU machine may lack the network that `setup` wants.
HAS_ALL = $(shell [ ! -e $(STAMP) ] && $(PYTHON) -c 'import torch, lightning, hydra, rustbpe, datasets' 2>/dev/null && echo yes)
.SECONDEXPANSION:
gpu-check: $$(if $$(HAS_ALL),,$$(STAMP)) ## on a GPU, in 9 minutes: what is equal, how fast, against which ceiling (ARGS="--only decode")
	$(if $(HAS_ALL),$(PYTHON),$(PY)) bench/gpu_check.py $(ARGS)

# Sphinx has packages of its own, as Schemathesis has. They are the extra `docs` of pyproject.toml.
DOCS_VENV := .venv-docs
$(DOCS_VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(PYTHON) -c 'import tomllib as t; print(*t.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
	  > $(DOCS_VENV)/requirements.txt
	$(DOCS_VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -r $(DOCS_VENV)/requirements.txt
	@touch $@

docs: $(STAMP) $(DOCS_VENV)/.installed ## the documentation with search, in docs/_build/html; a warning is an error
	$(PY) docs/reference.py
	rm -rf docs/_build
	$(DOCS_VENV)/bin/python -m sphinx -W --keep-going -q -d docs/_build/doctrees docs docs/_build/html
	@echo "docs/_build/html/index.html; links to other places: docs/_build/links.txt"

table: $(STAMP) ## all stages of all runs in one table (ARGS="--stage pretrain --sort bpb --diff")
	$(PY) -m llm.experiments.table $(ARGS)

report: $(STAMP) ## rebuild the report of a run (RUN=runs/demo)
	$(PY) -m llm.report $(RUN)

inspect: $(STAMP) ## what a run holds, every checksum verified (RUN=runs/demo)
	$(PY) -m llm.checkpoint $(RUN)

show-data: $(STAMP) ## what a stage trains on, coloured, also in batch.html (STAGE=sft ARGS="experiment=demo")
	$(PY) -m llm.stages --html batch.html stage=$(STAGE) $(or $(ARGS),experiment=demo)

check-data: $(STAMP) ## read all data once: bad rows, lengths, markers, repeated and leaked rows (ARGS="experiment=own")
	$(PY) train.py stage=check $(or $(ARGS),experiment=own)

clean: ## remove .venv, caches and build products; runs/ stays
	rm -rf $(VENV) $(DOCS_VENV) docs/_build docs/reference build *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis tests/browser/node_modules
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
