"""The weights of a Hugging Face directory: a safetensors file, or shards with an index.

Tensors are read and written one at a time, so memory holds no more than the largest tensor. The content of a directory
is known from the headers of its files. Pickles are never opened, because they can run any code that they name.
"""

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from looplm.failures import UserError
from looplm.files import fsync, is_file_name
from looplm.huggingface.names import Shape

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}


class StoredTensor(NamedTuple):
    """A tensor on the disk, as described by the header of its file."""

    path: Path
    shape: Shape
    dtype: torch.dtype


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a directory by name, from the headers.

    Raises:
        UserError: there are no safetensors, a file is missing or damaged, or a dtype is not supported.
    """
    if (folder / WHOLE).is_file():
        require_inside(folder / WHOLE)
        return _read_header(folder / WHOLE)
    if (folder / INDEX).is_file():
        return _find_in_shards(folder / INDEX)
    pickles = sorted(path for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise UserError(
            f"{pickles[0]}: a pickle can run any code when it is opened, so it is not; give {WHOLE} (most repositories "
            "have one), or convert the pickle with the safetensors package if you trust its origin"
        )
    raise UserError(f"{folder}: neither {WHOLE} nor {INDEX} is here; give the directory that holds the weights")


def is_inside(path: Path) -> bool:
    """Return False for a link that leads out of its directory, except to the ``blobs`` of Hugging Face's cache.

    A link that leads elsewhere could fetch any file of the machine.
    """
    root = path.parent.resolve()
    return any(folder in path.resolve().parents for folder in (root, root.parent.parent / "blobs"))


def require_inside(path: Path) -> None:
    """Raise a :class:`UserError` unless a file :func:`is_inside` its directory."""
    if not is_inside(path):
        raise UserError(f"{path}: a link to {path.resolve()}, outside its directory; put the file itself there")


def read_tensor(name: str, stored: StoredTensor) -> Tensor:
    """Return one tensor, memory-mapped from its file for as long as the tensor lives."""
    with safe_open(stored.path, framework="pt", device="cpu") as file:
        return file.get_tensor(name)


def check_shapes(found: Mapping[str, StoredTensor], expected: Mapping[str, Shape], where: Path) -> None:
    """Raise a :class:`UserError` unless the weights are exactly those that ``config.json`` describes."""
    missing = [name for name in expected if name not in found]
    if missing:
        raise UserError(f"{where}: {_some(missing)} missing, but described by config.json; get the files again")
    surplus = [name for name in found if name not in expected]
    if surplus:
        raise UserError(f"{where}: {_some(surplus)} here, but config.json describes no such tensor; check its keys")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise UserError(
                f"{found[name].path}: {name} has the shape {list(found[name].shape)}, "
                f"but config.json asks for {list(shape)}; one of the two belongs to another model"
            )


def common_dtype(found: Mapping[str, StoredTensor]) -> torch.dtype:
    """Return the dtype that holds every tensor without loss: our models have a single one."""
    return functools.reduce(torch.promote_types, (stored.dtype for stored in found.values()))


def write_tensors(
    folder: Path, shapes: Mapping[str, Shape], dtype: torch.dtype, limit: int, tensors: Iterable[Tensor]
) -> None:
    """Write ``tensors`` in the order of ``shapes``; each one is written before the next is requested.

    Args:
        folder: an empty directory.
        shapes: shapes by name.
        dtype: dtype of all tensors in the files.
        limit: largest size of a file in bytes; a larger tensor gets a file of its own.
        tensors: one for each of ``shapes``, preferably lazy, so that only one is in memory at a time.
    """
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}
    shards, stream = list(_shards(sizes, limit)), iter(tensors)
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [WHOLE]
    for file, names in zip(files, shards, strict=True):
        _write_file(folder / file, {name: shapes[name] for name in names}, dtype, stream)
    if len(shards) > 1:
        file_by_name = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_by_name}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _find_in_shards(index: Path) -> dict[str, StoredTensor]:
    try:
        file_by_name = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(file_by_name.values()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: not an index of safetensors ({error!r}); get it again") from error
    found: dict[str, StoredTensor] = {}
    for file in files:
        if not is_file_name(file) or not file.endswith(".safetensors"):
            raise UserError(f"{index}: names {file!r}, which is no safetensors file of this directory; get it again")
        if not (index.parent / file).is_file():
            raise UserError(f"{index.parent / file}: missing, although {index.name} names it; get this shard again")
        require_inside(index.parent / file)
        tensors = _read_header(index.parent / file)
        for name in tensors.keys() & found.keys():
            raise UserError(
                f"{index.parent / file}: has {name}, which {found[name].path.name} has too; "
                "get the shards of one revision"
            )
        found |= tensors
    for name in sorted(found.keys() | file_by_name.keys()):
        stated, actual = file_by_name.get(name, "no shard"), found[name].path.name if name in found else "no shard"
        if stated != actual:
            raise UserError(
                f"{index}: places {name} in {stated}, but it is in {actual}; get index and shards of one revision"
            )
    return found


def _read_header(path: Path) -> dict[str, StoredTensor]:
    found = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_slice(name)
                if tensor.get_dtype() not in DTYPES:
                    raise UserError(
                        f"{path}: {name} is stored as {tensor.get_dtype()}, but our models hold {', '.join(DTYPES)}; "
                        "give weights that are not quantized"
                    )
                found[name] = StoredTensor(path, tuple(tensor.get_shape()), DTYPES[tensor.get_dtype()])
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated, or not in safetensors format ({error}); get it again") from error
    return found


def _shards(sizes: Mapping[str, int], limit: int) -> Iterator[Sequence[str]]:
    """Yield the names of each file, filled up to the limit."""
    names: list[str] = []
    total = 0
    for name, size in sizes.items():
        if names and total + size > limit:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names


def _write_file(path: Path, shapes: Mapping[str, Shape], dtype: torch.dtype, tensors: Iterator[Tensor]) -> None:
    """Write one file: the length of the header in 8 bytes, the header in JSON, and the data without gaps.

    The safetensors library is no alternative. It needs all tensors of a file at once, up to a second copy of the model
    (older releases copy them once more). And it sorts tensors by dtype and name, so that an export would no longer
    equal an earlier one to the byte.
    """
    dtype_name = next(name for name, value in DTYPES.items() if value is dtype)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": dtype_name, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = next(tensors).detach().to(dtype)
            assert tuple(tensor.shape) == shape, f"{name}: {tuple(tensor.shape)} is not {shape}"
            file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    fsync(path)


def _some(names: Sequence[str]) -> str:
    """Return the first of the names with the number of others, and the verb."""
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"
