"""Which layouts are legal, and what the refusal of the others says."""

import pytest

from looplm.cli import UserError
from looplm.config import ParallelConfig

WIDTHS = {"model.num_attention_heads": 12, "model.vocab_size": 48}


def check(layout: ParallelConfig, seq_length=32, num_layers=6, mla=True, tied=False) -> None:
    layout.check(WIDTHS, seq_length, num_layers, mla, tied)


@pytest.mark.parametrize(
    ("keys", "stages"),
    [
        ({}, [6]),
        ({"pipeline": 3}, [2, 2, 2]),
        ({"pipeline": 2, "first_stage_layers": 2}, [2, 4]),
        ({"pipeline": 3, "last_stage_layers": 2}, [2, 2, 2]),
        ({"pipeline": 4, "first_stage_layers": 1, "last_stage_layers": 1}, [1, 2, 2, 1]),
    ],
)
def test_layers_are_dealt_to_the_stages(keys, stages):
    layout = ParallelConfig(**keys)
    check(layout)
    assert layout.stage_layers(6) == stages


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tensor": 0}, "parallel.tensor: 0 is not allowed"),
        ({"context": -1}, "parallel.context: -1 is not allowed"),
        ({"sequence": True}, "parallel.sequence: True is not allowed; it needs parallel.tensor > 1"),
        ({"first_stage_layers": 2}, "parallel.first_stage_layers: 2 is not allowed; it needs parallel.pipeline > 1"),
        ({"pipeline": 2, "last_stage_layers": 0}, "parallel.last_stage_layers: 0 is not allowed"),
        ({"tensor": 5}, "parallel.tensor: 5 is not allowed; it must divide model.num_attention_heads=12; the nearest legal value is 4"),
        ({"tensor": 2, "sequence": False}, "parallel.sequence: False is not allowed; mla"),
        ({"pipeline": 4}, "parallel.pipeline: 4 is not allowed; it must divide model.num_layers=6; the nearest legal value is 3"),
        ({"pipeline": 2, "first_stage_layers": 6}, "parallel.first_stage_layers: 6 is not allowed; model.num_layers=6 must leave"),
        ({"pipeline": 3, "last_stage_layers": 3}, "parallel.last_stage_layers: 3 is not allowed; model.num_layers=6 must leave"),
        ({"context": 3}, "data.seq_length: 32 is not allowed; it must be a multiple of 2 x parallel.context x the ranks that split the sequence = 6; the nearest legal value is 30"),
        ({"context": 2, "tensor": 12}, "the nearest legal value is 4"),
    ],
)  # fmt: skip
def test_an_illegal_layout_is_refused_with_the_nearest_legal_one(keys, message):
    with pytest.raises(UserError) as refused:
        check(ParallelConfig(**keys))
    assert message in str(refused.value)


def test_tied_embeddings_do_not_span_a_pipeline():
    with pytest.raises(UserError, match=r"model\.tie_embeddings"):
        check(ParallelConfig(pipeline=2), tied=True)


def test_mha_may_do_without_sequence_parallelism():
    check(ParallelConfig(tensor=2, sequence=False), mla=False)
