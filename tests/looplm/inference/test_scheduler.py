"""Continuous depth batching: many requests in few rows, tokens of different loops in one pass."""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from looplm.inference import Generation, GenerationConfig, Generator, Request
from looplm.inference.depth_batch import DepthBatch
from looplm.inference.kv_cache import CacheIndex, CacheMode, KVCache
from looplm.inference.prefill import Prefill
from tests.support.generation_oracle import GATES, VARIANTS, SlowGenerator, build, byte_tokenizer
from tests.support.observe import observed

TOKENIZER = byte_tokenizer()
NEVER = -1
GREEDY = GenerationConfig(temperature=0.0, batch_size=5, prefill_chunk=48)
MODES: tuple[CacheMode, ...] = get_args(CacheMode)


def generator_of(groups: ProcessGroupCollection, variant: str = "mla", gate: str = "lru") -> Generator:
    return Generator(build(VARIANTS[variant], GATES[gate], groups), TOKENIZER, NEVER)


@pytest.fixture(scope="module")
def generator(single_process: ProcessGroupCollection) -> Generator:
    return generator_of(single_process)


def mixed_requests(count: int) -> list[Request]:
    """Return requests with prompts of 1 to 60 tokens, to be continued by 1 to 9."""
    dice = random.Random(4)
    sizes = [(dice.choice([1, 3, 8, 20, 60]), dice.randint(1, 9)) for _ in range(count)]
    return [
        Request([dice.randrange(256) for _ in range(length)], seed=99 + new, max_new_tokens=new)
        for length, new in sizes
    ]


def ids_and_depths(generation: Generation) -> tuple[list[int], list[int]]:
    return generation.ids, generation.depths


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_of_64_requests_equals_each_alone(mode: CacheMode, generator: Generator) -> None:
    """With more requests than rows, early exit, and prompts longer than a chunk."""
    requests, config = mixed_requests(64), replace(GREEDY, kv_cache=mode, exit_threshold=0.6)
    together = generator.generate(iter(requests), config)
    for request, generation in zip(requests, together, strict=True):
        assert ids_and_depths(generation) == ids_and_depths(generator.generate([request], config)[0])
    assert len(together) == 64 and len({depth for generation in together for depth in generation.depths}) > 1


@pytest.mark.parametrize(
    "variant, gate, mode", [("gqa", "sequence", "mean"), ("mla-query-latent", "linear", "per_loop")]
)
def test_a_stream_equals_the_oracle(
    variant: str, gate: str, mode: CacheMode, single_process: ProcessGroupCollection
) -> None:
    """The oracle runs one row, one token, one loop at a time. The gate's sums must move with the rows."""
    generator = generator_of(single_process, variant, gate)
    requests = mixed_requests(10)
    together = generator.generate(iter(requests), replace(GREEDY, kv_cache=mode, exit_threshold=0.6))
    for request, generation in zip(requests, together, strict=True):
        if mode == "per_loop":
            alone = generator.generate([request], replace(GREEDY, exit_threshold=0.6, batch_size=1))[0]
            assert ids_and_depths(generation) == ids_and_depths(alone)
        else:
            slow = SlowGenerator(generator.model, GATES[gate], mode, threshold=0.6)
            assert not isinstance(request.prompt, str)
            assert ids_and_depths(generation) == tuple(slow.generate(list(request.prompt), len(generation.tokens)))


@pytest.mark.parametrize("mode", ["per_loop", "last"])
def test_sampled_text_does_not_depend_on_neighbours(mode: CacheMode, generator: Generator) -> None:
    requests = mixed_requests(12)
    config = replace(GREEDY, temperature=1.2, top_p=0.9, kv_cache=mode, exit_threshold=0.6, repetition_penalty=1.3)
    together = generator.generate(iter(requests), config)
    backwards = generator.generate(iter(requests[::-1]), replace(config, batch_size=3, seed=5))
    assert [ids_and_depths(g) for g in together] == [ids_and_depths(g) for g in backwards[::-1]]


class Passes(list[list[tuple[int, int, int]]]):
    """(row, loop, position) of the tokens of every pass."""

    def record(self, monkeypatch: pytest.MonkeyPatch) -> "Passes":
        index = KVCache.index

        def recorded(
            cache: KVCache, rows: list[int], loops: list[int], positions: list[int], length: int
        ) -> CacheIndex:
            self.append(list(zip(rows, loops, positions, strict=True)))
            return index(cache, rows, loops, positions, length)

        monkeypatch.setattr(KVCache, "index", recorded)
        return self


@pytest.mark.parametrize("mode", ["per_loop", "last"])
def test_the_next_token_starts_in_the_very_next_pass(
    mode: CacheMode, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row's token starts at loop 1 right after the one before it exits, and rows share passes at different loops."""
    passes = Passes().record(monkeypatch)
    config = replace(GREEDY, kv_cache=mode, exit_threshold=0.6, max_new_tokens=12)
    generations = generator.generate(["abc", "x", "hello world"], config)
    assert any(len({loop for _, loop, _ in tokens}) > 1 for tokens in passes)
    for generation in generations:
        prompt = len(TOKENIZER.encode(generation.prompt).ids)
        start = 0
        for place, depth in enumerate(generation.depths[1:]):
            for loop in range(depth):
                assert (loop, prompt + place) in {token[1:] for token in passes[start + loop]}
            start += depth
    if mode == "last":  # a token that exited takes part in no further pass
        ran = sum(depth for generation in generations for depth in generation.depths[1:])
        assert sum(len(tokens) for tokens in passes) == ran


def test_with_a_cache_per_loop_a_token_runs_on_behind_its_successor(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Passes().record(monkeypatch)
    config = replace(GREEDY, exit_threshold=0.0, max_new_tokens=9)
    generator.generate(["abc"], config)
    assert [len(tokens) for tokens in passes] == [1, 2, 3, 4, 4, 4, 4, 4]
    for tokens in passes:
        assert [loop for _, loop, _ in tokens] == list(range(len(tokens)))[::-1]


def test_free_rows_are_filled_and_holes_closed(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass contains the first rows without gaps, as many as there are requests; full depth, five rows."""
    passes = Passes().record(monkeypatch)
    lengths = (3, 9, 4, 2, 8, 8, 5, 9, 3)
    requests = [Request("ab", max_new_tokens=length) for length in lengths]
    generator.generate(iter(requests), replace(GREEDY, kv_cache="last"))
    for tokens in passes:
        assert [row for row, _, _ in tokens] == list(range(len(tokens)))
    assert [len(tokens) for tokens in passes[::4]][:6] == [5] * 6, "all rows are in use while requests wait"
    assert sum(len(tokens) for tokens in passes) == 4 * sum(length - 1 for length in lengths)


def test_an_endless_queue_is_read_as_rows_become_free(generator: Generator) -> None:
    asked = []

    def endless() -> Iterator[Request]:
        for seed in range(10**6):
            asked.append(seed)
            yield Request("ab" if seed % 7 else "", seed=seed, max_new_tokens=3)

    stream = generator.stream(endless(), replace(GREEDY, kv_cache="last"))
    first = [next(stream) for _ in range(20)]
    assert len(asked) < 40
    errors = {index for index, generation in first if generation.error}
    assert errors == {index for index, _ in first if index % 7 == 0} and len(errors) > 1


def test_a_long_prompt_does_not_hold_up_others(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read a piece at a time, and other rows take a pass between two pieces."""
    order: list[str] = []
    monkeypatch.setattr(DepthBatch, "advance", observed(DepthBatch.advance, lambda _: order.append("pass")))
    monkeypatch.setattr(Prefill, "advance", observed(Prefill.advance, lambda _: order.append("piece")))
    config = replace(GREEDY, kv_cache="mean", prefill_chunk=16, max_new_tokens=40)
    short, long = Request("ab", max_new_tokens=40), Request("x" * 90, max_new_tokens=1)
    together = generator.generate([short, long], config)
    assert order.count("piece") == 4 + 4 * 6
    between = " ".join(order[4:]).split("pass")
    assert max(words.count("piece") for words in between) <= 2, (
        "a short piece at a prompt's end leaves room for another"
    )
    whole = [generator.generate([request], replace(config, prefill_chunk=1000))[0] for request in (short, long)]
    assert [ids_and_depths(g) for g in together] == [ids_and_depths(g) for g in whole]


def test_a_row_that_is_not_finite_is_zeroed(single_process: ProcessGroupCollection) -> None:
    """The request that gets its row must not see the NaNs, not even behind a mask."""
    generator = generator_of(single_process)
    requests = [Request("x" * 20), Request("ab~cd"), Request("yz"), Request("a~"), Request("hello")]
    expected = {
        index: ids_and_depths(generator.generate([requests[index]], replace(GREEDY, max_new_tokens=6))[0])
        for index in (0, 2, 4)
    }
    with torch.no_grad():
        generator.model.embedding.word_embeddings.weight[TOKENIZER.encode("~").ids] = float("nan")
    for mode in MODES:
        config = replace(GREEDY, batch_size=2, max_new_tokens=6, kv_cache=mode)
        generations = generator.generate(iter(requests), config)
        assert [g.finish for g in generations] == ["length", "error", "length", "error", "length"]
        if mode == "per_loop":
            assert {index: ids_and_depths(generations[index]) for index in expected} == expected
