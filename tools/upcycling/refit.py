"""Fit the output projections of a converted attention to what the attention gave before the conversion.

A conversion that only approximates changes what each layer's heads give, and each layer's errors are the inputs of the
next. So the layers are taken from the first on, each on what the fitted layers before it now give::

    W = argmin sum_n |W c_n - y_n|² + λ |W - W_0|²

c_n is what the heads of the converted attention give at token n, y_n the output of the attention before, and W_0 the
projection that both have. Where the conversion is exact, W_0 is the minimum and stays. On SmolLM2 a narrow latent then
costs 0.06 to 0.18 nats for 0.07 to 0.41 (docs/LOG.md, 2026-11-30). To aim at the whole residual stream before the
conversion, errors of earlier layers included, is worse: a few tokens of enormous size decide it.

Shapes: S sequence, B batch, D hidden, N tokens, C width of all heads' contexts.
"""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn
from tqdm import tqdm

from looplm.bounds import require
from looplm.config import ModelConfig
from looplm.model import LoopLM
from pretrain.data import Batch
from tools.upcycling.model_state import ModelState, assemble

_RIDGE = 1e-3  # λ as a share of the contexts' mean square; 1e-2 is worse on SmolLM2


def check_refit(config: ModelConfig, samples: int) -> None:
    """Raise if a model has several loops: a layer would be fitted before the last layer of the loop before."""
    loops, fix = config.num_loops, "a layer would be fitted before the last layer of the loop before it; give 0"
    require(loops == 1 or samples == 0, "refit_samples", samples, f"with model.num_loops={loops} {fix}")


@torch.no_grad()
def refit(
    before: ModelState, after: ModelState, batches: Sequence[Batch], groups: ProcessGroupCollection
) -> ModelState:
    """Return the converted model with fitted output projections.

    Args:
        before: the model before the conversion; :func:`check_refit` has accepted it.
        after: the converted model.
        batches: text that both read.
        groups: process groups of a single process.
    """
    old, new = (_Walk(assemble(state, groups).eval(), batches) for state in (before, after))
    weights = dict(after.weights)
    for number in tqdm(range(before.config.num_layers), unit="layer", disable=not sys.stderr.isatty()):
        projection = new.model.decoder.layers[number].self_attention.linear_proj.weight
        seen_CC, wanted_DC = torch.zeros(2 * projection.shape[1:]).double(), torch.zeros(projection.shape).double()
        for place in range(len(batches)):
            c_NC = new.look(number, place).context_NC
            y_ND = old.step(number, place).output_ND
            seen_CC += (c_NC.mT @ c_NC).cpu()
            wanted_DC += (y_ND.mT @ c_NC).cpu()
        projection.copy_(fit(seen_CC, wanted_DC, projection.double().cpu()))
        for place in range(len(batches)):
            new.step(number, place)
        weights[f"decoder.layers.{number}.self_attention.linear_proj.weight"] = projection.detach().float().cpu()
    return after._replace(weights=weights)


def fit(seen_CC: Tensor, wanted_DC: Tensor, start_DC: Tensor) -> Tensor:
    """Return W [D, C] that is nearest to the outputs, and near its start where no context says otherwise.

    Args:
        seen_CC: sum of c c^T over the tokens.
        wanted_DC: sum of y c^T.
        start_DC: W_0.
    """
    ridge = _RIDGE * seen_CC.trace() / len(seen_CC)
    return torch.linalg.solve(seen_CC + ridge * torch.eye(len(seen_CC)).double(), (wanted_DC + ridge * start_DC).mT).mT


class _Seen(NamedTuple):
    """A layer's state, its heads' contexts and its attention's output, on a batch."""

    h_SBD: Tensor
    context_NC: Tensor
    output_ND: Tensor


class _Walk:
    """A model of one loop that is run layer by layer, each over all batches."""

    def __init__(self, model: LoopLM, batches: Sequence[Batch]) -> None:
        self.model = model
        self._spans = [model.attention_spans(batch.ids_BS, batch.document_start_SB) for batch in batches]
        self._h = [model.enter(batch.ids_BS, spans) for batch, spans in zip(batches, self._spans, strict=True)]
        if model.step_embedding is not None:
            self._h = [model.step_embedding(h_SBD, 0) for h_SBD in self._h]

    def step(self, number: int, place: int) -> _Seen:
        """Run a layer on a batch, from the layer before on."""
        seen = self.look(number, place)
        self._h[place] = seen.h_SBD
        return seen

    def look(self, number: int, place: int) -> _Seen:
        """Run a layer on a batch, and stay before it."""
        layer, h_SBD, kept = self.model.decoder.layers[number], self._h[place], dict[str, Tensor]()

        def keep(_: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> None:
            kept["context"], kept["output"] = (x.flatten(0, 1).double() for x in (args[0], output[0]))

        hook = layer.self_attention.linear_proj.register_forward_hook(keep)
        rotary = None if self.model.rotary is None else self.model.rotary(len(h_SBD))
        h_SBD, _ = layer(h_SBD, attention_mask=self._spans[place], rotary_pos_emb=rotary)
        hook.remove()
        return _Seen(h_SBD, kept["context"], kept["output"])
