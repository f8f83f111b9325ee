"""What a model is: the looped transformer and its exit gate, in numbers; also what a checkpoint says of itself."""

from dataclasses import dataclass
from typing import Literal

from looplm.cli import require


def require_positive(section: str, config: object, *keys: str) -> None:
    """Every key of ``config`` named is above 0, or one line says which is not, with its section."""
    for key in keys:
        value = getattr(config, key)
        require(value > 0, f"{section}.{key}", value, "give a number above 0")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The looped transformer.

    Args:
        vocab_size: tokens of the tokenizer; every id of the data is below it.
        hidden_size: width of the residual stream (D).
        ffn_hidden_size: inner width of the SwiGLU feed-forward layer (F).
        num_layers: blocks in the shared stack (L).
        num_attention_heads: attention heads (H).
        num_loops: how often the stack runs in training, with the same weights (R).
        attention: mla (multi-head latent attention, DeepSeek-V3) or mha (plain or grouped, as released Ouro).
        num_query_groups: mha only: key-value heads; null means one per attention head.
        head_dim: mha only: width of a head; null means hidden_size / num_attention_heads.
        qkv_bias: mha only: biases on the projections of queries, keys and values, as in Qwen2.
        qk_norm: mha only: an RMSNorm over each head's query and each head's key before they turn, as in Qwen3.
        q_lora_rank: mla only: width of the query's latent; null projects the query directly.
        kv_lora_rank: mla only: width of the latent that keys and values are made from, and that is cached.
        qk_nope_head_dim: mla only: width of a query or key head that carries no position; may be 0.
        qk_rope_head_dim: mla only: width of the rotary part; the key's is shared by all heads.
        qk_rope_period: mla only: width after which its frequencies begin anew, so that it holds several rotary keys side
            by side, as a model converted from mha has them; null means qk_rope_head_dim: one key.
        v_head_dim: mla only: width of a value head.
        rope_base: base of the rotary frequencies (theta).
        max_sequence_length: longest context the model may be trained on or generate in, in tokens.
        norm_eps: epsilon of every RMSNorm.
        sandwich_norm: normalise each sublayer's output too, before the residual add (Ouro section 3.1).
        tie_embeddings: use one matrix for the embedding and the head.
        init_std: standard deviation of the initial weights.
        embedding_init_std: of the embedding; null means 1, the scale of the loop-end norm's output that every later
            loop reads, or init_std where the embedding is the head too.
    """

    vocab_size: int
    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_loops: int = 4
    attention: Literal["mla", "mha"] = "mla"
    num_query_groups: int | None = None
    head_dim: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    qk_rope_period: int | None = None
    v_head_dim: int = 128
    rope_base: float = 10_000.0
    max_sequence_length: int = 4096
    norm_eps: float = 1e-6
    sandwich_norm: bool = True
    tie_embeddings: bool = False
    init_std: float = 0.02
    embedding_init_std: float | None = None

    def __post_init__(self) -> None:
        require_positive(
            "model", self, "vocab_size", "hidden_size", "ffn_hidden_size", "num_layers", "num_attention_heads"
        )
        require(self.embedding_init_std is None or self.embedding_init_std > 0, "model.embedding_init_std", self.embedding_init_std, "give null or a number above 0")  # fmt: skip
        require_positive("model", self, "num_loops", "rope_base", "max_sequence_length", "norm_eps", "init_std")
        if self.attention == "mla":
            require_positive("model", self, "kv_lora_rank", "qk_rope_head_dim", "v_head_dim")
            require(self.qk_nope_head_dim >= 0, "model.qk_nope_head_dim", self.qk_nope_head_dim, "give 0 or more")
            require(self.qk_rope_head_dim % 2 == 0, "model.qk_rope_head_dim", self.qk_rope_head_dim, "give an even number")  # fmt: skip
            whole = self.rope_period > 0 and self.rope_period % 2 == 0 and self.qk_rope_head_dim % self.rope_period == 0
            require(whole, "model.qk_rope_period", self.qk_rope_period, f"give null or an even divisor of model.qk_rope_head_dim={self.qk_rope_head_dim}")  # fmt: skip
            require(self.q_lora_rank is None or self.q_lora_rank > 0, "model.q_lora_rank", self.q_lora_rank, "give null or a number above 0")  # fmt: skip
            for key in ("num_query_groups", "head_dim", "qkv_bias", "qk_norm"):
                value = getattr(self, key)
                require(value is None or value is False, f"model.{key}", value, "it belongs to model.attention=mha; leave it out")  # fmt: skip
            return
        heads = self.num_attention_heads
        require(
            self.head_dim is not None or self.hidden_size % heads == 0,
            "model.num_attention_heads",
            heads,
            f"model.hidden_size={self.hidden_size} must be a multiple of it, or give model.head_dim",
        )
        require(self.attention_head_dim % 2 == 0, "model.head_dim", self.attention_head_dim, "rotary positions need an even width")  # fmt: skip
        require(heads % self.query_groups == 0, "model.num_query_groups", self.query_groups, f"model.num_attention_heads={heads} must be a multiple of it")  # fmt: skip

    @property
    def embedding_std(self) -> float:
        """Standard deviation of the initial embedding."""
        if self.embedding_init_std is not None:
            return self.embedding_init_std
        return self.init_std if self.tie_embeddings else 1.0

    @property
    def attention_head_dim(self) -> int:
        """Width of a query-key head: both parts for mla."""
        if self.attention == "mla":
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope_period(self) -> int:
        """Width of one rotary key (mla): its frequencies are rope_base^(-2k / rope_period)."""
        return self.qk_rope_head_dim if self.qk_rope_period is None else self.qk_rope_period

    @property
    def tensor_parallel_widths(self) -> dict[str, int]:
        """What the ranks of a tensor-parallel group divide among themselves, by the key it comes from."""
        groups = {"model.num_query_groups": self.query_groups} if self.attention == "mha" else {}
        keys = ("num_attention_heads", "ffn_hidden_size", "vocab_size")
        return {**{f"model.{key}": getattr(self, key) for key in keys}, **groups}

    @property
    def query_groups(self) -> int:
        """Key-value heads (mha)."""
        return self.num_query_groups or self.num_attention_heads


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """The exit gate: per token, how likely to leave after each loop.

    Args:
        kind: lru (a GRU state carried over the loops; ours) or linear (a plain linear read-out; Ouro's).
        state_size: lru only: width of the state (Z).
        sequence_level: lru only: add a read-out of the running mean of the state over the document so far.
    """

    kind: Literal["lru", "linear"] = "lru"
    state_size: int = 64
    sequence_level: bool = False

    def __post_init__(self) -> None:
        require_positive("gate", self, "state_size")
        require(not self.sequence_level or self.kind == "lru", "gate.sequence_level", True, "only gate.kind=lru has a state to average")  # fmt: skip
