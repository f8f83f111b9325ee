"""Capo: biographies of a fixed population, to be memorized; how many bits does a parameter hold?

The task of Allen-Zhu and Li (arXiv 2404.05405), made small: a person is a name of three tokens and one value for each
attribute; a biography is the name and then, in random order, each attribute in one of its wordings with its value. The
labels are the next tokens. The people follow from their own seed and are the same in every split, because the question
is what a model remembers of its training data. An item is the telling of a biography (the order of the attributes and
the wording of each): validation and test tell the same facts as training, in tellings that training does not contain.
Nobody occurs twice in a sample, because the second biography could be copied from the first.
"""

import math

import numpy as np

from data_pipeline.synthetic.task import END, NO_LEVEL, Examples, Ints, Split, Task, draw, require_length
from looplm.config import CapoConfig
from looplm.failures import UserError

NAME_TOKENS = 3
WORDING, NAME, FIRST_VALUE = 0, 1, 2  # levels


class Capo(Task):
    """Biographies, each begun by END.

    The level is the kind of the label: 0 for a wording, which is random, or the END that begins the next biography; 1
    for a token of the name; 2 + a for the value of attribute a.

    Attributes:
        name_PT: first, middle and last name of each person, each from 0 on; no two persons share all three.
        value_PA: value of each person's attributes, from 0 on.
    """

    level_name = "part"

    def __init__(self, config: CapoConfig) -> None:
        self._config = config
        random = np.random.default_rng(config.people_seed)
        code_P = random.choice(config.name_parts**NAME_TOKENS, size=config.people, replace=False)
        self.name_PT = np.stack(
            [code_P // config.name_parts**part % config.name_parts for part in range(NAME_TOKENS)], 1
        )
        self.value_PA = random.integers(config.values, size=(config.people, config.attributes))
        names = (f"{kind}{part}" for kind in ("first", "middle", "last") for part in range(config.name_parts))
        words = (f"is{a}.{wording}" for a in range(config.attributes) for wording in range(config.wordings))
        values = (f"v{a}.{value}" for a in range(config.attributes) for value in range(config.values))
        self.symbols = (END, *names, *words, *values)

    def generate(self, random: np.random.Generator, count: int, length: int, split: Split) -> Examples:
        """Return as many biographies a sample as fit."""
        config, tokens = self._config, 1 + NAME_TOKENS + 2 * self._config.attributes
        require_length("capo", length, tokens)
        fit = length // tokens
        if fit > config.people:
            fix = f"a sample holds each of {config.people} people once; give at most {tokens * (config.people + 1) - 1}"
            raise UserError(f"data.seq_length: {length} is not allowed; {fix}")
        person_M = self._people(random, count, fit)
        telling_MI = draw(lambda number: self._tellings(random, number), len(person_M), split)
        ids_MT, level_MT = self._told(person_M, telling_MI)
        ids_NS, level_NS = np.zeros((count, length), np.int64), np.full((count, length), NO_LEVEL)
        ids_NS[:, : fit * tokens] = ids_MT.reshape(count, -1)
        level_NS[:, : fit * tokens - 1] = level_MT.reshape(count, -1)[:, 1:]
        label_NS = np.where(level_NS != NO_LEVEL, np.roll(ids_NS, -1, axis=1), 0)
        return Examples(ids_NS, label_NS, level_NS)

    def _people(self, random: np.random.Generator, count: int, fit: int) -> Ints:
        """Return the person of each biography: everyone is told before anyone of the same round is told again."""
        samples = self._config.people // fit  # of one round
        rounds = -(-count // samples)
        round_RP = np.stack([random.permutation(self._config.people)[: samples * fit] for _ in range(rounds)])
        return round_RP.reshape(-1)[: count * fit]

    def _tellings(self, random: np.random.Generator, number: int) -> Ints:
        """Return random orders of the attributes, and a wording for each attribute."""
        config = self._config
        order_MA = np.argsort(random.random((number, config.attributes)), axis=1)
        wording_MA = random.integers(config.wordings, size=(number, config.attributes))
        return np.concatenate([order_MA, wording_MA], axis=1)

    def _told(self, person_M: Ints, telling_MI: Ints) -> tuple[Ints, Ints]:
        """Return the biographies and what each token is."""
        config = self._config
        order_MA, wording_MA = telling_MI[:, : config.attributes], telling_MI[:, config.attributes :]
        first_word = 1 + NAME_TOKENS * config.name_parts
        first_value = first_word + config.attributes * config.wordings
        value_MA = np.take_along_axis(self.value_PA[person_M], order_MA, axis=1)
        wording_MA = np.take_along_axis(wording_MA, order_MA, axis=1)
        name_M3 = self.name_PT[person_M] + 1 + config.name_parts * np.arange(NAME_TOKENS)
        told_MA2 = np.stack(
            [first_word + order_MA * config.wordings + wording_MA, first_value + order_MA * config.values + value_MA],
            axis=2,
        )
        level_MA2 = np.stack([np.full_like(order_MA, WORDING), FIRST_VALUE + order_MA], axis=2)
        end_M1, size = np.zeros((len(person_M), 1), np.int64), len(person_M)
        ids_MT = np.concatenate([end_M1, name_M3, told_MA2.reshape(size, -1)], axis=1)
        name_level_M3 = np.full((size, NAME_TOKENS), NAME)
        return ids_MT, np.concatenate([end_M1 + WORDING, name_level_M3, level_MA2.reshape(size, -1)], axis=1)


def bits_learned(config: CapoConfig, name_loss: float, value_loss: float) -> float:
    """Return the bits about the people that a model with these losses must hold, at least.

    N log2(N0 / e^p1) + N log2(S0 / e^p2), with N people, N0 possible names and S0 possible combinations of values, from
    arXiv 2404.05405, for its bioS data. (Definition 1 in appendix B.1 of arXiv 2510.25741 prints p2 with a wrong sign.)
    Negative if the model is worse than one that knows only the ranges. Divide by the parameters for bits per parameter.

    Args:
        config: the population.
        name_loss: p1, the cross-entropy of a name in nats: the sum over its tokens, averaged over people.
        value_loss: p2, the same for all values of a person.
    """
    names, values = name_bits(config), config.attributes * math.log2(config.values)
    return config.people * (names - name_loss / math.log(2) + values - value_loss / math.log(2))


def name_bits(config: CapoConfig) -> float:
    """Return log2 of the number of possible names."""
    return NAME_TOKENS * math.log2(config.name_parts)


def losses_of(config: CapoConfig, loss_by_level: dict[int, float]) -> tuple[float, float]:
    """Return p1 and p2 of :func:`bits_learned` from the mean loss of a token of each level.

    Args:
        config: the population.
        loss_by_level: nats per token; the first token of a sample's names counts like any other.
    """
    values = sum(loss_by_level[FIRST_VALUE + attribute] for attribute in range(config.attributes))
    return NAME_TOKENS * loss_by_level[NAME], values
