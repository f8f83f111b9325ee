"""Checkpoints: whole or absent, checked before they are trusted."""

import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import pytest
import torch

from looplm import checkpoint
from looplm.checkpoint import step_folder
from looplm.cli import UserError
from looplm.megatron import process_groups
from pretrain.data import check_corpus
from pretrain.train import train
from tests.support.launch import SERVER
from tests.support.tiny import run_config


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory, single_process) -> Path:
    """A finished run with checkpoints at steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    config = run_config(corpus, folder, checkpoint={"save_every": 2, "keep": 3})
    train(config, check_corpus(config), single_process)
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of it to damage."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def test_a_step_directory_stands_alone(trained, single_process):
    step = trained / "checkpoints/step_00000006"
    assert (trained / "checkpoints/latest").read_text().strip() == step.name
    assert not list((trained / "checkpoints").glob(".*partial"))
    opened = checkpoint.open_model(str(step), single_process)
    assert opened.about.step == 6 and opened.about.gate_trained and opened.about.eos_id == 1
    assert opened.tokenizer.decode(opened.tokenizer.encode("def f():").ids) == "def f():"
    about = checkpoint.read_about(step)
    assert (
        about.versions["torch"] == torch.__version__.partition("+")[0] or about.versions["torch"] == torch.__version__
    )
    assert about.samples == 24 and about.tokens == 24 * 32


def test_one_that_only_a_newer_megatron_can_read_is_refused(run, single_process):
    step = run / "checkpoints/step_00000006"
    about = json.loads((step / "about.json").read_text())
    about["versions"]["megatron-core"] = "0.99.1"
    (step / "about.json").write_text(json.dumps(about))
    (step / "state/common.pt").unlink(missing_ok=True)
    files = {str(path.relative_to(step)): step_folder.fingerprint(path) for path in step_folder.files_in(step)}
    (step / "manifest.json").write_text(json.dumps(files))
    with pytest.raises(UserError, match=r"written by megatron-core 0\.99\.1, which .* cannot read"):
        checkpoint.open_model(str(step), single_process)


def test_only_the_newest_are_kept(corpus, tmp_path, single_process):
    config = run_config(corpus, tmp_path / "run", checkpoint={"save_every": 1, "keep": 2})
    train(config, check_corpus(config), single_process)
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step_*"))
    assert names == ["step_00000005", "step_00000006"]


def _truncate(step: Path) -> None:
    shard = next((step / "state").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-10])


def _flip_a_byte(step: Path) -> None:
    shard = next((step / "state").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


FAULTS = {
    "truncated shard": (_truncate, "bytes instead of"),
    "flipped byte": (_flip_a_byte, "has changed since"),
    "missing shard": (lambda step: next((step / "state").glob("*.distcp")).unlink(), "is missing"),
    "missing manifest": (lambda step: (step / "manifest.json").unlink(), "cannot be read"),
    "garbled manifest": (lambda step: (step / "manifest.json").write_text("{"), "cannot be read"),
    "empty metadata": (lambda step: (step / "state/.metadata").write_bytes(b""), "bytes instead of"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_checkpoint_falls_back_to_the_one_before_and_says_so(run, fault):
    damage, words = FAULTS[fault]
    damage(run / "checkpoints/step_00000006")
    said: list[str] = []
    assert step_folder.newest(run / "checkpoints", said.append) == run / "checkpoints/step_00000004"
    assert len(said) == 1 and "step_00000006" in said[0] and words in said[0]


def test_naming_a_broken_step_is_an_error(run):
    _flip_a_byte(run / "checkpoints/step_00000006")
    with pytest.raises(UserError, match="has changed since it was written"):
        step_folder.locate(str(run / "checkpoints/step_00000006"))


def test_no_checkpoint_at_all(tmp_path):
    assert step_folder.newest(tmp_path, print) is None
    with pytest.raises(UserError, match="no whole checkpoint"):
        step_folder.locate(str(tmp_path))


class _Payload:
    def __reduce__(self) -> tuple:
        return os.system, ("touch /tmp/looplm_payload_ran",)


def test_a_pickle_that_runs_code_is_refused_even_with_a_matching_manifest(run):
    step = run / "checkpoints/step_00000006"
    metadata = step / "state/.metadata"
    metadata.write_bytes(pickle.dumps(_Payload()))
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["state/.metadata"] = step_folder.fingerprint(metadata)
    (step / "manifest.json").write_text(json.dumps(manifest))
    Path("/tmp/looplm_payload_ran").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"names posix\.system, which a checkpoint has no need of"):
        step_folder.locate(str(step))
    assert not Path("/tmp/looplm_payload_ran").exists()


def _save_and_die(corpus: Path, folder: Path) -> None:
    """Train on from the last checkpoint and be killed while the next one is being written."""
    os.setsid()  # what Megatron starts to write a checkpoint would outlive this process: it is found by its group
    torch.set_num_threads(1)
    config = run_config(corpus, folder, optim={"train_steps": 7}, checkpoint={"save_every": 1})
    rename = os.rename

    def die(source: str | Path, target: str | Path) -> None:
        if "step_00000007" in str(target):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.rename = die  # type: ignore[assignment]
    train(config, check_corpus(config), process_groups.start(config.seed))


def test_kill_during_save_leaves_the_old_state(corpus, run):
    process = SERVER.Process(target=_save_and_die, args=(corpus, run))
    process.start()
    process.join(120)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.exitcode == -signal.SIGKILL
    folder = run / "checkpoints"
    assert (folder / ".step_00000007.partial").exists(), "killed in the middle of saving"
    assert (folder / "latest").read_text().strip() == "step_00000006"
    assert step_folder.newest(folder, print) == folder / "step_00000006"


def test_weights_survive_the_round_trip(trained, corpus, tmp_path, single_process):
    first = checkpoint.open_model(str(trained), single_process)
    config = run_config(corpus, tmp_path / "next", optim={"lr": 1e-30}, checkpoint={"initial": str(trained)})
    train(config, check_corpus(config), single_process)
    second = checkpoint.open_model(str(tmp_path / "next"), single_process)
    for (name, old), new in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(old, new), name


def test_a_config_of_another_version_names_file_and_key(run):
    path = run / "checkpoints/step_00000006/config.yaml"
    path.write_text(path.read_text().replace("hidden_size:", "width:", 1))
    with pytest.raises(UserError, match=r"config\.yaml: model\.width: unknown key"):
        checkpoint.read_config(path.parent)
