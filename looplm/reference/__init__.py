"""The looped model in plain torch: the shortest way to learn it, and the oracle of the tests.

It is independent of the product: nothing here imports another package of looplm, or Megatron, and autograd alone
computes the gradients. Start with ``model.py``.
"""

from looplm.reference.losses import adaptive_gate_loss as adaptive_gate_loss
from looplm.reference.losses import entropy as entropy
from looplm.reference.losses import entropy_regularised_loss as entropy_regularised_loss
from looplm.reference.losses import exit_distribution as exit_distribution
from looplm.reference.losses import geometric_prior as geometric_prior
from looplm.reference.losses import masked_mean as masked_mean
from looplm.reference.losses import q_exit as q_exit
from looplm.reference.losses import state_changes as state_changes
from looplm.reference.losses import token_losses as token_losses
from looplm.reference.model import Output as Output
from looplm.reference.model import Params as Params
from looplm.reference.model import View as View
from looplm.reference.model import at_least_fp32 as at_least_fp32
from looplm.reference.model import attend as attend
from looplm.reference.model import block as block
from looplm.reference.model import evens_then_odds as evens_then_odds
from looplm.reference.model import exit_gate as exit_gate
from looplm.reference.model import forward as forward
from looplm.reference.model import grouped_attention as grouped_attention
from looplm.reference.model import gru_cell as gru_cell
from looplm.reference.model import head_weight as head_weight
from looplm.reference.model import inject as inject
from looplm.reference.model import latent_attention as latent_attention
from looplm.reference.model import mha_head_dim as mha_head_dim
from looplm.reference.model import output_gate as output_gate
from looplm.reference.model import rms_norm as rms_norm
from looplm.reference.model import rotate as rotate
from looplm.reference.model import scope as scope
from looplm.reference.model import swiglu as swiglu
from looplm.reference.model import visible as visible
from looplm.reference.module import ReferenceLM as ReferenceLM
from looplm.reference.module import parameter_shapes as parameter_shapes
