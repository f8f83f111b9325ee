"""Loop a range of a dense model's layers; the layers before and after it stay outside the loops.

The layers before the range become the prelude, those after it the coda, and the dense model's final norm that of the
coda. The loops continue the residual stream (``model.loop_norm: readout``), so one loop is the dense model itself. A
middle range loops at a much lower cost in loss than the whole stack (compare arXiv 2511.07384, 2502.05171).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from looplm.config import GateConfig, Injection
from pretrain.data import Batch
from tools.upcycling.dense import parse_range
from tools.upcycling.measure import measure
from tools.upcycling.model_state import ModelState, Upcycled
from tools.upcycling.structure import scale_residual

_END_NORM = "decoder.final_layernorm.weight"


class Trial(NamedTuple):
    """A range that was tried, and its loss after each loop."""

    layers: str
    residual_scale: float
    loss: tuple[float, ...]


def retrofit(
    source: ModelState,
    layers: str,
    loops: int,
    gate: GateConfig,
    injection: Injection = "none",
    residual_scale: float = 1.0,
) -> Upcycled:
    """Return the model whose layers in a range are looped, with a fresh gate.

    Args:
        source: the dense model.
        layers: the range, FIRST:END, counted as in a Python slice.
        loops: number of loops.
        gate: configuration of the gate.
        injection: ``model.injection``; diagonal and linear start without an effect.
        residual_scale: factor on what each sublayer in the range adds; 1 leaves it unchanged.

    Raises:
        UserError: there are no such layers.
    """
    count, chosen = source.config.num_layers, parse_range(layers, source.config.num_layers)
    first, end = chosen[0], chosen[-1] + 1
    config = replace(
        source.config,
        num_layers=end - first,
        num_loops=loops,
        prelude_layers=first,
        coda_layers=count - end,
        loop_norm="readout",
        injection=injection,
    )
    weights = _moved(source.weights, first, end)
    if end < count:
        weights["coda.final_layernorm.weight"] = weights[_END_NORM]
    weights = scale_residual(weights, source.config.sandwich_norm, residual_scale)
    exact = [f"every weight; layers {first} to {end - 1} are looped, {first} stand before them and {count - end} after"]
    if residual_scale == 1:
        exact.append("the function of one loop: it is the dense model")
    else:
        exact.append(f"the function of one loop, but for the factor {residual_scale:g} on what the looped layers add")
    approximate = ["loops after the first: the range was never trained on its own output"] if loops > 1 else []
    if injection == "additive" and loops > 1:
        approximate.append("their input: the range was never trained on the sum of its input and its output")
    return Upcycled(ModelState(config, gate, weights), exact, approximate)


def search(
    source: ModelState,
    ranges: Sequence[str],
    scales: Sequence[float],
    loops: int,
    injection: Injection,
    batches: list[Batch],
    groups: ProcessGroupCollection,
) -> Iterator[Trial]:
    """Yield the losses of each range with each factor, before any training.

    Args:
        source: the dense model.
        ranges: each as in :func:`retrofit`.
        scales: factors on what each sublayer in a range adds.
        loops: number of loops; there is a loss after each.
        injection: ``model.injection``.
        batches: text.
        groups: process groups of a single process.
    """
    for layers, scale in product(ranges, scales):
        made = retrofit(source, layers, loops, GateConfig(kind="linear"), injection, scale)
        losses = measure(made.state, batches, loops, groups)["loss_per_depth"]
        yield Trial(layers, scale, tuple(losses))


def _moved(weights: Mapping[str, Tensor], first: int, end: int) -> dict[str, Tensor]:
    """Return the weights under their names in prelude, stack and coda."""
    moved = {}
    for name, weight in weights.items():
        block, _, rest = name.partition(".layers.")
        if block != "decoder" or not rest:
            moved[name] = weight
            continue
        number, _, inner = rest.partition(".")
        layer = int(number)
        if layer < first:
            moved[f"prelude.layers.{layer}.{inner}"] = weight
        elif layer < end:
            moved[f"decoder.layers.{layer - first}.{inner}"] = weight
        else:
            moved[f"coda.layers.{layer - end}.{inner}"] = weight
    return moved
