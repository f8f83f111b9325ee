"""The spectral radius of a loop, against the eigenvalues of the oracle's whole Jacobian."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from looplm import reference
from looplm.config import GateConfig, ModelConfig
from looplm.evaluation.spectral_radius import spectral_radius
from looplm.model import LoopLM
from tests.support.tiny import MODEL

S, B, LOOPS = 5, 2, 4


def ids() -> Tensor:
    return torch.randint(MODEL.vocab_size, (B, S), generator=torch.Generator().manual_seed(0))


def oracle(params: reference.Params, config: ModelConfig) -> Iterator[float]:
    """Yield the largest eigenvalue of each loop's Jacobian from the second loop on, as a mean over the samples."""
    ids_BS, width = ids(), config.hidden_size
    entered_SBD = torch.nn.functional.embedding(ids_BS.T, params["embedding.word_embeddings.weight"])
    state_SBD = reference.forward(params, config, GateConfig(), ids_BS, 1).hidden[0]
    for _ in range(1, LOOPS):
        radii = []
        for sample in range(B):
            view = reference.View.of(config, ids_BS[sample : sample + 1], None, fused=False)

            def loop(flat: Tensor, view: reference.View = view, sample: int = sample) -> Tensor:
                h_SBD = flat.view(S, 1, width)
                if config.injection == "additive":
                    h_SBD = h_SBD + entered_SBD[:, sample : sample + 1]
                for layer in range(config.num_layers):
                    h_SBD = reference.block(reference.scope(params, f"decoder.layers.{layer}."), config, h_SBD, view)
                weight = params["decoder.final_layernorm.weight"]
                return reference.rms_norm(h_SBD, weight, config.norm_eps).flatten()

            flat = state_SBD[:, sample].flatten()
            jacobian = torch.autograd.functional.jacobian(loop, flat)
            radii.append(float(torch.linalg.eigvals(jacobian).abs().max()))
            state_SBD[:, sample] = loop(flat).view(S, width)
        yield sum(radii) / B


@pytest.mark.parametrize("changes", [{"attention": "mla"}, {"attention": "mha", "injection": "additive"}], ids=str)
def test_radii_are_the_largest_eigenvalues(changes, single_process):
    config = replace(MODEL, **changes)
    model = LoopLM(config, GateConfig(), single_process).eval()
    with torch.no_grad():
        for weight in model.decoder.parameters():
            weight.mul_(1.5)  # away from a loop that changes nothing
        params = {name: weight.detach() for name, weight in model.named_parameters()}
        expected = list(oracle(params, config))
    assert spectral_radius(model, ids(), LOOPS, iterations=600) == pytest.approx(expected, rel=0.02)
    assert spectral_radius(model, ids(), LOOPS) == pytest.approx(expected, rel=0.2)
    assert not any(weight.grad is not None for weight in model.parameters())
    assert spectral_radius(model, ids(), 1) == ()
