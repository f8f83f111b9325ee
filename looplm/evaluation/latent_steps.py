"""How many steps the unit inside attention takes for each position (:mod:`looplm.model.latent_reasoning`).

Shapes: S sequence, B batch, C latent, N calls of a unit: one in each loop of each layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from looplm.evaluation.hooks import inputs_watched
from looplm.model import LoopLM
from looplm.model.latent_reasoning import LatentReasoning


@contextmanager
def watched_steps(model: LoopLM) -> Iterator[list[Tensor]]:
    """Yield a list to which every call of a unit that halts adds its expected steps, [S, B], in the order of the calls.

    Its states are computed twice meanwhile.
    """
    steps = list[Tensor]()

    def look(unit: Any, inputs: tuple[Any, ...]) -> None:
        with torch.no_grad():
            steps.append(unit.expected_steps(inputs[0]))

    units = [module for module in model.modules() if isinstance(module, LatentReasoning) and module.halt is not None]
    with inputs_watched(units, look):
        yield steps
