"""Damaged and hostile step directories: none is taken for a whole one, and nothing in one runs."""

import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from looplm import checkpoint
from looplm.checkpoint import step_folder
from looplm.checkpoint.verify import fingerprint
from looplm.failures import UserError
from pretrain.data import check_corpus
from pretrain.train import train
from tests.support.tiny import run_config

pytestmark = pytest.mark.slow
NEWEST, BEFORE = "step_00000006", "step_00000004"


class Payload:
    """An object whose unpickling makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def shard(step: Path, index: int = 0) -> Path:
    return sorted((step / "state").glob("*.distcp"))[index]


def flip(path: Path, offset: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if offset is None else offset] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def edit_manifest(step: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((step / "manifest.json").read_text())
    change(manifest)
    (step / "manifest.json").write_text(json.dumps(manifest))


def plant(step: Path, name: str, content: bytes) -> None:
    """Replace a file and its line in the manifest, as someone does who wants it to be read."""
    (step / name).write_bytes(content)
    edit_manifest(step, lambda manifest: manifest.update({name: fingerprint(step / name)}))


def link(path: Path) -> None:
    """Replace a file or folder by a link to a copy elsewhere."""
    elsewhere = path.parent.parent.parent.parent / f"elsewhere_{path.name}"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


def mix_shards(step: Path) -> None:
    """Put the shard of another step in the place of this one's, padded or cut to the same size."""
    ours, theirs = shard(step), shard(step.parent / BEFORE)
    size = ours.stat().st_size
    ours.write_bytes(theirs.read_bytes()[:size].ljust(size, b"\0"))


def edit_metadata(step: Path, change: Callable[[Any], object]) -> None:
    metadata = pickle.loads((step / "state/.metadata").read_bytes())
    change(metadata)
    plant(step, "state/.metadata", pickle.dumps(metadata))


def move_storage(metadata: Any, where: str) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = where


def in_torch_file(payload: Payload) -> bytes:
    stream = io.BytesIO()
    torch.save({"rng": payload}, stream)
    return stream.getvalue()


def replace_shard(step: Path, make: Callable[[Path], object]) -> None:
    shard(step).unlink()
    make(step / "state/__0_0.distcp")


def link_companion(step: Path, target: str) -> None:
    (step / "companions").mkdir()
    (step / "companions/x").symlink_to(target)


HASH = "0" * 32
MARK = Path("payload_ran")  # replaced by a path in the test's folder
# Each damages the step directory that it is given; its words stand in the report.
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated shard": (lambda step: truncate(shard(step)), "bytes instead of"),
    "flipped byte in a shard": (lambda step: flip(shard(step)), "has changed since it was written"),
    "flipped byte in the last shard, the optimizer's": (
        lambda step: flip(shard(step, -1), -3000),
        "has changed since it was written",
    ),
    "missing shard": (lambda step: shard(step).unlink(), "is missing"),
    "shard of another step": (mix_shards, "has changed since it was written"),
    "shard is a folder": (lambda step: replace_shard(step, Path.mkdir), "is not a file"),
    "shard is a pipe": (lambda step: replace_shard(step, os.mkfifo), "is not a file"),
    "flipped byte in the manifest": (
        lambda step: flip(step / "manifest.json", -20),
        "has changed since it was written",
    ),
    "missing manifest": (lambda step: (step / "manifest.json").unlink(), "cannot be read"),
    "empty manifest": (lambda step: (step / "manifest.json").write_text(""), "cannot be read"),
    "half a manifest": (lambda step: truncate(step / "manifest.json"), "cannot be read"),
    "deep manifest": (lambda step: (step / "manifest.json").write_text("[" * 100_000), "cannot be read"),
    "manifest is a list": (lambda step: (step / "manifest.json").write_text("[1]"), "lists no files"),
    "manifest without sizes": (
        lambda step: edit_manifest(step, lambda manifest: manifest.update({"about.json": "x"})),
        "no size and hash of 'about.json'",
    ),
    "manifest with a hash of another kind": (
        lambda step: edit_manifest(step, lambda manifest: manifest.update({"about.json": [1, "0" * 40]})),
        "no size and hash of 'about.json'",
    ),
    "manifest with a huge size": (
        lambda step: edit_manifest(step, lambda manifest: manifest.update({"about.json": [10**30, HASH]})),
        "bytes instead of",
    ),
    "manifest with '..'": (
        lambda step: edit_manifest(step, lambda manifest: manifest.update({"../../x": [1, HASH]})),
        "names '../../x', which is not inside this folder",
    ),
    "manifest with an absolute name": (
        lambda step: edit_manifest(step, lambda manifest: manifest.update({"/etc/passwd": [1, HASH]})),
        "names '/etc/passwd', which is not inside this folder",
    ),
    "manifest with a name that no disk can hold": (
        lambda step: edit_manifest(step, lambda manifest: manifest.update({"state/" + "x" * 256: [1, HASH]})),
        "which is not inside this folder",
    ),
    "manifest with half a character": (
        lambda step: edit_manifest(step, lambda manifest: manifest.update({"\ud800": [1, HASH]})),
        "names '\\ud800', which is not inside this folder",
    ),
    "manifest without about.json": (
        lambda step: edit_manifest(step, lambda manifest: manifest.pop("about.json")),
        "about.json is not in manifest.json",
    ),
    "shard that is not in the manifest": (
        lambda step: (step / "state/__9_0.distcp").write_bytes(b"x"),
        "state/__9_0.distcp is not in manifest.json",
    ),
    "link beside the companions": (
        lambda step: link_companion(step, "/etc/passwd"),
        "companions/x is not in manifest.json",
    ),
    "shard is a link": (lambda step: link(shard(step)), "is a link"),
    "state is a link": (lambda step: link(step / "state"), "state is a link"),
    "step is a link": (link, "a link to another folder"),
    "missing .metadata": (lambda step: (step / "state/.metadata").unlink(), "is missing"),
    "truncated .metadata": (lambda step: truncate(step / "state/.metadata"), "bytes instead of"),
    "half a .metadata, planted": (
        lambda step: plant(step, "state/.metadata", (step / "state/.metadata").read_bytes()[:500]),
        "state/.metadata cannot be read",
    ),
    "pickle in .metadata": (
        lambda step: plant(step, "state/.metadata", pickle.dumps(Payload(step.parent / MARK))),
        "names posix.system, which no checkpoint needs",
    ),
    "torch's own modules in .metadata": (
        lambda step: plant(step, "state/.metadata", b"ctorch.distributed.checkpoint.filesystem\nos\n."),
        "names torch.distributed.checkpoint.filesystem.os, which no checkpoint needs",
    ),
    "memory bomb in .metadata": (
        lambda step: plant(step, "state/.metadata", b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f"),
        "state/.metadata cannot be read",
    ),
    ".metadata that points outside": (
        lambda step: edit_metadata(step, lambda metadata: move_storage(metadata, "../../../x")),
        "points to '../../../x', which is not in manifest.json",
    ),
    "missing common.pt": (lambda step: (step / "state/common.pt").unlink(), "is missing"),
    "truncated common.pt": (lambda step: truncate(step / "state/common.pt"), "bytes instead of"),
    "pickle in common.pt": (
        lambda step: plant(step, "state/common.pt", in_torch_file(Payload(step.parent / MARK))),
        "state/common.pt is not plain data and is not opened",
    ),
    "missing metadata.json": (lambda step: (step / "state/metadata.json").unlink(), "is missing"),
    "other backend in metadata.json": (
        lambda step: plant(step, "state/metadata.json", b'{"sharded_backend": "zarr"}'),
        "asks for sharded_backend='zarr', not 'torch_dist'",
    ),
    "missing config.yaml": (lambda step: (step / "config.yaml").unlink(), "is missing"),
    "flipped byte in about.json": (lambda step: flip(step / "about.json"), "has changed since it was written"),
}
HAS_COMMON = not checkpoint.versions()["megatron-core"].startswith(("0.17", "0.18", "0.19"))
if not HAS_COMMON:
    DAMAGES = {name: damage for name, damage in DAMAGES.items() if "common.pt" not in name}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.promise(
    text="A damaged or hostile checkpoint is not opened; a run falls back to the one before and says so",
    expected="the fault by name; naming it is refused; no code runs",
)
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(run, name, record_property, capsys):
    damage, words = DAMAGES[name]
    folder = run / "checkpoints"
    damage(folder / NEWEST)
    said: list[str] = []
    assert step_folder.newest(folder, said.append) == folder / BEFORE
    assert len(said) == 1 and said[0].startswith(f"{folder / NEWEST}: ") and words in said[0]
    assert said[0].endswith("; falling back to the checkpoint before it") and "\n" not in said[0]
    assert not (folder / MARK).exists(), "code of the checkpoint ran"
    assert step_folder.locate(str(run)) == folder / BEFORE
    assert capsys.readouterr().err == f"note: {said[0]}\n", "who names a run learns that its newest step is not used"
    if name != "step is a link":  # a link that the user names is the user's
        with pytest.raises(UserError) as raised:
            step_folder.locate(str(folder / NEWEST))
        assert "missing manifest" in name or words in str(raised.value)
    sizes_hidden = re.sub(r"\d+ bytes", "N bytes", said[0]).replace(f"{folder}/", "")
    record_property("seen", f"{name}: {sizes_hidden}")


LATEST = {
    "missing": None,
    "empty": "",
    "garbage": "\0\x7f\n\n",
    "dangling": "step_00000099\n",
    "an absolute path": "/etc\n",
    "above the folder": "../../..\n",
}


@pytest.mark.parametrize("name", LATEST)
@pytest.mark.promise(
    text="What the file `latest` says does not matter: it is for people", expected="the newest whole checkpoint"
)
def test_latest_is_not_trusted(run, name, record_property):
    folder, content = run / "checkpoints", LATEST[name]
    (folder / "latest").unlink()
    if content is not None:
        (folder / "latest").write_text(content)
    assert step_folder.newest(folder, pytest.fail) == folder / NEWEST
    assert step_folder.locate(str(run)) == folder / NEWEST
    record_property("seen", f"{name}: step 6")


def test_odd_names_are_no_steps(run):
    folder = run / "checkpoints"
    for name in ("step_", "step_x", "step_-1", "step_²", "step_99999999999999999999"):
        (folder / name).mkdir()
    (folder / "step_00000009").write_text("a file")
    assert [step.name for step in step_folder.steps_in(folder)] == [NEWEST, BEFORE, "step_00000002"]


def resume(corpus: Path, run: Path, groups: Any, **sections: Any) -> None:
    """Train two more steps, as the command does."""
    config = run_config(corpus, run, **{"optim": {"train_steps": 8}, **sections})
    train(config, check_corpus(config.data, config.model.vocab_size), groups)


CONTENTS = {  # of files whose hash the manifest confirms
    "about.json is a list": ("about.json", b"[]", "holds a list, not a JSON object"),
    "about.json is cut": ("about.json", b'{"step": ', "cannot be read"),
    "about.json of another step": ("about.json", None, "its about.json is that of step 4"),
    "config.yaml builds an object": ("config.yaml", b"model: !!python/object/apply:os.system [id]", "config.yaml"),
    "config.yaml is a list": ("config.yaml", b"[1, 2]", "config.yaml"),
    "config.yaml is binary": ("config.yaml", b"\xff\xfe\x00", "config.yaml"),
    "a shard without its tensors": ("state/__0_0.distcp", b"x", "its state cannot be loaded"),
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.promise(
    text="A checkpoint whose files were exchanged together with their hashes ends a run in one line",
    expected="status 2, one line that names the file or folder",
)
def test_exchanged_files_end_in_one_line(run, corpus, single_process, name, record_property):
    file, content, words = CONTENTS[name]
    step = run / "checkpoints" / NEWEST
    plant(step, file, content if content is not None else (step.parent / BEFORE / file).read_bytes())
    with pytest.raises(UserError) as raised:
        resume(corpus, run, single_process)
    message = str(raised.value)
    assert words in message and NEWEST in message and "\n" not in message
    record_property("seen", f"{name}: {message.replace(str(run), 'run')}")


def test_an_object_in_a_shard_runs_no_code(run, tmp_path, single_process):
    """Megatron-core since 0.17 stores objects in shards, and torch's planner would load them without a check."""
    step, mark = run / "checkpoints" / NEWEST, tmp_path / MARK
    planner = torch.distributed.checkpoint.DefaultLoadPlanner(flatten_state_dict=False)
    planner.state_dict = {}
    item = torch.distributed.checkpoint.planner.ReadItem(
        type=torch.distributed.checkpoint.planner.LoadItemType.BYTE_IO,
        dest_index=MetadataIndex("common_state"),
        dest_offsets=torch.Size([0]),
        storage_index=MetadataIndex("common_state"),
        storage_offsets=torch.Size([0]),
        lengths=torch.Size([0]),
    )
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        planner.load_bytes(item, io.BytesIO(in_torch_file(Payload(mark))))
    assert not mark.exists() and step.exists()
    planner.load_bytes(item, io.BytesIO(in_torch_file(torch.ones(2))))  # type: ignore[arg-type]
    assert planner.state_dict["common_state"]["rng"].sum() == 2


KEYS: dict[str, tuple[dict[str, Any], str]] = {  # what a resumed run changes, and the key that its one line must name
    "fp32 to bf16": ({"optim": {"train_steps": 8, "precision": "bf16"}}, "optim.precision=fp32, this run has bf16"),
    "other width": ({"model": {"ffn_hidden_size": 64}}, "model.ffn_hidden_size=48, this run has 64"),
    "tied head": ({"model": {"tie_embeddings": True}}, "model.tie_embeddings=False, this run has True"),
    "other gate": ({"gate": {"kind": "linear"}}, "gate.kind="),
    "gate state": ({"gate": {"state_size": 4}}, "gate.state_size=8, this run has 4"),
    "other attention": ({"model": {"attention": "mha"}}, "model.attention=mla, this run has mha"),
    "step embedding": ({"model": {"step_embedding": "learned"}}, "model.step_embedding=none, this run has learned"),
}


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.promise(
    text="A run that resumes with a key whose change does not fit the stored state says which key",
    expected="status 2, one line that names the key and both values",
)
def test_a_key_that_does_not_fit_is_named(run, corpus, single_process, name, record_property):
    sections, words = KEYS[name]
    with pytest.raises(UserError) as raised:
        resume(corpus, run, single_process, **sections)
    assert words in str(raised.value) and "\n" not in str(raised.value)
    record_property("seen", f"{name}: {str(raised.value).replace(str(run), 'run')}")


def test_bf16_to_fp32_is_refused_too(run, corpus, single_process):
    step = run / "checkpoints" / NEWEST
    about = json.loads((step / "about.json").read_text())
    plant(step, "about.json", json.dumps({**about, "dtype": "bfloat16"}).encode())
    with pytest.raises(UserError, match=r"trained with optim\.precision=bf16, this run has fp32; set optim\.precision"):
        resume(corpus, run, single_process)


def test_keys_that_may_change(run, corpus, single_process):
    """The learning-rate schedule, the number of loops and the batch are no part of the stored state."""
    optim = {"train_steps": 8, "lr": 1e-3, "min_lr": 1e-4, "schedule": "cosine", "decay_steps": 0, "weight_decay": 0.2}
    resume(corpus, run, single_process, optim=optim, model={"num_loops": 2})
    assert step_folder.newest(run / "checkpoints", pytest.fail) == run / "checkpoints/step_00000008"
