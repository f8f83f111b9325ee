"""Checkpoints: complete or absent, and verified before they are trusted."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from looplm import checkpoint
from looplm.checkpoint import step_folder
from looplm.checkpoint.verify import fingerprint
from looplm.failures import UserError
from pretrain.data import check_corpus
from pretrain.run import build
from pretrain.train import train
from tests.support.tiny import run_config

MOMENTS = ["optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."]
GATE_PARAMETERS = [f"gate.cell.{kind}_{side}" for kind in ("bias", "weight") for side in ("hh", "ih")]
GATE_PARAMETERS += ["gate.input_proj.weight", "gate.readout.bias", "gate.readout.weight"]


@pytest.mark.slow
def test_a_step_directory_needs_no_other_file(trained, single_process):
    step = trained / "checkpoints/step_00000006"
    assert (trained / "checkpoints/latest").read_text().strip() == step.name
    assert not list((trained / "checkpoints").glob(".*partial"))
    opened = checkpoint.open_model(str(step), single_process)
    assert opened.about.step == 6 and opened.about.gate_trained and opened.about.eos_ids == (1,)
    assert opened.tokenizer.decode(opened.tokenizer.encode("def f():").ids) == "def f():"
    about = checkpoint.read_about(step)
    assert about.versions["torch"] in (torch.__version__, torch.__version__.partition("+")[0])
    assert about.samples == 24 and about.tokens == 24 * 32


def rewrite_about(step: Path, change: Callable[[dict], object]) -> None:
    """Change about.json and renew the manifest."""
    about = json.loads((step / "about.json").read_text())
    change(about)
    (step / "about.json").write_text(json.dumps(about))
    files = {str(path.relative_to(step)): fingerprint(path) for path in step_folder.files_in(step)}
    (step / "manifest.json").write_text(json.dumps(files))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sections", "parts", "names"),
    [
        ({"model": {"step_embedding": "learned"}}, [*MOMENTS, ""], ["step_embedding.weight"]),
        ({"loss": {"weights": "last"}}, MOMENTS, GATE_PARAMETERS),
    ],
)
def test_a_state_of_other_parameters_is_refused(sections, parts, names, trained, corpus, tmp_path, single_process):
    step = trained / "checkpoints/step_00000006"
    state = build(run_config(corpus, tmp_path, **sections), single_process)[0].state
    with pytest.raises(UserError) as raised:
        checkpoint.load_run(step, state)
    assert str(raised.value) == (
        f"{step}: not a checkpoint of this run: only one of the two has "
        f"{', '.join(part + name for part in parts for name in names)}; resume with the configuration that wrote it"
    )


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
    assert json.loads((step / "about.json").read_text())["format_version"] == checkpoint.FORMAT_VERSION == 3


@pytest.mark.slow
def test_a_checkpoint_of_format_1_is_upgraded(run, single_process):
    """Releases before 0.2.0 wrote no format_version; the oldest of them wrote none of the optional keys either."""
    step = run / "checkpoints/step_00000006"
    expected = checkpoint.read_about(step)
    optional = ("bos_id", "pad_id", "dtype", "optimizer_step")

    def downgrade(about):
        about["eos_id"] = about.pop("eos_ids")[0]
        del about["begin_id"], about["format_version"]

    rewrite_about(step, downgrade)
    assert checkpoint.open_model(str(step), single_process).about == expected
    rewrite_about(step, lambda about: [about.pop(key) for key in optional])
    opened = checkpoint.open_model(str(step), single_process)
    assert opened.about == dataclasses.replace(expected, bos_id=None, pad_id=None, dtype="", optimizer_step=None)


@pytest.mark.slow
@pytest.mark.parametrize("version", [4, "3.1"])
def test_a_checkpoint_of_a_newer_format_is_refused(version, run, single_process):
    step = run / "checkpoints/step_00000006"
    rewrite_about(step, lambda about: about.update(format_version=version, a_key_of_tomorrow=1))
    config = step / "config.yaml"
    config.write_text(config.read_text().replace("hidden_size:", "width:", 1))  # the format is checked first
    rewrite_about(step, lambda about: None)
    with pytest.raises(UserError) as raised:
        checkpoint.open_model(str(step), single_process)
    assert str(raised.value) == (
        f"{step / 'about.json'}: written in checkpoint format {version}, but this release reads formats up to 3; "
        "install the release of LoopLM that wrote it, or a newer one"
    )


def test_a_folder_without_checkpoints(tmp_path):
    assert step_folder.newest(tmp_path, print) is None
    with pytest.raises(UserError, match="no whole checkpoint"):
        step_folder.locate(str(tmp_path))


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokenizer_sha256": "0" * 64}, "about.json: tokenizer_sha256: '0+' is not allowed; it is not this"),
        ({"eos_ids": []}, r"about.json: eos_ids: \[\] is not allowed; it is not this"),
        ({"eos_ids": [1, 320]}, "about.json: token: 320 is not allowed; the model has 320; it is not this"),
        ({"bos_id": 888888}, "about.json: token: 888888 is not allowed; the model has 320; it is not this"),
    ],
)
def test_an_about_of_another_model_is_refused(changed, message, run, single_process):
    step = step_folder.steps_in(run / "checkpoints")[0]
    rewrite_about(step, lambda about: about.update(changed))
    with pytest.raises(UserError, match=message):
        checkpoint.open_model(str(step), single_process)
