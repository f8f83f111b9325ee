"""One table of a model's parameters: names, shapes, roles, tensor splits, and their parts in a Hugging Face checkpoint.

Counts, FLOPs (:mod:`looplm.accounting`), legal tensor-parallel sizes, FP8 width checks, weight-decay groups, the map of
Hugging Face names and the planner's weights per rank derive from these rows. A variant of attention or of the gate
contributes its rows in one function, registered in :data:`ATTENTIONS` or :data:`GATES`.

Names there: where Ouro has a name, it is Ouro's; MLA's projections have DeepSeek-V3's. A model with plain attention,
sandwich norms and the linear gate therefore *is* in Ouro's layout.

The configuration checks layouts with this table, so the table imports nothing of it: ``model`` and ``gate`` are its
ModelConfig and GateConfig.

Shapes: D hidden, F feed-forward, V vocabulary, H heads, G key-value heads, K head width, C latent, Z gate state.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple, TypeVar

Variant = TypeVar("Variant")
Shape = tuple[int, ...]
Section = Literal[
    "embedding", "prelude", "injection", "step_embedding", "layers", "loop_end_norm", "coda", "head", "gate"
]


class TensorSplit(NamedTuple):
    """How tensor-parallel ranks share a parameter: along ``dim``, in ``units`` indivisible pieces."""

    dim: int
    units: int
    key: str  # the config key that counts the pieces


class Parameter(NamedTuple):
    """A row of the table.

    Args:
        name: in the model's state dict.
        shape: of the whole parameter. Only the step embedding's contains the number of loops.
        section: part of the model that it belongs to.
        role: matrix (multiplied with every token), table (looked up) or vector (a norm's gain, a bias).
        tensor_split: None if every tensor-parallel rank holds the whole parameter.
        hugging_face_parts: tensors that it is made of there, with their shapes.
        groups: number of blocks of rows; each block holds its share of every part, one part after the other.
        sides: for a block's matrix, where the widths of its output and its input come from.
        uses: how often a token is multiplied with a matrix in one loop.
    """

    name: str
    shape: Shape
    section: Section
    role: Literal["matrix", "table", "vector"]
    hugging_face_parts: Mapping[str, Shape]
    tensor_split: TensorSplit | None = None
    groups: int = 1
    sides: tuple[str, str] | None = None
    uses: int = 1

    @property
    def size(self) -> int:
        """Number of values."""
        return self.shape[0] * (self.shape[1] if len(self.shape) > 1 else 1)


def chosen(variants: Mapping[str, Variant], key: str, kind: str) -> Variant:
    """Return the variant named ``kind``.

    Raises:
        ValueError: ``variants`` has no such kind; the message names ``key`` and the kinds there are.
    """
    if kind not in variants:
        raise ValueError(f"{key}: {kind!r} is unknown here; known are {', '.join(variants)}")
    return variants[kind]


def parameters(model: Any, gate: Any) -> list[Parameter]:
    """Return every parameter of a model, in the order in which a forward pass meets them."""
    shape, vocabulary = (model.vocab_size, model.hidden_size), _vocabulary(model)
    table = _row("embedding", "embedding.word_embeddings.weight", "model.embed_tokens.weight", shape)
    rows = [table._replace(role="table", tensor_split=vocabulary)]
    rows += _in_layers(model, "prelude", "prelude", model.prelude_layers)
    rows += [*injection_parameters(model), *step_parameters(model)]
    rows += _in_layers(model, "layers", "decoder", model.num_layers)
    rows.append(_row("loop_end_norm", "decoder.final_layernorm.weight", "model.norm.weight", (model.hidden_size,)))
    rows += gate_parameters(model, gate)
    rows += _in_layers(model, "coda", "coda", model.coda_layers)
    if model.coda_layers:
        rows.append(_row("coda", "coda.final_layernorm.weight", "model.coda_norm.weight", (model.hidden_size,)))
    if not model.tie_embeddings:
        head = _row("head", "output_layer.weight", "lm_head.weight", shape)
        rows.append(head._replace(tensor_split=vocabulary))
    return rows


@cache
def layer_parameters(model: Any) -> tuple[Parameter, ...]:
    """Return the parameters of one layer, under their names inside it; all layers are alike."""
    d, f = model.hidden_size, model.ffn_hidden_size
    norms = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
    if model.sandwich_norm:
        norms |= {"self_attn_bda.norm": "input_layernorm_2", "mlp_bda.norm": "post_attention_layernorm_2"}
    halves, by_column = {f"mlp.{half}_proj.weight": (f, d) for half in ("gate", "up")}, "model.ffn_hidden_size"
    sides = (f"2 x {by_column}", "model.hidden_size")
    return (
        *(_row("layers", f"{ours}.weight", f"{theirs}.weight", (d,)) for ours, theirs in norms.items()),
        *chosen(ATTENTIONS, "model.attention", model.attention)(model),
        Parameter(
            "mlp.linear_fc1.weight", (2 * f, d), "layers", "matrix", halves, TensorSplit(0, f, by_column), sides=sides
        ),
        _linear("mlp.linear_fc2", "mlp.down_proj", (d, f), (sides[1], by_column), TensorSplit(1, f, by_column)),
    )


def injection_parameters(model: Any) -> list[Parameter]:
    """Return what ``model.injection`` adds, which every tensor-parallel rank holds whole."""
    shapes = chosen(INJECTIONS, "model.injection", model.injection)(model.hidden_size)
    return [_row("injection", f"injection.{name}", f"model.injection.{name}", shape) for name, shape in shapes.items()]


def step_parameters(model: Any) -> list[Parameter]:
    """Return what ``model.step_embedding`` adds, which every tensor-parallel rank holds whole."""
    if model.step_embedding == "none":
        return []
    name, shape = "step_embedding.weight", (model.num_loops, model.hidden_size)
    return [_row("step_embedding", name, f"model.{name}", shape)._replace(role="table")]


def gate_parameters(model: Any, gate: Any) -> list[Parameter]:
    """Return the parameters of the exit gate, which every tensor-parallel rank holds whole."""
    rows = gate_rows(model, gate)
    return [
        _row("gate", f"gate.{name}", f"model.early_exit_gate.{rows.renamed.get(name, name)}", shape)
        for name, shape in rows.shapes.items()
    ]


def gate_rows(model: Any, gate: Any) -> "GateRows":
    """Return what the gate's variant contributes.

    Raises:
        ValueError: there is no gate of that kind.
    """
    return chosen(GATES, "gate.kind", gate.kind)(model, gate)


# ------------------------------------------------------------------------------------------------------------ variants


def _latent_attention(model: Any) -> list[Parameter]:
    """MLA. The down projections are replicated, because each rank's heads read the whole latent."""
    d, heads, query, latent = model.hidden_size, model.num_attention_heads, model.q_lora_rank, model.kv_lora_rank
    by_head = TensorSplit(0, heads, "model.num_attention_heads")
    query_width = heads * model.attention_head_dim
    query_side = "model.num_attention_heads x (qk_nope_head_dim + qk_rope_head_dim)"
    key_value_width = heads * (model.qk_nope_head_dim + model.v_head_dim)
    key_value_side = "model.num_attention_heads x (qk_nope_head_dim + v_head_dim)"
    down_side = "model.kv_lora_rank + qk_rope_head_dim"
    hidden, kv_rank, q_rank = "model.hidden_size", "model.kv_lora_rank", "model.q_lora_rank"
    if query is None:
        rows = [_attention("linear_q_proj", "q_proj", (query_width, d), (query_side, hidden), by_head)]
    else:
        rows = [
            _attention("linear_q_down_proj", "q_a_proj", (query, d), (q_rank, hidden)),
            _attention_norm("q_layernorm", "q_a_layernorm", query),
            _attention("linear_q_up_proj", "q_b_proj", (query_width, query), (query_side, q_rank), by_head),
        ]
    down, out = (latent + model.qk_rope_head_dim, d), (d, heads * model.v_head_dim)
    out_sides = (hidden, "model.num_attention_heads x v_head_dim")
    return [
        *rows,
        _attention("linear_kv_down_proj", "kv_a_proj_with_mqa", down, (down_side, hidden)),
        *_before_keys_and_values(model),
        _attention("linear_kv_up_proj", "kv_b_proj", (key_value_width, latent), (key_value_side, kv_rank), by_head),
        *_output_gate(model, "v_head_dim"),
        _attention("linear_proj", "o_proj", out, out_sides, TensorSplit(1, heads, "model.num_attention_heads")),
    ]


def _before_keys_and_values(model: Any) -> Iterator[Parameter]:
    """Yield what the latent passes before the up-projection: a norm, a unit of latent reasoning, or that with its norm.

    The unit's cell reads the latent once, and its own state in every step.
    """
    width, steps = model.kv_lora_rank, model.latent_iterations
    if not steps:
        yield from [_attention_norm("kv_layernorm", "kv_a_layernorm", width)] if model.kv_latent_norm else []
        return
    shapes: dict[str, Shape] = {"norm.weight": (width,)} if model.kv_latent_norm else {}
    shapes |= _gru_cell(width)
    shapes |= {"halt.weight": (1, width), "halt.bias": (1,)} if model.latent_halting else {}
    for name, shape in shapes.items():
        ours, theirs = f"self_attention.kv_layernorm.{name}", f"self_attn.latent_reasoning.{name}"
        uses = steps if name in ("cell.weight_hh", "halt.weight") else 1
        yield _row("layers", ours, theirs, shape)._replace(uses=uses)


def _head_attention(model: Any) -> list[Parameter]:
    """MHA and GQA. Ours holds, key-value head by key-value head, its queries, its key and its value."""
    d, heads, groups, width = model.hidden_size, model.num_attention_heads, model.query_groups, model.attention_head_dim
    rows, by_group = {"q": heads * width, "k": groups * width, "v": groups * width}, "model.num_query_groups"
    name, split, total = "self_attention.linear_qkv", TensorSplit(0, groups, by_group), sum(rows.values())
    sides = ("(num_attention_heads + 2 x num_query_groups) x head_dim", "model.hidden_size")
    weights = {f"self_attn.{part}_proj.weight": (number, d) for part, number in rows.items()}
    found = [Parameter(f"{name}.weight", (total, d), "layers", "matrix", weights, split, groups, sides)]
    if model.qkv_bias:
        biases = {f"self_attn.{part}_proj.bias": (number,) for part, number in rows.items()}
        found.append(Parameter(f"{name}.bias", (total,), "layers", "vector", biases, split, groups))
    if model.qk_norm:
        found += [_attention_norm(f"{part}_layernorm", f"{part}_norm", width) for part in "qk"]
    sides = ("model.hidden_size", "model.num_attention_heads x head_dim")
    by_head = TensorSplit(1, heads, "model.num_attention_heads")
    out = _attention("linear_proj", "o_proj", (d, heads * width), sides, by_head)
    return [*found, *_output_gate(model, "head_dim"), out]


def _output_gate(model: Any, value_key: str) -> list[Parameter]:
    """Return the gate on attention's output, of heads or of their channels."""
    if model.attention_gate == "none":
        return []
    heads = "model.num_attention_heads"
    sides = heads if model.attention_gate == "head" else f"{heads} x {value_key}", "model.hidden_size"
    shape, split = (model.attention_gate_width, model.hidden_size), TensorSplit(0, model.num_attention_heads, heads)
    return [_attention("linear_gate", "output_gate_proj", shape, sides, split)]


class GateRows(NamedTuple):
    """A gate's parameters.

    Args:
        shapes: by name inside the gate.
        kept_values: values that autograd keeps of one token and loop, besides the hidden state.
        renamed: the names that differ in a Hugging Face checkpoint.
    """

    shapes: Mapping[str, Shape]
    kept_values: int
    renamed: Mapping[str, str] = {}


def _linear_gate(model: Any, gate: Any) -> GateRows:
    ouro_names = {"readout.weight": "weight", "readout.bias": "bias"}
    return GateRows({"readout.weight": (1, model.hidden_size), "readout.bias": (1,)}, 0, ouro_names)


def _lru_gate(model: Any, gate: Any) -> GateRows:
    z = gate.state_size
    shapes: dict[str, Shape] = {"input_proj.weight": (z, model.hidden_size)}
    shapes |= _gru_cell(z)
    shapes |= {"readout.weight": (1, z), "readout.bias": (1,)}
    shapes |= {"sequence_readout.weight": (1, z)} if gate.sequence_level else {}
    return GateRows(shapes, 9 * z)  # the GRU cell keeps its state and its gates


def _mlp_gate(model: Any, gate: Any) -> GateRows:
    z = gate.hidden_size
    shapes: dict[str, Shape] = {"hidden.weight": (z, model.hidden_size), "hidden.bias": (z,), "change.weight": (z, 1)}
    shapes |= {"readout.weight": (1, z), "readout.bias": (1,)}
    return GateRows(shapes, model.hidden_size + 2 * z)  # the change of the hidden state, both sides of silu


INJECTIONS: dict[str, Callable[[int], dict[str, Shape]]] = {
    "none": lambda width: {},
    "additive": lambda width: {},
    "diagonal": lambda width: {"state_gain": (width,), "input_gain": (width,)},
    "linear": lambda width: {"weight": (width, 2 * width)},
}
ATTENTIONS: dict[str, Callable[[Any], list[Parameter]]] = {"mla": _latent_attention, "mha": _head_attention}
GATES: dict[str, Callable[[Any, Any], GateRows]] = {
    "lru": _lru_gate,
    "linear": _linear_gate,
    "mlp": _mlp_gate,
}


# ---------------------------------------------------------------------------------------------------- what derives here


def tensor_parallel_units(model: Any) -> dict[str, int]:
    """Return the numbers that the tensor-parallel size must divide, by the config key that each comes from."""
    splits = [_vocabulary(model), *(row.tensor_split for row in layer_parameters(model))]
    return {split.key: split.units for split in splits if split is not None}


def replicates_matrices(model: Any) -> bool:
    """Return True if every tensor-parallel rank holds some matrix of a block whole, as with MLA's down projections."""
    return any(row.role == "matrix" and row.tensor_split is None for row in layer_parameters(model))


def linear_widths(model: Any, tensor: int) -> dict[str, int]:
    """Return the sides of a block's matrices as each of ``tensor`` ranks holds them, by what they come from."""
    widths = {}
    for row in layer_parameters(model):
        for dim, side in enumerate(row.sides or ()):
            split = row.tensor_split is not None and row.tensor_split.dim == dim
            widths[side] = row.shape[dim] // (tensor if split else 1)
    return dict(sorted(widths.items(), key=lambda item: " x " not in item[0] and "+" in item[0]))  # plain keys first


def decayed_names(model: Any, gate: Any) -> set[str]:
    """Return the names that weight decay applies to.

    Norms and biases are spared. So are the gate, which is meant to move freely away from its prior, and the injection
    and the step embedding, which start as the identity.
    """
    spared = ("gate", "injection", "step_embedding")
    return {row.name for row in parameters(model, gate) if row.role != "vector" and row.section not in spared}


# ------------------------------------------------------------------------------------------------------------- helpers


def _vocabulary(model: Any) -> TensorSplit:
    """Return the split of embedding and head."""
    return TensorSplit(0, model.vocab_size, "model.vocab_size")


def _row(section: Section, ours: str, theirs: str, shape: Shape) -> Parameter:
    """Return a parameter that is one tensor on both sides."""
    return Parameter(ours, shape, section, "matrix" if len(shape) > 1 else "vector", {theirs: shape})


def _gru_cell(width: int) -> dict[str, Shape]:
    """Return the shapes of torch's GRU cell whose input is as wide as its state."""
    shapes: dict[str, Shape] = {f"cell.weight_{side}": (3 * width, width) for side in ("ih", "hh")}
    return shapes | {f"cell.bias_{side}": (3 * width,) for side in ("ih", "hh")}


def _linear(
    ours: str, theirs: str, shape: Shape, sides: tuple[str, str], split: TensorSplit | None = None
) -> Parameter:
    row = _row("layers", f"{ours}.weight", f"{theirs}.weight", shape)
    return row._replace(tensor_split=split, sides=sides)


def _attention(
    ours: str, theirs: str, shape: Shape, sides: tuple[str, str], split: TensorSplit | None = None
) -> Parameter:
    return _linear(f"self_attention.{ours}", f"self_attn.{theirs}", shape, sides, split)


def _attention_norm(ours: str, theirs: str, width: int) -> Parameter:
    return _row("layers", f"self_attention.{ours}.weight", f"self_attn.{theirs}.weight", (width,))


def _in_layers(model: Any, section: Section, block: str, number: int) -> Iterator[Parameter]:
    """Yield the parameters of ``number`` layers of the module ``block``."""
    for layer in range(number):
        for row in layer_parameters(model):
            parts = {f"model.{section}.{layer}.{name}": shape for name, shape in row.hugging_face_parts.items()}
            yield row._replace(name=f"{block}.layers.{layer}.{row.name}", section=section, hugging_face_parts=parts)
