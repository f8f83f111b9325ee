"""Tensors of a checkpoint, known from its metadata before any of them is read."""

from pathlib import Path

import torch
from megatron.core.dist_checkpointing import load_tensors_metadata

from looplm.checkpoint.about import ModelDescription
from looplm.failures import UserError
from looplm.parameters import Shape, parameters


def stored_tensors(step: Path, described: ModelDescription) -> list[tuple[Shape, torch.dtype]]:
    """Return shape and dtype of the model's tensors. Megatron stacks the tensors of the layers."""
    ours = {row.name for row in parameters(described.model, described.gate)}
    names = {".".join(part for part in name.split(".") if not part.isdigit()) for name in ours}
    try:
        found = load_tensors_metadata(str(step / "state"))
    except Exception as error:  # Megatron-core raises any kind over a file that it did not write
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{step}: its state cannot be read ({reason}); take another step directory") from error
    return [(tuple(found[name].global_shape), found[name].dtype) for name in found if name in names]


def check_size(step: Path, described: ModelDescription) -> None:
    """Raise a :class:`UserError` if the weights are not as many as config.yaml says.

    A model is built before its weights are compared with the stored ones. One of a size that nobody has ever stored
    would take all memory.
    """
    wanted = sum(row.size for row in parameters(described.model, described.gate))
    stored = sum(torch.Size(shape).numel() for shape, _ in stored_tensors(step, described))
    if stored != wanted:
        raise UserError(
            f"{step}: its config.yaml describes {wanted:,} parameters, its state holds {stored:,}; take another step "
            "directory"
        )
