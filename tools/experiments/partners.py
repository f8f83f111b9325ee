"""Partners of a looped model for a fair comparison: what is equal to it in parameters, or in training FLOPs.

A model with L layers and R loops is compared with the same layers once (equal parameters), with as many layers as it
runs, LR, and with a wider stack of L layers (equal FLOPs). A wider model in loops has the parameters of LR layers. The
head and the gate run after each loop, so LR layers that run once cost less than L layers in R loops; the partner's
feed-forward width makes up for it.
"""

from dataclasses import replace
from typing import NamedTuple

from looplm.bounds import require
from looplm.config import LossConfig, ModelConfig, RunConfig
from tools.experiments.runs import TOLERANCE, Size


class Partner(NamedTuple):
    """A model to compare with.

    Args:
        name: what it is, in words.
        model: its configuration.
        size: its parameters and FLOPs.
        matched: the quantity that it has in common, and with which model.
    """

    name: str
    model: ModelConfig
    size: Size
    matched: str

    @property
    def changes(self) -> str:
        """The keys of the model that an arm of an experiment gives, as YAML."""
        keys = ("num_layers", "num_loops", "hidden_size", "ffn_hidden_size", "num_attention_heads")
        return f"{{model: {{{', '.join(f'{key}: {getattr(self.model, key)}' for key in keys)}}}}}"


def partners(config: RunConfig) -> list[Partner]:
    """Return the recipe itself and its partners.

    Raises:
        UserError: the recipe has one loop, or no width matches within the tolerance of experiments.
    """
    model, own = config.model, Size.of(config)
    layers, loops = model.num_layers, model.num_loops
    require(loops > 1, "model.num_loops", loops, "a model without loops has no partners; give at least 2")
    shape = f"{layers} x {loops}"

    def partner(name: str, other: ModelConfig, matched: str) -> Partner:
        return Partner(name, other, _size(config, other), matched)

    once = replace(model, num_loops=1)
    deep = replace(once, num_layers=layers * loops)
    if not _is_near(_value(config, deep, "flops_per_token"), own.flops_per_token):
        deep = _with_fitted_ffn(config, deep, "flops_per_token", own.flops_per_token)
    wide = _widened(config, once, "flops_per_token", own.flops_per_token)
    wide_loops = _widened(config, model, "parameters", _size(config, deep).parameters)
    return [
        partner(f"{shape}, this recipe", model, ""),
        partner(f"{layers} x 1, the same layers once", once, f"parameters of {shape}"),
        partner(f"{layers * loops} x 1, as many layers as run", deep, f"flops of {shape}"),
        partner(f"{layers} x 1, wider", wide, f"flops of {shape}"),
        partner(f"{shape}, wider", wide_loops, f"parameters of {layers * loops} x 1"),
    ]


def table(found: list[Partner]) -> str:
    """Return the partners as a table, each with the keys of its arm below."""
    width = max(len(partner.name) for partner in found)
    rows = [f"{'model':<{width}} {'parameters':>16} {'training MFLOP a token':>24}  equal"]
    for name, _, size, matched in found:
        rows.append(f"{name:<{width}} {size.parameters:>16,} {size.flops_per_token / 1e6:>24,.3f}  {matched}".rstrip())
    return "\n".join([*rows, "", "as arms of an experiment:", *(f"  {partner.changes}" for partner in found)])


def _size(config: RunConfig, model: ModelConfig) -> Size:
    loss = config.loss if model.num_loops > 1 else LossConfig()  # keys that need several loops would be refused
    return Size.of(replace(config, model=model, loss=loss))


def _value(config: RunConfig, model: ModelConfig, quantity: str) -> float:
    return float(getattr(_size(config, model), quantity))


def _is_near(value: float, target: float) -> bool:
    return abs(value - target) <= TOLERANCE * max(value, target)


def _widened(config: RunConfig, model: ModelConfig, quantity: str, target: float) -> ModelConfig:
    """Return the model with the hidden and feed-forward widths that bring its quantity to the target.

    Both widths grow in proportion, the hidden one in steps that the heads allow. If no step is near enough, the
    feed-forward width makes up for the rest.
    """
    plain = model.attention == "mha" and model.head_dim is None
    step = 2 * model.num_attention_heads if plain else 8  # rotary embeddings need heads of an even width

    def made(steps: int) -> ModelConfig:
        hidden = steps * step
        ffn = max(1, round(model.ffn_hidden_size * hidden / model.hidden_size))
        return replace(model, hidden_size=hidden, ffn_hidden_size=ffn)

    low, high = 1, 2
    while _value(config, made(high), quantity) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _value(config, made(middle), quantity) < target else (low, middle)
    best = min((made(low), made(high)), key=lambda other: abs(_value(config, other, quantity) - target))
    if _is_near(_value(config, best, quantity), target):
        return best
    return _with_fitted_ffn(config, best, quantity, target)


def _with_fitted_ffn(config: RunConfig, model: ModelConfig, quantity: str, target: float) -> ModelConfig:
    """Return the model with the feed-forward width that brings its quantity to the target; it is linear in the width.

    Raises:
        UserError: no width does, within the tolerance of experiments.
    """
    at_1, at_2 = (_value(config, replace(model, ffn_hidden_size=width), quantity) for width in (1, 2))
    width = max(1, 1 + round((target - at_1) / (at_2 - at_1)))
    found = replace(model, ffn_hidden_size=width)
    reached = _value(config, found, quantity)
    fix = f"the nearest partner has {reached:,.0f} {quantity} in place of {target:,.0f}; use a wider model"
    require(_is_near(reached, target), "model.ffn_hidden_size", config.model.ffn_hidden_size, fix)
    return found
