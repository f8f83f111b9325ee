"""The rehearsal's parts: execution without numbers, the recorder's counts, roles, and the comparison of messages."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from looplm.config import ParallelConfig
from looplm.failures import UserError
from tools.rehearsal.hollow import HollowExecutor
from tools.rehearsal.matching import find_faults
from tools.rehearsal.recorder import Recorder
from tools.rehearsal.roles import chosen_roles, distinct_roles, role_of
from tools.rehearsal.traffic import RECEIVE, SEND, Message

HUGE = 1 << 20  # rows: a matrix of 4 TiB


@pytest.mark.parametrize("cast", ["to", "copy_"])
def test_an_offset_beyond_32_bits_is_refused(cast):
    def convert(offset: int) -> torch.Tensor:
        offsets_N = torch.tensor([0, offset])
        return offsets_N.to(torch.int32) if cast == "to" else torch.empty(2, dtype=torch.int32).copy_(offsets_N)

    with Recorder(HollowExecutor()).recording():
        assert convert(2**31 - 1).tolist() == [0, 2**31 - 1]
        with pytest.raises(
            RuntimeError, match=r"2,147,483,648 does not fit into torch.int32; offsets of this size need"
        ):
            convert(2**31)


def test_a_tensor_that_no_memory_could_hold_has_shapes_and_gradients() -> None:
    recorder = Recorder(HollowExecutor())
    with recorder.recording():
        x = torch.empty(HUGE, 4096, requires_grad=True)
        y = torch.nn.functional.silu(x.t() @ x)
        assert y.shape == (4096, 4096)
        (y.sum() * 2).backward()
        assert x.grad is not None and x.grad.shape == x.shape
        x.grad.add_(x.detach())
        assert y[1].sum().item() == 0, "a number that nobody computed is zero"
        small = torch.arange(4)
        assert (small * small).tolist() == [0, 1, 4, 9], "small tensors are computed"
    assert recorder.flops.by_operator["mm"] == 3 * 2 * 4096**2 * HUGE


def test_strides_are_those_of_the_real_operation() -> None:
    def strides(run: Any) -> list[tuple[int, ...]]:
        with run.recording():
            x = torch.ones(8, 3, 16).permute(1, 0, 2)
            kept = [x * 2, x.contiguous(), torch.cat((x, x), 1), x.float() + 1, torch.empty_like(x), x.sum(1)]
            return [one.stride() for one in kept]

    assert strides(Recorder(HollowExecutor(most_numbers=4))) == strides(Recorder())


def test_flops_agree_with_torchs_counter() -> None:
    def work() -> None:
        a = torch.ones(6, 5, requires_grad=True)
        (torch.addmm(torch.ones(6, 6), a, torch.ones(5, 6)) @ torch.ones(6, 2)).sum().backward()

    recorder, counter = Recorder(), FlopCounterMode(display=False)
    with recorder.recording():
        work()
    with counter:
        work()
    assert sum(recorder.flops.by_operator.values()) == counter.get_total_flops() > 0


def test_causal_attention_counts_half_of_the_scores_and_five_products_in_backward() -> None:
    recorder = Recorder()
    q, k, v = (torch.ones(1, 2, 8, 4, requires_grad=True) for _ in range(3))
    with recorder.recording():
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    forward = 2 * 2 * (8 * 8 // 2) * (4 + 4)
    assert sorted(recorder.flops.by_operator.values()) == [forward, 5 * forward // 2]


def test_bytes_follow_a_storage_from_its_first_tensor_to_its_last() -> None:
    recorder = Recorder()
    with recorder.recording():
        weight = torch.ones(100, requires_grad=True)
        recorder.memory.mark([weight], "weights")
        recorder.restart()
        y = (weight * 2).exp()  # keeps its result for backward
        view = y[:10]
        del y
        assert recorder.memory.bytes["activations"] == 400, "a view keeps the whole storage"
        kept = torch.zeros(7)
        del view
    use = recorder.memory.use()
    assert use.at_peak == {"weights": 400, "gradients": 0, "optimizer": 0, "activations": 400, "buffers": 400}
    assert use.kept == {kept.nbytes: 1}


def test_roles_are_the_ends_of_every_kind_of_parallelism() -> None:
    layout = ParallelConfig(tensor=4, pipeline=2, context=1)
    roles = distinct_roles(layout, 64)
    assert len(roles) == 2 * 2 * 2
    assert roles[-1].rank == 63 and str(roles[-1]) == "rank 63 (pipeline 1, data 7, context 0, tensor 3)"
    assert all(role == role_of(role.rank, layout, 64) for role in roles)
    assert [role.rank for role in chosen_roles("5, 9", layout, 64)] == [5, 9]
    with pytest.raises(UserError, match="rank: '64' is not allowed; give all, or numbers below gpus=64"):
        chosen_roles("64", layout, 64)


def message(kind: str, peer: int | None = None, size: int = 8, group: tuple[int, ...] = (0, 1)) -> Message:
    return Message(kind, group, (size,), "float32", peer, f"model.py:{size} {kind}")


def faults(*ranks: list[Message], orders: list[list[int]] | None = None) -> str:
    """Compare ranks' messages, each of which is waited for at once."""
    messages = dict(enumerate(ranks))
    at_once = [[step for number in range(len(one)) for step in (number, ~number)] for one in ranks]
    groups = {rank: [(0, 1)] for rank in messages}
    return "\n".join(find_faults(messages, dict(enumerate(orders or at_once)), groups))


def test_ranks_in_accord_have_no_faults() -> None:
    both = [message("all_reduce"), message("all_gather", size=16)]
    assert faults(both, both) == ""
    assert faults([message(SEND, 1), message(RECEIVE, 1)], [message(RECEIVE, 0), message(SEND, 0)]) == ""


def test_a_schedule_in_which_both_ranks_receive_first_is_a_deadlock() -> None:
    receive_first = [[message(RECEIVE, 1 - rank), message(SEND, 1 - rank, size=9)] for rank in range(2)]
    receive_first = [[one._replace(sizes=(8,)) for one in ones] for ones in receive_first]
    text = faults(*receive_first)
    assert text.startswith("deadlock of 2 ranks: rank 0 waits for recv of 8 bytes (float32) from rank 1 at model.py:8")
    # On a communicator of NCCL the send would come after the receive even if nobody waited in between.
    assert "deadlock" in faults(*receive_first, orders=[[0, 1, ~0]] * 2)
    (first, second), other = receive_first, (0, 1, 2)
    apart = [[first[0], first[1]._replace(group=other)], [second[0]._replace(group=other), second[1]]]
    assert faults(*apart, orders=[[0, 1, ~0]] * 2) == "", "two groups have two communicators"


def test_a_mismatch_names_ranks_position_and_sites() -> None:
    text = faults([message("all_reduce"), message("all_reduce", size=16)], [message("all_reduce")])
    assert text == (
        "collective 1 of group [0, 1]: rank 0 issues all_reduce of 16 bytes (float32) at model.py:16 all_reduce; "
        "rank 1 issues none"
    )
    text = faults([message(SEND, 1)], [message(RECEIVE, 0, size=4)])
    assert text.startswith("message 0 from rank 0 to rank 1: rank 0 issues send of 8 bytes (float32) to rank 1 at")
