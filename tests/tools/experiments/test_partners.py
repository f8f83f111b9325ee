"""Partners of a looped model: equal in what they claim, and accepted as arms of an experiment."""

from dataclasses import replace
from typing import Any

import pytest
import yaml

from looplm.cli import from_dict
from looplm.config import LossConfig, RunConfig
from looplm.failures import UserError
from tests.tools.experiments.test_runs import MINI
from tools import count_params
from tools.experiments.partners import partners, table
from tools.experiments.runs import ExperimentConfig

MODEL = {"vocab_size": 4096, "hidden_size": 192, "ffn_hidden_size": 512, "num_layers": 3, "num_attention_heads": 4}


def recipe(**model: object) -> RunConfig:
    data: dict[str, Any] = {"task": {"word_problem": {}}}
    values = {"output_dir": "run", "model": MODEL | model, "optim": {"train_steps": 1}, "data": data}
    return from_dict(RunConfig, values, where="test")


@pytest.mark.parametrize(
    "model",
    [
        {"num_loops": 4, "attention": "mha"},
        {"num_loops": 2, "attention": "mla", "kv_lora_rank": 48, "qk_nope_head_dim": 16, "v_head_dim": 16},
        {"num_loops": 8, "num_layers": 1, "attention": "mha", "hidden_size": 64, "ffn_hidden_size": 128},
        {"num_loops": 3, "attention": "mha", "num_query_groups": 2, "head_dim": 12, "vocab_size": 7},
    ],
)
def test_partners_have_equal_parameters_or_flops(model):
    config = recipe(**model)
    layers, loops = config.model.num_layers, config.model.num_loops
    own, once, deep, wide, wide_loops = partners(config)
    assert own.model == config.model
    shapes = [(found.model.num_layers, found.model.num_loops) for found in (once, deep, wide, wide_loops)]
    assert shapes == [(layers, 1), (layers * loops, 1), (layers, 1), (layers, loops)]
    assert once.size.parameters == own.size.parameters and once.size.flops_per_token < own.size.flops_per_token
    for found in (deep, wide):
        assert found.size.flops_per_token == pytest.approx(own.size.flops_per_token, rel=0.03)
        assert found.size.parameters > own.size.parameters
    assert wide_loops.size.parameters == pytest.approx(deep.size.parameters, rel=0.03)
    assert min(wide.model.hidden_size, wide_loops.model.hidden_size) > config.model.hidden_size
    ratio = wide.model.ffn_hidden_size / wide.model.hidden_size
    assert ratio == pytest.approx(config.model.ffn_hidden_size / config.model.hidden_size, rel=0.35)


def test_the_flops_are_those_of_the_matrices_that_run():
    """An oracle by hand: plain attention and SwiGLU, no head to speak of."""
    config = recipe(num_loops=4, attention="mha", vocab_size=7)
    for found in partners(config):
        model = found.model
        width, ffn = model.hidden_size, model.ffn_hidden_size
        layer = 4 * width**2 + 3 * width * ffn + width * config.data.seq_length  # scores and values: S / 2 each
        expected = 6 * model.num_loops * model.num_layers * layer
        assert found.size.flops_per_token == pytest.approx(expected, rel=0.05)


def test_the_table_prints_arms_that_an_experiment_accepts():
    config = recipe(num_loops=4, attention="mha", num_layers=1, hidden_size=64, ffn_hidden_size=128, vocab_size=300)
    lines = table(partners(config)).splitlines()
    arms = dict(zip("abcde", map(yaml.safe_load, lines[lines.index("as arms of an experiment:") + 1 :]), strict=True))
    pairs = [("a", "b", "parameters"), ("a", "c", "flops"), ("a", "d", "flops"), ("e", "c", "parameters")]
    values = yaml.safe_load(MINI) | {"arms": arms}
    values["base"]["model"]["vocab_size"] = 300
    values["base"] |= {"gate": {}, "loss": {}}
    values["base"]["data"]["seq_length"] = config.data.seq_length
    values["pairs"] = [{"better": better, "than": than, "matched": matched} for better, than, matched in pairs]
    values["decides"] = {"figure": "test.accuracy", "better": "a", "than": "b"}
    assert len(from_dict(ExperimentConfig, values, where="test").sizes) == 5


def test_the_command_prints_them_on_request(capsys):
    count_params.main(["--config", "configs/quickstart/pretrain.yaml", "--partners"])
    assert "12 x 1, as many layers as run" in capsys.readouterr().out


def test_a_model_without_loops_has_none():
    with pytest.raises(UserError, match=r"model\.num_loops: 1 is not allowed; a model without loops has no partners"):
        partners(recipe(num_loops=1))


@pytest.mark.parametrize("loss", [{"backward_loops": 2}, {"prior": "given", "prior_shares": [1, 1, 2]}])
def test_keys_that_need_several_loops_do_not_hinder_the_partners_without(loss):
    config = recipe(num_loops=3, attention="mha")
    assert len(partners(replace(config, loss=from_dict(LossConfig, loss, where="loss")))) == 5
