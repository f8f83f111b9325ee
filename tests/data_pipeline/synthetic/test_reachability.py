"""Distances in a graph against a breadth-first search."""

from collections import defaultdict

import pytest

from data_pipeline.synthetic.task import Task
from looplm.config import ReachabilityConfig
from looplm.failures import UserError
from tests.support import synthetic
from tests.support.synthetic import Answers, Words, check_disjoint, check_labels, check_levels, samples


def task(**keys) -> Task:
    return synthetic.open_named("reachability", ReachabilityConfig(**keys))


def edges_of(words: Words) -> list[tuple[str, str]]:
    end = words.index("from")
    return list(zip(words[:end:2], words[1:end:2], strict=True))


def distances(edges: list[tuple[str, str]], source: str) -> dict[str, int]:
    successors, found, nearest = defaultdict(list), {source: 0}, [source]
    for start, end in edges:
        successors[start].append(end)
    for node in nearest:
        for successor in successors[node]:
            if successor not in found:
                found[successor] = found[node] + 1
                nearest.append(successor)
    return found


def answers(words: Words) -> Answers:
    place, found = words.index("from"), Answers()
    distance = distances(edges_of(words), words[place + 1])
    for position in range(place + 2, len(words)):
        if words[position] != "<end>":
            level = distance.get(words[position], 0)
            found[position] = str(level or "no"), level
    return found


def items(words: Words) -> list[tuple[str, frozenset[tuple[str, str]]]]:
    return [(words[words.index("from") + 1], frozenset(edges_of(words)))]


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"names": 40, "max_nodes": 30, "extra_edges": 20},
        {"names": 62, "min_nodes": 62, "max_nodes": 62, "extra_edges": 0, "max_distance": 20},
        {"names": 3, "min_nodes": 3, "max_nodes": 3, "max_distance": 2, "extra_edges": 6},
    ],
)
def test_labels_are_the_distances_of_a_search(keys) -> None:
    check_labels(task(**keys), samples(task(**keys), 200, 250), answers)


def test_every_distance_occurs_and_so_do_nodes_out_of_reach() -> None:
    check_levels(samples(task(), 500, 50), {0, 1, 2, 3, 4, 5, 6})


def test_every_other_node_is_asked_once_and_no_edge_is_listed_twice() -> None:
    sizes = set()
    for words in synthetic.words_of(task(), samples(task(), 300, 50)):
        place = words.index("from")
        asked = [word for word in words[place + 2 :] if word != "<end>"]
        edges = edges_of(words)
        named = {node for edge in edges for node in edge}
        assert set(asked) == named - {words[place + 1]} and len(set(asked)) == len(asked)
        assert len(set(edges)) == len(edges) == len(asked) + 4 and all(start != end for start, end in edges)
        sizes.add(len(asked) + 1)
    assert sizes == set(range(8, 13))


def test_splits_share_no_graph() -> None:
    check_disjoint(task(), items, 43, 10_000)
    small = task(names=4, min_nodes=4, max_nodes=4, max_distance=3, extra_edges=1)
    found = synthetic.items_by_split(small, items, 13, {"train": 30_000, "valid": 4_000, "test": 4_000})
    total = sum(map(len, found.values()))
    assert total > 1000
    for split, seen in found.items():
        expected = total * synthetic.SHARES[split]
        assert len(seen) == pytest.approx(expected, abs=5 * (total / 16) ** 0.5)


def test_a_sample_too_short_for_the_largest_graph_is_refused() -> None:
    with pytest.raises(UserError, match=r"^data\.seq_length: 42 is not allowed; .*reachability.* 43 tokens"):
        samples(task(), 1, 42)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_distance": 8}, r"reachability\.min_nodes: 8 is not allowed; give a number above .*max_distance=8"),
        ({"names": 63}, r"reachability\.names: 63 is not allowed"),
        ({"names": 11}, r"reachability\.names: 11 is not allowed; give at least .*max_nodes=12"),
        ({"extra_edges": 133}, r"reachability\.extra_edges: 133 is not allowed; .* 132 pairs"),
    ],
)
def test_wrong_keys_are_refused(keys, message) -> None:
    with pytest.raises(UserError, match=message):
        ReachabilityConfig(**keys)
