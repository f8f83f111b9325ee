"""The looped model on Megatron-core's blocks. ``looplm/reference/model.py`` is the same in plain torch.

Read in this order:

loop_lm.py          embedding, the stack R times, the loop-end norm
exit_gate.py        after each loop, should this token leave?
head.py             cross-entropies with their gradients; losses.py the objectives made of them
block.py            one block, those outside the loops, recomputation
local_layers.py     what a block is made of on any device; transformer_engine_layers.py on NVIDIA's
attention.py        MLA and MHA around a core; core_attention.py that core, over the spans of spans.py
                    (span_attention.py on a CPU, span_attention_cuda.py on a GPU)
norms.py            RMSNorm, sandwich norms, the read-out's
pipeline.py         loops as virtual pipeline stages

Variants, each owning what it is: injection.py, step_embedding.py, attention_gate.py, latent_reasoning.py,
fp8_emulation.py.
"""

from looplm.model.loop_lm import EXTRA_STATE, LoopLM, LoopOutput

__all__ = ["EXTRA_STATE", "LoopLM", "LoopOutput"]
