"""Safetensors, tensor by tensor: the safetensors package reads our files, and every kind of damage is reported."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from looplm.failures import UserError
from looplm.huggingface.weight_files import check_shapes, common_dtype, find_tensors, read_tensor, write_tensors

SHAPES = {"a.weight": (4, 6), "b.weight": (3,), "c.weight": (2, 50), "d.bias": (1,)}


def values(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("limit", "files"), [(10**6, 1), (60, 3)])
def test_written_tensors_are_read_back_to_the_bit(dtype, limit, files, tmp_path):
    tensors, asked = values(dtype), []

    def one_by_one():
        for name, tensor in tensors.items():
            asked.append(name)
            yield tensor

    write_tensors(tmp_path, SHAPES, dtype, limit if files == 1 else limit * dtype.itemsize, one_by_one())
    assert asked == list(SHAPES)
    paths = sorted(tmp_path.glob("*.safetensors"))
    assert len(paths) == files
    theirs = {name: value for path in paths for name, value in load_file(path).items()}
    found = find_tensors(tmp_path)
    check_shapes(found, SHAPES, tmp_path)
    assert theirs.keys() == found.keys() == tensors.keys() and common_dtype(found) is dtype
    for name, tensor in tensors.items():
        assert torch.equal(theirs[name], tensor) and theirs[name].dtype is dtype
        assert torch.equal(read_tensor(name, found[name]), tensor)
    if files > 1:
        assert [path.name for path in paths] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        assert {name: found[name].path.name for name in found} == index["weight_map"]


def test_a_tensor_is_written_before_the_next_is_requested(tmp_path):
    sizes = []

    def watch():
        for tensor in values(torch.float32).values():
            sizes.append(sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")))
            yield tensor

    write_tensors(tmp_path, SHAPES, torch.float32, 1, watch())
    assert sizes == sorted(set(sizes)), "files do not grow while tensors are requested"


def test_two_dtypes_become_the_one_that_holds_both(tmp_path):
    tensors = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(2, dtype=torch.float16)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert common_dtype(find_tensors(tmp_path)) is torch.float32


def sharded(folder):
    write_tensors(folder, SHAPES, torch.float32, 60, iter(values(torch.float32).values()))


def rewrite_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def shard(number):
    return f"model-{number:05d}-of-00004.safetensors"


def cut(folder):
    path = folder / shard(2)
    path.write_bytes(path.read_bytes()[:-1])


def move_in_index(folder):
    def change(weight_map):
        del weight_map["a.weight"]
        weight_map["b.weight"] = shard(1)

    rewrite_index(folder, change)


def link_out(folder):
    path = folder / shard(2)
    path.rename(folder.parent / "elsewhere.safetensors")
    path.symlink_to(folder.parent / "elsewhere.safetensors")


def copy_tensors(folder):
    save_file({**load_file(folder / shard(1)), **load_file(folder / shard(2))}, folder / shard(2))


def add_to_index(file):
    return lambda folder: rewrite_index(folder, lambda weight_map: weight_map.update(e=file))


DAMAGE = {
    "cut": (cut, f"{shard(2)}: truncated, or not in safetensors format"),
    "missing": (lambda f: (f / shard(3)).unlink(), f"{shard(3)}: missing, although"),
    "garbage": (lambda f: (f / shard(1)).write_bytes(b"x" * 99), "truncated, or not in safetensors"),
    "too long a name": (add_to_index("x" * 256 + ".safetensors"), "which is no safetensors file of this directory"),
    "half a character": (add_to_index("\ud800.safetensors"), "names '\\ud800.safetensors', which is no safetensors"),
    "absent file named": (add_to_index("model-9.safetensors"), "model-9.safetensors: missing, although"),
    "path in index": (add_to_index("../x.safetensors"), "names '../x.safetensors', which is no"),
    "pickle in index": (add_to_index("pytorch_model.bin"), "names 'pytorch_model.bin', which is no"),
    "absolute path in index": (add_to_index("/x/a.safetensors"), "names '/x/a.safetensors', which is no"),
    "no name in index": (add_to_index(7), "not an index of safetensors"),
    "link to another folder": (link_out, f"{shard(2)}: a link to "),
    "tensor in two shards": (copy_tensors, f"{shard(2)}: has a.weight, which {shard(1)} has too"),
    "endless index": (lambda f: (f / "model.safetensors.index.json").write_text("[" * 10**5), "not an index of saf"),
    "tensor in no shard": (add_to_index(shard(1)), f"places e in {shard(1)}, but it is in no shard"),
    "tensor not in the index": (move_in_index, f"places a.weight in no shard, but it is in {shard(1)}"),
    "no index": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "not an index of safetensors"),
    "nothing": (lambda f: [p.unlink() for p in f.iterdir()], "neither model.safetensors nor"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_reported(damage, tmp_path):
    sharded(tmp_path)
    find_tensors(tmp_path)
    harm, words = DAMAGE[damage]
    harm(tmp_path)
    with pytest.raises(UserError) as raised:
        find_tensors(tmp_path)
    assert words in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.float64, "F64"), (torch.bool, "BOOL")],
)
def test_other_types_of_weights_are_refused(dtype, name, tmp_path):
    save_file({"a": torch.ones(2).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"a is stored as {name}.*give weights that are not quantized"):
        find_tensors(tmp_path)


def test_the_links_of_hugging_faces_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    save_file({"a": torch.ones(2)}, blobs / "4567")
    (snapshot / "model.safetensors").symlink_to("../../blobs/4567")
    assert find_tensors(snapshot)["a"].shape == (2,)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    save_file({"a": torch.ones(2)}, tmp_path / "elsewhere")
    with pytest.raises(UserError, match="outside its directory"):
        find_tensors(snapshot)


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, 200), bytes_=st.binary(min_size=1, max_size=9), cut=st.integers(0, 400))
def test_any_damage_of_a_file_is_harmless_or_reported(place, bytes_, cut):
    """Changed bytes that leave a valid header may also describe other tensors, which check_shapes then refuses."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(values(torch.float32), path)
        content = path.read_bytes()
        path.write_bytes(
            (content[:place] + bytes_ + content[place + len(bytes_) :])[: len(content) - max(0, cut - 200)]
        )
        try:
            check_shapes(find_tensors(Path(folder)), SHAPES, Path(folder))
        except UserError as error:
            assert str(path.parent) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_a_pickle_is_refused_unopened(name, tmp_path):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UserError, match=f"{name}: a pickle can run any code.*give model.safetensors"):
        find_tensors(tmp_path)


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        (SHAPES | {"e": (1,), "f": (1,)}, "e and 1 more are missing"),
        (
            {name: shape for name, shape in SHAPES.items() if name != "b.weight"},
            "b.weight is here, but config.json describes no such tensor",
        ),
        (SHAPES | {"a.weight": (6, 4)}, r"a.weight has the shape \[4, 6\], but config.json asks for \[6, 4\]"),
    ],
)
def test_tensors_that_the_config_does_not_describe(expected, words, tmp_path):
    sharded(tmp_path)
    with pytest.raises(UserError, match=words):
        check_shapes(find_tensors(tmp_path), expected, tmp_path)
