"""The exported model computes what ours computes: hidden states, logits, gate, loss, the gradient of each parameter."""

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from tests import reference
from tests.looplm.generation_oracle import GATES, SHAPES, build
from tests.looplm.huggingface.hf_models import hf_model, random_ids, to_ours
from tests.parity import TOLERANCE, assert_close_relative, gradients, oracle_copy, relative_error


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", SHAPES)
def test_everything_equals_the_oracle(shape: str, gate: str, single_process: ProcessGroupCollection) -> None:
    model_config, gate_config = SHAPES[shape], GATES[gate]
    ours = build(model_config, gate_config, single_process)
    theirs = hf_model(ours, gate_config)
    params = oracle_copy(dict(ours.named_parameters()))
    ids_BS = random_ids(2, 12, model_config.vocab_size)
    labels_BS = ids_BS.masked_fill(torch.rand(ids_BS.shape) < 0.2, -100)

    expected = reference.forward(params, model_config, gate_config, ids_BS)
    head = reference.head_weight(params, model_config)
    target_SB, counts_SB = labels_BS[:, 1:].T.clamp(min=0), labels_BS[:, 1:].T != -100
    losses = torch.stack([reference.token_losses(h_SBD[:-1], head, target_SB) for h_SBD in expected.hidden])
    loss = reference.entropy_regularised_loss(losses, expected.gate_logit_RSB[:, :-1], 0.0, counts_SB)

    got = theirs(ids_BS, labels=labels_BS, output_hidden_states=True, output_gate_logits=True)
    for mine, its in zip(got.hidden_states, expected.hidden, strict=True):
        assert relative_error(mine.transpose(0, 1), its) < TOLERANCE
    assert relative_error(got.logits.transpose(0, 1), expected.hidden[-1] @ head.T) < TOLERANCE
    assert relative_error(got.gate_logits.transpose(1, 2), expected.gate_logit_RSB) < TOLERANCE
    assert relative_error(got.loss, loss) < TOLERANCE
    found = to_ours(model_config, gate_config, gradients(got.loss, dict(theirs.named_parameters())))
    assert_close_relative(found, gradients(loss, params))
