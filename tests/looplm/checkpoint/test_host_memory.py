"""The main memory that checkpoints take, compared with the tensors that a run saves and loads."""

from typing import Any

import pytest

from looplm import checkpoint
from looplm.checkpoint import optimizer_state
from looplm.checkpoint.plan import make_plan
from looplm.checkpoint.state import sharded_state
from pretrain.run import build
from tests.support.tiny import run_config


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("group_bytes", [1, 1 << 30])
def test_saving_and_loading_take_what_is_said(
    precision, group_bytes, corpus, tmp_path, single_process, monkeypatch
) -> None:
    for module in ("optimizer_state", "host_memory"):
        monkeypatch.setattr(f"looplm.checkpoint.{module}.GROUP_BYTES", group_bytes)
    parallel = {"distributed_optimizer": True}
    config = run_config(corpus, tmp_path, optim={"precision": precision}, parallel=parallel)
    needs = checkpoint.host_bytes(config)
    state = build(config, single_process)[0].state

    (tmp_path / "state").mkdir()
    saved = sharded_state(state)
    gathered = [tensor.data.nbytes for values in saved["optimizer"].values() for tensor in values.values()]
    planned = [tensor.nbytes for tensor in make_plan(saved, tmp_path, True).tensors()]
    assert needs.staying == sum(planned) and needs.saving == sum(planned) + sum(gathered)

    groups = list[int]()

    def read(wanted: dict[str, Any]) -> optimizer_state.State:
        groups.append(sum(tensor.data.nbytes for values in wanted.values() for tensor in values.values()))
        return {}

    optimizer_state.load(state.optimizer, state.model, state.model.sharded_state_dict(), read, 0)
    assert needs.loading == 2 * max(groups) and sum(groups) == sum(gathered)
