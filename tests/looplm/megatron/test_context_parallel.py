"""Context parallelism in one process: which rank holds which positions. Its gradients are in tests/parallel."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

from looplm.megatron import context_parallel
from looplm.model.attention import document_mask


def groups_of(ranks: int) -> list[dist.ProcessGroup]:
    """Return a process group as each of its ranks sees it. It cannot communicate."""
    return [dist.ProcessGroup(dist.HashStore(), rank, ranks) for rank in range(ranks)]


def documents(length: int) -> torch.Tensor:
    """Return start positions [S, 2]: a sample of three documents and a sample of one."""
    starts = torch.zeros(length, 2, dtype=torch.int64)
    starts[3:, 0], starts[length - 5 :, 0] = 3, length - 5
    return starts


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_gather_inverts_shard(ranks, monkeypatch):
    whole = torch.randn(8 * ranks, 2, 3)
    shards = [context_parallel.shard(whole, group) for group in groups_of(ranks)]
    monkeypatch.setattr(context_parallel, "gather_from_sequence_parallel_region", lambda mine, group: torch.cat(shards))
    for group in groups_of(ranks):
        assert torch.equal(context_parallel.gather(shards[group.rank()], group), whole)
        assert torch.equal(
            context_parallel.shard(whole.transpose(0, 1), group, dim=1), shards[group.rank()].transpose(0, 1)
        )


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_positions_are_those_of_megatrons_rotary_embedding(ranks, single_process):
    angles = torch.arange(12.0 * ranks).view(-1, 1, 1, 1)
    for group in groups_of(ranks):
        mine = context_parallel.positions(12 * ranks, group)
        assert torch.equal(get_pos_emb_on_this_cp_rank(angles, 0, group).flatten(), mine.float())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_spans_are_consecutive_and_see_no_later_key(ranks):
    work = set()
    for group in groups_of(ranks):
        mine, found = context_parallel.positions(8 * ranks, group), []
        for own, seen in context_parallel.spans(len(mine), group):
            run = mine[own]
            assert torch.equal(run, torch.arange(seen - len(run), seen))
            found.append(run)
        assert torch.equal(torch.cat(found), mine)
        work.add(int((mine + 1).sum()))
    assert len(work) == 1, f"causal work is uneven: {work}"


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_ranks_document_mask_is_its_rows_of_the_whole_mask(ranks):
    starts = documents(8 * ranks)
    whole = document_mask(starts, torch.float32)
    for group in groups_of(ranks):
        mine = document_mask(context_parallel.shard(starts, group), torch.float32, group)
        assert torch.equal(mine, context_parallel.shard(whole, group, dim=2))


def test_a_sequence_that_cannot_be_sharded_is_refused():
    with pytest.raises(RuntimeError):
        context_parallel.shard(torch.zeros(10, 1), groups_of(2)[0])
