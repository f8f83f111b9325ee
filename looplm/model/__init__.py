"""The looped model: attention, norms, blocks, exit gates, losses, and loops as virtual pipeline stages."""

from looplm.model.loop_lm import EXTRA_STATE, LoopLM, LoopOutput

__all__ = ["EXTRA_STATE", "LoopLM", "LoopOutput"]
