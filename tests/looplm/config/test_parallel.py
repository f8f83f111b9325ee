"""Parallel layouts: which are legal, and the messages for those that are not."""

import pytest

from looplm.config import ParallelConfig
from looplm.failures import UserError

WIDTHS = {"model.num_attention_heads": 12, "model.vocab_size": 48}
NEAREST = "the nearest legal value is"
SPLIT = "2 x parallel.context x the ranks that split the sequence"


def check(layout: ParallelConfig, seq_length=32, num_layers=6, mla=True, tied=False) -> None:
    layout.check(WIDTHS, seq_length, num_layers, mla, tied)


@pytest.mark.parametrize(
    ("keys", "layers"),
    [
        ({}, [6]),
        ({"pipeline": 3}, [2, 2, 2]),
        ({"pipeline": 2, "first_stage_layers": 2}, [2, 4]),
        ({"pipeline": 3, "last_stage_layers": 2}, [2, 2, 2]),
        ({"pipeline": 4, "first_stage_layers": 1, "last_stage_layers": 1}, [1, 2, 2, 1]),
    ],
)
def test_layers_are_divided_among_pipeline_ranks(keys, layers):
    layout = ParallelConfig(**keys)
    check(layout)
    assert layout.layers_per_rank(6) == layers


@pytest.mark.parametrize(
    ("keys", "value", "fix"),
    [
        ({"tensor": 0}, "parallel.tensor: 0", "give a number above 0"),
        ({"context": -1}, "parallel.context: -1", "give a number above 0"),
        ({"sequence": True}, "parallel.sequence: True", "it needs parallel.tensor > 1"),
        ({"first_stage_layers": 2}, "parallel.first_stage_layers: 2", "it needs parallel.pipeline > 1"),
        ({"pipeline": 2, "last_stage_layers": 0}, "parallel.last_stage_layers: 0", "give null or a number above 0"),
        ({"overlap_param_gather": True}, "parallel.overlap_param_gather: True", "without parallel.dist"),
        ({"tensor": 5}, "parallel.tensor: 5", f"it must divide model.num_attention_heads=12; {NEAREST} 4"),
        (
            {"tensor": 11, "sequence": False},
            "parallel.tensor: 11",
            f"it must divide model.num_attention_heads=12; {NEAREST} 12",
        ),
        ({"tensor": 2, "sequence": False}, "parallel.sequence: False", "mla"),
        ({"pipeline": 4}, "parallel.pipeline: 4", f"it must divide model.num_layers=6; {NEAREST} 3"),
        ({"pipeline": 2, "first_stage_layers": 6}, "parallel.first_stage_layers: 6", "model.num_layers=6 must leave"),
        ({"pipeline": 3, "last_stage_layers": 3}, "parallel.last_stage_layers: 3", "model.num_layers=6 must leave"),
        ({"context": 3}, "data.seq_length: 32", f"it must be a multiple of {SPLIT} = 6; {NEAREST} 30"),
        ({"context": 2, "tensor": 12}, "parallel.tensor: 12", f"it must divide data.seq_length=32; {NEAREST} 4"),
    ],
)
def test_an_illegal_layout_is_refused_with_the_nearest_legal_one(keys, value, fix):
    with pytest.raises(UserError) as refused:
        check(ParallelConfig(**keys))
    assert str(refused.value).startswith(f"{value} is not allowed; {fix}")


def test_tied_embeddings_do_not_span_a_pipeline():
    with pytest.raises(UserError, match=r"model\.tie_embeddings"):
        check(ParallelConfig(pipeline=2), tied=True)


def test_mha_may_do_without_sequence_parallelism():
    check(ParallelConfig(tensor=2, sequence=False), mla=False)
