"""Depo: the k-th successor of a node on a random cycle that the prompt lists as shuffled pairs.

The task of Allen-Zhu (Physics of Language Models, part 4.1, "Architecture Design and the Magic of Canon Layers"), made
small and dense. A sample lists the pairs (node, successor) of one cycle, and then asks about node after node: a node,
then all k in random order, with a label at every k. So most positions after the pairs carry a label, which makes
the task learnable for a small model. No answer is ever an input, so a model must make all k hops itself. An item is the
cycle, whatever the order of its pairs and the questions.
"""

import numpy as np

from data_pipeline.synthetic.task import END, NO_LEVEL, Examples, Ints, Split, Task, draw, require_length
from looplm.config import DepoConfig


class Depo(Task):
    """Cycles over some of the ``names``.

    A test out of distribution has more nodes (``min_nodes`` and ``max_nodes``) of the same ``names``.
    """

    level_name = "hops"

    def __init__(self, config: DepoConfig) -> None:
        self._config, self._hops = config, np.array(config.hops)
        names = (f"n{name}" for name in range(config.names))
        self.symbols = (END, *names, *(f"k{hops}" for hops in config.hops))

    def generate(self, random: np.random.Generator, count: int, length: int, split: Split) -> Examples:
        """Return one cycle a sample, with as many questions as fit."""
        most, names, hops = self._config.max_nodes, self._config.names, len(self._hops)
        require_length("depo", length, 2 * most + 1 + hops)
        cycle_NI = draw(lambda number: self._cycles(random, number), count, split)
        nodes_N, successor_NV = cycle_NI[:, 0], cycle_NI[:, 1:]
        rows_N1 = np.arange(count)[:, None]

        # The pairs, in random order: absent names are sorted to the end.
        key_NV = np.where(successor_NV > 0, random.random((count, names)), 2)
        node_NP = np.argsort(key_NV, axis=1)[:, :most]
        pair_NP2 = np.stack([node_NP + 1, successor_NV[rows_N1, node_NP]], axis=2)

        # The questions: as many as fit beside the smallest cycle; those that do not fit beside a larger one are cut.
        questions = (length - 2 * self._config.min_nodes) // (1 + hops)
        rank_NQ = random.integers(nodes_N[:, None], size=(count, questions))
        asked_NQ = node_NP[rows_N1, rank_NQ]
        order_NQK = np.argsort(random.random((count, questions, hops)), axis=2)
        reached_NQH = self._successors(successor_NV, asked_NQ)
        answer_NQK = np.take_along_axis(reached_NQH, order_NQK, axis=2)
        question_NQK = np.concatenate([asked_NQ[:, :, None] + 1, 1 + names + order_NQK], axis=2)
        label_NQK = np.concatenate([np.zeros((count, questions, 1), np.int64), answer_NQK + 1], axis=2)
        level_NQK = np.concatenate([np.full((count, questions, 1), NO_LEVEL), self._hops[order_NQK]], axis=2)

        made = Examples(*(np.full((count, length), fill) for fill in (0, 0, NO_LEVEL)))
        for nodes in range(self._config.min_nodes, most + 1):
            row_M = np.flatnonzero(nodes_N == nodes)
            fit = (length - 2 * nodes) // (1 + hops)
            end = 2 * nodes + fit * (1 + hops)
            made.ids_NS[row_M, : 2 * nodes] = pair_NP2[row_M, :nodes].reshape(len(row_M), 2 * nodes)
            for x_NS, x_NQK in zip(made, (question_NQK, label_NQK, level_NQK), strict=True):
                x_NS[row_M, 2 * nodes : end] = x_NQK[row_M, :fit].reshape(len(row_M), end - 2 * nodes)
        return made

    def _cycles(self, random: np.random.Generator, number: int) -> Ints:
        """Return random cycles: the number of nodes, then the successor of every name, from 1 on; 0 if it is absent."""
        config = self._config
        nodes_N = random.integers(config.min_nodes, config.max_nodes + 1, size=number)
        order_NV = np.argsort(random.random((number, config.names)), axis=1)[:, : config.max_nodes]
        rank_V = np.arange(config.max_nodes)
        next_NV = np.take_along_axis(order_NV, (rank_V + 1) % nodes_N[:, None], axis=1)
        cycle_NI = np.zeros((number, 1 + config.names), np.int64)
        cycle_NI[:, 0] = nodes_N
        row_K, rank_K = np.nonzero(rank_V < nodes_N[:, None])
        cycle_NI[row_K, 1 + order_NV[row_K, rank_K]] = next_NV[row_K, rank_K] + 1
        return cycle_NI

    def _successors(self, successor_NV: Ints, node_NQ: Ints) -> Ints:
        """Return the node after each number of hops of the configuration, in its order."""
        reached_NQH = np.empty((*node_NQ.shape, len(self._hops)), np.int64)
        for hop in range(1, self._hops.max() + 1):
            node_NQ = np.take_along_axis(successor_NV, node_NQ, axis=1) - 1
            reached_NQH[:, :, self._hops == hop] = node_NQ[:, :, None]
        return reached_NQH
