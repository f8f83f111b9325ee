"""Saving and loading keep a single copy of the weights in memory."""

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from looplm.checkpoint.state import sharded_weights
from looplm.config import GateConfig
from looplm.model import LoopLM
from tests.support.tiny import MODEL

FUSED = {f"decoder.layers.{layer}.mlp.linear_fc1.weight" for layer in range(MODEL.num_layers)}


def test_halves_of_a_fused_matrix_share_its_memory(single_process):
    model = LoopLM(MODEL, GateConfig(), single_process, torch.bfloat16)
    state, parameters = sharded_weights(model), dict(model.named_parameters())
    assert {name for name, value in state.items() if isinstance(value, ShardedTensorFactory)} == FUSED
    for name in FUSED:
        halves = [part.data for part in state[name].build()]
        sizes = [half.untyped_storage().size() for half in halves]
        assert sizes == [half.nbytes for half in halves], "Megatron would copy a view"
        assert halves[0].data_ptr() == parameters[name].data_ptr()
        assert torch.equal(torch.cat(halves), parameters[name])
        fresh = [half.clone() for half in halves]
        assert torch.equal(state[name].merge_fn(fresh), parameters[name])
        assert state[name].merge_fn([half + 1 for half in halves]).data_ptr() != parameters[name].data_ptr()


@pytest.mark.slow
def test_weights_are_loaded_in_place(single_process, tmp_path):
    saved, model = (LoopLM(MODEL, GateConfig(), single_process, torch.bfloat16) for _ in range(2))
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.normal_()
    dist_checkpointing.save({"model": sharded_weights(saved)}, str(tmp_path))
    loaded = dist_checkpointing.load({"model": sharded_weights(model)}, str(tmp_path))["model"]
    parameters, expected = dict(model.named_parameters()), dict(saved.named_parameters())
    for name, parameter in parameters.items():
        assert torch.equal(loaded[name], expected[name]), name
        assert loaded[name].data_ptr() == parameter.data_ptr(), f"{name} was copied"
