"""Emulated FP8 linear layers: values, gradients and histories by the formats' definitions; and where they apply."""

import dataclasses

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from looplm.config import EngineConfig, GateConfig, ParallelConfig
from looplm.model import LoopLM
from looplm.model.fp8_emulation import E4M3, E5M2, FORMATS, Emulation, Rounding, by_scale
from tests.support import fp8_reference
from tests.support.fp8_reference import Delayed
from tests.support.parity import assert_close_relative, grad_of
from tests.support.tiny import MODEL

N, K, M = 150, 140, 270  # not multiples of a tile
MLA = dataclasses.replace(MODEL, q_lora_rank=12)
MHA = dataclasses.replace(MODEL, attention="mha", num_query_groups=1)


def matrices() -> tuple[Tensor, Tensor, Tensor]:
    """Return x, W and a gradient, with values that fall by five orders of magnitude along rows and along columns."""
    generator = torch.Generator().manual_seed(3)
    n, k, m = (torch.logspace(0, -5, length) for length in (N, K, M))
    x = torch.randn(N, K, generator=generator) * n[:, None] * k
    weight = torch.randn(M, K, generator=generator) * m[:, None] * k.flip(0)
    g = 1e-4 * torch.randn(N, M, generator=generator) * n.flip(0)[:, None] * m
    x[:40, :] = 0
    return x, weight, g


@pytest.mark.parametrize(("dtype", "name"), [(E4M3, "e4m3"), (E5M2, "e5m2")])
def test_rounding_equals_the_formats_definition(dtype, name):
    _, smallest, largest = fp8_reference.FORMATS[name]
    values = torch.cat(
        (
            torch.linspace(-largest, largest, 20_001),
            torch.logspace(-24, 9, 20_001, base=2),
            torch.arange(-64, 65) * 2.0 ** (smallest - 5),  # subnormal numbers and the ties between them
            torch.tensor([0.0, largest * 1.01, -largest * 100]),  # clipped
        )
    )
    found = by_scale(values, dtype, torch.tensor(1.0))
    assert torch.equal(found.values.double(), fp8_reference.rounded(values, name))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_leave_no_trace_in_a_history(value, single_process):
    """The update of such a step is skipped; the scales of later steps must be those of finite values."""
    rounding, x = Rounding(E4M3, "delayed", history=4), matrices()[0]
    rounding(x, learns=True)
    expected = rounding(x, learns=True)[0]
    rounding(torch.full_like(x, value), learns=True)
    found = rounding(x, learns=True)[0]
    assert torch.equal(found.values, expected.values)
    assert torch.equal(torch.as_tensor(found.factor), torch.as_tensor(expected.factor))


@pytest.mark.parametrize("weight", [False, True], ids=["piece", "square"])
@pytest.mark.parametrize(("recipe", "size"), [("blockwise", 128), ("mxfp8", 32)])
def test_tiles_are_scaled_and_rounded_to_the_bit(recipe, size, weight):
    """Neighbors differ by up to 2^20: with scales that are powers of two, only values below the format's range show a
    wrong tile."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(N, M, generator=generator) * 2.0 ** torch.randint(-20, 1, (N, M), generator=generator)
    over_columns, over_rows = Rounding(E4M3, recipe, history=1, weight=weight)(x, learns=True)
    side = size if weight and recipe == "blockwise" else 1
    assert torch.equal(over_columns.values.double(), fp8_reference.tiles(x, "e4m3", side, size))
    assert torch.equal(over_rows.values.double(), fp8_reference.tiles(x, "e4m3", size, side))


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
@pytest.mark.parametrize("fp8", FORMATS)
def test_a_linear_equals_the_definitions(fp8, recipe, single_process):
    x, weight, g = matrices()
    x.requires_grad_()
    weight.requires_grad_()
    y = Emulation(FORMATS[fp8], recipe, history=4)(x.view(15, 10, K), weight)
    y.backward(g.view(15, 10, M))
    their_recipe, g_format = "bf16" if fp8 == "emulate-bf16" else recipe, "e5m2" if fp8.endswith("hybrid") else "e4m3"
    theirs = fp8_reference.products(x.detach(), weight.detach(), g, their_recipe, g_format)
    assert_close_relative({"y": y.flatten(0, 1), "dx": grad_of(x), "dW": grad_of(weight)}, theirs)


def test_loops_share_a_history(single_process):
    """Three forward calls, then their backward passes, as three loops run them: earlier calls scale later ones."""
    inputs = [scale * torch.randn(20, 8) for scale in (1.0, 30.0, 0.1, 5.0, 0.01)]
    weights = [torch.randn(12, 8), 0.3 * torch.randn(12, 8)]
    linear = Emulation(FORMATS["emulate-hybrid"], "delayed", history=2)
    round_x, round_w, round_g = Delayed("e4m3", 2), Delayed("e4m3", 2), Delayed("e5m2", 2)
    for step, loops in enumerate((inputs[:3], inputs[3:])):
        weight = weights[step].clone().requires_grad_()
        found, theirs, gradients = [], [], []
        for loop, x in enumerate(loops):
            x = x.clone().requires_grad_()
            found.append((x, linear(x, weight)))
            theirs.append((round_x(x.detach()), round_w(weight.detach())))
            gradients.append(10.0**-loop * torch.randn(20, 12))
            assert_close_relative({"y": found[-1][1]}, {"y": theirs[-1][0] @ theirs[-1][1].T})
        expected = torch.zeros(12, 8, dtype=torch.float64)
        for (x, y), (their_x, their_w), g in reversed(list(zip(found, theirs, gradients, strict=True))):
            y.backward(g)
            their_g = round_g(g)
            expected += their_g.T @ their_x
            assert_close_relative({"dx": grad_of(x)}, {"dx": their_g @ their_w})
        assert_close_relative({"dW": grad_of(weight)}, {"dW": expected})
    with torch.no_grad():  # validation uses the history of training, and must not change it
        before = linear.x.amax_history.clone()
        y = linear(1e4 * inputs[0], weight)
        assert_close_relative({"y": y}, {"y": round_x(1e4 * inputs[0], learns=False) @ round_w(weight, learns=False).T})
        assert torch.equal(linear.x.amax_history, before)


LINEARS = {
    "mla": ["linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj"],
    "mha": ["linear_qkv", "linear_proj"],
}


@pytest.mark.parametrize("model", [MLA, MHA], ids=["mla", "mha"])
def test_emulation_covers_the_linear_layers_of_the_blocks_and_no_others(model, single_process):
    engine = EngineConfig(fp8="emulate-hybrid", last_layers_bf16=1)
    looped = LoopLM(model, GateConfig(state_size=8), single_process, engine=engine)
    plain = LoopLM(model, GateConfig(state_size=8), single_process)
    assert set(looped.state_dict()) == set(plain.state_dict()), "emulation must not change the checkpoint"
    found = {
        name.removesuffix(".product").removesuffix(".emulation"): module.x.dtype
        for name, module in looped.named_modules()
        if isinstance(module, Emulation)
    }
    names = [*(f"self_attention.{name}" for name in LINEARS[model.attention]), "mlp.linear_fc1", "mlp.linear_fc2"]
    dtypes = {0: E4M3, 1: torch.bfloat16}
    assert found == {f"decoder.layers.{layer}.{name}": dtype for layer, dtype in dtypes.items() for name in names}


def test_layers_outside_the_loops_stay_in_bf16(single_process):
    around = dataclasses.replace(MHA, prelude_layers=1, coda_layers=1)
    looped = LoopLM(around, GateConfig(state_size=8), single_process, engine=EngineConfig(fp8="emulate-e4m3"))
    dtypes: dict[str, set[torch.dtype]] = {}
    for name, module in looped.named_modules():
        if isinstance(module, Emulation):
            dtypes.setdefault(name.partition(".")[0], set()).add(module.x.dtype)
    assert dtypes == {"prelude": {torch.bfloat16}, "decoder": {E4M3}, "coda": {torch.bfloat16}}
    looped(torch.arange(8)[None]).hidden[-1].sum().backward()


@pytest.mark.parametrize("model", [MLA, MHA], ids=["mla", "mha"])
def test_every_matrix_of_the_blocks_is_multiplied_in_fp8_in_every_loop(model, single_process, monkeypatch):
    seen: list[torch.Size] = []
    forward = Emulation.forward

    def counted(self: Emulation, x: Tensor, weight: Tensor) -> Tensor:
        seen.append(weight.shape)
        return forward(self, x, weight)

    monkeypatch.setattr(Emulation, "forward", counted)
    looped = LoopLM(model, GateConfig(state_size=8), single_process, engine=EngineConfig(fp8="emulate-e4m3"))
    ids_BS = torch.randint(model.vocab_size, (2, 16))
    output = looped(ids_BS)
    matrices = [p.shape for layer in looped.decoder.layers for p in layer.parameters() if p.dim() == 2]
    assert sorted(seen) == sorted(matrices * model.num_loops)

    with torch.no_grad():
        exact = LoopLM(model, GateConfig(state_size=8), single_process)
        exact.load_state_dict(looped.state_dict())
        change = (output.hidden[-1] - exact(ids_BS).hidden[-1]).norm() / exact(ids_BS).hidden[-1].norm()
    assert 1e-3 < change < 0.3, f"out of place for e4m3, which has 4 significant bits: {change}"


@pytest.mark.parametrize("recompute", ["full", "loop"])
def test_recomputation_rounds_identically(recompute, single_process):
    gradients = []
    for mode in ("none", recompute):
        torch.manual_seed(8)
        layout, engine = ParallelConfig(recompute=mode), EngineConfig(fp8="emulate-hybrid", fp8_recipe="mxfp8")
        looped = LoopLM(MLA, GateConfig(state_size=8), single_process, layout=layout, engine=engine)
        output = looped(torch.randint(MLA.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1)))
        output.hidden[-1].square().mean().backward()
        gradients.append({name: p.grad for name, p in looped.decoder.named_parameters()})
    assert [name for name, grad in gradients[0].items() if not torch.equal(grad, gradients[1][name])] == []


def test_bf16_parameters_keep_their_type(single_process: ProcessGroupCollection):
    engine = EngineConfig(fp8="emulate-hybrid")
    looped = LoopLM(MLA, GateConfig(state_size=8), single_process, torch.bfloat16, engine=engine)
    output = looped(torch.randint(MLA.vocab_size, (2, 16)))
    output.hidden[-1].float().square().mean().backward()
    layer = looped.decoder.layers[0]
    assert output.hidden[-1].dtype is layer.mlp.linear_fc1.weight.grad.dtype is torch.bfloat16
