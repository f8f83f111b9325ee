"""The weights of a Hugging Face directory: safetensors in one file, or in shards with an index.

Tensors are read and written one by one, so a model of any size passes through the memory of its largest tensor. What a
directory holds is known from the files' headers alone. A pickle is never opened: it can run any code that it names.
"""

import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from looplm.cli import UserError
from looplm.files import fsync
from looplm.huggingface.names import Shape

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}


class StoredTensor(NamedTuple):
    """A tensor on the disk, as its file's header tells."""

    path: Path
    shape: Shape
    dtype: torch.dtype


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the directory by name, from the headers.

    Raises:
        UserError: there are no safetensors here, a file is missing or damaged, or its numbers are of a type that we
            cannot hold.
    """
    if (folder / WHOLE).is_file():
        return dict(_header(folder / WHOLE))
    if (folder / INDEX).is_file():
        return _find_in_shards(folder / INDEX)
    pickles = sorted(path for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise UserError(
            f"{pickles[0]}: a pickle can run any code when it is opened, so it is not; give {WHOLE} (most repositories "
            "have one), or convert the pickle with the safetensors package where its origin is trusted"
        )
    raise UserError(f"{folder}: neither {WHOLE} nor {INDEX} is here; give the directory that holds the weights")


def read_tensor(name: str, stored: StoredTensor) -> Tensor:
    """One tensor, mapped from its file; the mapping ends with the tensor."""
    with safe_open(stored.path, framework="pt", device="cpu") as file:
        return file.get_tensor(name)


def check_shapes(found: Mapping[str, StoredTensor], expected: Mapping[str, Shape], where: Path) -> None:
    """Refuse weights that are not exactly what ``config.json`` says."""
    missing = [name for name in expected if name not in found]
    if missing:
        raise UserError(f"{where}: {_some(missing)} missing, which config.json asks for; get the files again")
    surplus = [name for name in found if name not in expected]
    if surplus:
        raise UserError(f"{where}: {_some(surplus)} here, for which config.json has no place; check its keys")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise UserError(
                f"{found[name].path}: {name} has the shape {list(found[name].shape)}, "
                f"but config.json asks for {list(shape)}; one of the two belongs to another model"
            )


def common_dtype(found: Mapping[str, StoredTensor]) -> torch.dtype:
    """The type that holds every tensor without loss: a model of ours has one for all."""
    return functools.reduce(torch.promote_types, (stored.dtype for stored in found.values()))


def write_tensors(
    folder: Path, shapes: Mapping[str, Shape], dtype: torch.dtype, limit: int, tensors: Iterable[Tensor]
) -> None:
    """Write ``tensors``, one for each of ``shapes`` and in their order, each before the next one is asked for.

    Args:
        folder: an empty one.
        shapes: by name.
        dtype: of all of them on the disk.
        limit: bytes of a file; a larger tensor has one to itself.
        tensors: lazily, so that one is in memory at a time.
    """
    shards, stream = list(_shards(shapes, dtype, limit)), iter(tensors)
    files = [WHOLE] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]  # fmt: skip
    for file, names in zip(files, shards, strict=True):
        _write_file(folder / file, {name: shapes[name] for name in names}, dtype, stream)
    if len(shards) > 1:
        total = sum(map(_count, shapes.values())) * dtype.itemsize
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n")  # fmt: skip


def _find_in_shards(index: Path) -> dict[str, StoredTensor]:
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(where.values()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{index}: not an index of safetensors ({error!r}); get it again") from error
    found: dict[str, StoredTensor] = {}
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{index}: names {file!r}, which is no safetensors file of this directory; get it again")
        if not (index.parent / file).is_file():
            raise UserError(f"{index.parent / file}: missing, although {index.name} names it; get this shard again")
        found |= _header(index.parent / file)
    misplaced = [name for name in found.keys() | where.keys() if name not in found or found[name].path.name != where.get(name)]  # fmt: skip
    if misplaced:
        name = min(misplaced)
        raise UserError(
            f"{index}: says {where.get(name, 'nothing')} of {name}, the shards say "
            f"{found[name].path.name if name in found else 'nothing'}; get the index and the shards of one revision"
        )
    return found


def _header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            kinds = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated, or not in safetensors format ({error}); get it again") from error
    for name, (shape, kind) in kinds.items():
        if kind not in DTYPES:
            raise UserError(
                f"{path}: {name} is stored as {kind}, a model here holds {', '.join(DTYPES)}; give weights that are not quantised"
            )
        yield name, StoredTensor(path, shape, DTYPES[kind])


def _shards(shapes: Mapping[str, Shape], dtype: torch.dtype, limit: int) -> Iterator[Sequence[str]]:
    """Names, file by file, each filled up to the limit."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        more = _count(shape) * dtype.itemsize
        if names and size + more > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names


def _write_file(path: Path, shapes: Mapping[str, Shape], dtype: torch.dtype, tensors: Iterator[Tensor]) -> None:
    """The format: the header's length in 8 bytes, the header in JSON, and the numbers one after the other."""
    kind = next(name for name, value in DTYPES.items() if value is dtype)
    ends = list(itertools.accumulate(_count(shape) * dtype.itemsize for shape in shapes.values()))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for (name, shape), begin, end in zip(shapes.items(), [0, *ends], ends, strict=False):
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = next(tensors).detach().to(dtype)
            assert tuple(tensor.shape) == shape, f"{name}: {tuple(tensor.shape)} is not {shape}"
            file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    fsync(path)


def _count(shape: Shape) -> int:
    return torch.Size(shape).numel()


def _some(names: Sequence[str]) -> str:
    """The first of the names, and how many more."""
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"
