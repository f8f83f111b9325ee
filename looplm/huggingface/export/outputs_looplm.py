"""The outputs of a LoopLM. This file travels inside an export.

Shapes: B batch, S tokens of this call, D hidden, V vocabulary, R loops.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from .cache_looplm import LoopLMCache


@dataclass
class LoopLMModelOutput(ModelOutput):
    """Output of the stack.

    Args:
        last_hidden_state: [B, S, D], what the head reads of each token after the loop at which it exited.
        past_key_values: the cache, if one is used.
        hidden_states: on request, R tensors [B, S, D]: what the head reads after each loop, normed.
        gate_logits: on request, [R, B, S] in fp32: the logit of exiting after each loop.
        exit_depths: for a threshold below 1, [B, S]: number of loops that each token ran.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: LoopLMCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    gate_logits: Tensor | None = None
    exit_depths: Tensor | None = None


@dataclass
class LoopLMCausalOutput(ModelOutput):
    """As :class:`LoopLMModelOutput`, with the ``loss`` and each token's ``logits`` [B, S, V] at its exit."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: LoopLMCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    gate_logits: Tensor | None = None
    exit_depths: Tensor | None = None
