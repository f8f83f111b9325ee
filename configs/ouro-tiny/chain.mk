# Ouro's whole recipe with a few million parameters: `make ouro-tiny`. As in the quickstart, a finished phase leaves a
# stamp and is skipped from then on, an interrupted one continues, and one whose configuration changed starts over, with
# all phases that depend on it.

TINY     := runs/ouro-tiny
TINY_C   := configs/ouro-tiny
TINY_OK  := $(TINY)/.done
# A stage stacks on all earlier ones. Each starts from the weights of the previous one; 1b starts from upcycled ones.
TINY_STAGES := stage1a stage1b stage2 stage3 stage4 gate sft

ouro-tiny: $(TINY_OK)/report  ## Ouro's stages in small, from text to an exported model that answers (15 to 25 minutes)
	@$(PY) -m pretrain.stage_jumps $(TINY) --max_jump 0.3
	@echo "== ouro-tiny is done: open $(TINY)/report.html; the exported model is $(TINY)/exported" \
		" (start over: make clean-ouro-tiny)"

$(TINY_OK)/data: $(TINY_C)/data.yaml | $(READY)
	$(call phase,ouro-tiny: data)
	$(repeat)
	@$(PY) -m data_pipeline.tokenize --config $(TINY_C)/data.yaml
	@touch $@

$(TINY_OK)/questions: $(TINY_OK)/data $(TINY_C)/data-questions.yaml
	$(call phase,ouro-tiny: questions for mid-training and fine-tuning)
	$(repeat)
	@$(PY) -m data_pipeline.synthetic.questions --output $(TINY)/made/mid-training.jsonl --count 2000 --seed 1
	@$(PY) -m data_pipeline.synthetic.questions --output $(TINY)/made/sft.jsonl --count 1000 --seed 2
	@$(PY) -m data_pipeline.tokenize --config $(TINY_C)/data-questions.yaml
	@touch $@

$(TINY_OK)/upcycled: $(TINY_OK)/stage1a
	$(call phase,ouro-tiny: twice as deep)
	@rm -rf $(TINY)/upcycled
	@$(PY) -m tools.upcycle depth --checkpoint $(TINY)/stage1a --output $(TINY)/upcycled \
		--layers 4 --how stack --residual_scale 0.5 --data $(TINY)/data/python-short_valid
	@touch $@

# $(call tiny_stage,stage,phases it waits for)
define tiny_stage
$(TINY_OK)/$(1): $(2:%=$(TINY_OK)/%) $(TINY_C)/mha.yaml $(TINY_C)/$(1).yaml
	$$(call phase,ouro-tiny: $(1))
	$$(repeat)
	@$(PY) -m pretrain.train \
		$(foreach file,mha $(call tiny_upto,$(1),$(TINY_STAGES)),--config $(TINY_C)/$(file).yaml)
	@touch $$@
endef
# $(call tiny_upto,word,words): the words up to and including that one
tiny_upto = $(if $(2),$(firstword $(2)) \
	$(if $(filter $(1),$(firstword $(2))),,$(call tiny_upto,$(1),$(wordlist 2,99,$(2)))))

$(eval $(call tiny_stage,stage1a,data))
$(eval $(call tiny_stage,stage1b,upcycled))
$(eval $(call tiny_stage,stage2,stage1b))
$(eval $(call tiny_stage,stage3,stage2))
$(eval $(call tiny_stage,stage4,stage3 questions))
$(eval $(call tiny_stage,gate,stage4))
$(eval $(call tiny_stage,sft,gate))

$(TINY_OK)/exported: $(TINY_OK)/sft
	$(call phase,ouro-tiny: export for Hugging Face)
	@rm -rf $(TINY)/exported
	@$(PY) -m tools.convert_hf export --checkpoint $(TINY)/sft --output $(TINY)/exported
	@touch $@

$(TINY_OK)/samples: $(TINY_OK)/sft $(TINY_C)/questions.txt
	$(call phase,ouro-tiny: answers)
	@$(PY) -m looplm.generate --checkpoint $(TINY)/sft --chat true --prompts $(TINY_C)/questions.txt \
		--output $(TINY)/samples.jsonl --temperature 0 --max_new_tokens 40
	@touch $@

# Depths and exits are measured right after the training of the gate, and on the answers after fine-tuning.
$(TINY_OK)/evaluation: $(TINY_OK)/sft
	$(call phase,ouro-tiny: evaluation per depth)
	@$(PY) -m pretrain.evaluate --checkpoint $(TINY)/gate --output $(TINY)/evaluation.json --samples 24
	@$(PY) -m pretrain.evaluate --checkpoint $(TINY)/sft --samples 8
	@touch $@

$(TINY_OK)/report: $(TINY_OK)/exported $(TINY_OK)/samples $(TINY_OK)/evaluation
	$(call phase,ouro-tiny: report)
	@$(PY) -m pretrain.report $(TINY)
	@touch $@

clean-ouro-tiny:  ## delete ouro-tiny's results
	rm -rf $(TINY)
