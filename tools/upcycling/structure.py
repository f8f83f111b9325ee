"""Change the number of layers, the number of loops, or the gate, without changing the trunk's weights.

Ouro's 2.6B model was made of its 1.4B one by copying layers (arXiv 2510.25741, section 4)::

    stack       0 1 2 3  0 1 2 3        one loop passes what two loops passed, without the loop-end norm between them
    interleave  0 0 1 1  2 2 3 3        each layer runs twice in its place

Copies that each add only their share (``residual_scale`` = 4/8) nearly preserve the function, interleaved ones best: in
the quickstart's model made twice as deep the loss rose by at most 0.01 nats, against 0.25 without scaling.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from looplm.bounds import require
from looplm.config import GateConfig
from looplm.config.model import foreign_keys
from looplm.model.exit_gate import uniform_offset
from tools.upcycling.model_state import ModelState, Upcycled

LayerOrder = Literal["stack", "interleave"]
Value = TypeVar("Value")
_LAYERS, _STEPS = "decoder.layers.", "step_embedding.weight"


def deepen(source: ModelState, layers: int, order: LayerOrder, residual_scale: float = 1.0) -> Upcycled:
    """Return a model with a stack of ``layers`` layers.

    Args:
        source: the model.
        layers: a multiple, above 1, of the source's number of layers.
        order: order of the copies.
        residual_scale: factor on what every sublayer adds to the residual stream; 1 leaves it unchanged.

    Raises:
        UserError: ``layers`` is not such a multiple.
    """
    num_layers = source.config.num_layers
    fix = f"give a multiple of the source's {num_layers}, such as {2 * num_layers}"
    require(layers > num_layers and layers % num_layers == 0, "layers", layers, fix)
    config = replace(source.config, num_layers=layers)
    origins = [layer % num_layers if order == "stack" else layer * num_layers // layers for layer in range(layers)]
    weights = scale_residual(copy_layers(source.weights, origins), source.config.sandwich_norm, residual_scale)
    moments = None if source.moments is None else copy_layers(source.moments, origins)
    exact = ["embedding, norms, head, gate and every copied layer, with Adam's moments where the source has them"]
    if residual_scale != 1:
        exact[0] += f"; what a sublayer adds is multiplied by {residual_scale:g}"
    elif order == "stack" and config.injection == config.step_embedding == "none":
        norms = " without the loop-end norm between them" if config.loop_norm == "state" else ""
        exact.append(f"a loop is {layers // num_layers} loops of the source{norms}")
    approximate = ["the function: no layer was trained in the place of its copy"]
    return Upcycled(ModelState(config, source.gate, weights, moments), exact, approximate)


def copy_layers(values: Mapping[str, Value], origins: list[int]) -> dict[str, Value]:
    """Return values by our names in which layer i is layer ``origins[i]`` of ``values``."""
    copied = {}
    for name, value in values.items():
        if not name.startswith(_LAYERS):
            copied[name] = value
            continue
        layer, _, rest = name.removeprefix(_LAYERS).partition(".")
        copied |= {f"{_LAYERS}{new}.{rest}": value for new, old in enumerate(origins) if old == int(layer)}
    return copied


def scale_residual(weights: Mapping[str, Tensor], sandwich_norm: bool, factor: float) -> dict[str, Tensor]:
    """Scale what every sublayer of the stack adds, through its output's norm or, without sandwich norms, its matrix."""
    norms, matrices = ("attn_bda.norm.weight", "mlp_bda.norm.weight"), ("linear_proj.weight", "linear_fc2.weight")
    scaled = norms if sandwich_norm else matrices
    in_stack = {name for name in weights if name.startswith(_LAYERS) and name.endswith(scaled)}
    return {name: weight * factor if name in in_stack else weight for name, weight in weights.items()}


def change_loops(source: ModelState, loops: int) -> Upcycled:
    """Return the model with ``loops`` loops. No weight changes, but the meaning of the gate's logits does.

    A step embedding loses the vectors of loops that are no longer run; further loops start with the last one's.

    Raises:
        UserError: ``loops`` is not a number of loops, or is the source's.
    """
    before = source.config.num_loops
    require(loops > 0 and loops != before, "loops", loops, f"give a number above 0 other than the source's {before}")
    config = replace(source.config, num_loops=loops)
    exact = [f"every weight; hidden states, and so losses, at each of the first {min(before, loops)} depths"]
    if not source.gate.starts_uniform:
        exact.append(f"the gate's chance to leave after each of the first {min(before, loops) - 1} loops")
        approximate = f"the exit distribution: the rest now leaves after loop {loops}, before after loop {before}"
    else:
        # The last loop takes the rest, so it has no logit.
        offsets = [
            [round(float(uniform_offset(loop, count)), 3) for loop in range(count - 1)] for count in (before, loops)
        ]
        approximate = (
            "the exit distribution: what the gate has learned is now a deviation from the uniform prior over "
            f"{loops} loops; offsets of its logits per loop {offsets[0]} -> {offsets[1]}"
        )
    weights, moments = dict(source.weights), None if source.moments is None else dict(source.moments)
    if _STEPS in weights:
        kept = torch.arange(loops).clamp(max=before - 1)
        weights[_STEPS] = weights[_STEPS][kept]
        if moments is not None:
            moments[_STEPS] = {name: moment_RD[kept] for name, moment_RD in moments[_STEPS].items()}
    state = ModelState(config, source.gate, weights, moments)
    return Upcycled(state, exact, [approximate])


def change_gate(source: ModelState, gate: GateConfig) -> Upcycled:
    """Return the same trunk with a fresh gate.

    Raises:
        UserError: the source has this gate.
    """
    read = {spec.name for spec in fields(GateConfig)} - foreign_keys(gate)
    changed = gate.kind != source.gate.kind or any(getattr(gate, key) != getattr(source.gate, key) for key in read)
    require(changed, "kind", gate.kind, f"the source has this gate already: {source.gate}")
    moments = None if source.moments is None else _without_gate(source.moments)
    exact = ["the trunk: every weight of it, hidden states and losses at each depth"]
    loops = source.config.num_loops
    if gate.starts_uniform:
        exact.append(f"the fresh gate is the uniform prior: {1 / loops:.4f} after each of {loops} loops")
        approximate = f"nothing of the {source.gate.kind} gate is carried over; train the gate"
    else:
        approximate = f"the fresh gate halves what is left at each loop; nothing of the {source.gate.kind} gate is kept"
    return Upcycled(ModelState(source.config, gate, _without_gate(source.weights), moments), exact, [approximate])


def _without_gate(values: Mapping[str, Value]) -> dict[str, Value]:
    return {name: value for name, value in values.items() if not name.startswith("gate.")}
