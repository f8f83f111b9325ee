"""The same weights run another number of times, and the same trunk with another gate."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from looplm.cli import require
from looplm.config import GateConfig
from looplm.model.exit_gate import uniform_offset
from tools.upcycling.parts import Parts, Upcycled

Value = TypeVar("Value")


def change_loops(parts: Parts, loops: int) -> Upcycled:
    """Train on with ``loops`` loops. No weight changes; what the gate's logits mean does.

    Raises:
        UserError: not a number of loops, or the one it has.
    """
    have = parts.model.num_loops
    require(loops > 0 and loops != have, "loops", loops, f"give a number above 0 other than the source's {have}")
    exact = [f"every weight; hidden states, and so losses, at each of the first {min(have, loops)} depths"]
    if parts.gate.kind == "linear":
        exact = [*exact, f"the gate's chance to leave after each of the first {min(have, loops) - 1} loops"]
        approximate = [f"the exit distribution: the rest now leaves after loop {loops}, before after loop {have}"]
    else:
        before, after = (_offsets(number) for number in (have, loops))
        approximate = [
            "the exit distribution: what the gate has learnt is now a deviation from the uniform prior over "
            f"{loops} loops; offsets of its logits per loop {before} -> {after}"
        ]
    return Upcycled(parts._replace(model=replace(parts.model, num_loops=loops)), exact, approximate)


def change_gate(parts: Parts, gate: GateConfig) -> Upcycled:
    """A fresh gate of another kind on the same trunk.

    Raises:
        UserError: it is the gate that the source has.
    """
    require(gate != parts.gate, "kind", gate.kind, f"the source has this gate already: {parts.gate}")
    trunk = _without_gate(parts.weights)
    moments = None if parts.moments is None else _without_gate(parts.moments)
    exact = ["the trunk: every weight of it, hidden states and losses at each depth"]
    loops = parts.model.num_loops
    if gate.kind == "lru":
        exact = [*exact, f"the fresh gate is the uniform prior: {1 / loops:.4f} after each of {loops} loops"]
        approximate = [f"nothing of the {parts.gate.kind} gate is carried over; train the gate"]
    else:
        approximate = [
            f"the fresh gate halves what is left at each loop; nothing of the {parts.gate.kind} gate is kept"
        ]
    return Upcycled(Parts(parts.model, gate, trunk, moments), exact, approximate)


def _without_gate(values: Mapping[str, Value]) -> dict[str, Value]:
    return {name: value for name, value in values.items() if not name.startswith("gate.")}


def _offsets(loops: int) -> list[float]:
    """Of the LRU gate's logits, for every loop but the last, which takes the rest."""
    return [round(uniform_offset(loop, loops), 3) for loop in range(loops - 1)]
