"""Generation: batches against single rows, early exit against a slow oracle, sampling, streaming, bad input."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection

from looplm.failures import UserError
from looplm.inference import Generation, GenerationConfig, Generator
from looplm.inference.early_exit import ExitSignal, certainty, confidence, steadiness
from looplm.inference.kv_cache import CacheMode
from looplm.inference.sampling import penalize_repetition, probabilities, sample
from looplm.inference.text_stream import TextStream, Token
from looplm.megatron.device import DEVICE
from tests.support.generation_oracle import EOS, GATES, MLA, VARIANTS, VOCAB, SlowGenerator, build, byte_tokenizer

TOKENIZER = byte_tokenizer()
NEVER = -1  # no such token: a random model would sample the end of text as readily as any other
GREEDY = GenerationConfig(temperature=0.0, max_new_tokens=16)
MODES = get_args(CacheMode)
PROMPTS = ["import os\n", "d", "class Parser:\n    def __init__(self", "for x in"]


def generator_of(groups: ProcessGroupCollection, variant: str = "mla", gate: str = "lru") -> Generator:
    return Generator(build(VARIANTS[variant], GATES[gate], groups), TOKENIZER, NEVER)


@pytest.fixture(scope="module")
def generator(single_process: ProcessGroupCollection) -> Generator:
    return generator_of(single_process)


def depths(generation: Generation) -> list[int]:
    return [token.depth for token in generation.tokens]


# ------------------------------------------------------------------------------------------------ against slow oracles


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_text_equals_the_cacheless_models(variant: str, single_process: ProcessGroupCollection) -> None:
    """Each of 200 tokens is the likeliest one in a forward pass over the whole text before it."""
    roomy = replace(VARIANTS[variant], max_sequence_length=256)
    generator = Generator(build(roomy, GATES["lru"], single_process), TOKENIZER, NEVER)
    generations = generator.generate(PROMPTS, replace(GREEDY, max_new_tokens=200))
    for generation in generations:
        prompt_ids = TOKENIZER.encode(generation.prompt).ids
        ids_BS = torch.tensor([prompt_ids + generation.ids], device=DEVICE)
        with torch.no_grad():
            logits_SV = F.linear(generator.model(ids_BS).hidden[-1], generator.model.head_weight())[:, 0]
        assert logits_SV.argmax(-1)[len(prompt_ids) - 1 : -1].tolist() == generation.ids
        assert depths(generation) == [4] * 200
    assert len({i for generation in generations for i in generation.ids}) > 16, (
        "a text that repeats one token would prove little"
    )


@pytest.mark.parametrize("mode", ["last", "mean", "first"])
@pytest.mark.parametrize("variant, gate", [("mla", "lru"), ("gqa", "sequence"), ("mla-query-latent", "linear")])
def test_shared_caches_and_early_exit_equal_the_oracle(
    variant: str, gate: str, mode: CacheMode, single_process: ProcessGroupCollection
) -> None:
    """Tokens of a batch exit at different loops; the oracle runs one row, one token, one loop at a time."""
    generator = generator_of(single_process, variant, gate)
    config = replace(GREEDY, kv_cache=mode, exit_threshold=0.6)
    seen = set()
    for generation in generator.generate(PROMPTS, config):
        slow = SlowGenerator(generator.model, GATES[gate], mode, threshold=0.6)
        expected = slow.generate(TOKENIZER.encode(generation.prompt).ids, len(generation.tokens))
        assert generation.ids == expected.ids
        assert depths(generation) == expected.depths
        seen |= set(expected.depths)
    assert len(seen) > 1, "the gate must decide something, or this proves nothing"


@pytest.mark.parametrize("prompts", ["abc", [5, 7]])
def test_prompts_that_are_no_list_of_prompts_are_refused(prompts: Any, single_process: ProcessGroupCollection):
    generator = Generator(build(MLA, GATES["lru"], single_process), TOKENIZER, NEVER)
    with pytest.raises(UserError, match=r"prompts: .* is not allowed; give a list of prompts"):
        generator.generate(prompts, GREEDY)


def test_a_tiny_temperature_takes_the_likeliest_token():
    logits_NV = torch.tensor([[3.0, 1.0, -2.0], [-7.0, 0.5, 0.0]])
    assert torch.equal(probabilities(logits_NV, 1e-308), probabilities(logits_NV, 0.0))
    assert torch.allclose(probabilities(logits_NV, 0.7), (logits_NV.double() / 0.7).softmax(-1))


@pytest.mark.parametrize(
    "signal, threshold, mode, loops",
    [("confidence", 0.06, "last", 6), ("entropy", 0.12, "mean", 4), ("change", 0.4, "last", 6)],
)
def test_exits_without_a_gate_equal_the_oracle(
    signal: ExitSignal, threshold: float, mode: CacheMode, loops: int, single_process: ProcessGroupCollection
) -> None:
    """Also beyond the trained depth, where no gate can decide."""
    model = build(MLA, GATES["lru"], single_process)
    generator = Generator(model, TOKENIZER, NEVER, gate_trained=False)
    config = replace(GREEDY, kv_cache=mode, exit_threshold=threshold, exit_signal=signal, max_depth=loops)
    seen = set[int]()
    for generation in generator.generate(PROMPTS, config):
        slow = SlowGenerator(model, GATES["lru"], mode, threshold, signal, loops)
        expected = slow.generate(TOKENIZER.encode(generation.prompt).ids, len(generation.tokens))
        assert (generation.ids, generation.depths) == tuple(expected)
        seen |= set(expected.depths)
    assert len(seen) > 1, "the score must decide something, or this proves nothing"


def test_scores_range_from_0_to_1() -> None:
    flat, sure = torch.zeros(1, 50), torch.tensor([[1e4] + [0.0] * 49])
    assert confidence(torch.cat((flat, sure))).tolist() == pytest.approx([0.02, 1.0])
    assert certainty(torch.cat((flat, sure))).tolist() == pytest.approx([0.0, 1.0], abs=1e-6)
    h_ND = torch.tensor([[3.0, 4.0]]).expand(3, -1)
    assert steadiness(torch.stack((h_ND[0], -h_ND[0], h_ND[0])), h_ND, [1, 1, 0]).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("threshold", [None, 0.6])
@pytest.mark.parametrize("mode", MODES)
def test_a_row_in_a_batch_equals_the_row_alone(mode: CacheMode, threshold: float | None, generator: Generator) -> None:
    """Also while other rows end: the row that ends first is dropped from the batch."""
    config = replace(GREEDY, kv_cache=mode, exit_threshold=threshold)
    [first] = generator.generate(PROMPTS[:1], config)
    generator = Generator(generator.model, TOKENIZER, eos_ids=first.ids[6])
    together = generator.generate(PROMPTS, config)
    assert together[0].finish == "eos" and "length" in {generation.finish for generation in together}
    for prompt, generation in zip(PROMPTS, together, strict=True):
        assert generator.generate([prompt], config)[0] == generation


def test_depth_bounds_and_thresholds(generator: Generator) -> None:
    at = {q: generator.generate(PROMPTS, replace(GREEDY, exit_threshold=q, kv_cache="last")) for q in (0.0, 0.6, 1.0)}
    flat = {q: [depth for generation in generations for depth in depths(generation)] for q, generations in at.items()}
    assert set(flat[0.0]) == {1} and set(flat[1.0]) == {4} and len(set(flat[0.6])) > 1
    bounded = generator.generate(PROMPTS, replace(GREEDY, exit_threshold=0.6, min_depth=2, max_depth=3))
    assert {depth for generation in bounded for depth in depths(generation)} <= {2, 3}
    fixed = generator.generate(PROMPTS, replace(GREEDY, depth=6, kv_cache="last"))
    assert {depth for generation in fixed for depth in depths(generation)} == {6}


# ----------------------------------------------------------------------------------------------------------- sampling


def frequencies(logits: list[float], **settings: Any) -> list[float]:
    """Return how often each id is sampled by evenly spaced uniform numbers."""
    n = 20_000
    ids = sample(probabilities(torch.tensor([logits]).expand(n, -1), **settings), (torch.arange(n).double() + 0.5) / n)
    return (ids.bincount(minlength=len(logits)) / n).tolist()


def test_the_certainty_of_a_single_token_is_a_number() -> None:
    assert certainty(torch.zeros(2, 1)).tolist() == [1, 1]


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"temperature": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"temperature": 1.0, "top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 1.0, "top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 1.0, "top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 1.0, "top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"temperature": 1.0, "top_p": 1e-9}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.5}, [0, 4 / 7, 0, 3 / 7]),  # 0.4 of 0.9 is below a half
    ],
)
def test_sampling_frequencies(settings: dict[str, float], expected: list[float]) -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().tolist()
    assert frequencies(logits, **settings) == pytest.approx(expected, abs=1e-3)


def test_extreme_uniform_numbers_sample_no_excluded_token() -> None:
    logits_NV = torch.randn(500, 1000)
    largest = torch.ones(500, dtype=torch.float64).nextafter(torch.zeros(500, dtype=torch.float64))
    for uniform_N in (largest, torch.zeros_like(largest)):
        for settings in ({"top_k": 3}, {"top_p": 0.1}, {"top_k": 3, "top_p": 0.9}, {}):
            ids_N = sample(probabilities(logits_NV, 1.0, **settings), uniform_N)
            probability_N1 = logits_NV.softmax(-1).gather(-1, ids_N[:, None])
            assert not settings or (probability_N1 > 1 / 1000).all(), "far tails are cut off"


def test_repetition_penalty_for_positive_and_negative_logits(generator: Generator) -> None:
    seen = torch.tensor([[True, True, False, False]])
    assert penalize_repetition(torch.tensor([[2.0, -2.0, 2.0, -2.0]]), seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]
    [plain] = generator.generate(PROMPTS[:1], replace(GREEDY, max_new_tokens=60))
    [penalized] = generator.generate(PROMPTS[:1], replace(GREEDY, max_new_tokens=60, repetition_penalty=50.0))
    assert len(set(penalized.ids)) == 60 > len(set(plain.ids))
    assert not set(penalized.ids) & set(TOKENIZER.encode(PROMPTS[0]).ids), "the prompt counts as seen"


def test_seeds_reproduce_texts_and_belong_to_requests(generator: Generator) -> None:
    config = GenerationConfig(temperature=1.5, seed=11, max_new_tokens=16, kv_cache="last", exit_threshold=0.6)
    same = generator.generate([PROMPTS[0]] * 3, config)
    assert same == generator.generate([PROMPTS[0]] * 3, config)
    assert len({generation.text for generation in same}) == 3
    for row, generation in enumerate(same):
        assert generator.generate([PROMPTS[0]], replace(config, seed=11 + row)) == [generation]


# --------------------------------------------------------------------------------------------------------------- text


def pushed(text: bytes, stop: tuple[str, ...] = ()) -> tuple[TextStream, list[Token]]:
    """Push bytes as one token each until the stream stops; also return the tokens in the order they became final."""
    alphabet = TOKENIZER.get_vocab()
    letters = {byte: letter for letter, byte in _letters().items()}
    stream, shown = TextStream(TOKENIZER, [], stop), []
    for place, byte in enumerate(text):
        shown += stream.push(alphabet[letters[byte]], place)
        if stream.stopped:
            break
    return stream, shown + stream.close()


def _letters() -> dict[str, int]:
    """Return byte-level tokenizers' alphabet: printable bytes map to themselves, the others to 256, 257, ..."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


@pytest.mark.parametrize(
    "text",
    [b"plain", "naïve 漢字 🙂!".encode(), "🙂".encode()[:3], b"a\xff\xfe b\x80", "漢".encode()[:1] + b"x", b""],
)
def test_token_texts_join_to_the_whole_text(text: bytes) -> None:
    stream, shown = pushed(text)
    assert "".join(token.text for token in stream.tokens) == text.decode("utf-8", errors="replace")
    assert [token.depth for token in stream.tokens] == list(range(len(text)))
    assert shown == stream.tokens, "each token is shown once, in order, with its final text"


@pytest.mark.parametrize(
    "stop, expected",
    [
        (("cd",), "ab"),
        (("zz", "e"), "abcd"),
        (("abc", "b"), "a"),
        (("a",), ""),
        (("f\n\n", "fg"), "abcde"),
        (("gh",), "abcdefg"),
    ],
)
def test_stop_strings(stop: tuple[str, ...], expected: str) -> None:
    """No part of a stop string is in the text, or is shown before it turns out to be one."""
    stream, shown = pushed(b"abcdefg", stop)
    assert "".join(token.text for token in stream.tokens) == expected
    assert shown == stream.tokens
    assert stream.stopped == (expected != "abcdefg")


def test_streaming_shows_what_is_returned(generator: Generator) -> None:
    shown: dict[int, list[Token]] = {}
    generations = generator.generate(
        [*PROMPTS, ""], GREEDY, on_token=lambda index, token: shown.setdefault(index, []).append(token)
    )
    assert [shown.get(index, []) for index in range(5)] == [generation.tokens for generation in generations]


def test_finish_reasons(generator: Generator, single_process: ProcessGroupCollection) -> None:
    [first] = generator.generate(PROMPTS[:1], GREEDY)
    assert first.finish == "length" and len(first.tokens) == 16
    eos = first.ids[7]
    [ended] = Generator(generator.model, TOKENIZER, eos).generate(PROMPTS[:1], GREEDY)
    assert ended.finish == "eos" and ended.ids == first.ids[: first.ids.index(eos)]
    room = MLA.max_sequence_length
    [full, nearly] = generator.generate(["x" * (room - 5), "x" * (room - 1)], GREEDY)
    assert (full.finish, len(full.tokens)) == ("context", 5)
    assert (nearly.finish, len(nearly.tokens)) == ("context", 1)


# ---------------------------------------------------------------------------------------------------------- bad input


def test_an_invalid_request_does_not_affect_the_others(generator: Generator) -> None:
    [good] = generator.generate(PROMPTS[:1], GREEDY)
    rows = generator.generate([PROMPTS[0], "", "x" * 128, [5, VOCAB], [-1], [], "\ud800"], GREEDY)
    assert rows[0] == good
    words = ["empty", "128 tokens", f"id {VOCAB}", "id -1", "empty", "surrogate"]
    for row, word in zip(rows[1:], words, strict=True):
        assert row.finish == "error" and word in str(row.error) and "\n" not in str(row.error) and not row.tokens
    assert all(row.error for row in generator.generate(["", ""], GREEDY)), "no request is valid, so nothing runs"


def test_a_row_whose_logits_are_not_finite_ends_alone(single_process: ProcessGroupCollection) -> None:
    generator = generator_of(single_process)
    expected = generator.generate(PROMPTS[:1], GREEDY)
    with torch.no_grad():
        generator.model.embedding.word_embeddings.weight[TOKENIZER.encode("~").ids] = float("nan")
    rows = generator.generate([PROMPTS[0], "a~b"], GREEDY)
    assert rows[:1] == expected and rows[1].finish == "error" and "not finite" in str(rows[1].error)


@pytest.mark.parametrize(
    "settings, key",
    [
        ({"kv_cache": "shared"}, "kv_cache"),
        ({"exit_threshold": 1.1}, "exit_threshold"),
        ({"exit_threshold": -0.1}, "exit_threshold"),
        ({"exit_threshold": 0.5, "depth": 2}, "depth"),
        ({"exit_threshold": 0.5, "max_depth": 5}, "max_depth"),
        ({"exit_threshold": 0.5, "min_depth": 5}, "min_depth"),
        ({"exit_threshold": 0.5, "max_depth": 2, "min_depth": 3}, "min_depth"),
        ({"exit_threshold": 0.5, "exit_signal": "mood"}, "exit_signal"),
        ({"exit_signal": "entropy"}, "exit_signal"),
        ({"exit_threshold": 0.5, "max_depth": 0}, "max_depth"),
        ({"batch_size": 0}, "batch_size"),
        ({"prefill_chunk": 0}, "prefill_chunk"),
        ({"min_depth": 2}, "min_depth"),
        ({"max_depth": 2}, "max_depth"),
        ({"exit_threshold": 0.5, "exit_signal": "entropy", "max_depth": 10_001}, "max_depth"),
        ({"depth": 0}, "depth"),
        ({"depth": 10_001}, "depth"),
        ({"speculate": 65}, "speculate"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"stop": ("",)}, "stop"),
        ({"seed": -1}, "seed"),
    ],
)
def test_invalid_settings(settings: dict[str, Any], key: str, generator: Generator) -> None:
    with pytest.raises(UserError, match=rf"^{key}: ") as caught:
        generator.generate(PROMPTS, GenerationConfig(**settings))
    assert "\n" not in str(caught.value)


def test_early_exit_needs_a_trained_gate(generator: Generator) -> None:
    untrained = Generator(generator.model, TOKENIZER, EOS, gate_trained=False)
    with pytest.raises(UserError, match="never trained"):
        untrained.generate(PROMPTS, replace(GREEDY, exit_threshold=0.9))
    assert untrained.generate(PROMPTS[:1], replace(GREEDY, exit_threshold=1.0, max_new_tokens=1))[0].error is None
