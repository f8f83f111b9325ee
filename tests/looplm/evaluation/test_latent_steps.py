"""The steps of the unit inside attention, against the oracle."""

from dataclasses import replace

import torch

from looplm import reference
from looplm.config import GateConfig
from looplm.evaluation.latent_steps import watched_steps
from looplm.model import LoopLM
from tests.support.tiny import MODEL

HALTING = replace(MODEL, attention="mla", latent_iterations=3, latent_halting=True)


def test_every_call_equals_the_oracles_steps(single_process):
    model, gate = LoopLM(HALTING, GateConfig(), single_process).eval(), GateConfig()
    ids_BS = torch.randint(HALTING.vocab_size, (3, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
        with watched_steps(model) as steps:
            model(ids_BS, 2)
        expected = reference.forward(dict(model.named_parameters()), HALTING, gate, ids_BS, 2).latent_steps
        model(ids_BS, 2)
    assert len(steps) == len(expected) == 2 * HALTING.num_layers, "nothing is watched any more"
    torch.testing.assert_close(torch.stack(steps), torch.stack(expected))
    assert torch.stack(steps).std() > 0.01, "the positions take different numbers of steps"


def test_a_unit_that_does_not_halt_is_not_watched(single_process):
    model = LoopLM(replace(MODEL, attention="mla", latent_iterations=3), GateConfig(), single_process).eval()
    with watched_steps(model) as steps, torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long), 1)
    assert steps == []
