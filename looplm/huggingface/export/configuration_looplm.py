"""The configuration of a LoopLM in Hugging Face's terms. It travels inside an export and needs transformers alone."""

from typing import Any

from transformers import PretrainedConfig

_CHOICES = {"attention": ("mla", "mha"), "early_exit_gate": ("lru", "linear"), "kv_cache": ("per_loop", "last")}


class LoopLMConfig(PretrainedConfig):
    """A looped language model. Where Ouro has a name for a key it is Ouro's; MLA's keys have DeepSeek-V3's.

    How deep to run is a matter of each use, and may be overridden when a model is loaded
    (``from_pretrained(path, num_loops=2)``) or called (``model(ids, num_loops=2)``); the same for
    ``early_exit_threshold``.

    Args:
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: inner width of the SwiGLU feed-forward layer.
        num_hidden_layers: blocks in the shared stack (L).
        num_attention_heads: attention heads.
        num_key_value_heads: mha only: heads of keys and values; None for one per attention head.
        head_dim: mha only: width of a head; None for hidden_size / num_attention_heads.
        qkv_bias: mha only: biases on the projections of queries, keys and values, as in Qwen2.
        qk_norm: mha only: an RMSNorm over each head's query and each head's key before they turn, as in Qwen3.
        attention: mla (multi-head latent attention, DeepSeek-V3) or mha (plain or grouped, as Ouro).
        q_lora_rank: mla only: width of the query's latent; None projects the query directly.
        kv_lora_rank: mla only: width of the latent that keys and values are made from, and that is cached.
        qk_nope_head_dim: mla only: width of a query or key head that carries no position.
        qk_rope_head_dim: mla only: width of the rotary part; the key's is shared by all heads.
        qk_rope_period: mla only: width after which its frequencies begin anew; None means qk_rope_head_dim.
        v_head_dim: mla only: width of a value head.
        total_ut_steps: how often the stack ran in training (R); the exit distribution is over these loops.
        num_loops: how often it runs now, more than in training if you like; None for ``total_ut_steps``.
        early_exit_threshold: a token's logits are those of the first loop by which its summed exit probability reaches
            this; 1 takes the last loop.
        early_exit_gate: lru (a GRU state carried over the loops) or linear (Ouro's).
        gate_state_size: lru only: width of the state.
        gate_sequence_level: lru only: the gate also reads the running mean of its state over the text so far.
        gate_trained: whether the gate's own training stage was run; without it no threshold below 1 is accepted.
        sandwich_norm: normalise each sublayer's output too, before the residual add.
        kv_cache: per_loop (a cache for each loop: exact) or last (one that the loops share, from the first generated
            token on: a past token is seen as of the last loop it ran).
        rope_theta: base of the rotary frequencies.
        max_position_embeddings: longest text the model was trained for.
        rms_norm_eps: epsilon of every RMSNorm.
        hidden_act: of the feed-forward layer.
        initializer_range: standard deviation of first weights.
        embedding_initializer_range: of the embedding; None for 1, or initializer_range where it is the head too.
        use_cache: whether a forward pass without gradients returns a cache.
        tie_word_embeddings: one matrix for the embedding and the head.
        bos_token_id: begin of text.
        eos_token_id: end of text.
        pad_token_id: padding.

    Raises:
        ValueError: a key has a value that no such model can have.
    """

    model_type = "looplm"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 49_152,
        hidden_size: int = 2048,
        intermediate_size: int = 5632,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        attention: str = "mla",
        q_lora_rank: int | None = None,
        kv_lora_rank: int = 512,
        qk_nope_head_dim: int = 128,
        qk_rope_head_dim: int = 64,
        qk_rope_period: int | None = None,
        v_head_dim: int = 128,
        total_ut_steps: int = 4,
        num_loops: int | None = None,
        early_exit_threshold: float = 1.0,
        early_exit_gate: str = "lru",
        gate_state_size: int = 64,
        gate_sequence_level: bool = False,
        gate_trained: bool = False,
        sandwich_norm: bool = True,
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
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        self.attention = attention
        self.q_lora_rank = q_lora_rank
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.qk_rope_period = qk_rope_period
        self.v_head_dim = v_head_dim
        self.total_ut_steps = total_ut_steps
        self.num_loops = num_loops
        self.early_exit_threshold = early_exit_threshold
        self.early_exit_gate = early_exit_gate
        self.gate_state_size = gate_state_size
        self.gate_sequence_level = gate_sequence_level
        self.gate_trained = gate_trained
        self.sandwich_norm = sandwich_norm
        self.kv_cache = kv_cache
        self.rope_theta = rope_theta
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.hidden_act = hidden_act
        self.initializer_range = initializer_range
        self.embedding_initializer_range = embedding_initializer_range
        self.use_cache = use_cache
        for key, allowed in _CHOICES.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key}: {getattr(self, key)!r} is not allowed; give one of {', '.join(allowed)}")
        if self.attention == "mha" and num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: {self.num_key_value_heads} is not allowed; "
                f"num_attention_heads={num_attention_heads} must be a multiple of it"
            )
        ids = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        kwargs |= {**ids, "tie_word_embeddings": tie_word_embeddings}
        super().__init__(**kwargs)
