"""The word problem of a finite group: the label at every position is the product of the word so far.

One layer without loops cannot solve it for long words: for groups such as A5 it is complete for NC1 (Merrill, Petty and
Sabharwal, arXiv 2404.08819). END begins every word: attention averages over what it sees, so that without it the words
b, bb and bbb would look the same to a model with relative positions. Two words that differ share their first letters,
so that short products are seen in every split; an item is a whole word.
"""

from itertools import permutations

import numpy as np

from data_pipeline.synthetic.task import END, NO_LEVEL, Examples, Ints, Split, Task, draw, require_length
from looplm.config import WordProblemConfig


class WordProblem(Task):
    """Words over all elements of a group; ``a`` before ``b`` means the product a b, first b and then a as maps.

    Attributes:
        product_EE: the group's table: element i times element j, as indices of elements.
    """

    level_name = "position"

    def __init__(self, config: WordProblemConfig) -> None:
        self.product_EE, names = table(config.group)
        self.writes_chain = config.chain
        self.symbols = (END, *names)

    def generate(self, random: np.random.Generator, count: int, length: int, split: Split) -> Examples:
        """Return words of ``length - 1`` letters after END; with a chain, half as long, and END before the chain."""
        require_length("word_problem", length, 3 if self.writes_chain else 2)
        word = self._words(random, count, (length - 1) // 2 if self.writes_chain else length - 1, split)
        return _chained(word, length) if self.writes_chain else word

    def _words(self, random: np.random.Generator, count: int, length: int, split: Split) -> Examples:
        elements = len(self.product_EE)
        letter_NS = draw(lambda number: random.integers(elements, size=(number, length)), count, split)
        product_NS = np.empty_like(letter_NS)
        product_NS[:, 0] = letter_NS[:, 0]
        for position in range(1, length):
            product_NS[:, position] = self.product_EE[product_NS[:, position - 1], letter_NS[:, position]]
        level_NS = np.broadcast_to(np.arange(1, length + 1), letter_NS.shape)
        begun = ((letter_NS + 1, 0), (product_NS + 1, 0), (level_NS, NO_LEVEL))
        return Examples(*(np.pad(x_NS, ((0, 0), (1, 0)), constant_values=first) for x_NS, first in begun))


def _chained(word: Examples, length: int) -> Examples:
    """Return words without labels, each followed by END and by its products as tokens that are to be predicted."""
    rows, letters = word.label_NS.shape[0], word.label_NS.shape[1] - 1
    ids_NS, label_NS = (np.zeros((rows, length), np.int64) for _ in range(2))
    level_NS, begin = np.full((rows, length), NO_LEVEL), letters + 1
    ids_NS[:, :begin] = word.ids_NS
    ids_NS[:, begin + 1 : begin + letters] = word.label_NS[:, 1:-1]
    label_NS[:, begin : begin + letters] = word.label_NS[:, 1:]
    level_NS[:, begin : begin + letters] = word.level_NS[:, 1:]
    return Examples(ids_NS, label_NS, level_NS)


def table(group: str) -> tuple[Ints, tuple[str, ...]]:
    """Return the product of each two elements of a group, as indices of elements, and the elements' names."""
    kind, degree = group[0], int(group[1:])
    if kind == "Z":
        index_E = np.arange(degree)
        return (index_E[:, None] + index_E) % degree, tuple(str(index) for index in range(degree))
    maps = [p for p in permutations(range(degree)) if kind == "S" or _is_even(p)]
    map_ED = np.array(maps)
    composed_EED = map_ED[:, map_ED]  # first the second factor, then the first
    digit_D = degree ** np.arange(degree)
    code_E = map_ED @ digit_D
    order_E = np.argsort(code_E)
    product_EE = order_E[np.searchsorted(code_E[order_E], composed_EED @ digit_D)]
    return product_EE, tuple("".join(str(image + 1) for image in p) for p in maps)


def _is_even(permutation: tuple[int, ...]) -> bool:
    pairs = [(i, j) for i in range(len(permutation)) for j in range(i)]
    return sum(permutation[j] > permutation[i] for i, j in pairs) % 2 == 0
