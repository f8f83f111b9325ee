"""Hooks that find where numbers first stop being finite in a forward and backward pass: module, loop and position."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from looplm.model import LoopLM


class Fault(NamedTuple):
    """Place of the first value that is not finite."""

    what: str  # output or gradient of the output
    module: str
    loop: int  # from 1
    position: int  # in the sample

    def __str__(self) -> str:
        return f"the {self.what} of {self.module} in loop {self.loop} at position {self.position}"


class Watch:
    """Hooks on every module, which find the first output, or else the first gradient, that is not finite.

    A loop lasts until its end norm has run. The coda then reads out the loop that has ended, and after the last loop
    the gate runs once for each. A module may not run in all loops, so its own calls tell no loop. Backward starts at
    the last loop's end, so the first gradient found is the one closest to the loss.
    """

    def __init__(self, model: LoopLM, length: int) -> None:
        self._model, self._length, self._hooks = model, length, list[Any]()
        self._ended, self._gated = 0, 0  # loops
        self.fault: Fault | None = None

    def __enter__(self) -> None:
        self._hooks.append(self._model.gate.register_forward_pre_hook(self._enter_gate))
        for name, module in self._model.named_modules():
            if not list(module.children()) or name == "gate":  # a gate computes with its children's weights itself
                self._hooks.append(module.register_forward_hook(partial(self._after, name)))
        self._hooks.append(self._model.decoder.final_layernorm.register_forward_hook(self._end_loop))

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def look(self, what: str, name: str, value: Tensor, loop: int | None = None) -> None:
        """Note the place of the first number that is not finite; without ``loop``, loops are the first dimension."""
        if self.fault is not None or bool(value.isfinite().all()):
            return
        place = (~value.isfinite()).nonzero()[0].tolist()
        position = place[value.shape.index(self._length)] if self._length in value.shape else 0
        self.fault = Fault(what, name, place[0] + 1 if loop is None else loop, position)

    def _after(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        loop = {"coda": self._ended, "gate": self._gated}.get(name.partition(".")[0], self._ended + 1)
        for value in _tensors(output):
            self.look("output", name, value, loop)
            if value.requires_grad:
                value.register_hook(partial(self.look, "gradient of the output", name, loop=loop))

    def _end_loop(self, *_: object) -> None:
        self._ended += 1

    def _enter_gate(self, *_: object) -> None:
        self._gated += 1


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
