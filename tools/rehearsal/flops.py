"""FLOPs by operator: torch's formulas, and those of the operators that torch has none for."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten


def _matrix_product(into: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


def _pairs(queries: int, keys: int, causal: bool) -> int:
    """Return the number of scores of one head: under a causal mask half of them, as the planner counts too."""
    return queries * keys // 2 if causal else queries * keys


def _attention(query: Tensor, key: Tensor, value: Tensor, _: float = 0.0, causal: bool = False, **__: Any) -> int:
    samples, heads, queries, width = query.shape
    return 2 * samples * heads * _pairs(queries, key.shape[2], causal) * (width + value.shape[3])


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **__: Any) -> int:
    """Return those of five products: the scores once more, and four gradients."""
    samples, heads, queries, width = query.shape
    causal = rest[3]
    return 2 * samples * heads * _pairs(queries, key.shape[2], causal) * (3 * width + 2 * value.shape[3])


# By packet, without the overload's name. In-place products are not in torch's table.
FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _aten.addmm_: _matrix_product,
    _aten.baddbmm_: lambda into, a, b, **_: 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2],
    _aten.mv: lambda a, b, **_: 2 * a.numel(),
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class FlopCounter:
    """FLOPs by operator. FLOPs of anything but products are not counted, as usual."""

    def __init__(self) -> None:
        self.by_operator: Counter[str] = Counter()

    def restart(self) -> None:
        """Count from zero."""
        self.by_operator = Counter()

    def see(self, formula: Callable[..., int], name: str, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Count one call."""
        self.by_operator[name] += formula(*args, **kwargs, out_val=out)
