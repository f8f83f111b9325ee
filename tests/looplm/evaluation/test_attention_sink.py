"""The attention on a sample's first token, on a model whose weights decide it, and against the oracle."""

from dataclasses import replace

import pytest
import torch

from looplm import reference
from looplm.config import GateConfig
from looplm.evaluation.attention_sink import attention_sink
from looplm.model import LoopLM
from tests.support.tiny import MODEL

S, B = 7, 3


def ids(model: LoopLM):
    return torch.randint(model.model_config.vocab_size, (B, S), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "changes", [{"attention": "mha"}, {"attention": "mla"}, {"attention": "mha", "num_query_groups": 2}], ids=str
)
def test_every_loop_equals_the_oracles_softmax(changes, single_process, monkeypatch):
    config = replace(MODEL, num_attention_heads=4, **changes)
    model, gate = LoopLM(config, GateConfig(), single_process).eval(), GateConfig()
    shares: list[float] = []

    def attend(q_SBHK, k_SBHK, v_SBHK, view):
        score = torch.einsum("sbhk,tbhk->bhst", q_SBHK, k_SBHK).double() / q_SBHK.shape[-1] ** 0.5
        weight = score.masked_fill(~view.visible_BSS[:, None], float("-inf")).softmax(-1)
        shares.append(float(weight[:, :, 1:, 0].mean()))
        return original(q_SBHK, k_SBHK, v_SBHK, view)

    original = reference.attend
    monkeypatch.setattr(reference.model, "attend", attend)
    with torch.no_grad():
        reference.forward(dict(model.named_parameters()), config, gate, ids(model), 5)
    layers = config.num_layers
    expected = [sum(shares[layers * loop : layers * (loop + 1)]) / layers for loop in range(5)]
    assert attention_sink(model, ids(model), 5) == pytest.approx(expected, rel=1e-5)
    assert not any(layer.self_attention.core_attention._forward_pre_hooks for layer in model.decoder.layers)


def test_heads_that_look_at_all_alike_have_the_harmonic_mean(single_process):
    model = LoopLM(replace(MODEL, attention="mha"), GateConfig(), single_process).eval()
    for layer in model.decoder.layers:
        torch.nn.init.zeros_(layer.self_attention.linear_qkv.weight)
    alike = sum(1 / (i + 1) for i in range(1, S)) / (S - 1)
    assert attention_sink(model, ids(model), 2) == pytest.approx((alike, alike), rel=1e-6)
