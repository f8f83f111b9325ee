"""The exported model as accelerate places it: with weights offloaded, and spread over devices."""

import pytest
import torch
from accelerate import cpu_offload
from megatron.core.process_groups_config import ProcessGroupCollection

from tests.support.generation_oracle import GATES, READ_OUTS, VARIANTS, VOCAB, build
from tests.support.hf_models import generate, hf_model, random_ids

IDS_BS = random_ids(2, 9, VOCAB)
MODELS = VARIANTS | READ_OUTS


@pytest.mark.parametrize(
    "variant, gate",
    [
        *(("mla", gate) for gate in GATES),
        *(("mla-latent-halting", "linear"), ("mha-diagonal-injection", "linear"), ("mla-step-embedding", "linear")),
        *(("mla-prelude-coda", "linear"), ("gqa-head-gate", "linear")),
    ],
)
def test_offloaded_weights_give_the_same_text(variant: str, gate: str, single_process: ProcessGroupCollection) -> None:
    """Offloading loads the weights of the module that is called: none may be read from outside."""
    model = hf_model(build(MODELS[variant], GATES[gate], single_process), GATES[gate], early_exit_threshold=0.6)
    expected = generate(model, IDS_BS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    cpu_offload(model, torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(generate(model, IDS_BS, max_new_tokens=4, do_sample=False, pad_token_id=0), expected)
