"""Dense p-hop induction: the label at every letter is the letter that p hops back lead to.

One hop goes from a letter to the letter that followed its last occurrence: find(i) = max {j <= i : x_{j-1} = x_i}, and
the label of position i is x_{find^p(i)} (Sanford, Hsu and Telgarsky, arXiv 2402.09268; with looped models: Saunshi et
al., arXiv 2502.17416). Transformers need about log p layers for it. No two neighbors are equal, so that every hop leads
further back. An item is the sequence of letters, whatever p is.
"""

import numpy as np

from data_pipeline.synthetic.task import END, NO_LEVEL, Examples, Ints, Split, Task, draw, require_length
from looplm.config import PHopConfig


class PHop(Task):
    """A token that says p, then letters. Positions from which p hops lead nowhere have no label.

    A test out of distribution has a longer ``data.seq_length``; the symbols stay the same.
    """

    level_name = "hops"

    def __init__(self, config: PHopConfig) -> None:
        self._alphabet, self._hops = config.alphabet, np.array(config.hops)
        letters = (f"x{letter}" for letter in range(config.alphabet))
        self.symbols = (END, *letters, *(f"hop{hops}" for hops in config.hops))

    def generate(self, random: np.random.Generator, count: int, length: int, split: Split) -> Examples:
        """Return sequences of ``length`` - 1 letters."""
        require_length("p_hop", length, int(self._hops.max()) + 3)
        letter_NL = draw(lambda number: self._letters(random, number, length - 1), count, split)
        asked_N = random.integers(len(self._hops), size=count)
        hops_N = self._hops[asked_N]
        label_NL = _labels(letter_NL, hops_N, self._alphabet)
        ids_NS = np.concatenate([1 + self._alphabet + asked_N[:, None], letter_NL + 1], axis=1)
        label_NS = np.concatenate([np.zeros((count, 1), np.int64), label_NL + 1], axis=1)
        level_NS = np.where(label_NS > 0, hops_N[:, None], NO_LEVEL)
        return Examples(ids_NS, label_NS, level_NS)

    def _letters(self, random: np.random.Generator, number: int, letters: int) -> Ints:
        """Return random letters, each uniform over all but the one before."""
        step_NL = random.integers(1, self._alphabet, size=(number, letters))
        step_NL[:, 0] = random.integers(self._alphabet, size=number)
        return np.cumsum(step_NL, axis=1) % self._alphabet


def _labels(letter_NL: Ints, hops_N: Ints, alphabet: int) -> Ints:
    """Return the letter that hops_N hops lead to, or -1 if they lead nowhere."""
    count, letters = letter_NL.shape
    nowhere = letters  # an extra position, from which every hop leads nowhere
    found_NL, row_N = np.full((count, letters + 1), nowhere), np.arange(count)
    after_NA = np.full((count, alphabet), nowhere)  # the position after each letter's last occurrence
    for position in range(letters):
        found_NL[:, position] = after_NA[row_N, letter_NL[:, position]]
        after_NA[row_N, letter_NL[:, position]] = position + 1
    reached_NL = np.broadcast_to(np.arange(letters), letter_NL.shape)
    for hop in range(hops_N.max()):
        hopped_NL = np.take_along_axis(found_NL, reached_NL, axis=1)
        reached_NL = np.where((hop < hops_N)[:, None], hopped_NL, reached_NL)
    padded_NL = np.concatenate([letter_NL, np.full((count, 1), -1)], axis=1)
    return np.take_along_axis(padded_NL, reached_NL, axis=1)
