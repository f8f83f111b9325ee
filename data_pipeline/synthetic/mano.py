"""Mano: arithmetic modulo p in prefix notation, without intermediate results.

The task of Allen-Zhu (Physics of Language Models, part 4.1), as the Ouro paper trains it (arXiv 2510.25741, appendix
B.2): an expression of 1 to ``max_operators`` operators +, - and *, all values modulo p. Each part of an expression is
split at random: of its remaining operators, a uniform number goes to the left operand. The paper's token with the
number of operators is left out: prefix notation shows where an expression ends, and a longer one then needs no new
symbol. An item is the expression.
"""

import numpy as np

from data_pipeline.synthetic.packing import Items, pack
from data_pipeline.synthetic.task import END, NO_LEVEL, Examples, Ints, Split, Task, draw, require_length
from looplm.config import ManoConfig

_OPERATORS = ("+", "-", "*")
_FIRST_OPERATOR, _ASK = 1, 1 + len(_OPERATORS)
_FIRST_NUMBER = _ASK + 1


class Mano(Task):
    """Expressions, each followed by ``=``, where the label is its value.

    With ``dense``, the last token of every part of an expression has a label too: the value of the largest part that
    ends there. A test out of distribution has larger ``min_operators`` and ``max_operators``.
    """

    level_name = "operators"

    def __init__(self, config: ManoConfig) -> None:
        self._config = config
        self.symbols = (END, *_OPERATORS, "=", *(str(number) for number in range(config.modulus)))

    def generate(self, random: np.random.Generator, count: int, length: int, split: Split) -> Examples:
        """Return as many expressions a sample as fit."""
        require_length("mano", length, 2 * self._config.max_operators + 2)

        def make(number: int) -> Items:
            ids_MT = draw(lambda tries: self._expressions(random, tries), number, split)
            return self._labeled(ids_MT)

        return pack(make, count, length)

    def _expressions(self, random: np.random.Generator, number: int) -> Ints:
        """Return random expressions as ids; END fills what is left of a row."""
        config, most = self._config, self._config.max_operators
        operators_M = random.integers(config.min_operators, most + 1, size=number)
        tokens = 2 * most + 1
        operator_MT = random.integers(_FIRST_OPERATOR, _ASK, size=(number, tokens))
        number_MT = random.integers(_FIRST_NUMBER, _FIRST_NUMBER + config.modulus, size=(number, tokens))
        share_MT = random.random((number, tokens))
        ids_MT, row_M = np.zeros((number, tokens), np.int64), np.arange(number)
        pending_MP, top_M = np.zeros((number, most + 2), np.int64), np.zeros(number, np.int64)  # parts still to write
        pending_MP[:, 0] = operators_M
        for token in range(tokens):
            size_M = pending_MP[row_M, np.maximum(top_M, 0)]
            splits_M, ends_M = (top_M >= 0) & (size_M > 0), (top_M >= 0) & (size_M == 0)
            left_M = (share_MT[:, token] * size_M).astype(np.int64)
            ids_MT[:, token] = np.where(splits_M, operator_MT[:, token], np.where(ends_M, number_MT[:, token], 0))
            row_K = row_M[splits_M]
            pending_MP[row_K, top_M[row_K]] = (size_M - 1 - left_M)[row_K]
            pending_MP[row_K, top_M[row_K] + 1] = left_M[row_K]
            top_M += np.where(splits_M, 1, np.where(ends_M, -1, 0))
        return ids_MT

    def _labeled(self, ids_MT: Ints) -> Items:
        """Return the expressions with ``=`` and labels, evaluated from right to left with a stack."""
        (number, tokens), modulus = ids_MT.shape, self._config.modulus
        row_M, top_M = np.arange(number), np.full(number, -1)
        value_MP, size_MP, last_MP = (np.zeros((number, tokens // 2 + 2), np.int64) for _ in range(3))
        label_MT, level_MT = np.zeros((number, tokens + 1), np.int64), np.full((number, tokens + 1), NO_LEVEL)
        for token in reversed(range(tokens)):
            row_K = row_M[ids_MT[:, token] >= _FIRST_NUMBER]
            top_M[row_K] += 1
            value_MP[row_K, top_M[row_K]] = ids_MT[row_K, token] - _FIRST_NUMBER
            size_MP[row_K, top_M[row_K]] = 0
            last_MP[row_K, top_M[row_K]] = token
            row_K = row_M[(ids_MT[:, token] >= _FIRST_OPERATOR) & (ids_MT[:, token] < _ASK)]
            left_K, right_K = top_M[row_K], top_M[row_K] - 1
            a_K, b_K = value_MP[row_K, left_K], value_MP[row_K, right_K]
            operator_K = ids_MT[row_K, token] - _FIRST_OPERATOR
            value_K = np.choose(operator_K, (a_K + b_K, a_K - b_K, a_K * b_K)) % modulus
            size_K, last_K = size_MP[row_K, left_K] + size_MP[row_K, right_K] + 1, last_MP[row_K, right_K]
            value_MP[row_K, right_K], size_MP[row_K, right_K], top_M[row_K] = value_K, size_K, right_K
            label_MT[row_K, last_K], level_MT[row_K, last_K] = value_K + _FIRST_NUMBER, size_K
        if not self._config.dense:
            label_MT[:], level_MT[:] = 0, NO_LEVEL
        length_M = (ids_MT > 0).sum(axis=1) + 1
        answered_MT = np.concatenate([ids_MT, np.zeros((number, 1), np.int64)], axis=1)
        answered_MT[row_M, length_M - 1] = _ASK
        label_MT[row_M, length_M - 1] = value_MP[:, 0] + _FIRST_NUMBER
        level_MT[row_M, length_M - 1] = size_MP[:, 0]
        return Items(answered_MT, label_MT, level_MT, length_M)
