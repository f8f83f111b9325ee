# LoopLM: everything here runs in .venv, which the first target that needs it builds from setup.py and constraints.txt.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install quickstart ouro-tiny longer fp8-study upcycle-study evidence evidence-smoke plan-check rehearse
.PHONY: gpu-check gpu-bundle
.PHONY: test faults fuzz test-fast test-layouts test-newest test-hf-oldest test-te check format bench docs
.PHONY: text-levers worth smollm smollm-long smollm-latent clean clean-quickstart clean-ouro-tiny clean-smollm

# The first Python that really runs (a pyenv shim may not), is 3.10 to 3.12 and can make a virtual environment.
PROBE   := import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
running = $(firstword $(foreach name,$(1),$(shell $(name) -c '$(PROBE)' >/dev/null 2>&1 && command -v $(name))))
PYTHON  ?= $(call running,python3.12 python3.11 python3.10 python3)
VENV    := .venv
PY      := $(VENV)/bin/python
READY   := $(VENV)/.installed
# Megatron-core from 0.17 on needs Python 3.12, so 3.12 gets the newest pins and older Pythons the oldest promised ones.
NEW     := $(shell "$(PYTHON)" -c 'import sys; print("yes" if sys.version_info >= (3, 12) else "")' 2>/dev/null)
PINS    := $(if $(NEW),$(VENV)/constraints.txt,constraints.txt)
# The newest pins also have an environment of their own, for machines whose .venv has an older Python.
PYTHON312 ?= $(call running,python3.12 $(sort $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3.12)))
NEWEST  := .venv-newest
# The oldest transformers that an export is promised to run with; the packages of [eval] want newer ones beside it.
HF_OLDEST := .venv-hf-oldest
# Transformer Engine with the newest Megatron-core: built against CUDA's headers, it shows its parameters without a GPU.
TE_VENV := .venv-te
CUDA_HOME ?= /usr/local/cuda
# The documentation's packages, and none of the product's: the pages read the code, they do not import it.
DOCS    := .venv-docs
CONFIGS := configs/quickstart
RUN     := runs/quickstart
DONE    := $(RUN)/.done
# Evaluation decodes through every cache too; many rows side by side, for a row alone costs nearly as much time.
CACHES  := --batch_size 64 --kv_caches per_loop,last,mean,first

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONUNBUFFERED := 1
# How long an OpenMP thread spins for its peers before it sleeps. The default is a little faster on an idle machine and
# several times slower on a shared one (docs/LOG.md).
export GOMP_SPINCOUNT ?= 3000

help:  ## this list
	@echo "LoopLM. Start with:  make quickstart"
	@echo
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1|/p' $(MAKEFILE_LIST) \
		| while IFS='|' read -r name text; do printf '  make %-17s %s\n' "$$name" "$$text"; done
	@echo
	@echo "A path runs a part of the tests:     make test TESTS=tests/looplm"
	@echo "Another interpreter (3.10 to 3.12):  make install PYTHON=/path/to/python3.11"

# ---- environment

install: $(READY)  ## build .venv with the pinned packages

comma  := ,
EXTRAS := data,dev,eval,hf,stats
# $(call need,variable,versions): end with one line if no such Python was found
need = @test -n "$($(1))" \
	|| { echo "error: no Python $(2) with the venv module found; install one or name it: make $(1)=PATH" >&2; exit 2; }
need_python    = $(call need,PYTHON,3.10 to 3.12)
need_python312 = $(call need,PYTHON312,3.12)

# $(call build,python,environment,constraints,extras)
define build
	@echo "== installing into $(2) with $(1): takes minutes, torch is large"
	@"$(1)" -m venv $(2)
	@$(2)/bin/python -m pip install --quiet -c $(3) setuptools
	@$(2)/bin/python -m pip install --quiet --no-build-isolation -c $(3) -e '.[$(4)]'
	@touch $@
endef

$(READY): setup.py $(PINS)
	$(need_python)
	$(call build,$(PYTHON),$(VENV),$(PINS),$(EXTRAS))

# $(call overlay,file): the pins of constraints.txt, replaced by those of the file
overlay = @mkdir -p $(@D); awk -F= 'NR == FNR {print; newer[$$1]; next} !($$1 in newer)' $(1) constraints.txt > $@

OTHERS := $(NEWEST) $(HF_OLDEST) $(TE_VENV)
$(OTHERS:=/constraints.txt): .venv-%/constraints.txt: constraints.txt constraints-%.txt
	$(call overlay,constraints-$*.txt)

$(VENV)/constraints.txt: constraints.txt constraints-newest.txt
	$(call overlay,constraints-newest.txt)

$(NEWEST)/.installed: setup.py $(NEWEST)/constraints.txt
	$(need_python312)
	$(call build,$(PYTHON312),$(NEWEST),$(NEWEST)/constraints.txt,$(EXTRAS))

$(HF_OLDEST)/.installed: setup.py $(HF_OLDEST)/constraints.txt
	$(need_python)
	$(call build,$(PYTHON),$(HF_OLDEST),$(HF_OLDEST)/constraints.txt,dev$(comma)hf)

# Its build needs the folders of cuDNN and NCCL in torch's CUDA build, and the toolkit's headers before theirs.
nvidia = $(CURDIR)/$(TE_VENV)/lib/python3.12/site-packages/nvidia
$(TE_VENV)/.installed: setup.py $(TE_VENV)/constraints.txt
	$(need_python312)
	@test -e $(CUDA_HOME)/include/cuda_runtime_api.h \
		|| { echo "error: no CUDA headers in $(CUDA_HOME); name the toolkit: make test-te CUDA_HOME=PATH" >&2; exit 2; }
	$(call build,$(PYTHON312),$(TE_VENV),$(TE_VENV)/constraints.txt,dev)
	@rm $@
	@echo "== building Transformer Engine: 15 to 30 minutes on two cores"
	@$(TE_VENV)/bin/python -m pip install --quiet -c $(TE_VENV)/constraints.txt \
		ninja pybind11 pydantic einops onnx onnxscript importlib-metadata nvdlfw-inspect
	@$(TE_VENV)/bin/python -m pip install --quiet --no-deps -c $(TE_VENV)/constraints.txt \
		transformer-engine transformer-engine-cu13
	@NVTE_FRAMEWORK=pytorch MAX_JOBS=2 CUDA_HOME=$(CUDA_HOME) CUDNN_PATH=$(nvidia)/cudnn NCCL_HOME=$(nvidia)/nccl \
		CPATH=$(CUDA_HOME)/include:$(nvidia)/cu13/include:$(nvidia)/cudnn/include:$(nvidia)/nccl/include \
		$(TE_VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation -c $(TE_VENV)/constraints.txt \
		transformer-engine-torch
	@touch $@

$(DOCS)/.installed: constraints.txt
	$(need_python)
	@"$(PYTHON)" -m venv $(DOCS)
	@$(DOCS)/bin/python -m pip install --quiet -c constraints.txt mkdocs mkdocs-material 'mkdocstrings[python]'
	@touch $@

# With HISTORY=1 a command that succeeds appends its time and figures to docs/history.csv.
recorded = $(if $(HISTORY),$(PY) -m tools.history $(1) --)

# ---- quickstart: a finished phase leaves a stamp and is skipped from then on; an interrupted one continues; one whose
# config has changed is repeated, with all that depends on it

# The stamp of a phase is RUN/.done/PHASE, that of its beginning PHASE.begun, its output RUN/PHASE.
phase  = @echo "== $(1)"; mkdir -p $(@D)
repeat = @if test -e $@ || { test -e $@.begun && test -n "$$(find $^ -newer $@.begun)"; }; then \
		rm -rf $@ $@.begun $(@D:%/.done=%)/$(@F); fi; test -e $@.begun || touch $@.begun

ifdef HISTORY
quickstart: $(READY)
	@$(call recorded,quickstart) $(MAKE) --no-print-directory HISTORY= quickstart
else
quickstart: $(DONE)/report  ## text to trained, measured, talking model: runs/quickstart/report.html
	@echo "== quickstart is done: open $(RUN)/report.html  (start over: make clean-quickstart)"
endif

$(DONE)/data: $(CONFIGS)/data.yaml | $(READY)
	$(call phase,quickstart 1/6: data)
	$(repeat)
	@$(PY) -m data_pipeline.tokenize --config $(CONFIGS)/data.yaml
	@touch $@

$(DONE)/stage1: $(DONE)/data $(CONFIGS)/pretrain.yaml
	$(call phase,quickstart 2/6: pretraining)
	$(repeat)
	@$(PY) -m pretrain.train --config $(CONFIGS)/pretrain.yaml
	@touch $@

$(DONE)/gate: $(DONE)/stage1 $(CONFIGS)/gate.yaml
	$(call phase,quickstart 3/6: exit gate)
	$(repeat)
	@$(PY) -m pretrain.train --config $(CONFIGS)/pretrain.yaml --config $(CONFIGS)/gate.yaml
	@touch $@

$(DONE)/evaluation: $(DONE)/gate
	$(call phase,quickstart 4/6: evaluation per depth)
	@$(PY) -m pretrain.evaluate --checkpoint $(RUN)/gate --output $(RUN)/evaluation.json $(CACHES)
	@touch $@

$(DONE)/samples: $(DONE)/gate $(CONFIGS)/prompts.txt
	$(call phase,quickstart 5/6: generation)
	@$(PY) -m looplm.generate --checkpoint $(RUN)/gate --prompts $(CONFIGS)/prompts.txt \
		--output $(RUN)/samples.jsonl --exit_threshold 0.4
	@touch $@

$(DONE)/report: $(DONE)/evaluation $(DONE)/samples
	$(call phase,quickstart 6/6: report)
	@$(PY) -m pretrain.report $(RUN)
	@touch $@

# ---- Ouro's whole recipe in small

include configs/ouro-tiny/chain.mk

# ---- a real model, looped

include configs/smollm/chain.mk

# ---- experiments: slow; their results are in docs/LOG.md

LONGER  := runs/longer
STAGE1  := --config $(CONFIGS)/pretrain.yaml --config configs/longer/pretrain.yaml

longer: $(DONE)/gate  ## a deeper model trained longer on the quickstart's data; its loss with shared caches (an hour)
	@$(PY) -m pretrain.train $(STAGE1)
	@$(PY) -m pretrain.train $(STAGE1) --config $(CONFIGS)/gate.yaml --config configs/longer/gate.yaml
	@$(PY) -m pretrain.evaluate --checkpoint $(LONGER)/gate --output $(LONGER)/evaluation.json $(CACHES) \
		--exit_thresholds 1,0.4,0.3
	@$(PY) -m pretrain.report $(LONGER)

fp8-study: $(DONE)/data  ## the loss under emulated FP8: the quickstart's stage 1 in six formats, three seeds (hours)
	@$(PY) -m tools.fp8_study

upcycle-study: $(DONE)/data  ## trained models made deeper, latent and looped, and trained on (half an hour)
	@$(PY) -m tools.upcycle_study

# Repeated runs and pages go to runs/evidence; docs/evidence keeps the records that the documentation quotes.
JOBS ?= 2
EXPERIMENTS ?= $(sort $(notdir $(basename $(wildcard docs/evidence/*.jsonl))))
EVIDENCE := runs/evidence
experiment = for word in "run --jobs $(JOBS)" report; do $(PY) -m tools.experiment $$word $(1) \
	--output_dir $(EVIDENCE)/runs --evidence $(EVIDENCE) || exit; done

ON_TEXT := text-levers worth smollm-long smollm-latent

evidence: $(filter $(ON_TEXT),$(EXPERIMENTS))
evidence: $(READY)  ## repeat the recorded experiments, JOBS=2 runs at a time; continues if stopped (hours to days)
	@test -n "$(EXPERIMENTS)" || { echo "error: docs/evidence has no records yet; name files of configs/experiments:" \
		"make evidence EXPERIMENTS='p_hop mano'" >&2; exit 2; }
	@for name in $(filter-out $(ON_TEXT),$(EXPERIMENTS)); do echo "== $$name"; \
		$(call experiment,configs/experiments/$$name.yaml); done

# Experiments on text need data first.
TEXT := configs/experiments/text

text-levers: $(DONE)/data  ## levers on the quickstart's text at equal FLOPs; continues if stopped (three hours)
worth: $(DONE)/data  ## what a loop is worth on that text, in layers; continues if stopped (two hours)
text-levers worth:
	@$(PY) -m data_pipeline.tokenize --config $(TEXT)/data/packages.yaml
	@$(call experiment,$(TEXT)/$@.yaml)

smollm-long: $(SMOL_OK)/looped  ## does looping a real model pay? Against the dense one at equal FLOPs (three hours)
	@$(PY) -m data_pipeline.tokenize --config $(TEXT)/data/prose.yaml
	@$(call experiment,$(TEXT)/$@.yaml)

smollm-latent: $(SMOL_LATENTS)  ## what a narrow latent costs a real model, before and after some training (three hours)
	@$(call experiment,$(TEXT)/$@.yaml)

evidence-smoke: $(READY)  ## an experiment of each task in small, up to its page; keeps nothing (4 minutes)
	@$(PY) -m tools.experiments.smoke --jobs $(JOBS)

# ---- checks

# Keep the order of files: sorted by their number of tests, the longest single test would be the last.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder

test: $(READY)  ## the tests, in two processes: a sample of the layouts, the quick ones of the faults
	@HISTORY= OMP_NUM_THREADS=1 $(if $(TESTS),,$(call recorded,test)) $(PY) -m pytest $(SIDE_BY_SIDE) $(TESTS)

faults: $(READY)  ## every fault, also those that take long to inject; writes docs/reliability.md (half an hour)
	@HISTORY= FAULTS=all OMP_NUM_THREADS=1 $(call recorded,faults) $(PY) -m pytest $(SIDE_BY_SIDE) \
		-m "promise or hard" --reliability=docs/reliability.md

FUZZ_SECONDS ?= 600
FUZZED := $(wildcard tests/fuzz/test_fuzz_*.py)

fuzz: $(READY)  ## FUZZ_SECONDS=600 of new inputs for each target of tests/fuzz (80 minutes)
	@failed=0; for target in $(or $(TESTS),$(FUZZED)); do echo "== $$target"; \
		FUZZ_SECONDS=$(FUZZ_SECONDS) OMP_NUM_THREADS=1 $(PY) -m pytest -q -s $$target || failed=1; done; exit $$failed

test-fast: $(READY)  ## the tests that start no process and train nothing (a minute and a half)
	@OMP_NUM_THREADS=1 $(PY) -m pytest $(SIDE_BY_SIDE) -m "not slow" $(TESTS)

test-layouts: $(READY)  ## every parallel layout, of which `make test` takes a sample (3 to 15 minutes)
	@LAYOUTS=all OMP_NUM_THREADS=1 $(PY) -m pytest tests/parallel

test-newest: $(NEWEST)/.installed  ## all tests and layouts with the newest pins, on Python 3.12
	@LAYOUTS=all OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest $(SIDE_BY_SIDE) $(TESTS)

EXPORTED := $(addprefix tests/looplm/huggingface/test_modeling,.py _generation.py _files.py _transformers.py)

test-hf-oldest: $(HF_OLDEST)/.installed  ## the exported model with the oldest transformers
	@OMP_NUM_THREADS=1 $(HF_OLDEST)/bin/python -m pytest $(or $(TESTS),$(EXPORTED))

BACKENDS := $(addprefix tests/looplm/,model/test_transformer_engine.py config/test_engine.py model/test_loop_lm.py)

test-te: $(TE_VENV)/.installed  ## the blocks of Transformer Engine, without a GPU (6 GB; compiles for 15 to 30 minutes)
	@LD_LIBRARY_PATH=$$(echo $(nvidia)/*/lib | tr ' ' ':') OMP_NUM_THREADS=1 \
		$(TE_VENV)/bin/python -m pytest $(or $(TESTS),$(BACKENDS))

check: $(READY)  ## lint, formatting, types, shell scripts
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m mypy
	@$(VENV)/bin/shellcheck --external-sources .ci/run pretrain/slurm/* pretrain/container/*.sh tools/gpu/*.sh

format: $(READY)  ## apply ruff's automatic fixes
	@$(PY) -m ruff check --fix
	@$(PY) -m ruff format

# The trained model whose gate decides when tokens leave: the first of these that exists.
BENCHED = $(firstword $(wildcard runs/longer/gate runs/quickstart/gate))

bench: $(READY)  ## speed against plain torch, the head, a pipeline's bubble, decoding
	@$(call recorded,bench) $(PY) -m tools.bench $(if $(BENCHED),--checkpoint $(BENCHED))

plan-check: $(READY)  ## the planner's memory against training steps on this CPU, up to four processes
	@OMP_NUM_THREADS=1 $(PY) -m tools.plan_check

# $(call rehearsed,model,attention)
define rehearsed
	@echo "== ouro-$(1), $(2)"
	@OMP_NUM_THREADS=1 $(PY) -m tools.rehearse --chain --config configs/ouro-$(1)/chain.yaml --attention $(2) \
		--gpus $(GPUS)

endef
GPUS ?= 512

rehearse: $(READY)  ## a step of every rank that differs, of all Ouro recipes on GPUS=512, on this CPU (20 min)
	$(foreach model,1.4b 2.6b,$(foreach attention,mha mla,$(call rehearsed,$(model),$(attention))))

DEVICE ?= cuda

gpu-check: $(READY)  ## what a machine with one GPU can do, in 8 minutes (rehearse it: make gpu-check DEVICE=cpu)
	@$(PY) -m tools.gpu_check --device $(DEVICE)

# With TE=1 also Transformer Engine, whose pins have a file of their own.
BUNDLED := $(if $(TE),$(TE_VENV),$(NEWEST))/constraints.txt

# pip looks into a source package with its own build tools: those of Transformer Engine want torch's CUDA build.
BUNDLER := $(if $(TE),$(TE_VENV),$(VENV))

gpu-bundle: $(BUNDLER)/.installed $(BUNDLED)  ## wheels and code for gpu-check without a network (TE=1: larger)
	@$(BUNDLER)/bin/python -m tools.gpu_bundle --constraints $(BUNDLED) $(if $(TE),--engine true)

docs: $(DOCS)/.installed  ## the documentation as a site: site/index.html
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict
	@echo "open site/index.html"

# ---- clean

clean-quickstart:  ## delete the quickstart's results
	rm -rf $(RUN)

clean: clean-quickstart clean-ouro-tiny clean-smollm  ## also delete the environments and every cache
	rm -rf $(VENV) $(NEWEST) $(HF_OLDEST) $(TE_VENV) $(DOCS) site build dist *.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -type d -prune -exec rm -rf {} +
