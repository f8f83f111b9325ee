"""The exported model equals ours in hidden states, logits, gate logits, loss and the gradient of each parameter."""

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from looplm import reference
from tests.looplm.model.test_loop_lm import BETA, CASES, build
from tests.support.hf_models import hf_model, random_ids, to_ours
from tests.support.parity import assert_close_relative, gradients, oracle_copy


@pytest.mark.parametrize("case", CASES)
def test_everything_equals_the_oracle(case: str, single_process: ProcessGroupCollection) -> None:
    """The test adds the entropy term, because without it the gate's gradient is a small difference of large numbers."""
    config, gate = CASES[case]
    ours = build(config, gate, single_process)
    theirs, params = hf_model(ours, gate), oracle_copy(dict(ours.named_parameters()))
    ids_BS = random_ids(2, 19, config.vocab_size)
    labels_BS = ids_BS.masked_fill(random_ids(2, 19, 5) == 0, -100)
    target_SB, counts_SB = labels_BS[:, 1:].T.clamp(min=0), labels_BS[:, 1:].T != -100

    expected, head = reference.forward(params, config, gate, ids_BS), reference.head_weight(params, config)
    losses_RSB = torch.stack([reference.token_losses(h_SBD[:-1], head, target_SB) for h_SBD in expected.hidden])
    loss, regularised = (
        reference.entropy_regularised_loss(losses_RSB, expected.gate_logit_RSB[:, :-1], beta, counts_SB)
        for beta in (0.0, BETA)
    )
    oracle = {f"hidden {loop}": h_SBD for loop, h_SBD in enumerate(expected.hidden)}
    oracle |= {"gate": expected.gate_logit_RSB, "logits": expected.hidden[-1] @ head.T, "loss": loss}

    got = theirs(ids_BS, labels=labels_BS, output_hidden_states=True, output_gate_logits=True)
    values = {f"hidden {loop}": h_BSD.transpose(0, 1) for loop, h_BSD in enumerate(got.hidden_states)}
    values |= {"gate": got.gate_logits.transpose(1, 2), "logits": got.logits.transpose(0, 1), "loss": got.loss}
    assert_close_relative(values, oracle)
    entropy_SB = reference.entropy(reference.exit_distribution(values["gate"][:, :-1]))
    mine = got.loss - BETA * reference.masked_mean(entropy_SB, counts_SB)
    found = gradients(mine, dict(theirs.named_parameters()))
    assert_close_relative(to_ours(config, gate, found), gradients(regularised, params))
