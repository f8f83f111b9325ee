"""Last answers after chains that a model writes itself, on models whose every token is known."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from looplm.evaluation.chains import most_frequent, voted_answers

V, LETTERS = 6, 4


class Table:
    """A model that says, at each position, the distribution that ``row`` returns for the tokens so far."""

    def __init__(self, row: Any) -> None:
        self.row, self.calls = row, 0

    def __call__(self, ids_BS: Tensor) -> Any:
        self.calls += 1
        rows = [[self.row(ids[: end + 1]) for ids in ids_BS.tolist()] for end in range(ids_BS.size(1))]
        return SimpleNamespace(hidden=(torch.zeros(1), torch.tensor(rows).clamp(min=1e-30).log()))

    def head_weight(self) -> Tensor:
        return torch.eye(V)


def one(token: int) -> list[float]:
    return [1.0 if v == token % V else 0.0 for v in range(V)]


def chain_batch(rows: int = 8):
    """Words of LETTERS letters, 0, and their sums so far, each as the next token."""
    word_BS = torch.randint(1, V, (rows, LETTERS), generator=torch.Generator().manual_seed(1))
    sum_BS, zero_B1 = word_BS.cumsum(1) % V, torch.zeros(rows, 1, dtype=torch.int64)
    ids_BS = torch.cat((word_BS, zero_B1, sum_BS[:, :-1]), 1)
    labels_BS = torch.cat((zero_B1.expand(-1, LETTERS), sum_BS), 1)
    counts_SB = (torch.arange(2 * LETTERS) >= LETTERS)[:, None].expand(-1, rows)
    return ids_BS, labels_BS.t(), counts_SB


def solver(ids: list[int]) -> list[float]:
    step = len(ids) - LETTERS - 1
    before = ids[-1] if step > 0 else 0
    return one(before + ids[step]) if step >= 0 else one(0)


def solved(model: Any, votes: tuple[int, ...], writes_chain: bool, groups: Any, seed: int = 0) -> list[float]:
    found = voted_answers(model, [chain_batch(), chain_batch(5)], votes, writes_chain, seed, groups.dp)
    assert [answer.votes for answer in found] == list(votes)
    return [answer.solved for answer in found]


def test_a_model_that_adds_right_solves_all(single_process):
    assert solved(Table(solver), (1, 3), True, single_process) == [1.0, 1.0]


def test_the_models_own_tokens_stand_in_its_chain_and_not_the_right_ones(single_process):
    model = Table(lambda ids: one(ids[0] + 1) if len(ids) == LETTERS + 1 else solver(ids))
    assert solved(model, (1,), True, single_process) == [0.0], "one wrong step spoils the sum"


def test_the_most_frequent_of_sampled_chains_counts(single_process):
    def doubtful(ids: list[int]) -> list[float]:
        right = torch.tensor(solver(ids))
        return (0.9 * right + 0.1 / V).tolist() if len(ids) > LETTERS else right.tolist()

    model = Table(doubtful)
    one_vote, many = solved(model, (2, 25), True, single_process)
    assert many == 1.0 and one_vote < 1.0
    assert solved(model, (2,), True, single_process) == [one_vote], "the seed decides"


def test_a_task_without_chains_is_answered_at_once(single_process):
    model = Table(lambda ids: one(sum(ids[:LETTERS])))
    assert solved(model, (1, 9), False, single_process) == [1.0, 1.0] and model.calls == 2, "a batch is read once"
    assert solved(Table(lambda ids: one(sum(ids[:LETTERS]) + 1)), (1,), False, single_process) == [0.0]


def test_labels_at_different_positions_are_no_chain(single_process):
    ids_BS, labels_SB, counts_SB = chain_batch()
    counts_SB = counts_SB.clone()
    counts_SB[0, 0] = True
    with pytest.raises(AssertionError, match="other positions"):
        voted_answers(cast(Any, Table(solver)), [(ids_BS, labels_SB, counts_SB)], (1,), True, 0, single_process.dp)


def test_of_answers_that_are_equally_frequent_the_first_wins():
    answer_KB = torch.tensor([[5, 1, 3, 4], [2, 2, 3, 4], [5, 2, 1, 0], [2, 1, 1, 4]])
    assert most_frequent(answer_KB).tolist() == [5, 1, 3, 4]
    assert most_frequent(torch.tensor([[4], [1]])).tolist() == [4], "the smaller token is not the better answer"
