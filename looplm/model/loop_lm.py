"""LoopLM: embedding, one stack of blocks run R times, a norm at the end of every loop, a head and an exit gate.

::

    ids_BS --embed, prelude--> h_SBD --+--> shared stack --> norm --> h_SBD --+--> coda --> head (looplm.model.head)
                                       |                                      +--> gate --> logit_SB         loop r
                                       +--------- R times, same weights <-----+

The loop-end norm is inside the loop, as in Ouro: its output feeds the head, the gate and the next loop. With
``model.loop_norm: readout`` the next loop and the coda read its input instead. The prelude (run once) and the coda (run
for each loop's read-out) are layers with weights of their own; by default a model has neither, injects nothing into
later loops (:mod:`looplm.model.injection`), and tells no loop which one it is (:mod:`looplm.model.step_embedding`).
"""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from looplm.config import EngineConfig, GateConfig, ModelConfig, ParallelConfig
from looplm.megatron.device import DEVICE
from looplm.megatron.process_groups import seeded
from looplm.megatron.settings import transformer_config
from looplm.model.attention import outer_rotary_embedding
from looplm.model.block import block_spec, recomputed, unlooped_block
from looplm.model.exit_gate import build_exit_gate
from looplm.model.injection import INJECTIONS
from looplm.model.norms import ReadoutNorm
from looplm.model.spans import document_offsets, document_spans
from looplm.model.step_embedding import StepEmbedding
from looplm.parameters import chosen

EXTRA_STATE = "_extra_state"  # torch's suffix for the extra state of a module


class LoopOutput(NamedTuple):
    """For every loop the hidden state that the head reads [S, B, D], the gate's logits [R, S, B], and the loop's state.

    The ``state`` [S, B, D] is what the next loop reads. It is the hidden state too, unless a coda or a norm of the
    read-out lies between. S counts the positions of the given ids. Under sequence parallelism states are this rank's
    part of them; the logits are whole.
    """

    hidden: tuple[Tensor, ...]
    gate_logit_RSB: Tensor
    state: tuple[Tensor, ...]


class Readout(NamedTuple):
    """States that the gate and the head read after a loop; the same tensor [S, B, D] without a coda."""

    gate_SBD: Tensor
    head_SBD: Tensor

    def detached(self) -> "Readout":
        """Return it without autograd's graph."""
        return Readout(self.gate_SBD.detach(), self.head_SBD.detach())


class LoopLM(LanguageModule):
    """A looped language model on Megatron-core's transformer block.

    It computes hidden states and gate logits. Losses are in :mod:`looplm.model.losses`, sampling in
    :mod:`looplm.inference`.

    Args:
        model: configuration of the looped transformer.
        gate: configuration of the exit gate.
        groups: Megatron's process groups, from :func:`looplm.megatron.process_groups.start`.
        dtype: dtype of the parameters; the gate computes in fp32 in every case.
        layout: layout over the ranks; None for a whole model on each.
        initialize: initialize the matrices randomly; False leaves them undefined until weights are loaded, which saves
            the fp32 copies that initialization needs.
        engine: backend and matmul precision of the linear layers; None for Megatron's local ones.
    """

    def __init__(
        self,
        model: ModelConfig,
        gate: GateConfig,
        groups: ProcessGroupCollection,
        dtype: torch.dtype = torch.float32,
        layout: ParallelConfig | None = None,
        initialize: bool = True,
        engine: EngineConfig | None = None,
    ) -> None:
        layout, engine = layout or ParallelConfig(), engine or EngineConfig()
        config = transformer_config(model, dtype, layout, initialize, engine)
        super().__init__(config, pg_collection=groups)
        self.model_config, self.gate_config = model, gate
        self.attends_packed = engine.packs_documents(layout)
        self.recompute_loops = layout.recompute == "loop"
        self.pre_process, self.post_process = groups.pp.rank() == 0, groups.pp.rank() == groups.pp.size() - 1
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = model.tie_embeddings
        if self.pre_process:
            with seeded("embedding"):
                self.embedding = LanguageModelEmbedding(
                    config,
                    model.vocab_size,
                    model.max_sequence_length,
                    position_embedding_type="rope",
                    tp_group=groups.tp,
                )
        self.rotary = outer_rotary_embedding(model, config, groups)
        self.prelude: TransformerBlock | None = None
        if self.pre_process and model.prelude_layers:
            self.prelude = unlooped_block("prelude", model.prelude_layers, False, model, config, engine, groups)
        self.injection: MegatronModule | None = None
        if self.pre_process and model.injection != "none":
            self.injection = chosen(INJECTIONS, "model.injection", model.injection)(config)
        self.step_embedding: StepEmbedding | None = None
        if self.pre_process and model.step_embedding != "none":
            self.step_embedding = StepEmbedding(config, model.num_loops)
        self.decoder = TransformerBlock(
            config,
            block_spec(model, config, layout, groups.pp.rank(), engine),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=groups,
        )
        self.coda: TransformerBlock | None = None
        if self.post_process and model.coda_layers:
            self.coda = unlooped_block("coda", model.coda_layers, True, model, config, engine, groups)
        if self.post_process:
            with seeded("gate"):
                self.gate = build_exit_gate(config, gate, groups)
        if self.post_process and not model.tie_embeddings:
            with seeded("head"):
                self.output_layer = ColumnParallelLinear(
                    model.hidden_size,
                    model.vocab_size,
                    config=config,
                    init_method=config.init_method,
                    bias=False,
                    gather_output=False,
                    tp_group=groups.tp,
                )
        if not any(parameter.is_meta for parameter in self.parameters()):  # a model of shapes alone stays one
            self.to(DEVICE)

    @property
    def shape(self) -> ModelConfig:
        """Name of :attr:`model_config` in 0.1."""
        warnings.warn("LoopLM.shape is now LoopLM.model_config", DeprecationWarning, stacklevel=2)
        return self.model_config

    def head_weight(self) -> Tensor:
        """Return the head's matrix [V, D], which is the embedding when tied."""
        return self.embedding.word_embeddings.weight if self.model_config.tie_embeddings else self.output_layer.weight

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the weights in Megatron's sharded form, under the local block's names for every backend.

        The extra states of linear layers are left out. Megatron's are empty, Transformer Engine's are pickles of FP8
        scales.
        """
        state = super().sharded_state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if not name.endswith(EXTRA_STATE)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as torch does, except that extra states may be missing."""
        keys = super().load_state_dict(state_dict, strict=False, assign=assign)
        wrong = [key for key in (*keys.missing_keys, *keys.unexpected_keys) if not key.endswith(EXTRA_STATE)]
        if strict and wrong:
            raise RuntimeError(f"load_state_dict: names in only one of model and state: {', '.join(wrong)}")
        return keys

    def set_input_tensor(self, input_tensor: object) -> None:
        """Do nothing: Megatron's schedules pass a pipeline's activations here, and here there is no pipeline."""

    def forward(
        self,
        ids_BS: Tensor,
        num_loops: int | None = None,
        document_start_SB: Tensor | None = None,
        frozen_trunk: bool = False,
        backward_loops: int | None = None,
        gate_loops: int | None = None,
    ) -> LoopOutput:
        """Run the stack ``num_loops`` times.

        Args:
            ids_BS: token ids; under context parallelism this rank's positions
                (:func:`looplm.megatron.context_parallel.shard`).
            num_loops: how often; None takes ``model.num_loops``. More than in training is allowed.
            document_start_SB: index, in the whole sample, of the first position of each token's document; None if a
                sample is one document. On a GPU the host waits for it: give a tensor on the host.
            frozen_trunk: run everything but the gate without autograd (stage 2).
            backward_loops: how many of the last loops gradients flow through (``loss.backward_loops``); None for all.
            gate_loops: R of the gate's exit distribution; None takes ``model.num_loops``.

        Returns:
            hidden states, logits and states of each loop; logits of loops beyond ``gate_loops`` mean nothing.
        """
        num_loops = num_loops or self.model_config.num_loops
        spans, states, read = self.attention_spans(ids_BS, document_start_SB), list[Tensor](), list[Readout]()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen_trunk):
            h_SBD = entered_SBD = self.enter(ids_BS, spans)
            for loop in range(num_loops):
                if loop > 0 and loop + (backward_loops or num_loops) == num_loops:
                    h_SBD = h_SBD.detach()
                if self.injection is not None and loop > 0:
                    h_SBD = self.injection(h_SBD, entered_SBD)
                if self.step_embedding is not None:
                    h_SBD = self.step_embedding(h_SBD, loop)
                h_SBD = self._run(self.decoder, h_SBD, spans)
                states.append(h_SBD)
                read.append(self.read_out(h_SBD, spans))
        if frozen_trunk:
            # Megatron re-enables autograd around residual adds.
            read, states = [readout.detached() for readout in read], [h_SBD.detach() for h_SBD in states]
        state, logits = None, []
        for loop, readout in enumerate(read):
            logit_SB, state = self.gate_logit(readout.gate_SBD, state, loop, document_start_SB, gate_loops)
            logits.append(logit_SB)
        return LoopOutput(tuple(readout.head_SBD for readout in read), torch.stack(logits), tuple(states))

    def attention_spans(self, ids_BS: Tensor, document_start_SB: Tensor | None) -> Tensor | None:
        """Return which keys each query sees, in the core's form, for all layers and loops; None for all earlier ones.

        Args:
            ids_BS: token ids of this rank's positions.
            document_start_SB: as in :meth:`forward`.
        """
        if document_start_SB is None:
            if self.cp_group.size() == 1:
                return None
            document_start_SB = torch.zeros(ids_BS.t().shape, dtype=torch.int64)
        if self.attends_packed:
            return document_offsets(document_start_SB).to(DEVICE)
        return document_spans(document_start_SB, self.cp_group)

    def run_layers(self, ids_BS: Tensor, hidden_SBD: Tensor | None, spans: Tensor | None, loop: int) -> Tensor:
        """Run this pipeline rank's layers once: its part of one loop.

        Args:
            ids_BS: token ids, embedded where ``hidden_SBD`` is None, and again where a later loop injects them.
            hidden_SBD: from the loop, or the pipeline rank, before.
            spans: from :meth:`attention_spans`.
            loop: 0-based.
        """
        if hidden_SBD is None:
            hidden_SBD = self.enter(ids_BS, spans)
        elif self.injection is not None:
            hidden_SBD = self.injection(hidden_SBD, self.enter(ids_BS, spans))
        if self.step_embedding is not None:
            hidden_SBD = self.step_embedding(hidden_SBD, loop)
        return self._run(self.decoder, hidden_SBD, spans)

    def enter(self, ids_BS: Tensor, spans: Tensor | None) -> Tensor:
        """Return the input of the first loop; only the pipeline's first rank can.

        Args:
            ids_BS: token ids.
            spans: from :meth:`attention_spans`.
        """
        h_SBD = self.embedding(ids_BS, position_ids=None)
        return h_SBD if self.prelude is None else self._run(self.prelude, h_SBD, spans)

    def read_out(self, h_SBD: Tensor, spans: Tensor | None) -> "Readout":
        """Return what the gate and the head read of a loop's output; only the pipeline's last rank can.

        Args:
            h_SBD: the state after the loop.
            spans: from :meth:`attention_spans`.
        """
        norm = self.decoder.final_layernorm
        gate_SBD = norm.read(h_SBD) if isinstance(norm, ReadoutNorm) else h_SBD
        return Readout(gate_SBD, gate_SBD if self.coda is None else self._run(self.coda, h_SBD, spans))

    def _run(self, block: TransformerBlock, h_SBD: Tensor, spans: Tensor | None) -> Tensor:
        """Run a block; with ``parallel.recompute: loop`` backward keeps only its input."""

        def layers(h_SBD: Tensor) -> Tensor:
            # Asked for the whole sequence, Megatron's rotary embedding returns this context-parallel rank's part.
            split = self.cp_group.size() * (self.tp_group.size() if self.config.sequence_parallel else 1)
            rotary = None if self.rotary is None else self.rotary(len(h_SBD) * split)
            block.set_input_tensor(h_SBD)  # the input of blocks after the pipeline's first
            return block(h_SBD, attention_mask=spans, rotary_pos_emb=rotary)

        if self.recompute_loops and self.training and torch.is_grad_enabled():
            return recomputed(layers, h_SBD, block.config, self.tp_group)
        return layers(h_SBD)

    def gate_logit(
        self,
        h_SBD: Tensor,
        state_SBZ: Tensor | None,
        loop: int,
        document_start_SB: Tensor | None,
        gate_loops: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the gate's logit [S, B] after loop ``loop`` (0-based), for the whole sequence, and its state."""
        gate_loops = gate_loops or self.model_config.num_loops
        logit_SB, state_SBZ = self.gate(h_SBD, state_SBZ, loop, gate_loops, document_start_SB)
        if self.config.sequence_parallel:
            # One number per token is cheap to gather, and losses and their gradients are then equal on every rank.
            logit_SB = gather_from_sequence_parallel_region(
                logit_SB, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return logit_SB, state_SBZ
