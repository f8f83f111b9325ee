"""Context parallelism in one process: which rank holds which positions. Its gradients are in tests/parallel."""

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

from looplm.megatron import context_parallel
from tests.support.documents import groups_of


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


def test_a_sequence_that_cannot_be_sharded_is_refused():
    with pytest.raises(RuntimeError):
        context_parallel.shard(torch.zeros(10, 1), groups_of(2)[0])
