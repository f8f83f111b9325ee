"""Checkpoints: complete or absent, and verified before they are trusted."""

import dataclasses
import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
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
    train(config, check_corpus(config.data, config.model.vocab_size), single_process)
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the finished run, to be damaged."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.slow
def test_a_step_directory_needs_no_other_file(trained, single_process):
    step = trained / "checkpoints/step_00000006"
    assert (trained / "checkpoints/latest").read_text().strip() == step.name
    assert not list((trained / "checkpoints").glob(".*partial"))
    opened = checkpoint.open_model(str(step), single_process)
    assert opened.about.step == 6 and opened.about.gate_trained and opened.about.eos_id == 1
    assert opened.tokenizer.decode(opened.tokenizer.encode("def f():").ids) == "def f():"
    about = checkpoint.read_about(step)
    assert about.versions["torch"] in (torch.__version__, torch.__version__.partition("+")[0])
    assert about.samples == 24 and about.tokens == 24 * 32


def rewrite_about(step: Path, change: Callable[[dict], object]) -> None:
    """Change about.json and renew the manifest."""
    about = json.loads((step / "about.json").read_text())
    change(about)
    (step / "about.json").write_text(json.dumps(about))
    files = {str(path.relative_to(step)): step_folder.fingerprint(path) for path in step_folder.files_in(step)}
    (step / "manifest.json").write_text(json.dumps(files))


@pytest.mark.slow
def test_a_checkpoint_of_a_newer_megatron_is_refused(run, single_process):
    step = run / "checkpoints/step_00000006"
    (step / "state/common.pt").unlink(missing_ok=True)
    rewrite_about(step, lambda about: about["versions"].update({"megatron-core": "0.99.1"}))
    with pytest.raises(UserError, match=r"written by megatron-core 0\.99\.1, which .* cannot read"):
        checkpoint.open_model(str(step), single_process)


@pytest.mark.slow
def test_checkpoints_are_written_in_the_current_format(trained):
    step = trained / "checkpoints/step_00000006"
    assert json.loads((step / "about.json").read_text())["format_version"] == checkpoint.FORMAT_VERSION == 2


@pytest.mark.slow
def test_a_checkpoint_of_format_1_is_upgraded(run, single_process):
    """Releases before 0.2.0 wrote no format_version; the oldest of them wrote none of the optional keys either."""
    step = run / "checkpoints/step_00000006"
    expected = checkpoint.read_about(step)
    optional = ("bos_id", "pad_id", "dtype", "optimizer_step")
    rewrite_about(step, lambda about: about.pop("format_version"))
    assert checkpoint.open_model(str(step), single_process).about == expected
    rewrite_about(step, lambda about: [about.pop(key) for key in optional])
    opened = checkpoint.open_model(str(step), single_process)
    assert opened.about == dataclasses.replace(expected, bos_id=None, pad_id=None, dtype="", optimizer_step=None)


@pytest.mark.slow
@pytest.mark.parametrize("version", [3, "2.1"])
def test_a_checkpoint_of_a_newer_format_is_refused(version, run, single_process):
    step = run / "checkpoints/step_00000006"
    rewrite_about(step, lambda about: about.update(format_version=version, a_key_of_tomorrow=1))
    config = step / "config.yaml"
    config.write_text(config.read_text().replace("hidden_size:", "width:", 1))  # the format is checked first
    rewrite_about(step, lambda about: None)
    with pytest.raises(UserError) as raised:
        checkpoint.open_model(str(step), single_process)
    assert str(raised.value) == (
        f"{step / 'about.json'}: written in checkpoint format {version}, but this release reads formats up to 2; "
        "install the release of LoopLM that wrote it, or a newer one"
    )


@pytest.mark.slow
def test_only_the_newest_are_kept(corpus, tmp_path, single_process):
    config = run_config(corpus, tmp_path / "run", checkpoint={"save_every": 1, "keep": 2})
    train(config, check_corpus(config.data, config.model.vocab_size), single_process)
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


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(run, fault):
    damage, words = FAULTS[fault]
    damage(run / "checkpoints/step_00000006")
    said: list[str] = []
    assert step_folder.newest(run / "checkpoints", said.append) == run / "checkpoints/step_00000004"
    assert len(said) == 1 and "step_00000006" in said[0] and words in said[0]


@pytest.mark.slow
def test_naming_a_damaged_step_is_an_error(run):
    _flip_a_byte(run / "checkpoints/step_00000006")
    with pytest.raises(UserError, match="has changed since it was written"):
        step_folder.locate(str(run / "checkpoints/step_00000006"))


def test_a_folder_without_checkpoints(tmp_path):
    assert step_folder.newest(tmp_path, print) is None
    with pytest.raises(UserError, match="no whole checkpoint"):
        step_folder.locate(str(tmp_path))


class _Payload:
    def __reduce__(self) -> tuple:
        return os.system, ("touch /tmp/looplm_payload_ran",)


@pytest.mark.slow
def test_a_pickle_with_code_is_refused_even_if_the_manifest_matches(run):
    step = run / "checkpoints/step_00000006"
    metadata = step / "state/.metadata"
    metadata.write_bytes(pickle.dumps(_Payload()))
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["state/.metadata"] = step_folder.fingerprint(metadata)
    (step / "manifest.json").write_text(json.dumps(manifest))
    Path("/tmp/looplm_payload_ran").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"names posix\.system, which no checkpoint needs"):
        step_folder.locate(str(step))
    assert not Path("/tmp/looplm_payload_ran").exists()


def _save_and_die(corpus: Path, folder: Path) -> None:
    """Resume from the last checkpoint and be killed while the next one is being written."""
    os.setsid()  # Megatron's writer processes would outlive this one; the test kills its process group
    torch.set_num_threads(1)
    config = run_config(corpus, folder, optim={"train_steps": 7}, checkpoint={"save_every": 1})
    rename = os.rename

    def die(source: str | Path, target: str | Path) -> None:
        if "step_00000007" in str(target):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.rename = die  # type: ignore[assignment]
    train(config, check_corpus(config.data, config.model.vocab_size), process_groups.start(config.seed))


@pytest.mark.slow
def test_a_kill_while_saving_leaves_the_old_state(corpus, run):
    process = SERVER.Process(target=_save_and_die, args=(corpus, run))
    process.start()
    process.join(120)
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGKILL)
    assert process.exitcode == -signal.SIGKILL
    folder = run / "checkpoints"
    assert (folder / ".step_00000007.partial").exists(), "killed in the middle of saving"
    assert (folder / "latest").read_text().strip() == "step_00000006"
    assert step_folder.newest(folder, print) == folder / "step_00000006"


@pytest.mark.slow
def test_weights_survive_the_round_trip(trained, corpus, tmp_path, single_process):
    first = checkpoint.open_model(str(trained), single_process)
    config = run_config(corpus, tmp_path / "next", optim={"lr": 1e-30}, checkpoint={"initial": str(trained)})
    train(config, check_corpus(config.data, config.model.vocab_size), single_process)
    second = checkpoint.open_model(str(tmp_path / "next"), single_process)
    for (name, old), new in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(old, new), name


@pytest.mark.slow
def test_a_config_of_another_version_names_file_and_key(run):
    path = run / "checkpoints/step_00000006/config.yaml"
    path.write_text(path.read_text().replace("hidden_size:", "width:", 1))
    with pytest.raises(UserError, match=r"config\.yaml: model\.width: unknown key"):
        checkpoint.read_config(path.parent)
