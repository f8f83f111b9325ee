"""Reachability: how far is each node of a directed graph from a source, if it can be reached at all?

Transformers need a number of layers that grows with the logarithm of the distance (Sanford, Hsu and Telgarsky, arXiv
2402.09268; Merrill and Sabharwal, arXiv 2503.03961). A sample lists the edges of one graph in random order, then the
source, then the other nodes in random order, each with its distance as label. Random graphs hold few long distances,
so distances are planted: a path as long as the largest distance, every other node at a random distance or out of
reach, an edge into each reached node from one that is a step nearer, an edge out of each that is not reached, and
``extra_edges`` at random that shorten no distance. An item is the set of edges with the source.
"""

import numpy as np

from data_pipeline.synthetic.task import END, NO_LEVEL, Examples, Ints, Split, Task, draw, require_length
from looplm.config import ReachabilityConfig

_OUT_OF_REACH, _ABSENT = -1, -2  # in place of a distance
_REACHED_SHARE = 0.75  # of the nodes beside the path
_ASK, _NO = 1, 2
_FIRST_NAME = 3


class Reachability(Task):
    """Graphs over some of the ``names``. Level 0 is a node that cannot be reached, any other level its distance.

    A test out of distribution has more nodes (``min_nodes`` and ``max_nodes``), or more ``extra_edges``.
    """

    level_name = "distance"

    def __init__(self, config: ReachabilityConfig) -> None:
        self._config = config
        names = (f"n{name}" for name in range(config.names))
        self.symbols = (END, "from", "no", *names, *(str(d) for d in range(1, config.max_distance + 1)))

    def generate(self, random: np.random.Generator, count: int, length: int, split: Split) -> Examples:
        """Return one graph a sample."""
        config, most = self._config, self._config.max_nodes
        edges = most - 1 + config.extra_edges
        require_length("reachability", length, 2 * edges + 1 + most)
        item_NI = draw(lambda number: self._graphs(random, number), count, split)
        source_N, distance_NV, successors_NV = np.split(item_NI, (1, 1 + config.names), axis=1)
        bit_V = np.arange(config.names)
        made = Examples(*(np.full((count, length), fill) for fill in (0, 0, NO_LEVEL)))

        # Edges in random order, then the rest of the sample; each sample has its own number of them.
        sample_E, from_E, to_E = np.nonzero(successors_NV[:, :, None] >> bit_V & 1)
        edge_order_E = np.lexsort((random.random(len(sample_E)), sample_E))
        edges_N = np.bincount(sample_E, minlength=count)
        place_E = 2 * (np.arange(len(sample_E)) - np.repeat(np.cumsum(edges_N) - edges_N, edges_N))
        made.ids_NS[sample_E, place_E] = from_E[edge_order_E] + _FIRST_NAME
        made.ids_NS[sample_E, place_E + 1] = to_E[edge_order_E] + _FIRST_NAME

        row_N, start_N = np.arange(count), 2 * edges_N
        made.ids_NS[row_N, start_N] = _ASK
        made.ids_NS[row_N, start_N + 1] = source_N[:, 0] + _FIRST_NAME
        sample_Q, node_Q = np.nonzero((distance_NV != _ABSENT) & (distance_NV != 0))
        node_Q = node_Q[np.lexsort((random.random(len(sample_Q)), sample_Q))]
        asked_N = np.bincount(sample_Q, minlength=count)
        place_Q = np.arange(len(sample_Q)) - np.repeat(np.cumsum(asked_N) - asked_N, asked_N) + start_N[sample_Q] + 2
        level_Q = np.maximum(distance_NV[sample_Q, node_Q], 0)
        made.ids_NS[sample_Q, place_Q] = node_Q + _FIRST_NAME
        made.label_NS[sample_Q, place_Q] = np.where(level_Q > 0, _FIRST_NAME + config.names + level_Q - 1, _NO)
        made.level_NS[sample_Q, place_Q] = level_Q
        return made

    def _graphs(self, random: np.random.Generator, number: int) -> Ints:
        """Return random graphs: the source, then the distance of every name, then its successors as a bit mask."""
        config, most = self._config, self._config.max_nodes
        distance_NW = self._distances(random, number)
        reached_NW, present_NW = distance_NW >= 0, distance_NW != _ABSENT
        pair_NWW = present_NW[:, :, None] & present_NW[:, None, :] & ~np.eye(most, dtype=bool)
        key_NWW = random.random((number, most, most), dtype=np.float32)

        # Edges [from, to]: one into each reached node from one that is a step nearer, one out of each unreached node.
        is_nearer_NWW = distance_NW[:, :, None] == distance_NW[:, None, :] - 1
        is_into_NWW = pair_NWW & is_nearer_NWW & reached_NW[:, :, None]
        is_edge_NWW = np.zeros_like(pair_NWW)
        row_E, to_E = np.nonzero(distance_NW > 0)
        from_NW = np.argmax(np.where(is_into_NWW, key_NWW, -1), axis=1)
        is_edge_NWW[row_E, from_NW[row_E, to_E], to_E] = True
        row_E, from_E = np.nonzero(distance_NW == _OUT_OF_REACH)
        to_NW = np.argmax(np.where(pair_NWW, key_NWW, -1), axis=2)
        is_edge_NWW[row_E, from_E, to_NW[row_E, from_E]] = True

        # More edges, of which none leads from a reached node to one that is more than a step further or unreached.
        is_short_NWW = reached_NW[:, None, :] & (distance_NW[:, None, :] <= distance_NW[:, :, None] + 1)
        is_free_NWW = pair_NWW & ~is_edge_NWW & (is_short_NWW | ~reached_NW[:, :, None])
        key_NK = np.where(is_free_NWW, random.random((number, most, most), dtype=np.float32), -1).reshape(number, -1)
        if config.extra_edges:
            chosen_NE = np.argpartition(key_NK, -config.extra_edges, axis=1)[:, -config.extra_edges :]
            row_N1 = np.arange(number)[:, None]
            is_edge_NWW.reshape(number, -1)[row_N1, chosen_NE] |= key_NK[row_N1, chosen_NE] >= 0

        # Names for the nodes; node 0 is the source.
        name_NW = np.argsort(random.random((number, config.names)), axis=1)[:, :most]
        successors_NW = (is_edge_NWW * (1 << name_NW)[:, None, :]).sum(axis=2)
        distance_NV, successors_NV = (
            np.full((number, config.names), _ABSENT),
            np.zeros((number, config.names), np.int64),
        )
        np.put_along_axis(distance_NV, name_NW, distance_NW, axis=1)
        np.put_along_axis(successors_NV, name_NW, successors_NW, axis=1)
        return np.concatenate([name_NW[:, :1], distance_NV, successors_NV], axis=1)

    def _distances(self, random: np.random.Generator, number: int) -> Ints:
        """Return each node's distance: 0, 1, ... along a path, then at random."""
        config, most = self._config, self._config.max_nodes
        nodes_N1 = random.integers(config.min_nodes, most + 1, size=(number, 1))
        longest_N1 = random.integers(1, config.max_distance + 1, size=(number, 1))
        node_W = np.arange(most)
        beside_NW = random.integers(1, longest_N1 + 1, size=(number, most))
        beside_NW[random.random((number, most)) >= _REACHED_SHARE] = _OUT_OF_REACH
        distance_NW = np.where(node_W <= longest_N1, node_W, beside_NW)
        return np.where(node_W < nodes_N1, distance_NW, _ABSENT)
