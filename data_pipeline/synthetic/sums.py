"""Chains of additions and subtractions of two-digit numbers, without intermediate results.

The task with which rkstgr/LoopLM looks for a looped model's advantage (39 % of the answers of four-step chains with one
layer and one loop, no result with more), here with digits in reverse: units first, so that carries run in reading
order. An operator is + or - at random, and always + where the result would be negative. The answer has as many digits
as the largest one that a configuration allows, with zeros in front, and is the only part with labels: ``=`` and each
digit but the last announce the next digit. An item is the chain.
"""

import numpy as np

from data_pipeline.synthetic.packing import Items, pack
from data_pipeline.synthetic.task import END, NO_LEVEL, Examples, Ints, Split, Task, draw, require_length
from looplm.config import SumsConfig

_PLUS, _MINUS, _ASK, _FIRST_DIGIT = 1, 2, 3, 4
_SMALLEST, _LARGEST = 10, 99  # the numbers of a chain


class Sums(Task):
    """Chains of ``min_terms`` to ``max_terms`` numbers.

    A test out of distribution has more terms, with the same ``answer_digits``.
    """

    level_name = "terms"

    def __init__(self, config: SumsConfig) -> None:
        self._config = config
        self.symbols = (END, "+", "-", "=", *(str(digit) for digit in range(10)))

    def generate(self, random: np.random.Generator, count: int, length: int, split: Split) -> Examples:
        """Return as many chains a sample as fit."""
        most, digits = self._config.max_terms, self._config.answer_digits
        require_length("sums", length, 3 * most + digits - 1)

        def make(number: int) -> Items:
            return self._labeled(draw(lambda tries: self._chains(random, tries), number, split))

        return pack(make, count, length)

    def _chains(self, random: np.random.Generator, number: int) -> Ints:
        """Return random chains as signed numbers; 0 beyond their end."""
        most = self._config.max_terms
        term_MK = random.integers(_SMALLEST, _LARGEST + 1, size=(number, most))
        minus_MK = random.integers(2, size=(number, most)) > 0
        terms_M = random.integers(self._config.min_terms, most + 1, size=number)
        total_M = np.zeros(number, np.int64)
        for index in range(most):
            minus_M = minus_MK[:, index] & (term_MK[:, index] <= total_M)
            term_MK[:, index] *= np.where(index < terms_M, 1 - 2 * minus_M, 0)
            total_M += term_MK[:, index]
        return term_MK

    def _labeled(self, term_MK: Ints) -> Items:
        number, most = term_MK.shape
        digits, row_M = self._config.answer_digits, np.arange(number)
        size_MK = np.abs(term_MK)
        sign_MK = np.where(term_MK < 0, _MINUS, _PLUS)
        written_MK3 = np.stack([sign_MK, size_MK % 10 + _FIRST_DIGIT, size_MK // 10 + _FIRST_DIGIT], axis=2)
        terms_M = (term_MK != 0).sum(axis=1)
        length_M = (
            3 * terms_M + digits - 1
        )  # no sign before the first number, an = and all digits of the answer but one
        ids_MT = np.zeros((number, 3 * most + digits - 1), np.int64)
        ids_MT[:, : 3 * most - 1] = written_MK3.reshape(number, -1)[:, 1:]
        label_MT, level_MT = np.zeros_like(ids_MT), np.full_like(ids_MT, NO_LEVEL)
        answer_M, ask_M = term_MK.sum(axis=1), 3 * terms_M - 1
        ids_MT[row_M, ask_M] = _ASK
        for digit in range(digits):
            digit_M = answer_M // 10**digit % 10 + _FIRST_DIGIT
            label_MT[row_M, ask_M + digit], level_MT[row_M, ask_M + digit] = digit_M, terms_M
            if digit + 1 < digits:
                ids_MT[row_M, ask_M + digit + 1] = digit_M
        return Items(ids_MT, label_MT, level_MT, length_M)
