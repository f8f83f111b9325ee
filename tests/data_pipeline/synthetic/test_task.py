"""Splits by hash, drawing and packing."""

import numpy as np
import pytest

from data_pipeline.synthetic import __main__ as command
from data_pipeline.synthetic.packing import Items, pack
from data_pipeline.synthetic.task import NO_LEVEL, Ints, draw, split_of
from looplm.failures import UserError


@pytest.mark.parametrize("width", [1, 3, 40])
def test_each_split_has_its_share_of_the_items(width: int) -> None:
    item_NI = np.random.default_rng(width).integers(90 if width > 1 else 1 << 40, size=(100_000, width))
    shares = np.bincount(split_of(item_NI), minlength=3) / len(item_NI)
    assert shares == pytest.approx([14 / 16, 1 / 16, 1 / 16], abs=0.01)


def test_the_split_depends_on_every_number_and_on_no_other_item() -> None:
    item_NI = np.random.default_rng(0).integers(9, size=(20_000, 6))
    split_N = split_of(item_NI)
    assert np.array_equal(split_N[::7], split_of(item_NI[::7]))
    for column in range(6):
        changed_NI = item_NI.copy()
        changed_NI[:, column] += 1
        assert np.mean(split_of(changed_NI) != split_N) == pytest.approx(1 - (14**2 + 2) / 16**2, abs=0.02)


def test_consecutive_numbers_are_spread_over_the_splits() -> None:
    runs = split_of(np.arange(16_000)[:, None]).reshape(-1, 160)
    assert ((runs == 2).sum(axis=1) > 0).mean() > 0.99


@pytest.mark.parametrize("seen", [1, 0.25])
def test_drawn_items_are_those_of_the_split(seen: float) -> None:
    random = np.random.default_rng(0)
    item_NI = draw(lambda number: random.integers(4000, size=(number, 1)), 40_000, "train", seen=seen)
    assert item_NI.shape == (40_000, 1) and not split_of(item_NI).any()
    assert len(np.unique(item_NI)) == pytest.approx(4000 * 14 / 16 * seen, rel=0.06)


def test_a_split_without_items_is_refused() -> None:
    with pytest.raises(UserError, match=r"^data\.task: items of the split: '(valid|test)' is not allowed; .*too few"):
        for split in ("valid", "test"):
            draw(lambda number: np.zeros((number, 2), np.int64), 1, split)


def packed_by_hand(lengths: list[int], count: int, length: int) -> list[list[int]]:
    """Return the item that each token belongs to, from 1 on, in samples filled one after another."""
    rows: list[list[int]] = [[]]
    for item, size in enumerate(lengths, 1):
        if len(rows[-1]) + size > length:
            rows.append([])
        rows[-1] += [item] * size
    assert len(rows) > count
    return [row + [0] * (length - len(row)) for row in rows[:count]]


@pytest.mark.parametrize(("count", "length"), [(1, 7), (40, 7), (300, 23)])
def test_items_are_packed_in_their_order(count: int, length: int) -> None:
    random, lengths = np.random.default_rng(length), list[int]()

    def make(number: int) -> Items:
        length_M: Ints = random.integers(1, 8, size=number)
        item_M1 = np.arange(len(lengths) + 1, len(lengths) + number + 1)[:, None]
        lengths.extend(length_M.tolist())
        ids_MT = np.broadcast_to(item_M1, (number, 7))
        return Items(ids_MT, ids_MT + 1, ids_MT + 2, length_M)

    made = pack(make, count, length)
    ids_NS = np.array(packed_by_hand(lengths, count, length))
    assert np.array_equal(made.ids_NS, ids_NS)
    assert np.array_equal(made.label_NS, np.where(ids_NS > 0, ids_NS + 1, 0))
    assert np.array_equal(made.level_NS, np.where(ids_NS > 0, ids_NS + 2, NO_LEVEL))


def test_the_command_prints_token_label_and_level_below_each_other(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    command.main(["--task.mano.dense", "true", "--seq_length", "30", "--count", "2", "--split", "valid"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("mano, valid: 16 symbols, labels at ")
    assert [line for line in lines if line.startswith("sample")] == ["sample 0", "sample 1"]
    tokens = [line for line in lines if line.startswith("token")]
    labels = [line for line in lines if line.startswith("label")]
    levels = [line for line in lines if line.startswith("operators")]
    assert len(tokens) == len(labels) == len(levels) == 8 and max(map(len, lines)) <= 60
    column = tokens[0].index("=")
    assert labels[0][column].isdigit() and levels[0][column].isdigit()
    assert len(" ".join(tokens[:4]).split()) == 4 + 30


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["--count", "1000000000000"], "count: 1000000000000 is not allowed; give a number above 0 and at most 1000"),
        (["--seq_length", f"{2**63 - 1}"], "give a number above 0 and at most 1000000"),
        (
            ["--seq_length", "1000000", "--count", "11"],
            "count: 11 is not allowed; with seq_length=1000000 give at most 10: .* 10,000,000 tokens are printed",
        ),
    ],
)
def test_the_command_prints_no_more_than_fits(keys, message) -> None:
    with pytest.raises(UserError, match=f"{message}$"):
        command.main(["--task.mano.dense", "true", *keys])


def test_the_command_needs_a_task() -> None:
    with pytest.raises(UserError, match=r"^task: required|^data\.task: None is not allowed; name exactly one"):
        command.main([])
