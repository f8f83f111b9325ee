"""FP8 linear layers from the formats' definitions, in double precision and plain loops: the emulation's oracle.

It is independent of the product: it uses neither torch's float8 types nor tiling by reshape. Only scales are computed
in fp32, as in hardware: with a scale in double precision, a value halfway between two others would round to the other.

Sources: formats, FP8 Formats for Deep Learning (arXiv 2209.05433); delayed scaling, Transformer Engine's documentation;
blocks of 1 x 128 and 128 x 128, DeepSeek-V3 (2412.19437) section 3.3; 32 values, OCP Microscaling Formats 1.0.
"""

import math

import torch
from torch import Tensor

# mantissa bits, exponent of the smallest normal number, largest value
FORMATS = {"e4m3": (3, -6, 448.0), "e5m2": (2, -14, 57344.0)}


def rounded(x: Tensor, name: str) -> Tensor:
    """Round to the nearest value of the format, ties to even, and clamp to its range."""
    mantissa, smallest, largest = FORMATS[name]
    x = x.double()
    exponent = torch.floor(torch.log2(x.abs().clamp(min=2.0**-40))).clamp(min=smallest)
    step = 2.0 ** (exponent - mantissa)
    return (torch.round(x / step) * step).clamp(-largest, largest)


def under_scale(x: Tensor, name: str, scale: float) -> Tensor:
    """Scale in fp32, round, and scale back."""
    return rounded(x.float() * torch.tensor(scale, dtype=torch.float32), name) / float(torch.tensor(scale).float())


def tensorwise(x: Tensor, name: str) -> Tensor:
    """Round with one scale for the whole tensor."""
    amax = float(x.abs().max())
    return under_scale(x, name, float(torch.tensor(FORMATS[name][2]) / torch.tensor(amax)) if amax else 1.0)


def tiles(x: Tensor, name: str, height: int, width: int) -> Tensor:
    """Round with one scale per tile, a power of two."""
    result = torch.empty_like(x, dtype=torch.float64)
    for top in range(0, x.size(0), height):
        for left in range(0, x.size(1), width):
            here = (slice(top, top + height), slice(left, left + width))
            amax = float(x[here].abs().max())
            scale = 2.0 ** math.floor(math.log2(FORMATS[name][2] / amax)) if amax else 1.0
            result[here] = under_scale(x[here], name, scale)
    return result


class Delayed:
    """Delayed scaling of one operand: the largest values of earlier calls set the scale."""

    def __init__(self, name: str, length: int) -> None:
        self.name, self.length, self.seen = name, length, list[float]()

    def __call__(self, x: Tensor, learns: bool = True) -> Tensor:
        recent = self.seen[-self.length :]
        largest = torch.tensor(FORMATS[self.name][2])
        scale = float(largest / torch.tensor(max(recent))) if recent and max(recent) > 0 else 1.0
        if learns:
            self.seen.append(float(x.abs().max()))
        return under_scale(x, self.name, scale)


def products(x_NK: Tensor, weight_MK: Tensor, g_NM: Tensor, recipe: str, g_format: str) -> dict[str, Tensor]:
    """Return y, dx and dW of a linear layer, with both operands of each product rounded for it.

    Delayed scaling is not among the recipes, because it depends on earlier calls.
    """
    if recipe == "bf16":
        x, weight, g = (t.bfloat16().double() for t in (x_NK, weight_MK, g_NM))
        return {"y": x @ weight.T, "dx": g @ weight, "dW": g.T @ x}
    if recipe == "tensorwise":
        x, weight, g = tensorwise(x_NK, "e4m3"), tensorwise(weight_MK, "e4m3"), tensorwise(g_NM, g_format)
        return {"y": x @ weight.T, "dx": g @ weight, "dW": g.T @ x}
    size = {"blockwise": 128, "mxfp8": 32}[recipe]
    square = size if recipe == "blockwise" else 1
    weight_K, weight_M = tiles(weight_MK, "e4m3", square, size), tiles(weight_MK, "e4m3", size, square)
    return {
        "y": tiles(x_NK, "e4m3", 1, size) @ weight_K.T,
        "dx": tiles(g_NM, g_format, 1, size) @ weight_M,
        "dW": tiles(g_NM, g_format, size, 1).T @ tiles(x_NK, "e4m3", size, 1),
    }
