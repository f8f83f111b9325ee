"""Our parameters to and from the tensors of a Hugging Face checkpoint, by the table of :mod:`looplm.parameters`.

Nothing is permuted or rounded: a round trip keeps every bit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from looplm.config import GateConfig, ModelConfig
from looplm.parameters import Parameter, Shape, parameters


def stored_shapes(model: ModelConfig, gate: GateConfig) -> dict[str, Shape]:
    """Return the shape of every tensor of a Hugging Face checkpoint, by name, in file order."""
    return {name: shape for row in parameters(model, gate) for name, shape in row.hugging_face_parts.items()}


def join(row: Parameter, parts: Sequence[Tensor]) -> Tensor:
    """Return our tensor from its parts there."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.unflatten(0, (row.groups, -1)) for part in parts], dim=1).flatten(0, 1)


def split(row: Parameter, tensor: Tensor) -> list[Tensor]:
    """Return the parts of our tensor: the inverse of :func:`join`."""
    if len(row.hugging_face_parts) == 1:
        return [tensor]
    rows = [shape[0] // row.groups for shape in row.hugging_face_parts.values()]
    return [part.flatten(0, 1) for part in tensor.unflatten(0, (row.groups, -1)).split(rows, dim=1)]
