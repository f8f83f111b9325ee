"""How much attention rests on a sample's first token, which a model may use as a sink for heads with nothing to read.

Shapes: R loops, S sequence, B batch, H heads, G key heads, P query heads per key head, K query-key width, T keys.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from looplm.evaluation.hooks import inputs_watched
from looplm.model import LoopLM


@torch.no_grad()
def attention_sink(model: LoopLM, ids_BS: Tensor, loops: int) -> tuple[float, ...]:
    """Return the weight on the first position in each loop, as a mean over layers, heads and all later positions.

    Heads that look at all earlier tokens alike would have the mean of 1 / (i + 1) over the positions i.

    Args:
        model: in eval mode, on the local backend.
        ids_BS: samples of one document each, of at least two tokens.
        loops: number of loops to run.
    """
    with _watched(model) as shares:
        model(ids_BS, loops)
    return tuple(torch.tensor(shares).view(loops, -1).mean(1).tolist())


@contextmanager
def _watched(model: LoopLM) -> Iterator[list[float]]:
    """Yield a list to which every call of a layer's attention adds its share, in the order of the calls."""
    shares = list[float]()

    def look(core: Any, inputs: tuple[Any, ...]) -> None:
        query, key = inputs[:2]
        shares.append(float(_first_weight(query, key, core.softmax_scale or key.size(-1) ** -0.5)))

    with inputs_watched([layer.self_attention.core_attention for layer in model.decoder.layers], look):
        yield shares


def _first_weight(query_SBHK: Tensor, key_SBGK: Tensor, scale: float) -> Tensor:
    query_SBGPK = query_SBHK.unflatten(2, (key_SBGK.size(2), -1)).float()
    score_BGPST = torch.einsum("sbgpk,tbgk->bgpst", query_SBGPK, key_SBGK.float()) * scale
    later = torch.ones(score_BGPST.shape[-2:], dtype=torch.bool, device=score_BGPST.device).triu(1)
    weight_BGPST = score_BGPST.masked_fill(later, float("-inf")).softmax(-1)
    return weight_BGPST[..., 1:, 0].mean()
