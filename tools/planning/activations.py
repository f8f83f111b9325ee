"""What autograd keeps on one rank from forward to backward, in bytes.

Counted operation by operation in the engine's own layers, as Korthikanti et al. 2022 (arXiv 2205.05198, section 4) do for
a GPT layer. Their 34 S B D does not hold here: RMSNorm and sandwich norms, SwiGLU, latent attention, and fused attention,
which keeps a number per row instead of S x S scores. Every storage counts once, however many operations keep it.

One *pass* is one micro-batch through one loop of a rank's layers. All R passes of a micro-batch are kept until its
backward; under a pipeline, those that its schedule has in flight.
"""

from looplm.config import ModelConfig
from tools.planning.planned_run import PlannedRun

FP32 = 4
INDEX = 8


def peak_activation_bytes(candidate: PlannedRun, rank: int) -> float:
    """The most that pipeline rank ``rank`` keeps at a time, what backward makes again included."""
    config, mode = candidate.config, candidate.config.parallel.recompute
    passes, last = in_flight(candidate, rank), candidate.is_last(rank)
    if candidate.frozen:
        return passes * _gate(candidate) if last else 0.0
    layers, whole_layer = candidate.stages()[rank], layer_bytes(candidate)
    hidden = candidate.shard_tokens * config.model.hidden_size * candidate.number_bytes
    norm = _norm(candidate, config.model.hidden_size) * last
    losses, deepest = (_losses(candidate), _deepest(candidate)) if last else (0.0, 0.0)
    # Backward goes through the losses first: without a pipeline those of all loops are gone before anything is made again.
    gone = losses * (passes if config.parallel.pipeline == 1 else 1) + deepest
    # What is made again begins with a norm that keeps its input, which is there already; an fp32 copy of it is not.
    again = -hidden if candidate.fused_norms or candidate.number_bytes == FP32 else 0.0
    if mode == "full":  # what enters each layer; one is made again at a time, the loop-end norm's backward is over
        kept, again, gone = layers * hidden + norm, again + whole_layer, gone + norm
    elif mode == "loop":  # what enters the pass; all of it is made again
        kept, again = hidden, again + layers * whole_layer + norm
    else:
        kept, again = layers * whole_layer + norm, 0.0
    masks = mask_bytes(candidate) * (passes if config.parallel.pipeline > 1 and mode != "loop" else 1)
    return passes * (kept + losses) + masks + deepest + max(0.0, again - gone)


def in_flight(candidate: PlannedRun, rank: int) -> int:
    """Passes whose activations a rank keeps at the same time.

    Megatron's interleaved 1F1B starts with 2 (P - 1 - rank) + (R - 1) P forward passes and then alternates.
    """
    loops, ranks = candidate.config.model.num_loops, candidate.config.parallel.pipeline
    if ranks == 1:
        return loops
    return min(loops * candidate.micro_batches, 2 * (ranks - 1 - rank) + (loops - 1) * ranks + 1)


def layer_bytes(candidate: PlannedRun) -> float:
    """One layer, one pass."""
    model, e, tensor = candidate.config.model, candidate.number_bytes, candidate.config.parallel.tensor
    d = model.hidden_size
    norms = (4 if model.sandwich_norm else 2) * _norm(candidate, d)
    inputs = 2 * candidate.shard_tokens * d * e  # of the first projections of attention and feed-forward layer
    # Both halves of the first product, silu of the one, the other (Megatron adds an offset of 0), their product.
    feed_forward = 5 * candidate.tokens * model.ffn_hidden_size * e / tensor
    return norms + inputs + feed_forward + _attention(candidate) + _rotary(candidate)


def _norm(candidate: PlannedRun, width: int) -> float:
    """RMSNorm over ``width`` numbers: its input and 1 / rms; composed of several kernels, input and result in fp32."""
    kept = width * candidate.number_bytes if candidate.fused_norms else 2 * width * FP32
    return candidate.shard_tokens * (kept + FP32)


def _attention(candidate: PlannedRun) -> float:
    """Between the input of the first projection and the output of the last."""
    layout, e = candidate.config.parallel, candidate.number_bytes
    queries, keys, values = _head_widths(candidate.config.model)
    tokens = candidate.tokens / layout.tensor
    whole = tokens * layout.context  # keys and values of the whole sequence, gathered
    latents, padded = _latents(candidate), max(values[0], keys[0]) * values[1]
    value, query, key = values[0] * values[1], queries[0] * queries[1], keys[0] * keys[1]
    out = queries[1] * max(values[0], queries[0])  # as wide as the padded values
    mha = candidate.config.model.attention == "mha"
    row_sums = tokens * queries[1] * FP32
    if layout.recompute == "selective":
        # The core's inputs, and its result as the last projection's input; plain attention's values lie in the output of
        # the one projection that makes queries, keys and values.
        inputs = query + key + (query + key + value if mha else value)
        return latents + tokens * (inputs + queries[1] * values[0]) * e
    cut = 0 if out == queries[1] * values[0] and layout.context == 1 else queries[1] * values[0]
    own = tokens * (query + out + cut) * e + row_sums
    if layout.context == 1:
        return latents + own + tokens * (key + (query + key + value if mha else padded)) * e
    gathered = key + value + (padded if padded != value else 0)
    return latents + own + whole * gathered * e


def _head_widths(model: ModelConfig) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Width and number of the heads of queries, keys and values."""
    width, heads = model.attention_head_dim, model.num_attention_heads
    if model.attention == "mha":
        return (width, heads), (width, model.query_groups), (width, model.query_groups)
    return (width, heads), (width, heads), (model.v_head_dim, heads)


def _latents(candidate: PlannedRun) -> float:
    """MLA's latents: each is normalised, and is the input of an up-projection."""
    model, e = candidate.config.model, candidate.number_bytes
    if model.attention == "mha":
        return 0.0
    widths = [model.kv_lora_rank] + ([model.q_lora_rank] if model.q_lora_rank else [])
    kept = sum(_norm(candidate, width) + candidate.shard_tokens * width * e for width in widths)
    # The rotary key comes out of the same product, so that it stays as long as the latent does; an fp32 copy is without it.
    shared = candidate.fused_norms or e == FP32
    return kept + (candidate.shard_tokens * model.qk_rope_head_dim * e if shared else 0.0)


def _rotary(candidate: PlannedRun) -> float:
    """Cosines and sines, for queries and for keys; the same for all sequences of a micro-batch."""
    model, data = candidate.config.model, candidate.config.data
    width = model.qk_rope_head_dim if model.attention == "mla" else model.attention_head_dim
    return 4 * data.seq_length / candidate.config.parallel.context * width * candidate.number_bytes


def mask_bytes(candidate: PlannedRun) -> float:
    """The additive document mask, [B, 1, S, T]; the layers share it, and without a pipeline the loops too. Of a pipeline's
    passes each has its own, which recompute=loop makes again instead of keeping it."""
    config, data = candidate.config, candidate.config.data
    if not data.document_masking or config.engine.packs_documents(config.parallel):
        return 0.0
    return candidate.tokens * data.seq_length * candidate.number_bytes


def _losses(candidate: PlannedRun) -> float:
    """After a loop: what the chunked cross-entropy keeps, the kept logits if there are any, and the gate."""
    config, e = candidate.config, candidate.number_bytes
    layout, loss, d = config.parallel, config.loss, config.model.hidden_size
    labels = candidate.tokens * (INDEX + 2 * FP32)
    logits = 0.0 if loss.head_recompute else candidate.tokens * config.model.vocab_size / layout.tensor * FP32
    own = layout.sequence_parallel or not _shares_hidden(candidate)
    hidden = candidate.tokens * d * e if own else 0.0  # gathered over the tensor-parallel ranks
    return labels + logits + hidden + _gate(candidate)


def _shares_hidden(candidate: PlannedRun) -> bool:
    """Whether the head's input is the very tensor that the next loop keeps."""
    layout = candidate.config.parallel
    if layout.pipeline > 1:
        return False
    return candidate.fused_norms or candidate.number_bytes == FP32 or layout.recompute in ("full", "loop")


def _deepest(candidate: PlannedRun) -> float:
    """The hidden state after the last loop, which no next loop keeps; the gate reads it, and without TP the head too."""
    config = candidate.config
    if not _shares_hidden(candidate) or (config.parallel.sequence_parallel and candidate.number_bytes != FP32):
        return 0.0
    return candidate.shard_tokens * config.model.hidden_size * candidate.number_bytes


def _gate(candidate: PlannedRun) -> float:
    """After a loop: the hidden state in fp32, where it is not already, and what the GRU cell keeps of its state."""
    config, layout = candidate.config, candidate.config.parallel
    kept_anyway = not candidate.frozen and not (layout.pipeline > 1 and layout.sequence_parallel)
    copy = 0 if candidate.number_bytes == FP32 and kept_anyway else config.model.hidden_size
    state = 9 * config.gate.state_size if config.gate.kind == "lru" else 0
    return candidate.shard_tokens * (copy + state) * FP32
