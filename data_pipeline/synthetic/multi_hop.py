"""Multi-hop questions over the facts of a fixed random world, most of which are never asked in training.

The task of the Ouro paper (arXiv 2510.25741, appendix B.3): entities in layers, relations that lead from each entity of
a layer to one of the next, and questions "entity, relation, relation, relation" whose answer is the entity at the end.
The world follows from its own seed and is the same in every split. Questions of one hop are the facts themselves:
training asks for all of them, validation and test for none. Of its longer questions, training asks only the share
``seen``. An item is a question.
"""

import numpy as np

from data_pipeline.synthetic.packing import Items, pack
from data_pipeline.synthetic.task import END, NO_LEVEL, Examples, Ints, Split, Task, draw, require_length
from looplm.config import MultiHopConfig


class MultiHop(Task):
    """Questions of ``min_hops`` to ``max_hops`` hops.

    A test out of distribution has more hops, up to the number of layers less one.

    Attributes:
        answer_LRE: by layer (but the last), relation and entity: the entity of the next layer.
    """

    level_name = "hops"

    def __init__(self, config: MultiHopConfig) -> None:
        self._config = config
        shape = config.layers - 1, config.relations, config.entities
        self.answer_LRE = np.random.default_rng(config.world_seed).integers(config.entities, size=shape)
        entities = (f"e{layer}.{entity}" for layer in range(config.layers) for entity in range(config.entities))
        self.symbols = (END, *entities, *(f"r{relation}" for relation in range(config.relations)))

    def generate(self, random: np.random.Generator, count: int, length: int, split: Split) -> Examples:
        """Return as many questions a sample as fit."""
        config = self._config
        require_length("multi_hop", length, 1 + config.max_hops)
        facts = split == "train" and config.min_hops == 1
        fewest = max(config.min_hops, 2)
        lengths = config.max_hops - fewest + 1  # of questions that are no facts
        fact_share = 1 / (lengths + 1) if facts else 0.0

        def make(number: int) -> Items:
            facts_made = int(random.binomial(number, fact_share)) if lengths else number
            made = [self._questions(random, facts_made, 1, 1)]
            if facts_made < number:
                longer = draw(
                    lambda tries: self._questions(random, tries, fewest, config.max_hops),
                    number - facts_made,
                    split,
                    seen=config.seen,
                )
                made.append(longer)
            return self._labeled(random.permutation(np.concatenate(made)))

        return pack(make, count, length)

    def _questions(self, random: np.random.Generator, number: int, fewest: int, most: int) -> Ints:
        """Return random questions: the hops, the layer, the entity, and each relation from 1 on, 0 beyond the end."""
        config = self._config
        hops_M = random.integers(fewest, most + 1, size=number)
        layer_M = random.integers(config.layers - hops_M)
        entity_M = random.integers(config.entities, size=number)
        relation_MH = random.integers(1, config.relations + 1, size=(number, config.max_hops))
        relation_MH[np.arange(config.max_hops) >= hops_M[:, None]] = 0
        return np.concatenate([np.stack([hops_M, layer_M, entity_M], axis=1), relation_MH], axis=1)

    def _labeled(self, item_MI: Ints) -> Items:
        config = self._config
        (hops_M, layer_M, entity_M), relation_MH = item_MI[:, :3].T, item_MI[:, 3:]
        first_relation = config.layers * config.entities  # ids are one higher, because relations count from 1 here
        ids_MT = np.concatenate(
            [(1 + layer_M * config.entities + entity_M)[:, None], first_relation + relation_MH], axis=1
        )
        reached_M = entity_M.copy()
        for hop in range(config.max_hops):
            row_K = np.flatnonzero(hop < hops_M)
            reached_M[row_K] = self.answer_LRE[layer_M[row_K] + hop, relation_MH[row_K, hop] - 1, reached_M[row_K]]
        label_MT, level_MT, row_M = np.zeros_like(ids_MT), np.full_like(ids_MT, NO_LEVEL), np.arange(len(ids_MT))
        label_MT[row_M, hops_M] = 1 + (layer_M + hops_M) * config.entities + reached_M
        level_MT[row_M, hops_M] = hops_M
        return Items(ids_MT, label_MT, level_MT, hops_M + 1)
