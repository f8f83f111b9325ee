"""Simulated schedules against Megatron's own, run rank by rank with a communicator that receives noise."""

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_pipelining_with_interleaving,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from looplm.cli import parse_config
from looplm.failures import UserError
from looplm.megatron import patches
from tools.plan import main
from tools.planning import schedule
from tools.planning.schedule import Costs, Work
from tools.timeline import TimelineConfig

ROOT = Path(__file__).resolve().parents[3]
SIZES = [(2, 1, 4), (2, 4, 2), (2, 4, 8), (3, 4, 6), (4, 2, 8), (4, 4, 4), (4, 4, 16), (8, 3, 24)]


class Group:
    """A process group that only knows its size."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


class Groups:
    tp = cp = dp_cp = Group()
    embd = pos_embd = None

    def __init__(self, pp: Group) -> None:
        self.pp = pp


class Communicator:
    """Communicator that answers every message at once, so that one rank can run a schedule alone."""

    def __init__(self, pp_group: Group, config: TransformerConfig) -> None:
        self.pp_group, self.config = pp_group, config
        self.virtual_pipeline_model_parallel_size = config.virtual_pipeline_model_parallel_size

    def recv_forward(self, shape: Any, is_first: bool) -> Any:
        """Return a message, or for a list of shapes, as the plain schedule gives it, a list of them."""
        if isinstance(shape[0], tuple):
            return [self.recv_forward(one, is_first) for one in shape]
        return None if is_first else torch.zeros(shape, requires_grad=True)

    def recv_backward(self, shape: Any, is_last_stage: bool) -> Any:
        if isinstance(shape[0], tuple):
            return [self.recv_backward(one, is_last_stage) for one in shape]
        return None if is_last_stage else torch.zeros(shape)

    def send_forward(self, _: Any, is_last_stage: bool) -> None: ...

    def send_backward(self, _: Any, is_first: bool) -> None: ...

    def send_forward_recv_backward(self, _: Any, shape: Any, is_last_stage: bool) -> Any:
        return self.recv_backward(shape, is_last_stage)

    def send_backward_recv_forward(self, _: Any, shape: Any, is_first: bool) -> Any:
        return self.recv_forward(shape, is_first)

    def send_forward_recv_forward(self, _: Any, recv_prev: bool, tensor_shape: Any) -> Tensor | None:
        return self.recv_forward(tensor_shape, not recv_prev)

    def send_backward_recv_backward(self, _: Any, recv_next: bool, tensor_shape: Any) -> Tensor | None:
        return self.recv_backward(tensor_shape, not recv_next)

    def send_forward_backward_recv_forward_backward(
        self, *_: Any, recv_prev: bool, recv_next: bool, tensor_shape: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        return self.recv_forward(tensor_shape, not recv_prev), self.recv_backward(tensor_shape, not recv_next)


class Recorder(nn.Module):
    """One loop's part of the model, which records when its forward and backward run."""

    def __init__(self, config: TransformerConfig, loop: int, record: list[Work]) -> None:
        super().__init__()
        self.config, self.vp_stage, self.record, self.calls = config, loop, record, 0
        self.model_type, self.share_embeddings_and_output_weights = None, False
        self.input: Tensor | None = None

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        self.input = tensors[0]

    def forward(self) -> Tensor:
        loop, micro_batch, self.calls = self.vp_stage, self.calls, self.calls + 1
        self.record.append(Work("forward", loop, micro_batch))
        hidden = torch.zeros(1, 1, 1, requires_grad=True) if self.input is None else self.input
        output = hidden * 1.0
        output.register_hook(lambda _: self.record.append(Work("backward", loop, micro_batch)))
        return output


def megatron_order(rank: int, pipeline: int, loops: int, micro_batches: int) -> list[Work]:
    """Return the order in which Megatron's own schedule runs the loops of one rank."""
    config = TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1)
    # Set afterwards, as looplm.model.pipeline does: Megatron's own check needs parallel_state.
    config.virtual_pipeline_model_parallel_size = loops if loops > 1 else None
    config.microbatch_group_size_per_vp_stage = pipeline
    config.deallocate_pipeline_outputs, config.pipeline_dtype = False, torch.float32
    record: list[Work] = []
    group = Group(rank, pipeline)
    run = (
        forward_backward_pipelining_without_interleaving
        if loops == 1
        else forward_backward_pipelining_with_interleaving
    )
    run(
        forward_step_func=lambda _, model: (
            model(),
            lambda output: (output.sum(), torch.tensor(1, dtype=torch.int), None),
        ),
        data_iterator=[None] * loops,
        model=[Recorder(config, loop, record) for loop in range(loops)],
        num_microbatches=micro_batches,
        seq_length=1,
        micro_batch_size=1,
        p2p_communicator=Communicator(group, config),
        pg_collection=Groups(group),
    )
    return record


@pytest.mark.parametrize("sizes", SIZES)
def test_the_order_is_megatrons(sizes: tuple[int, int, int]) -> None:
    patches.install()
    order = schedule.interleaved_order(*sizes)
    for rank in range(sizes[0]):
        assert order[rank] == megatron_order(rank, *sizes), f"rank {rank}"


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("costs", [Costs(), Costs(forward=3.0, backward=4.0)])
def test_the_bubble_matches_the_formula(sizes: tuple[int, int, int], costs: Costs) -> None:
    ranks, loops, micro_batches = sizes
    virtual = schedule.simulate([schedule.interleaved_order(*sizes)], costs)
    by_loop = schedule.simulate(schedule.loop_by_loop_order(*sizes), costs)
    assert schedule.bubble(virtual) == pytest.approx((ranks - 1) / (loops * micro_batches))
    assert schedule.bubble(by_loop) == pytest.approx((ranks - 1) / micro_batches)
    assert schedule.interleaved_bubble(*sizes) == pytest.approx((ranks - 1) / (loops * micro_batches))
    assert schedule.loop_by_loop_bubble(*sizes) == pytest.approx((ranks - 1) / micro_batches)
    most = (loops + 1) * ranks - 1 if loops > 1 else ranks
    assert schedule.in_flight(virtual) == min(loops * micro_batches, most)
    assert schedule.in_flight(by_loop) == loops * micro_batches


def test_work_never_starts_before_its_input_arrives() -> None:
    costs = Costs(forward=1.0, backward=2.0, head=0.5, send=0.25)
    for passes in ([schedule.interleaved_order(4, 3, 8)], schedule.loop_by_loop_order(4, 3, 8)):
        slots = schedule.simulate(passes, costs)
        times = {(rank, slot.work): slot for rank, row in enumerate(slots) for slot in row}
        assert len(times) == 4 * 2 * 3 * 8
        for rank, row in enumerate(slots):
            assert all(after.start >= before.end for before, after in itertools.pairwise(row))
            assert sum(slot.end - slot.start for slot in row) == pytest.approx(24 * 3 * (1.5 if rank == 3 else 1.0))
        for micro_batch in range(8):
            line = [(rank, Work("forward", loop, micro_batch)) for loop in range(3) for rank in range(4)]
            line += [(rank, Work("backward", loop, micro_batch)) for rank, (_, loop, _) in reversed(line)]
            for before, after in itertools.pairwise(line):
                free = before[0] == after[0]
                assert times[after].start >= times[before].end + (0.0 if free else 0.25)


def test_a_deadlock_is_an_error() -> None:
    order = schedule.interleaved_order(2, 2, 2)
    order[0].reverse()
    with pytest.raises(ValueError, match="wait for each other"):
        schedule.simulate([order], Costs())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pipeline", "1"], "pipeline: 1 is not allowed; a pipeline has at least 2 ranks"),
        (["--loops", "0"], "loops: 0 is not allowed"),
        (["--micro_batches", "7"], "micro_batches: 7 is not allowed; .* legal value is 8"),
        (["--micro_batches", "1"], "micro_batches: 1 is not allowed; .* legal value is 4"),
        (["--forward", "0"], "forward: 0.0 is not allowed"),
        (["--forward", "1e-300", "--head", "1e300"], "forward: 1e-300 is not allowed; give a number of at least 1e-06"),
        (["--head", "1e300"], r"head: 1e\+300 is not allowed; give a number of at least 0 and at most 1000000.0"),
        (
            ["--loops", "100000"],
            "loops: 100000 is not allowed; pipeline x loops x micro_batches are 1,600,000; at most 200,000 can be",
        ),
        (["--send", "-1"], "send: -1.0 is not allowed"),
        (["--micro_batch", "8"], "--micro_batch: unknown key; did you mean micro_batches?"),
    ],
)
def test_bad_input_gives_a_one_line_error(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_config(TimelineConfig, arguments, prog="plan", description="")
    assert "\n" not in str(caught.value)


def test_the_flag_can_be_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--timeline", "--pipeline", "2", "--micro_batches", "2"])
    drawn = capsys.readouterr().out
    main(["--pipeline", "2", "--micro_batches", "2", "--timeline"])
    assert capsys.readouterr().out == drawn


@pytest.mark.slow
def test_the_docs_show_what_the_command_prints() -> None:
    page = (ROOT / "docs/parallelism.md").read_text(encoding="utf-8")
    command = "python -m tools.plan --timeline --pipeline 4 --loops 4 --micro_batches 4"
    assert f"`{command}`" in page
    done = subprocess.run([sys.executable, *command.split()[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout in page
