"""Execution of tensor operations without computing them: shapes, strides and storages are real, numbers are not.

A *hollow* tensor is an ordinary CPU tensor that nobody writes to. The operating system gives memory to a page when it
is first written, so a hollow tensor of a hundred GiB takes none. An operation with a hollow argument is not executed:
its outputs are allocated and left alone, with the shapes that torch's own meta kernels give. All other operations
are executed, so spans, masks, token counts and whatever else a host reads are right. Views are always executed, because
they only share a storage. A whole number that does not fit into its new type, such as an offset beyond 2^31 in 32 bits,
is an error: on a GPU it would wrap around.

Torch's ``FakeTensorMode`` does the same with tensors of a class of its own. They fail where Megatron-core reads a
number, swaps a parameter's data or hands a tensor to a collective, and each operation takes several times as long.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

# Larger tensors are hollow. Integers say what is computed (ids, spans, masks), so more of them keep their numbers.
MOST_NUMBERS = 1 << 12
MOST_INTEGERS = 1 << 23

_INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool})
# They return a view, but their schema does not say so.
_ALSO_VIEWS = frozenset(
    ["_unsafe_view", "lift_fresh", "set_", "_reshape_alias", "unsafe_chunk", "unsafe_split", "resize_"]
)
_UNINITIALIZED = frozenset(["empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"])
# Their outputs may be large although no argument is.
_FACTORIES = _UNINITIALIZED | {
    *("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "arange", "linspace", "eye", "scalar_tensor"),
    *("rand", "randn", "randint", "randperm", "repeat", "cat", "stack", "one_hot"),
}
_CASTS = {"_to_copy": 0, "copy_": 1}  # conversions to another type, and which argument is converted
_empty = torch._C._VariableFunctions.empty_strided  # the original: torch's own name may be patched (looplm.megatron)

Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


class Operation(NamedTuple):
    """How an operation is executed; it depends on its schema alone."""

    is_view: bool
    is_factory: bool
    leaves_undefined: bool  # its outputs are memory that nobody wrote to
    aliases: tuple[int | str | None, ...] | None  # for each output the argument that it is; None: no output is one
    name: str


class Outputs(NamedTuple):
    """Layouts of an operation's outputs for arguments of given shapes."""

    layouts: tuple[Layout | None, ...]  # None for an output that is not a tensor
    container: type | None  # tuple or list; None for a single output
    are_large: bool


class HollowExecutor:
    """Executes operations, those on large tensors without computing them.

    Args:
        most_numbers: elements of the largest tensor that is computed.
    """

    def __init__(self, most_numbers: int = MOST_NUMBERS) -> None:
        self._most_numbers = most_numbers
        self._outputs: dict[Any, Outputs] = {}

    def __call__(self, func: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return the operation's outputs."""
        operation = inspect(func)
        if operation.is_view:
            return func(*args, **kwargs)
        parts: list[Any] = [func]
        is_large = self._describe(args, parts)
        if kwargs:
            is_large |= self._describe(tuple(kwargs.items()), parts)
        if not is_large and not operation.is_factory:
            out = func(*args, **kwargs)
            if operation.name in _CASTS:
                _refuse_overflow(func, args[_CASTS[operation.name]], out)
            return out
        if operation.aliases is not None:
            return self._return_arguments(func, operation, args, kwargs)
        key = tuple(parts)
        outputs = self._outputs.get(key)
        if outputs is None:
            outputs = self._outputs[key] = self._outputs_of(func, operation, args, kwargs)
        if is_large or outputs.are_large or operation.leaves_undefined:
            return self._allocate(outputs)
        return func(*args, **kwargs)

    def _describe(self, values: Any, parts: list[Any]) -> bool:
        """Add what decides the outputs' layouts to ``parts``; return True if a tensor among ``values`` is hollow."""
        is_large = False
        for value in values:
            if isinstance(value, Tensor):
                parts.append((value.shape, value.stride(), value.dtype))
                is_large = is_large or self._is_hollow(value)
            elif isinstance(value, (list, tuple)):
                parts.append(len(value))
                is_large |= self._describe(value, parts)
            else:
                parts.append((type(value), value))
        return is_large

    def _is_hollow(self, tensor: Tensor) -> bool:
        dtype = tensor.dtype
        most = max(MOST_INTEGERS, self._most_numbers) if dtype in _INTEGERS else self._most_numbers
        return tensor.numel() > most or tensor.untyped_storage().nbytes() > most * dtype.itemsize

    def _outputs_of(self, func: OpOverload, operation: Operation, args: Any, kwargs: dict[str, Any]) -> Outputs:
        """Return the layouts of the outputs, from torch's meta kernel."""
        if operation.name in ("_local_scalar_dense", "equal"):
            return Outputs((None,), None, False)
        meta_args, meta_kwargs = _to_meta(args), {key: _to_meta(value) for key, value in kwargs.items()}
        if "device" in meta_kwargs or not any(isinstance(value, (Tensor, list, tuple)) for value in args):
            meta_kwargs["device"] = torch.device("meta")
        try:
            found = func(*meta_args, **meta_kwargs)
        except (NotImplementedError, RuntimeError) as error:
            shapes = ", ".join(str(tuple(value.shape)) for value in args if isinstance(value, Tensor))
            raise RuntimeError(f"{func} of shapes {shapes}: {error}") from error
        values = tuple(found) if isinstance(found, (tuple, list)) else (found,)
        layouts = tuple((x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else None for x in values)
        sizes = [x.numel() * x.element_size() for x in values if isinstance(x, Tensor)]
        are_large = any(
            x.numel() > (MOST_INTEGERS if x.dtype in _INTEGERS else self._most_numbers)
            for x in values
            if isinstance(x, Tensor)
        )
        container = type(found) if isinstance(found, (tuple, list)) else None
        assert sizes or container is not None or found is None, f"{func}: returns {found}"
        return Outputs(layouts, container, are_large)

    def _allocate(self, outputs: Outputs) -> Any:
        if outputs.container is None:
            return self._new(outputs.layouts[0])
        return outputs.container(self._new(layout) for layout in outputs.layouts)

    def _new(self, layout: Layout | None) -> Any:
        """Return a tensor: hollow if it is large, else zeros, so that whatever reads it sees the same in every run."""
        if layout is None:
            return 0
        size, stride, dtype = layout
        tensor = _empty(size, stride, dtype=dtype)
        return tensor if self._is_hollow(tensor) else tensor.zero_()

    def _return_arguments(self, func: OpOverload, operation: Operation, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return the arguments that an in-place operation would have written to."""
        assert operation.aliases is not None
        found = [None if at is None else kwargs[at] if isinstance(at, str) else args[at] for at in operation.aliases]
        return None if not found else found[0] if len(found) == 1 else tuple(found)


@functools.cache
def inspect(func: OpOverload) -> Operation:
    """Return how ``func`` is executed."""
    schema = func._schema
    name = schema.name.removeprefix("aten::")
    writes = any(argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments)
    is_view = name in _ALSO_VIEWS or (not writes and any(value.alias_info is not None for value in schema.returns))
    aliases = tuple(_argument_of(schema, value) for value in schema.returns) if writes else None
    return Operation(is_view, name in _FACTORIES, name in _UNINITIALIZED, aliases, name)


def _argument_of(schema: Any, value: Any) -> int | str | None:
    """Return the argument, by its place or name, whose storage an output has."""
    if value.alias_info is None:
        return None
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.before_set == value.alias_info.before_set:
            return str(argument.name) if argument.kwarg_only else place
    return None


def _refuse_overflow(func: OpOverload, source: Any, out: Tensor) -> None:
    """Raise if whole numbers have changed in a conversion to fewer bits."""
    dtypes = (source.dtype, out.dtype) if isinstance(source, Tensor) else (torch.bool,)
    if torch.bool in dtypes or not _INTEGERS.issuperset(dtypes) or out.dtype.itemsize >= source.dtype.itemsize:
        return
    changed = source != out.to(source.dtype)
    if changed.any():
        value = int(source.expand_as(out)[changed.expand_as(out)].flatten()[0])
        raise RuntimeError(f"{func}: {value:,} does not fit into {out.dtype}; offsets of this size need torch.int64")


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _empty(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, (list, tuple)):
        return type(value)(_to_meta(one) for one in value)
    return value


Executor = Callable[[OpOverload, Any, dict[str, Any]], Any]


def execute(func: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return the operation's outputs, computed: the executor of a real run."""
    return func(*args, **kwargs)
