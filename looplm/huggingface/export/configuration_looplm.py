"""Configuration of a LoopLM for transformers. This file travels inside an export and needs only transformers."""

from typing import Any

from transformers import PretrainedConfig

_CHOICES = {
    "attention": ("mla", "mha"),
    "loop_norm": ("state", "readout"),
    "injection": ("none", "additive", "diagonal", "linear"),
    "step_embedding": ("none", "learned"),
    "attention_gate": ("none", "head", "element"),
    "kv_cache": ("per_loop", "last"),
}


class LoopLMConfig(PretrainedConfig):
    """Configuration of a looped language model. Keys have Ouro's names where Ouro has them, and DeepSeek-V3's for MLA.

    The depth is a matter of each use. It may be overridden when a model is loaded (``from_pretrained(path,
    num_loops=2)``) or called (``model(ids, num_loops=2)``). The same holds for ``early_exit_threshold``.

    Args:
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: inner width of the SwiGLU feed-forward layer.
        num_hidden_layers: blocks in the shared stack (L).
        prelude_layers: blocks of their own before the loops, run once.
        coda_layers: blocks of their own, and a norm, between the end of a loop and the head.
        loop_norm: what the norm at the end of a loop is for: state (the next loop and the coda read its output, as in
            Ouro) or readout (the gate does, and without a coda the head; the others read the residual stream).
        injection: what each loop after the first reads: none, the state h; additive, h + e; diagonal, a h + b e with
            vectors a and b; or linear, W [h; e]. e is what entered the first loop.
        step_embedding: what tells a loop which one it is: none, or learned, a vector of each that is added before it.
        num_attention_heads: attention heads.
        num_key_value_heads: mha only: heads of keys and values; None for one per attention head.
        head_dim: mha only: width of a head; None for hidden_size / num_attention_heads.
        qkv_bias: mha only: biases on the projections of queries, keys and values, as in Qwen2.
        qk_norm: mha only: an RMSNorm over each head's query and key before the rotation, as in Qwen3.
        attention: mla (multi-head latent attention, DeepSeek-V3) or mha (multi-head or grouped-query, as in Ouro).
        attention_gate: sigmoids on attention's output: none, head (one for each) or element (one for each channel).
        q_lora_rank: mla only: width of the query's latent; None projects the query directly.
        kv_lora_rank: mla only: width of the latent of keys and values, which is cached.
        kv_latent_norm: mla only: normalize that latent.
        latent_iterations: mla only: steps of a GRU cell that refine that latent; 0 leaves it as it is.
        latent_halting: mla only: weigh the states of these steps by a probability of stopping at each.
        qk_nope_head_dim: mla only: width of the part of a query or key head without position.
        qk_rope_head_dim: mla only: width of the rotary part; the heads share its key.
        qk_rope_period: mla only: width after which the rotary frequencies repeat; None for qk_rope_head_dim.
        v_head_dim: mla only: width of a value head.
        total_ut_steps: number of loops in training (R); the exit distribution is over these loops.
        num_loops: number of loops to run, which may exceed that of training; None for ``total_ut_steps``.
        early_exit_threshold: a token's logits are those of the first loop by which its cumulative exit probability
            reaches this; 1 takes the last loop.
        early_exit_gate: lru (a GRU state carried over the loops), linear (Ouro's) or mlp (one hidden layer).
        gate_state_size: lru only: width of the state.
        gate_hidden_size: mlp only: width of the hidden layer.
        gate_sequence_level: lru only: the gate also reads the running mean of its state over the text so far.
        gate_trained: True if the gate's own training stage was run; otherwise a threshold below 1 is refused.
        sandwich_norm: also normalize the output of each sublayer, before the residual add.
        residual_gain: initial gain of those norms: depth (1/sqrt(2 L R)) or loops (1/(R sqrt(2 L))).
            Blocks outside the loops count once.
        kv_cache: per_loop (a cache for each loop: exact) or last (one cache for all loops, from the first generated
            token on: a past token is seen as of the last loop it ran).
        rope_theta: base of the rotary frequencies.
        max_position_embeddings: longest text in training, in tokens.
        rms_norm_eps: epsilon of every RMSNorm.
        hidden_act: activation of the feed-forward layer.
        initializer_range: standard deviation of the initial weights.
        embedding_initializer_range: that of the embedding; None for 1, or initializer_range if it is also the head.
        use_cache: return a cache from a forward pass without gradients.
        tie_word_embeddings: use one matrix for the embedding and the head.
        bos_token_id: id of the token that begins a text.
        eos_token_id: id of the token that ends a text.
        pad_token_id: id of the padding.

    Raises:
        ValueError: a key has a value that no such model can have.
    """

    model_type = "looplm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (Trainer adds a list to it)

    def __init__(
        self,
        vocab_size: int = 49_152,
        hidden_size: int = 2048,
        intermediate_size: int = 5632,
        num_hidden_layers: int = 24,
        prelude_layers: int = 0,
        coda_layers: int = 0,
        loop_norm: str = "state",
        injection: str = "none",
        step_embedding: str = "none",
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        attention: str = "mla",
        attention_gate: str = "none",
        q_lora_rank: int | None = None,
        kv_lora_rank: int = 512,
        kv_latent_norm: bool = True,
        latent_iterations: int = 0,
        latent_halting: bool = False,
        qk_nope_head_dim: int = 128,
        qk_rope_head_dim: int = 64,
        qk_rope_period: int | None = None,
        v_head_dim: int = 128,
        total_ut_steps: int = 4,
        num_loops: int | None = None,
        early_exit_threshold: float = 1.0,
        early_exit_gate: str = "lru",
        gate_state_size: int = 64,
        gate_hidden_size: int = 64,
        gate_sequence_level: bool = False,
        gate_trained: bool = False,
        sandwich_norm: bool = True,
        residual_gain: str = "depth",
        kv_cache: str = "per_loop",
        rope_theta: float = 10_000.0,
        max_position_embeddings: int = 4096,
        rms_norm_eps: float = 1e-6,
        hidden_act: str = "silu",
        initializer_range: float = 0.02,
        embedding_initializer_range: float | None = None,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        num_key_value_heads = num_key_value_heads or num_attention_heads
        head_dim = head_dim or hidden_size // num_attention_heads
        values = {key: value for key, value in locals().items() if key not in ("self", "kwargs", "__class__")}
        for key, value in values.items():
            setattr(self, key, value)
        for key, allowed in _CHOICES.items():
            if values[key] not in allowed:
                raise ValueError(f"{key}: {values[key]!r} is not allowed; give one of {', '.join(allowed)}")
        if attention == "mha" and num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: {num_key_value_heads} is not allowed; "
                f"num_attention_heads={num_attention_heads} must be a multiple of it"
            )
        inherited = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
        super().__init__(**kwargs, **{key: values[key] for key in inherited})
