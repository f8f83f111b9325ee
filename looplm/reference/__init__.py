"""The looped model in plain torch: the shortest way to learn it, and the oracle of the tests.

It is independent of the product: nothing here imports another package of looplm, or Megatron, and autograd alone
computes the gradients. Start with ``model.py``.
"""

from looplm.reference.losses import (
    adaptive_gate_loss,
    entropy,
    entropy_regularised_loss,
    exit_distribution,
    geometric_prior,
    masked_mean,
    q_exit,
    state_penalty,
    token_losses,
)
from looplm.reference.model import (
    Output,
    Params,
    View,
    at_least_fp32,
    attend,
    block,
    evens_then_odds,
    exit_gate,
    forward,
    grouped_attention,
    gru_cell,
    head_weight,
    inject,
    latent_attention,
    mha_head_dim,
    output_gate,
    rms_norm,
    rotate,
    scope,
    swiglu,
    visible,
)
from looplm.reference.module import (
    ReferenceLM,
    parameter_shapes,
)

__all__ = [
    "Output",
    "Params",
    "ReferenceLM",
    "View",
    "adaptive_gate_loss",
    "at_least_fp32",
    "attend",
    "block",
    "entropy",
    "entropy_regularised_loss",
    "evens_then_odds",
    "exit_distribution",
    "exit_gate",
    "forward",
    "geometric_prior",
    "grouped_attention",
    "gru_cell",
    "head_weight",
    "inject",
    "latent_attention",
    "masked_mean",
    "mha_head_dim",
    "output_gate",
    "parameter_shapes",
    "q_exit",
    "rms_norm",
    "rotate",
    "scope",
    "state_penalty",
    "swiglu",
    "token_losses",
    "visible",
]
