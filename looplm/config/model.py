"""The looped transformer and its exit gate in numbers; also stored with every checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from looplm.bounds import at_least, check_bounds, positive, require

# Keys that only one kind of attention or of gate reads. mha ignores the widths of mla, and a gate those of other gates,
# so that a recipe serves several kinds: configs/upcycle-study/mha.yaml stacks on a recipe for mla.
ATTENTION_KEYS = {
    "mla": (
        *("q_lora_rank", "kv_lora_rank", "kv_latent_norm", "latent_iterations", "latent_halting"),
        *("qk_nope_head_dim", "qk_rope_head_dim", "qk_rope_period", "v_head_dim"),
    ),
    "mha": ("num_query_groups", "head_dim", "qkv_bias", "qk_norm"),
}
GATE_KEYS = {"lru": ("state_size", "sequence_level"), "linear": (), "mlp": ("hidden_size",)}


class AttentionWidths(NamedTuple):
    """Widths of one layer's attention, the same terms for every kind of attention.

    Args:
        key_heads: heads of keys and of values that the core attends with.
        query_key: width of a query or key head.
        value: width of a value head.
        rotary: width of the rotated part of a head.
        latents: widths of the latents, that of keys and values first; empty without latents.
        projected: width of the inputs that tensor-parallel ranks gather for queries, keys, values and gates.
        cached: values that a cache keeps of one token.
        summary: what the cache keeps, in words.
    """

    key_heads: int
    query_key: int
    value: int
    rotary: int
    latents: tuple[int, ...]
    projected: int
    cached: int
    summary: str


Injection = Literal["none", "additive", "diagonal", "linear"]
MAX_DEPTH = 10_000  # layers or loops; a file that asks for more is damaged, and would take hours to refuse


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The looped transformer.

    Args:
        vocab_size: size of the tokenizer's vocabulary; every token id in the data is below it.
        hidden_size: width of the residual stream (D).
        ffn_hidden_size: inner width of the SwiGLU feed-forward layer (F).
        num_layers: layers in the shared stack (L).
        prelude_layers: layers of their own before the loops, run once.
        coda_layers: layers of their own, and a norm, between the end of a loop and the head; run for every read-out.
        num_attention_heads: attention heads (H).
        num_loops: how often the stack runs in training, with the same weights (R).
        attention: mla (multi-head latent attention, DeepSeek-V3) or mha (multi-head or grouped-query, as in Ouro). mha
            ignores the widths of mla, so that one recipe serves both.
        num_query_groups: mha only: key-value heads; null means one per attention head.
        head_dim: mha only: width of a head; null means hidden_size / num_attention_heads.
        qkv_bias: mha only: biases on the query, key and value projections, as in Qwen2.
        qk_norm: mha only: an RMSNorm over each head's query and key before the rotary embedding, as in Qwen3.
        q_lora_rank: mla only: width of the query's latent; null projects the query directly.
        kv_lora_rank: mla only: width of the latent from which keys and values are computed, and which is cached.
        kv_latent_norm: mla only: normalize that latent, as DeepSeek-V3 does; without, a model converted from mha is
            exact as soon as the latent is as wide as the values of all key-value heads.
        latent_iterations: mla only: steps of a GRU cell that refine the latent before keys and values are projected
            from it, in every layer and loop; 0 leaves it as it is.
        latent_halting: latent_iterations > 1 only: weigh the states of these steps by a learned probability of stopping
            at each; otherwise the last one is taken.
        attention_gate: a sigmoid of the block's input that is multiplied onto the attention's output, before the output
            projection: none, head (one for each head) or element (one for each channel of a head; arXiv 2505.06708).
        qk_nope_head_dim: mla only: width of the part of a query or key head without rotary embedding; may be 0.
        qk_rope_head_dim: mla only: width of the rotary part; all heads share its key.
        qk_rope_period: mla only: width after which the rotary frequencies repeat, so that the rotary part holds several
            keys side by side, as in a model converted from mha; null means qk_rope_head_dim: one key.
        v_head_dim: mla only: width of a value head.
        rope_base: base of the rotary frequencies (theta).
        max_sequence_length: longest context for training or generation, in tokens.
        norm_eps: epsilon of every RMSNorm.
        sandwich_norm: normalize each sublayer's output too, before the residual add (Ouro section 3.1).
        residual_gain: sandwich_norm only: what the initial gain of those norms keeps constant: depth, 1/√(2 L R), the
            variance that independent sublayers add, or loops, 1/(R √(2 L)), the sum of the loops' updates, which are
            alike (arXiv 2606.18524). Layers of the prelude and the coda count once.
        loop_norm: what the norm at the end of a loop is for: state (the next loop reads its output, as in Ouro) or
            readout (the gate does, and without a coda the head; the next loop and a coda read the residual stream).
        injection: what each loop after the first reads: none, the state h; additive, h + e; diagonal, a h + b e with
            vectors a and b; or linear, W [h; e]. e is what entered the first loop. The last two start as h alone.
        step_embedding: what tells a loop which one it is: none, or learned, a vector of each loop that is added to the
            state before it, zero at first (Universal Transformer, arXiv 1807.03819). Loops beyond num_loops read the
            last vector.
        tie_embeddings: use one matrix for the embedding and the head.
        init_std: standard deviation of the initial weights.
        embedding_init_std: standard deviation of the initial embedding; null means 1, the scale of the loop-end norm's
            output that every later loop reads, or init_std if the embedding is also the head.
    """

    vocab_size: int = positive()
    hidden_size: int = positive()
    ffn_hidden_size: int = positive()
    num_layers: int = positive(at_most=MAX_DEPTH)
    prelude_layers: int = at_least(0, 0, at_most=MAX_DEPTH)
    coda_layers: int = at_least(0, 0, at_most=MAX_DEPTH)
    num_attention_heads: int = positive()
    num_loops: int = positive(4, at_most=MAX_DEPTH)
    attention: Literal["mla", "mha"] = "mla"
    num_query_groups: int | None = positive(None)
    head_dim: int | None = positive(None)
    qkv_bias: bool = False
    qk_norm: bool = False
    q_lora_rank: int | None = positive(None)
    kv_lora_rank: int = positive(512)
    kv_latent_norm: bool = True
    latent_iterations: int = at_least(0, 0, at_most=MAX_DEPTH)
    latent_halting: bool = False
    attention_gate: Literal["none", "head", "element"] = "none"
    qk_nope_head_dim: int = at_least(0, 128)
    qk_rope_head_dim: int = positive(64)
    qk_rope_period: int | None = positive(None)
    v_head_dim: int = positive(128)
    rope_base: float = positive(10_000.0)
    max_sequence_length: int = positive(4096)
    norm_eps: float = positive(1e-6)
    sandwich_norm: bool = True
    residual_gain: Literal["depth", "loops"] = "depth"
    loop_norm: Literal["state", "readout"] = "state"
    injection: Injection = "none"
    step_embedding: Literal["none", "learned"] = "none"
    tie_embeddings: bool = False
    init_std: float = positive(0.02)
    embedding_init_std: float | None = positive(None)

    def __post_init__(self) -> None:
        check_bounds(self, "model")
        fix = "only model.sandwich_norm=true has a gain; leave it out"
        require(self.sandwich_norm or self.residual_gain == "depth", "model.residual_gain", self.residual_gain, fix)
        mla, steps, fix = self.attention == "mla", self.latent_iterations, "only model.attention=mla has a latent"
        require(mla or not steps, "model.latent_iterations", steps, f"{fix}; leave it out")
        fix = f"with model.latent_iterations={steps} there is nothing to weigh; leave it out"
        require(steps > 1 or not self.latent_halting, "model.latent_halting", True, fix)
        heads, rope = self.num_attention_heads, self.qk_rope_head_dim
        if self.attention == "mla":
            require(rope % 2 == 0, "model.qk_rope_head_dim", rope, "give an even number")
            whole = self.rope_period % 2 == 0 and rope % self.rope_period == 0
            fix = f"give null or an even divisor of model.qk_rope_head_dim={rope}"
            require(whole, "model.qk_rope_period", self.qk_rope_period, fix)
            for key in ATTENTION_KEYS["mha"]:
                value = getattr(self, key)
                require(value in (None, False), f"model.{key}", value, "only model.attention=mha has it; leave it out")
            return
        fix = f"model.hidden_size={self.hidden_size} must be a multiple of it, or give model.head_dim"
        require(bool(self.head_dim) or self.hidden_size % heads == 0, "model.num_attention_heads", heads, fix)
        width = self.attention_head_dim
        require(width % 2 == 0, "model.head_dim", width, "rotary embeddings need an even width; give an even number")
        fix = f"model.num_attention_heads={heads} must be a multiple of it"
        require(heads % self.query_groups == 0, "model.num_query_groups", self.query_groups, fix)

    @property
    def embedding_std(self) -> float:
        """Standard deviation of the initial embedding."""
        return self.embedding_init_std or (self.init_std if self.tie_embeddings else 1.0)

    @property
    def initial_gain(self) -> float:
        """Initial gain of the norms behind the sublayers."""
        loops = self.num_loops if self.residual_gain == "depth" else self.num_loops**2
        return float((2 * (self.num_layers * loops + self.unlooped_layers)) ** -0.5)

    @property
    def unlooped_layers(self) -> int:
        """Layers outside the loops."""
        return self.prelude_layers + self.coda_layers

    @property
    def depth_summary(self) -> str:
        """The layers and loops in words."""
        outside = {"before": self.prelude_layers, "after": self.coda_layers}
        parts = [f"{layers} {where}" for where, layers in outside.items() if layers]
        return f"{self.num_layers} layers x {self.num_loops} loops" + (
            f" ({' and '.join(parts)} them)" if parts else ""
        )

    @property
    def attention_head_dim(self) -> int:
        """Width of a query or key head; for mla the sum of both parts."""
        if self.attention == "mla":
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope_period(self) -> int:
        """Width of one rotary key (mla): its frequencies are rope_base^(-2k / rope_period)."""
        return self.qk_rope_period or self.qk_rope_head_dim

    @property
    def query_groups(self) -> int:
        """Key-value heads (mha)."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def attention_gate_width(self) -> int:
        """Gates on one layer's attention output; 0 without."""
        per_head = {"none": 0, "head": 1, "element": self.attention_widths.value}[self.attention_gate]
        return self.num_attention_heads * per_head

    @property
    def attention_widths(self) -> AttentionWidths:
        """Widths of one layer's attention."""
        width, groups = self.attention_head_dim, self.query_groups
        gate = 0 if self.attention_gate == "none" else self.hidden_size
        if self.attention == "mha":
            cached, summary = 2 * groups * width, f"{groups} for keys and values"
            return AttentionWidths(groups, width, width, width, (), self.hidden_size + gate, cached, summary)
        query, latent, rotary = self.q_lora_rank, self.kv_lora_rank, self.qk_rope_head_dim
        return AttentionWidths(
            key_heads=self.num_attention_heads,
            query_key=width,
            value=self.v_head_dim,
            rotary=rotary,
            latents=(latent,) if query is None else (latent, query),
            projected=(query or self.hidden_size) + latent + rotary + gate,
            cached=latent + rotary,
            summary=f"a latent of {latent}",
        )


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """The exit gate: for each token, the probability of leaving after each loop.

    Args:
        kind: lru (a GRU state carried over the loops; ours), linear (a linear layer on the hidden state; Ouro's) or mlp
            (two layers on the hidden state and on how much the loop changed it). Each ignores the widths of the others,
            so that one recipe serves all.
        state_size: lru only: width of the state (Z).
        sequence_level: lru only: add a readout of the running mean of the state over the document so far.
        hidden_size: mlp only: width of the hidden layer.
    """

    kind: Literal["lru", "linear", "mlp"] = "lru"
    state_size: int = positive(64)
    sequence_level: bool = False
    hidden_size: int = positive(64)

    @property
    def starts_uniform(self) -> bool:
        """True if a constant in the logits makes the untrained gate the uniform prior over the loops."""
        return self.kind != "linear"

    def __post_init__(self) -> None:
        check_bounds(self, "gate")
        averages = self.kind == "lru" or not self.sequence_level
        require(averages, "gate.sequence_level", True, "only gate.kind=lru has a state to average; leave it false")


def foreign_keys(config: ModelConfig | GateConfig) -> set[str]:
    """Return the keys that only other kinds of attention or of gate read."""
    if isinstance(config, GateConfig):
        return _keys_of_others(GATE_KEYS, config.kind)
    return _keys_of_others(ATTENTION_KEYS, config.attention)


def _keys_of_others(keys: Mapping[str, tuple[str, ...]], own: str) -> set[str]:
    return {key for kind in keys if kind != own for key in keys[kind]}
