"""Stored configurations: what an earlier release has accepted, this one reads."""

from typing import Any

import pytest
import yaml

from looplm.checkpoint import read_model
from looplm.cli import from_dict, to_dict
from looplm.config import RunConfig
from looplm.config.stored import upgrade_config
from looplm.failures import UserError
from looplm.yaml_text import parse_yaml
from pretrain.report import data
from tests.support.tiny import MODEL, run_config


def in_a_file(values: dict[str, Any]) -> dict[str, Any]:
    read: dict[str, Any] = parse_yaml(yaml.safe_dump(values), "here").values
    return read


def test_keys_that_earlier_releases_did_not_heed_do_not_keep_a_checkpoint_from_being_read():
    common = {"output_dir": "run", "seed": 7}
    stored = {"loss": {"weights": "last", "prior": "geometric", "beta": 0.2}, "health": {"spike_factor": 8.0}}
    found = upgrade_config(common | stored, "here")
    assert found == common | {"loss": {"weights": "last", "beta": 0.2}, "health": {"spike_factor": 8.0}}
    varying = {"loss": {"loop_onset": 0.3, "prior": "geometric"}, "health": {"spike_factor": 8.0, "max_rollbacks": 2}}
    assert upgrade_config(varying, "here") == {"loss": varying["loss"], "health": {}}


@pytest.mark.parametrize(
    "stored",
    [
        {"optim": {"schedule": "constant", "decay_steps": 0, "min_lr": 1e-4}},
        {"optim": {"decay_steps": 0, "min_lr": 1e-4}},
        {"loss": {"geometric_rate": 0.2}},
        {"loss": {"loop_onset": 1.0}},
        {"loss": {"loop_onset": 0.5, "onset_loops": 3}},
        {"data": {"train": [], "valid": [], "task": {"sums": {}}, "horizon_samples": 8, "cache_dir": "c"}},
        {"data": {"train": [], "valid": [], "task": {"sums": {}}, "document_masking": False}},
        {"engine": {"fp8_recipe": "delayed", "amax_history": 7}},
        {"engine": {"fp8": "emulate-bf16", "fp8_recipe": "mxfp8"}},
        {"engine": {"fp8": "emulate-hybrid", "amax_history": 7}},
        {"health": {"spike_window": 8, "spike_steps": 2}},
        {"loss": {"weights": "last", "backward_loops": 1}},
        {"loss": {"weights": "last", "backward_loops": 1, "loop_onset": 0.5}},
        {"loss": {"loop_onset": 0.5}, "health": {"spike_factor": 8.0, "spike_window": 8}},
    ],
)
def test_keys_that_are_refused_now_do_not_keep_a_run_from_being_read(stored, tmp_path):
    values: dict[str, Any] = to_dict(run_config(tmp_path, tmp_path))
    values |= {section: values[section] | keys for section, keys in stored.items()}
    with pytest.raises(UserError, match="is not allowed"):
        from_dict(RunConfig, values, where="here")
    for read in (values, in_a_file(values)):
        from_dict(RunConfig, upgrade_config(read, "here"), where="here")


@pytest.mark.parametrize(
    ("loss", "model"),
    [
        ({"weights": "uniform"}, {}),
        ({"weights": "last"}, {"injection": "diagonal"}),
        ({"weights": "last", "sampled_loops": "uniform"}, {}),
    ],
)
def test_a_truncated_gradient_that_reaches_the_embedding_stays(loss, model, tmp_path):
    config = run_config(tmp_path, tmp_path, loss=loss | {"backward_loops": 1}, model=model)
    assert from_dict(RunConfig, upgrade_config(to_dict(config), "here"), where="here") == config


def test_keys_that_have_an_effect_stay(tmp_path):
    engine = {"fp8": "emulate-hybrid", "fp8_recipe": "delayed", "amax_history": 7}
    health, optim = {"spike_factor": 8.0, "spike_window": 8}, {"min_lr": 1e-4}
    config = run_config(tmp_path, tmp_path, engine=engine, health=health, optim=optim, data={"cache_dir": "c"})
    for read in (to_dict(config), in_a_file(to_dict(config))):
        assert from_dict(RunConfig, upgrade_config(read, "here"), where="here") == config


REMOVED: dict[str, Any] = {
    "model.latent_mixing": 3,
    "model.latent_sequence_halting": True,
    "model.latent_rotary_key": True,
    "loss.fixed_point": 0.1,
    "loss.sparsity": 0.1,
    "loss.latent_stability": 0.1,
    "loss.latent_ponder_cost": 1.0,
}


def test_removed_keys_that_were_off_do_not_keep_a_run_from_being_read(tmp_path):
    config = run_config(tmp_path, tmp_path)
    values: dict[str, Any] = to_dict(config)
    for name, used in REMOVED.items():
        section, key = name.split(".")
        values[section] |= {key: type(used)(0)}
    with pytest.raises(UserError, match="unknown key"):
        from_dict(RunConfig, values, where="here")
    for read in (values, in_a_file(values)):
        assert from_dict(RunConfig, upgrade_config(read, "here"), where="here") == config


def test_weights_are_read_by_the_keys_of_their_model_alone(tmp_path):
    stored = to_dict(MODEL) | {"latent_mixing": 0, "latent_rotary_key": False}
    values: dict[str, Any] = {"model": stored, "loss": {"sparsity": 0.1}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert read_model(tmp_path).model == MODEL == data._read_model(tmp_path)
    stored["latent_mixing"] = 3
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    for read in (read_model, data._read_model):
        with pytest.raises(UserError, match=r"config\.yaml: model\.latent_mixing: 3 is not allowed; it was removed"):
            read(tmp_path)


@pytest.mark.parametrize(("name", "value"), REMOVED.items())
def test_a_run_that_used_a_removed_key_is_refused(name, value):
    section, key = name.split(".")
    fix = "it was removed, as it showed no gain (docs/levers.md); read this run with revision de6f01f"
    for read in ({section: {key: value}}, in_a_file({section: {key: value}})):
        with pytest.raises(UserError) as caught:
            upgrade_config(read, "here")
        assert str(caught.value) == f"here: {name}: {value} is not allowed; {fix}"
