"""Bytes that autograd keeps on one rank from forward to backward.

Counted operation by operation in our own layers, as Korthikanti et al. 2022 (arXiv 2205.05198, section 4) do for a GPT
layer. Their 34 S B D does not apply here because of RMSNorm and sandwich norms, SwiGLU, latent attention, and fused
attention, which keeps one number per row instead of S x S scores. Every storage counts once, no matter how many
operations keep it.

One *pass* is one micro-batch through one loop of a rank's layers. All R passes of a micro-batch are kept until its
backward. Under a pipeline these are the passes that its schedule has in flight.
"""

from math import ceil

from looplm.parameters import gate_rows
from tools.planning.planned_run import PlannedRun

FP32 = 4
STEP_STATES = 7  # kept by a step of latent reasoning, in latents: the cell's products, 3, its gates, 2, and states, 2


def peak_activation_bytes(run: PlannedRun, rank: int) -> float:
    """Return the most bytes that pipeline rank ``rank`` keeps at any time, including what backward recomputes."""
    config, mode = run.config, run.config.parallel.recompute
    if run.frozen or mode not in ("full", "loop"):
        return forward_activation_bytes(run, rank)
    passes, last = in_flight(run, rank), run.is_last(rank)
    layers, whole_layer = run.layers_per_rank()[rank], layer_bytes(run)
    norm = _norm_bytes(run, config.model.hidden_size) * last
    losses, deepest = (_loss_bytes(run), _deepest_bytes(run)) if last else (0.0, 0.0)
    # Backward starts with the losses. Without a pipeline those of all loops are freed before anything is recomputed.
    freed = losses * (passes if config.parallel.pipeline == 1 else 1)
    # Recomputation starts with a norm, whose input is already kept. After the loop-end norm's backward, ``full``
    # recomputes one layer at a time, and ``loop`` all of the pass.
    recomputed = whole_layer - norm if mode == "full" else layers * whole_layer + norm
    hidden, coda = run.shard_tokens * config.model.hidden_size * run.number_bytes, config.model.coda_layers * last
    # The gate's backward comes first; a coda keeps the states of its loops longer.
    more = recomputed - hidden - freed - (min(deepest, hidden) if coda else deepest)
    if coda:  # the last loop's coda comes before, and reads the deepest state
        of_coda = whole_layer - norm if mode == "full" else coda * whole_layer + norm
        more = max(more, of_coda - hidden - freed)
    return forward_activation_bytes(run, rank) + max(0.0, more)


def _unlooped_bytes(run: PlannedRun, rank: int) -> float:
    """Return the bytes kept of the prelude, once for each micro-batch in flight, and of the coda, in every pass."""
    model, passes = run.config.model, in_flight(run, rank)
    prelude = model.prelude_layers if rank == 0 else 0
    coda = model.coda_layers if run.is_last(rank) else 0
    hidden = run.shard_tokens * model.hidden_size * run.number_bytes
    layer, ends = layer_bytes(run), _norm_bytes(run, model.hidden_size)
    if run.config.parallel.recompute == "full":
        layer = hidden
    elif run.config.parallel.recompute == "loop":
        layer, ends, prelude, coda = hidden, 0.0, min(1, prelude), min(1, coda)
    # The coda's input is kept anyway, by the next loop or the gate; or by neither, after a step embedding in bf16.
    alone = model.step_embedding != "none" and run.number_bytes != FP32 and run.config.parallel.pipeline == 1
    own = coda * layer + ends - (0.0 if alone else hidden) if coda else 0.0
    return ceil(passes / run.num_loops) * prelude * layer + passes * own


def _injection_bytes(run: PlannedRun, rank: int) -> float:
    """Return the bytes kept by the injection, in every pass of the first rank but those of the first loop.

    ``linear`` keeps its joined input, ``diagonal`` the state, and under a pipeline the embedding, which is looked up
    again for every loop. Without one, the gate keeps the state, which is no longer a pass's input. What recomputes has
    freed it by the time of the peak.
    """
    model, layout, passes = run.config.model, run.config.parallel, in_flight(run, rank)
    if rank != 0 or model.injection == "none":
        return 0.0
    states = {"additive": 0, "diagonal": 1, "linear": 2}[model.injection]
    if layout.pipeline > 1:
        states += model.injection == "diagonal"
    elif layout.recompute in ("none", "selective"):
        states += model.injection != "diagonal"
    later = passes - ceil(passes / run.num_loops)
    return later * states * run.shard_tokens * model.hidden_size * run.number_bytes


def forward_activation_bytes(run: PlannedRun, rank: int) -> float:
    """Return the bytes that pipeline rank ``rank`` keeps when the last of the passes in flight has ended."""
    config, mode = run.config, run.config.parallel.recompute
    passes, last = in_flight(run, rank), run.is_last(rank)
    if run.frozen:
        return passes * _gate_bytes(run) if last else 0.0
    layers, hidden = run.layers_per_rank()[rank], run.shard_tokens * config.model.hidden_size * run.number_bytes
    norm = _norm_bytes(run, config.model.hidden_size) * last
    losses, deepest = (_loss_bytes(run), _deepest_bytes(run)) if last else (0.0, 0.0)
    if mode == "full":  # keeps every layer's input
        kept = layers * hidden + norm
    elif mode == "loop":  # keeps the pass's input
        kept = hidden
    else:
        kept = layers * layer_bytes(run) + norm
    return passes * (kept + losses) + deepest + _unlooped_bytes(run, rank) + _injection_bytes(run, rank)


def in_flight(run: PlannedRun, rank: int) -> int:
    """Return the number of passes whose activations a rank keeps at the same time.

    Megatron's interleaved 1F1B starts with 2 (P - 1 - rank) + (R - 1) P forward passes and then alternates. A single
    loop takes the plain schedule, which starts with P - 1 - rank.
    """
    loops, ranks = run.num_loops, run.config.parallel.pipeline
    if ranks == 1:
        return loops
    if loops == 1:
        return min(run.micro_batches, ranks - rank)
    return min(loops * run.micro_batches, 2 * (ranks - 1 - rank) + (loops - 1) * ranks + 1)


def layer_bytes(run: PlannedRun) -> float:
    """Return the bytes kept of one layer in one pass."""
    return _layer_bytes(run, selective=run.config.parallel.recompute == "selective")


def _layer_bytes(run: PlannedRun, selective: bool) -> float:
    model, e, tensor = run.config.model, run.number_bytes, run.config.parallel.tensor
    d = model.hidden_size
    norms = (4 if model.sandwich_norm else 2) * _norm_bytes(run, d)
    inputs = 2 * run.shard_tokens * d * e  # of the first projections of attention and feed-forward layer
    # Both halves of the first product, from which backward computes silu again, and the second product's input.
    feed_forward = 3 * run.tokens * model.ffn_hidden_size * e / tensor
    return norms + inputs + feed_forward + _attention_bytes(run, selective) + _rotary_bytes(run)


def written_bytes(run: PlannedRun) -> float:
    """Return the bytes that a layer writes in forward, of what it could keep.

    That is what it keeps if nothing is recomputed, and MHA's one projection, from which attention copies its queries,
    keys and values.
    """
    widths, heads = run.config.model.attention_widths, run.config.model.num_attention_heads
    written = _layer_bytes(run, selective=False)
    if widths.latents or run.config.model.qk_norm:
        return written  # there is no such projection, or it is kept
    width = widths.query_key * (heads + widths.key_heads) + widths.value * widths.key_heads
    return written + run.tokens / run.config.parallel.tensor * width * run.number_bytes


def core_bytes(run: PlannedRun) -> float:
    """Return the part of :func:`written_bytes` that attention's core writes; ``selective`` writes it again in backward.

    That is the result, the sums of its rows, and copies: of the keys and values of all context-parallel ranks, or else
    of MHA's values, which are a view of the one projection.
    """
    layout, widths, heads = run.config.parallel, run.config.model.attention_widths, run.config.model.num_attention_heads
    copied = widths.value * widths.key_heads * (not widths.latents)
    if layout.context > 1:
        copied = layout.context * widths.key_heads * (widths.query_key + widths.value)
    numbers = copied + widths.value * heads
    padding = _padding_bytes(run) if run.padded_heads else 0.0
    return run.tokens / layout.tensor * (numbers * run.number_bytes + heads * FP32) + padding


def _norm_bytes(run: PlannedRun, width: int) -> float:
    """Return the bytes kept by an RMSNorm of ``width`` channels: its input and 1 / rms."""
    return run.shard_tokens * (width * run.number_bytes + FP32)


def _attention_bytes(run: PlannedRun, selective: bool) -> float:
    """Return the bytes kept between the input of the first projection and the output of the last."""
    layout, e = run.config.parallel, run.number_bytes
    model = run.config.model
    widths, heads = model.attention_widths, model.num_attention_heads
    tokens = run.tokens / layout.tensor
    value, query, key = widths.value * widths.key_heads, widths.query_key * heads, widths.query_key * widths.key_heads
    out, latents, row_sums = widths.value * heads, _latent_bytes(run), tokens * heads * FP32
    if selective:
        # The core's inputs, and its result, which is the last projection's input. Plain attention's values are a view
        # of the output of the one projection that computes queries, keys and values.
        inputs = query + key + (value if widths.latents else query + key + value)
        return latents + tokens * (inputs + out) * e + _output_gate_bytes(run)
    keys = tokens * layout.context * (key + value)  # of the whole sequence
    projection = query + key + value if model.qk_norm else 0  # kept by the norms of its heads
    padding = _padding_bytes(run) if run.padded_heads else 0.0
    return latents + (tokens * (query + out + projection) + keys) * e + row_sums + padding + _output_gate_bytes(run)


def _output_gate_bytes(run: PlannedRun) -> float:
    """Return the bytes kept by the gate on attention's output: the sigmoids, and the product beside the output."""
    model = run.config.model
    if model.attention_gate == "none":
        return 0.0
    width = model.attention_gate_width + model.num_attention_heads * model.attention_widths.value
    return run.tokens / run.config.parallel.tensor * width * run.number_bytes


def _padding_bytes(run: PlannedRun) -> float:
    """Return the bytes kept because torch's kernels on a GPU take values as wide as queries and keys.

    The output is then kept twice, padded and without its padding. Gathered values are kept with and without.
    """
    layout, widths, heads = run.config.parallel, run.config.model.attention_widths, run.config.model.num_attention_heads
    wider = widths.query_key - widths.value
    if wider <= 0:
        return 0.0
    tokens = run.tokens / layout.tensor
    whole = widths.query_key if layout.context > 1 else wider  # values in the gathered tensor stay there
    return tokens * (widths.query_key * heads + layout.context * whole * widths.key_heads) * run.number_bytes


def _latent_bytes(run: PlannedRun) -> float:
    """Return the bytes kept of MLA's latents: each is normalized, and is the input of an up-projection."""
    widths, e = run.config.model.attention_widths, run.number_bytes
    if not widths.latents:
        return 0.0
    kept = sum(_norm_bytes(run, width) + run.shard_tokens * width * e for width in widths.latents)
    if not run.config.model.kv_latent_norm:
        kept -= _norm_bytes(run, widths.latents[0])
    kept += _reasoning_bytes(run)
    return kept + run.shard_tokens * widths.rotary * e  # the rotary key is part of the same product as the latent


def _reasoning_bytes(run: PlannedRun) -> float:
    """Return the bytes kept of the unit that refines the latent: of each step what its cell reads and computes.

    The last state is counted with the latents, as the input of the up-projection.
    """
    model, steps = run.config.model, run.config.model.latent_iterations
    if steps == 0:
        return 0.0
    latents, in_fp32 = steps * STEP_STATES, 0
    if model.latent_halting:
        latents += steps  # stacked for their mean
        if run.number_bytes == FP32:  # the readout keeps the states themselves; the cell has kept all but the last
            latents += 1
        else:  # the readout keeps an fp32 copy
            in_fp32 += steps
    return run.shard_tokens * model.kv_lora_rank * (latents * run.number_bytes + in_fp32 * FP32)


def _rotary_bytes(run: PlannedRun) -> float:
    """Return the bytes of cosines and sines for queries and for keys; all sequences of a micro-batch share them."""
    length, width = run.config.data.seq_length, run.config.model.attention_widths.rotary
    return 4 * length / run.config.parallel.context * width * run.number_bytes


def _loss_bytes(run: PlannedRun) -> float:
    """Return the bytes kept after a loop, on average, by the head, the gate, and the penalty of the states.

    The head has computed the hidden state's gradient, unless the loop's losses have none.
    """
    losses = run.tokens * 2 * FP32  # each token's loss and its weight
    gradient = run.shard_tokens * run.config.model.hidden_size * run.number_bytes
    with_gradient = run.loops_with_head_gradients / run.num_loops
    return losses + gradient * with_gradient + _gate_bytes(run) + _penalty_bytes(run)


def _penalty_bytes(run: PlannedRun) -> float:
    """Return the bytes kept by the penalty of the states: fp32 differences of the loops."""
    if not run.config.loss.stability:
        return 0.0
    return (run.num_loops - 1) / run.num_loops * run.shard_tokens * run.config.model.hidden_size * FP32


def _deepest_bytes(run: PlannedRun) -> float:
    """Return the bytes of the hidden states that the gate reads and no later loop keeps.

    That is the one after the last loop. With a step embedding it is every one, because a loop keeps the sum.
    In bf16 the gate keeps an fp32 copy instead, and under a pipeline every loop's hidden state is its own
    (:func:`_gate_bytes`).
    """
    if run.config.parallel.pipeline > 1 or run.number_bytes != FP32 or not run.config.loss.trains_gate:
        return 0.0
    model = run.config.model
    return (run.num_loops if model.step_embedding != "none" else 1) * run.shard_tokens * model.hidden_size * FP32


def _gate_bytes(run: PlannedRun) -> float:
    """Return the bytes kept after a loop by the gate: an fp32 hidden state unless shared, and values of its own.

    A gate that is not trained needs no input for the gradients of its weights.
    """
    config, layout = run.config, run.config.parallel
    kept_anyway = not run.frozen and layout.pipeline == 1 and run.number_bytes == FP32
    copy = 0 if kept_anyway or not config.loss.trains_gate else config.model.hidden_size
    return run.shard_tokens * (copy + gate_rows(config.model, config.gate).kept_values) * FP32
