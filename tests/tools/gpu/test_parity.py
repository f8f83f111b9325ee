"""The parity part's own judgement: errors, tolerances, names. Its comparisons run in test_gpu_check.py."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from looplm.cli import from_dict
from looplm.config import ModelConfig, Recompute
from looplm.model import LoopLM
from tools.gpu import parity
from tools.gpu.parity import Case, Found
from tools.gpu.record import Mismatch, Rows, read_rows

MLA = Case("mla", "lru", "fp32", "local")


def found(loss: float, **gradients: list[float]) -> Found:
    return Found(torch.tensor(loss), {name: torch.tensor(values) for name, values in gradients.items()})


def test_the_gradient_closest_to_its_limit_is_named() -> None:
    wanted = found(2.0, **{"x.a": [1.0, 10.0], "y.b": [1.0, 1.0]})
    values = parity.compare(
        found(2.0, **{"x.a": [1.0, 10.2], "y.b": [1.01, 1.0]}), wanted, {"loss": 0.1, "x.a": 0.1, "y.b": 0.02}
    )
    assert values == {"loss": 0.0, "worst": 0.01, "allowed": 0.02, "tensor": "y.b"}


@pytest.mark.parametrize("wrong", [11.1, float("nan")])
def test_a_wrong_gradient_fails_with_its_name_and_values(wrong: float) -> None:
    wanted, allowed = found(2.0, a=[1.0, 10.0]), {"loss": 0.1, "a": 0.1}
    with pytest.raises(Mismatch, match=r"1 of 2 tensors differ, most of all a: .*, allowed 1.0e-01") as raised:
        parity.compare(found(2.0, a=[1.0, wrong]), wanted, allowed)
    assert raised.value.values["tensor"] == "a"


def test_a_gradient_that_must_be_zero_allows_nothing_else() -> None:
    zero, other = found(1.0, a=[0.0, 0.0]), found(1.0, a=[0.0, 1e-9])
    assert parity.errors(zero, zero) == {"loss": 0, "a": 0}
    assert parity.errors(other, zero)["a"] == float("inf")


def test_a_gradient_that_cancels_is_judged_by_its_modules_others() -> None:
    wanted = Found(torch.tensor(1.0), {"gate.weight": torch.tensor([-2.0]), "gate.bias": torch.tensor([1e-3])})
    seen = Found(wanted.loss, {"gate.weight": torch.tensor([-2.0]), "gate.bias": torch.tensor([2e-3])})
    assert parity.errors(seen, wanted)["gate.bias"] == pytest.approx(5e-4)


def test_the_weights_fit_the_model_and_none_is_trivial(single_process) -> None:
    for attention, gate in (("mla", "lru"), ("mha", "linear")):
        model = from_dict(ModelConfig, parity.MODELS[attention], where="test")
        weights = parity.random_weights(model, parity.GATES[gate], torch.float32)
        built = LoopLM(model, parity.GATES[gate], single_process)
        assert {name: tuple(value.shape) for name, value in weights.items()} == {
            name: tuple(value.shape) for name, value in built.named_parameters()
        }
        assert all(value.any() and not (value == 1).all() for value in weights.values())


def test_a_fused_norm_gets_the_weight_of_the_local_one(single_process, monkeypatch: pytest.MonkeyPatch) -> None:
    model = from_dict(ModelConfig, parity.MODELS["mla"], where="test")
    built = LoopLM(model, parity.GATES["lru"], single_process)
    assert all(own == local for own, local in parity.local_names(built).items())
    renames = {"mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm."}
    monkeypatch.setattr(built.decoder.layers[0].submodules_config, "sharded_state_dict_keys_map", renames)
    own = "decoder.layers.1.mlp.linear_fc1.layer_norm_weight"
    monkeypatch.setattr(built, "named_parameters", lambda: iter([(own, torch.zeros(1))]))
    assert parity.local_names(built) == {own: "decoder.layers.1.pre_mlp_layernorm.weight"}


def test_a_wrong_gradient_of_the_product_is_found(single_process, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight's gradient is off by a thousandth: the row of each way of recomputing fails and names it."""
    computed = parity.computed

    def wrong(
        case: Case, weights: Mapping[str, Tensor], model: ModelConfig, batch: object, mode: Recompute, groups: object
    ) -> Found:
        result = computed(case, weights, model, batch, mode, groups)  # type: ignore[arg-type]
        if mode == "loop":
            result.gradients["decoder.layers.1.mlp.linear_fc2.weight"].mul_(1.001)
        return result

    monkeypatch.setattr(parity, "computed", wrong)
    monkeypatch.setattr(parity, "get_args", lambda _: ("none", "loop"))
    parity.check_case(MLA, single_process, Rows(tmp_path / "rows"))
    rows = read_rows(tmp_path / "rows")
    assert [row.status for row in rows] == ["ok", "ok", "failed", "failed"]
    assert [row.values["tensor"] for row in rows[2:]] == ["decoder.layers.1.mlp.linear_fc2.weight"] * 2
