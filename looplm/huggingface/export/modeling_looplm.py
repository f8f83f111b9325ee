"""LoopLM for transformers: one stack of blocks run several times, a norm at the end of every loop, an exit gate.

This file travels inside an export and needs only torch and transformers (4.54 or later)::

    input_ids --embed, prelude--> h --+--> shared stack --> norm --> h --+--> coda --> lm_head     loop r
                                      |                                  +--> early_exit_gate      loop r
                                      +------- R times, same weights <---+

Most models have no blocks outside the loops. A coda reads each token as of the loop in which it exited.

Shapes: B batch, N rows of the batch that still run, S tokens of this call, T tokens seen (cached ones and these), D
hidden, V vocabulary, R loops. Loops count from 0, depth from 1.

Sources: loops, loss, Q-exit, shared caches: Ouro (arXiv 2510.25741).
"""

from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.utils import can_return_tuple, logging

from .cache_looplm import LoopLMCache, View
from .configuration_looplm import LoopLMConfig
from .gates_looplm import GATES, Exits, exit_log_probs
from .latent_reasoning_looplm import LoopLMRefiningCell
from .layers_looplm import LoopLMBlock
from .loop_inputs_looplm import INJECTIONS, LoopLMDiagonalInjection, LoopLMLinearInjection, LoopLMStepEmbedding
from .norm_looplm import LoopLMRMSNorm
from .outputs_looplm import LoopLMCausalOutput, LoopLMModelOutput

_logger = logging.get_logger(__name__)
# Arguments that transformers passes to every model, and that change nothing here.
_UNUSED = {"cache_position", "token_type_ids", "cu_seq_lens_k", "max_length_q", "max_length_k", "output_attentions"}
_OWN_START = (LoopLMDiagonalInjection, LoopLMLinearInjection, LoopLMStepEmbedding, LoopLMRefiningCell)


class LoopLMPreTrainedModel(PreTrainedModel):
    """Initial weights, and the properties that transformers asks for."""

    config: LoopLMConfig
    config_class = LoopLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LoopLMBlock", "LoopLMRecurrentGate", "LoopLMMLPGate"]  # noqa: RUF012
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize as in pretraining. A module with initial values of its own has them as attributes."""
        config = self.config
        if isinstance(module, _OWN_START):
            module.start()
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=getattr(module, "start_std", config.initializer_range))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            # An untied embedding gets the scale of the loop-end norm's output, which every later loop reads.
            std = config.initializer_range if config.tie_word_embeddings else 1.0
            nn.init.normal_(module.weight, std=config.embedding_initializer_range or std)
        elif isinstance(module, LoopLMRMSNorm):
            nn.init.constant_(module.weight, module.start)
        elif isinstance(module, nn.GRUCell):
            for weight in module.parameters():
                nn.init.uniform_(weight, -(module.hidden_size**-0.5), module.hidden_size**-0.5)


class LoopLMModel(LoopLMPreTrainedModel):
    """Embedding, prelude, shared stack, loop-end norm, exit gate, coda."""

    def __init__(self, config: LoopLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        ends = accumulate((config.num_hidden_layers, config.prelude_layers, config.coda_layers), initial=0)
        self.layers, self.prelude, self.coda = (
            nn.ModuleList(LoopLMBlock(config, block) for block in range(first, end)) for first, end in pairwise(ends)
        )
        self.norm = LoopLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.coda_norm = LoopLMRMSNorm(config.hidden_size, config.rms_norm_eps) if config.coda_layers else None
        self.injection = None if config.injection == "none" else INJECTIONS[config.injection](config)
        self.step_embedding = None if config.step_embedding == "none" else LoopLMStepEmbedding(config)
        if config.early_exit_gate not in GATES:
            raise ValueError(
                f"early_exit_gate: {config.early_exit_gate!r} is not allowed; give one of {', '.join(GATES)}"
            )
        self.early_exit_gate = GATES[config.early_exit_gate](config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LoopLMCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        num_loops: int | None = None,
        early_exit_threshold: float | None = None,
        output_hidden_states: bool | None = None,
        output_gate_logits: bool = False,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> LoopLMModelOutput:
        """Run the loops.

        Args:
            input_ids: [B, S].
            attention_mask: [B, T], 0 for padding on either side; it covers the cached tokens too.
            position_ids: [B, S]; None counts each row's tokens. Where they do not go up by one, another document
                begins, which sees nothing of the one before.
            past_key_values: cache of the previous tokens.
            inputs_embeds: [B, S, D] in place of ``input_ids``.
            use_cache: return a cache; None takes the config's, and no cache while gradients are recorded.
            num_loops: depth; None takes the config's.
            early_exit_threshold: None takes the config's.
            output_hidden_states: return what the head reads after each loop; a coda then runs in each.
            output_gate_logits: return the gate's logits; beyond ``total_ut_steps`` they mean nothing.
            seq_idx: [B, S], the number of each token's document, if several are packed into a row.
            cu_seq_lens_q: the ends of the documents of a single row, beginning with 0.
            kwargs: other arguments that transformers passes to every model; unused, with a warning for an
                argument that transformers does not pass.

        Raises:
            ValueError: the arguments contradict each other.
        """
        if kwargs.get("output_attentions"):
            raise ValueError(
                "output_attentions: True is not allowed, because the attention kernels return no weights; leave it out"
            )
        for name in kwargs.keys() - _UNUSED:
            _logger.warning_once(f"{name}: has no effect on a LoopLM; leave it out, or correct its name")
        depth, threshold = self._plan(num_loops, early_exit_threshold)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: give these or inputs_embeds, one of the two")
        h_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values, use_cache)
        past = 0 if cache is None else cache.begin(depth)
        documents = position_ids, seq_idx, cu_seq_lens_q
        view = View.of(self.config, h_BSD, attention_mask, documents, cache, past)

        # In a shared cache a past token is seen as of its last loop, so a token that exits need not run any further.
        shared = cache if cache is not None and cache.shared and past > 0 and h_BSD.size(1) == 1 else None
        if shared is not None and threshold < 1 and (output_hidden_states or output_gate_logits):
            raise ValueError(
                "output_hidden_states: with kv_cache=last a token that exits has no later states; "
                "give early_exit_threshold=1, or a cache per loop"
            )
        reads_text = self.config.gate_sequence_level and cache is not None  # then the gate must run for every token
        exits = Exits(h_BSD, threshold, depth) if threshold < 1 else None
        hidden, logits, state_NSZ = [], [], None
        for block in self.prelude:
            h_BSD = block(h_BSD, view, 0)
        entered_BSD, whole = h_BSD, view
        for loop in range(depth):
            if loop > 0 and self.injection is not None:
                h_BSD = self.injection(h_BSD, entered_BSD)
            if self.step_embedding is not None:
                h_BSD = self.step_embedding(h_BSD, loop)
            for block in self.layers:
                h_BSD = block(h_BSD, view, loop)
            readable_BSD = self.norm(h_BSD)
            if self.config.loop_norm == "state":
                h_BSD = readable_BSD
            leaving_BSD = readable_BSD if self.coda_norm is None else h_BSD
            if output_hidden_states:
                hidden.append(self._read_out(leaving_BSD, view, loop))
            if exits is None and not output_gate_logits and not reads_text:
                continue
            with torch.autocast(h_BSD.device.type, enabled=False):
                logit_NS, state_NSZ = self.early_exit_gate(readable_BSD, state_NSZ, view, loop)
            logits.append(logit_NS)
            if exits is None:
                continue
            stay_N = exits.record(leaving_BSD, logit_NS, loop, view.rows)
            if shared is not None and not stay_N.all():
                if not stay_N.any():
                    shared.skip(range(loop + 1, depth))
                    break
                stay = stay_N.nonzero().squeeze(-1)
                view, h_BSD, entered_BSD = view.narrow(stay), _take(h_BSD, stay), _take(entered_BSD, stay)
                state_NSZ = None if state_NSZ is None else _take(state_NSZ, stay)
        if exits is not None:
            last_BSD = self._read_out(exits.h_BSD, whole, len(hidden))
        else:
            last_BSD = hidden[-1] if hidden else self._read_out(leaving_BSD, whole, 0)
        return LoopLMModelOutput(
            last_hidden_state=last_BSD,
            past_key_values=cache,
            hidden_states=tuple(hidden) if output_hidden_states else None,
            gate_logits=torch.stack(logits) if output_gate_logits else None,
            exit_depths=None if exits is None else exits.depth_BS,
        )

    def _read_out(self, leaving_BSD: Tensor, view: View, runs: int) -> Tensor:
        """Return what the head reads of tokens that leave the loops with these states.

        Args:
            leaving_BSD: the states; without a coda, normed.
            view: that of all rows.
            runs: how often the coda ran in this call before. Its newest entries replace those in the cache.
        """
        if self.coda_norm is None:
            return leaving_BSD
        for block in self.coda:
            leaving_BSD = block(leaving_BSD, view, runs)
        return self.coda_norm(leaving_BSD)

    def _plan(self, num_loops: int | None, threshold: float | None) -> tuple[int, float]:
        """Return depth and threshold; raise if they are not allowed."""
        config = self.config
        num_loops = config.num_loops if num_loops is None else num_loops
        threshold = config.early_exit_threshold if threshold is None else threshold
        depth = config.total_ut_steps if num_loops is None else num_loops
        if depth < 1:
            raise ValueError(f"num_loops: {depth} is not allowed; give at least 1")
        if not 0 <= threshold <= 1:
            raise ValueError(f"early_exit_threshold: {threshold} is not allowed; give a number from 0 to 1")
        if threshold < 1 and not config.gate_trained:
            raise ValueError(
                f"early_exit_threshold: {threshold} is not allowed; this model's gate was never trained; give 1"
            )
        if threshold < 1 and depth > config.total_ut_steps:
            raise ValueError(
                f"num_loops: {depth} is not allowed with early_exit_threshold below 1; "
                f"the gate knows loops 1 to {config.total_ut_steps}"
            )
        return depth, threshold

    def _cache(self, given: LoopLMCache | None, use_cache: bool | None) -> LoopLMCache | None:
        if self.gradient_checkpointing and self.training:
            return None  # the recomputation in backward would store its entries again
        if given is not None and not isinstance(given, LoopLMCache):
            raise ValueError(
                f"past_key_values: {type(given).__name__} is not allowed, because each loop needs entries of its own; "
                "give LoopLMCache(model.config), or nothing"
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not torch.is_grad_enabled()
        return LoopLMCache(self.config) if given is None and use_cache else given


class LoopLMForCausalLM(LoopLMPreTrainedModel, GenerationMixin):
    """The model with its head, as ``AutoModelForCausalLM`` loads it."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LoopLMConfig) -> None:
        super().__init__(config)
        self.model = LoopLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Return False: the cache that ``generate`` creates by itself has no room for loops."""
        return False

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation: {generation_config.cache_implementation!r} is not allowed, because each loop "
                "needs entries of its own; leave it out"
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = LoopLMCache(self.config)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:  # called for assisted decoding only
        if kwargs["generation_config"].assistant_early_exit is not None:
            raise ValueError(
                "assistant_early_exit: it is not allowed, because it counts layers; give assistant_model, the same "
                "model with a smaller num_loops"
            )
        if kwargs["model_kwargs"]["past_key_values"].shared:
            raise ValueError(
                "kv_cache: last is not allowed with drafts (assistant_model, prompt_lookup_num_tokens), because tokens "
                "that are checked together see each other as of another loop; give per_loop"
            )
        return super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LoopLMCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_loops: int | None = None,
        early_exit_threshold: float | None = None,
        output_hidden_states: bool | None = None,
        output_gate_logits: bool = False,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> LoopLMCausalOutput:
        """Run the loops and the head. Arguments that are not listed are those of :meth:`LoopLMModel.forward`.

        Args:
            labels: [B, S], the tokens themselves, or -100 for tokens that do not count. The loss is that of
                pretraining's first stage without its entropy term: the expectation of the loops' cross-entropies under
                the exit distribution, not the cross-entropy of mixed predictions; a mean over the tokens that count.
            logits_to_keep: number of last tokens, or indices of tokens, to compute logits for; 0 for all.
            num_loops: depth. Loops beyond ``total_ut_steps`` do not enter the loss.
            num_items_in_batch: the number by which Trainer divides the loss of a part of a batch.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            num_loops=num_loops,
            early_exit_threshold=early_exit_threshold,
            output_hidden_states=output_hidden_states or labels is not None,
            output_gate_logits=output_gate_logits or labels is not None,
            return_dict=True,
            **kwargs,
        )
        loss = None
        if labels is not None:
            loss = self._expected_loss(output.hidden_states, output.gate_logits, labels, num_items_in_batch)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return LoopLMCausalOutput(
            loss=loss,
            logits=self.lm_head(output.last_hidden_state[:, kept]),
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states if output_hidden_states else None,
            gate_logits=output.gate_logits if output_gate_logits else None,
            exit_depths=output.exit_depths,
        )

    def _expected_loss(
        self,
        hidden: tuple[Tensor, ...],
        gate_logit_RBS: Tensor,
        labels_BS: Tensor,
        num_items_in_batch: int | Tensor | None,
    ) -> Tensor:
        trained = min(len(hidden), self.config.total_ut_steps)
        target_BS = labels_BS[:, 1:]
        states = [h_BSD[:, :-1] for h_BSD in hidden[:trained]]
        losses = [checkpoint(self._token_loss, h_BSD, target_BS, use_reentrant=False) for h_BSD in states]
        loss_RBS = torch.stack(losses)
        p_RBS = exit_log_probs(gate_logit_RBS[:trained, :, :-1]).exp().to(loss_RBS.device)
        total = (p_RBS * loss_RBS).sum()  # a label of -100 has a loss of 0 in every loop
        counted = (target_BS != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return total / torch.as_tensor(counted, device=total.device)

    def _token_loss(self, h_BSD: Tensor, target_BS: Tensor) -> Tensor:
        """Return the loss [B, S] in fp32; under :func:`checkpoint`, the logits of one loop exist at a time."""
        logits_NV = self.lm_head(h_BSD).float().flatten(0, 1)
        target_N = target_BS.flatten().to(logits_NV.device)
        loss_N = F.cross_entropy(logits_NV, target_N, ignore_index=-100, reduction="none")
        return loss_N.view_as(target_BS)


def _take(x_B: Tensor, rows: Tensor) -> Tensor:
    """Return some rows; a model that is spread over devices keeps their indices elsewhere."""
    return x_B[rows.to(x_B.device)]
