"""What a layer's attention reads: the second moment of its normed input, over the tokens and loops of a few samples.

Shapes: S sequence, B batch, D hidden, L layers.
"""

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from pretrain.data import Batch
from tools.upcycling.parts import Parts, assemble

_RIDGE = 1e-3  # share of an isotropic moment: a direction that no token had is unlikely, not impossible


@torch.no_grad()
def second_moments(parts: Parts, batches: list[Batch], groups: ProcessGroupCollection) -> list[Tensor]:
    """E[u u^T] of each layer, [D, D] with a trace of D; u is the input of attention before its norm's gain."""
    model, shape = assemble(parts, groups).eval(), parts.model
    width = shape.hidden_size
    sums_LDD = [torch.zeros(width, width, dtype=torch.float64) for _ in range(shape.num_layers)]

    def add(sum_DD: Tensor, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        u_ND = F.rms_norm(args[0], (width,), eps=shape.norm_eps).flatten(0, 1).double()
        sum_DD += (u_ND.mT @ u_ND).cpu()

    hooks = [
        layer.input_layernorm.register_forward_pre_hook(lambda *seen, sum_DD=sum_DD: add(sum_DD, *seen))
        for layer, sum_DD in zip(model.decoder.layers, sums_LDD, strict=True)
    ]
    for batch in batches:
        model(batch.ids_BS, None, batch.document_start_SB)
    for hook in hooks:
        hook.remove()
    isotropic = torch.eye(width, dtype=torch.float64)
    return [(1 - _RIDGE) * total_DD * width / total_DD.trace() + _RIDGE * isotropic for total_DD in sums_LDD]
