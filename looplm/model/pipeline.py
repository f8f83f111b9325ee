"""Loops as virtual pipeline stages: Megatron's interleaved schedule over R views of one set of weights.

With P pipeline ranks each rank holds L / P layers. Megatron's interleaved 1F1B schedule receives R "model chunks" per
rank that are views of one module; chunk r is loop r. The schedule carries the hidden state from the last rank's chunk r
to the first rank's chunk r + 1. The shared weights need no gradient exchange, and the bubble shrinks by R.

The objective needs every loop's losses and gate logits. All of them are computed on the last rank, in R different
calls, and stay there. After loop r they are detached from the graph as leaves, and the hidden state passes through
:class:`_Carry`, whose backward returns the leaves' gradients. Loop r + 1's backward always runs first, so the gradients
exist by then.

Shapes: S sequence, B micro-batch, D hidden, R loops.
"""

from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.enums import ModelType
from torch import Tensor, nn

from looplm.model.exit_gate import exit_log_prob
from looplm.model.head import HeadLosses
from looplm.model.loop_lm import LoopLM
from looplm.model.losses import LoopLosses

# Maps a loop's hidden state [S, B, D], the probability of leaving after it [S, B], and True for the last loop, to the
# loop's losses.
Head = Callable[[Tensor, Tensor, bool], HeadLosses]


class ViewOutput(NamedTuple):
    """Output of one call of a view, for the schedule and, on the last rank in the last loop, for the objective."""

    hidden_SBD: Tensor  # sent to the next rank, except on the last rank in the last loop
    losses: LoopLosses | None  # of all loops; only on the last rank in the last loop


class _Carried(NamedTuple):
    """Leaves kept on the last rank for the loops that a micro-batch has completed."""

    losses: tuple[HeadLosses, ...] = ()
    gate_logit: tuple[Tensor, ...] = ()
    gate_state: Tensor | None = None

    def add(self, losses: HeadLosses, logit_SB: Tensor, state: Tensor | None) -> "_Carried":
        """Return these leaves with those of one more loop."""
        return _Carried((*self.losses, losses), (*self.gate_logit, logit_SB), state)


class LoopView(nn.Module):
    """Loop ``loop`` of this rank's layers: a view that owns no parameters.

    Args:
        ddp: the rank's model in Megatron's wrapper; all views share it.
        loop: 0-based.
        loops: number of loops in the step.
        carried: what is kept of each micro-batch, by its number; shared by the views of a rank.
        spans: the spans of each micro-batch, by its number; shared by the views of a rank.
    """

    def __init__(
        self,
        ddp: DistributedDataParallel,
        loop: int,
        loops: int,
        carried: dict[int, _Carried],
        spans: dict[int, Tensor | None],
    ) -> None:
        super().__init__()
        self._shared = (ddp,)  # a tuple hides it from torch, which would count every parameter R times
        self._carried, self._spans = carried, spans
        self.loop = self.vp_stage = loop
        self.loops = loops
        self.model_type = ModelType.encoder_or_decoder
        self._calls = 0
        self._input: Tensor | None = None

    @property
    def ddp(self) -> DistributedDataParallel:
        """Megatron's wrapper around :attr:`inner`."""
        return self._shared[0]

    @property
    def inner(self) -> LoopLM:
        """The rank's model."""
        return self.ddp.module

    @property
    def config(self) -> Any:
        """Megatron's config for its schedules, which count the views as virtual pipeline stages.

        It is a copy, because Megatron's layers must still see a single share of the stack on this rank. A single view
        is no virtual stage, and the plain schedule refuses to overlap messages.
        """
        config, several = copy(self.inner.config), self.loops > 1
        config.virtual_pipeline_model_parallel_size = self.loops if several else None
        config.overlap_p2p_comm = config.overlap_p2p_comm and several
        return config

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Store what the previous rank sent; called by the schedule."""
        self._input = input_tensor[0]

    def set_is_first_microbatch(self) -> None:
        """Have FP8 copies of the weights recomputed, once for all loops; the schedule calls it after a step."""
        if self.loop == 0:
            self.ddp.set_is_first_microbatch()

    def restart(self) -> None:
        """Number micro-batches from 0 again; call it before each step."""
        self._calls = 0
        self._carried.clear()
        self._spans.clear()

    def forward(
        self,
        ids_BS: Tensor,
        document_start_SB: Tensor | None,
        head: Head,
        frozen_trunk: bool = False,
        backward_loops: int | None = None,
        watch: Callable[[Tensor], None] | None = None,
    ) -> ViewOutput:
        """Run this rank's layers once.

        Args:
            ids_BS: token ids, read by the first rank.
            document_start_SB: as in :meth:`LoopLM.forward`.
            head: called on the last rank, after the gate.
            frozen_trunk: use autograd for the gate only.
            backward_loops: as in :meth:`LoopLM.forward`.
            watch: called on the last rank with the loop's state.
        """
        micro_batch, self._calls = self._calls, self._calls + 1
        inner, loops = self.inner, self.loops
        last_loop, first_trained = self.loop == loops - 1, loops - (backward_loops or loops)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen_trunk):
            if self.loop == 0:
                self._spans[micro_batch] = inner.attention_spans(ids_BS, document_start_SB)
            spans = self._spans.pop(micro_batch) if last_loop else self._spans[micro_batch]
            if inner.pre_process and self.loop == first_trained > 0:
                self._input = _Cut.apply(self._input)  # type: ignore[no-untyped-call]  # torch's
            hidden_SBD = inner.run_layers(ids_BS, self._input, spans, self.loop)
            if not inner.post_process:
                return ViewOutput(hidden_SBD, None)
            readout = inner.read_out(hidden_SBD, spans)
        if frozen_trunk:  # Megatron re-enables autograd around residual adds
            hidden_SBD, readout = hidden_SBD.detach(), readout.detached()
        if watch is not None:
            watch(hidden_SBD)

        before = self._carried.pop(micro_batch, _Carried())
        logit_SB, state = inner.gate_logit(readout.gate_SBD, before.gate_state, self.loop, document_start_SB, loops)
        exit_SB = exit_log_prob((*before.gate_logit, logit_SB), last_loop).exp()
        losses = head(readout.head_SBD, exit_SB, last_loop)
        if last_loop:
            logit_RSB = torch.stack((*before.gate_logit, logit_SB))
            return ViewOutput(hidden_SBD, LoopLosses.of((*before.losses, losses), logit_RSB))
        if frozen_trunk:  # no backward crosses the ranks, so the gate's graph can continue into the next loop
            self._carried[micro_batch] = before.add(losses, logit_SB, state)
            return ViewOutput(hidden_SBD, None)
        kept = (losses.token_loss_SB, logit_SB, losses.expected, state)
        leaves = [None if x is None else x.detach().requires_grad_(x.requires_grad) for x in kept]
        loss_leaf, logit_leaf, expected_leaf, state_leaf = leaves
        assert loss_leaf is not None and logit_leaf is not None
        self._carried[micro_batch] = before.add(HeadLosses(loss_leaf, expected_leaf), logit_leaf, state_leaf)
        carried_SBD = _Carry.apply(leaves, hidden_SBD, *kept)  # type: ignore[no-untyped-call]  # torch's
        return ViewOutput(carried_SBD, None)


class _Cut(torch.autograd.Function):
    """Identity whose gradient is zero: the schedule sends a gradient to the rank before in every case."""

    @staticmethod
    def forward(ctx, hidden_SBD):  # type: ignore[no-untyped-def]
        return hidden_SBD.clone()

    @staticmethod
    def backward(ctx, grad_SBD):  # type: ignore[no-untyped-def]
        return torch.zeros_like(grad_SBD)


class _Carry(torch.autograd.Function):
    """Identity on the hidden state whose backward also returns the leaves' gradients to the tensors behind them."""

    @staticmethod
    def forward(ctx, leaves, hidden_SBD, *kept):  # type: ignore[no-untyped-def]
        ctx.leaves = leaves
        return hidden_SBD.clone()  # the schedule may send this storage while the head still reads the original

    @staticmethod
    def backward(ctx, grad_SBD):  # type: ignore[no-untyped-def]
        grads = [None if leaf is None else leaf.grad for leaf in ctx.leaves]
        ctx.leaves = None
        return None, grad_SBD, *grads


def loop_views(ddp: DistributedDataParallel, loops: int | None = None) -> list[LoopView]:
    """Return this rank's views for steps of ``loops`` loops, in their order; None for all of the model's."""
    loops = loops or ddp.module.model_config.num_loops
    carried, spans = dict[int, _Carried](), dict[int, Tensor | None]()
    return [LoopView(ddp, loop, loops, carried, spans) for loop in range(loops)]
