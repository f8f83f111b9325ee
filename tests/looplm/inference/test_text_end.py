"""Where a text ends: at any of several end tokens in every mode of decoding, and at stop strings."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.process_groups_config import ProcessGroupCollection
from tokenizers import AddedToken, Tokenizer, decoders, models

from looplm.failures import UserError
from looplm.inference import GenerationConfig, Generator
from looplm.inference.text_stream import TextStream, Token
from tests.support.generation_oracle import BOS, EOS, GATES, MLA, build, byte_tokenizer

TOKENIZER = byte_tokenizer()
GREEDY = GenerationConfig(temperature=0.0, max_new_tokens=16)
MODES = {
    "plain": GREEDY,
    "shared cache": replace(GREEDY, kv_cache="last"),
    "depth batch": replace(GREEDY, exit_threshold=0.6),
    "depth batch, shared cache": replace(GREEDY, exit_threshold=0.6, kv_cache="last"),
    "drafts": replace(GREEDY, speculate=3, draft_depth=2),
    "queue": replace(GREEDY, batch_size=2, prefill_chunk=4),
}
PROMPTS = ["def f(", "x = [1, 2", "import", "aa"]


@pytest.fixture(scope="module")
def endless(single_process: ProcessGroupCollection) -> Generator:
    """A generator without an end token."""
    return Generator(build(MLA, GATES["lru"], single_process), TOKENIZER, ())


def until_any(ids: list[int], ends: set[int]) -> list[int]:
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


@pytest.mark.promise(text="Any of several end tokens ends a text, in every mode of decoding", expected="all texts end")
@pytest.mark.parametrize("mode", MODES)
def test_any_end_token_ends_a_text(
    mode: str, endless: Generator, record_property: Callable[[str, object], None]
) -> None:
    whole = [answer.ids for answer in endless.generate(PROMPTS, MODES[mode])]
    ends = {ids[3 + 2 * place] for place, ids in enumerate(whole)}
    answers = Generator(endless.model, TOKENIZER, sorted(ends)).generate(PROMPTS, MODES[mode])
    assert [answer.ids for answer in answers] == [until_any(ids, ends) for ids in whole]
    assert {answer.finish for answer in answers} == {"eos"}
    assert len({ids[len(answer.ids)] for ids, answer in zip(whole, answers, strict=True)}) > 1, (
        "several tokens end texts"
    )
    record_property("seen", "all texts end")


def stream_of(ids: list[int], stop: tuple[str, ...]) -> tuple[TextStream, list[Token]]:
    """Push ids up to the stop; return the stream and the tokens that it showed."""
    stream, shown = TextStream(TOKENIZER, TOKENIZER.encode("a").ids, stop), list[Token]()
    for token_id in ids:
        shown += stream.push(token_id, 1)
        if stream.stopped:
            break
    return stream, shown + stream.close()


def ids_of(*parts: str | int) -> list[int]:
    return [token for part in parts for token in ([part] if isinstance(part, int) else TOKENIZER.encode(part).ids)]


@pytest.mark.promise(text="A stop string may name a special token", expected="the text ends before it")
@pytest.mark.parametrize(
    "ids, stop, expected",
    [
        (ids_of("ab", EOS, "cd"), ("<eos>",), "ab"),
        (ids_of(EOS, "cd"), ("<eos>",), ""),
        (ids_of("ab", BOS, "cd", EOS, "e"), ("<eos>",), "abcd"),
        (ids_of("ab", BOS, EOS, "cd"), ("<bos><eos>",), "ab"),
        (ids_of("ab", BOS, EOS, "cd"), ("<eos><bos>", "d"), "abc"),
        (ids_of("ab", EOS, "\ncd"), ("b<eos>\n",), "a"),
        (ids_of("ab", EOS, "cd"), ("b<eos>d", "<eos>d"), "abcd"),
        (ids_of("ab", EOS, "cd"), ("cd", "<eos>c", "<pad>"), "ab"),
        (ids_of("ab", EOS, "cd"), ("eos",), "abcd"),  # the name of a special token is no text
        (ids_of("a<", "eos> b"), ("<eos>",), "a"),  # but a text may spell it
        (ids_of("a", EOS, "b"), ("ab",), ""),  # special tokens have no text
        ([*ids_of("aé")[:2], EOS], ("<eos>",), "a\ufffd"),  # half a character before it
    ],
    ids=str,
)
def test_a_stop_string_names_a_special_token(
    ids: list[int], stop: tuple[str, ...], expected: str, record_property: Callable[[str, object], None]
) -> None:
    stream, shown = stream_of(ids, stop)
    assert "".join(token.text for token in stream.tokens) == expected and shown == stream.tokens
    record_property("seen", "the text ends before it")


STOPS = ["<eos>", "a<bos>", "<pad><pad>", "ab", "é", "\n", "<eos>é", "b<eos>b"]


@settings(max_examples=300, deadline=None)
@given(
    ids=st.lists(st.sampled_from(ids_of("ab\né", EOS, BOS, 258)) | st.integers(0, 258), max_size=20),
    stop=st.lists(st.sampled_from(STOPS), min_size=1, max_size=3),
)
def test_what_is_shown_is_the_text_up_to_the_first_stop(ids: list[int], stop: list[str]) -> None:
    stream, shown = stream_of(ids, tuple(stop))
    text = "".join(token.text for token in stream.tokens)
    assert [token for token in shown if token.text] == [token for token in stream.tokens if token.text]
    assert not any(one in text for one in stop)
    assert not any(0xD800 <= ord(letter) < 0xE000 for letter in text), "marks are not shown"
    consumed = ids[: len(stream.tokens)]
    for one in stop:
        if one in ("<eos>", "<pad><pad>"):
            wanted = [TOKENIZER.token_to_id(one[:5])] * (len(one) // 5)
            assert all(consumed[place : place + len(wanted)] != wanted for place in range(len(consumed)))


GREEDILY = "it has no effect at temperature 0; leave it out, or raise temperature"


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"stop": ("a", "")}, "stop: ['a', ''] is not allowed; an empty string would stop at once; leave it out"),
        ({"stop": "\n"}, "stop: '\\n' is not allowed; give a list of strings"),
        ({"temperature": 0.0, "top_k": 5}, f"top_k: 5 is not allowed; {GREEDILY}"),
        ({"temperature": 0.0, "top_p": 0.5}, f"top_p: 0.5 is not allowed; {GREEDILY}"),
    ],
    ids=str,
)
def test_settings_without_effect_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        GenerationConfig(**keys)
    assert str(caught.value) == message


def words(*pieces: str) -> Tokenizer:
    """Return a tokenizer whose words are these; text is not split."""
    tokenizer = Tokenizer(models.BPE(vocab={"<pad>": 0}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    return tokenizer


@pytest.mark.parametrize(
    "stop, pieces, expected",
    [
        (("\n",), [":\n"], [(":", ":", 1)]),
        (("\n",), ["a", "bc\n"], [("a", "a", 1), ("b", "", 2), ("c", "bc", 2)]),  # no word is bc
        ((")",), ["a", "x)"], [("a", "a", 1), ("x)", "x", 2)]),  # no word is x: it stays whole
    ],
    ids=str,
)
def test_a_token_that_a_stop_string_cuts_becomes_those_of_its_text(
    stop: tuple[str, ...], pieces: list[str], expected: list[tuple[str, str, int]]
) -> None:
    tokenizer = words(":", ":\n", "a", "b", "c", "bc\n", "x)")
    vocabulary = tokenizer.get_vocab()
    stream = TextStream(tokenizer, [vocabulary["a"]], stop)
    for depth, piece in enumerate(pieces, start=1):
        stream.push(vocabulary[piece], depth)
    stream.close()
    assert stream.stopped
    assert [(tokenizer.id_to_token(token.id), token.text, token.depth) for token in stream.tokens] == expected


@pytest.mark.parametrize(
    "prompt, added, text",
    [
        (ids_of("na\u00ef")[:-1], ids_of("\u00efve")[1:], "\u00efve"),
        (ids_of("\u4e16")[:-1], ids_of("\u4e16")[2:], "\u4e16"),
        (ids_of("\u4e16")[:1], ids_of("\u4e16")[1:], "\u4e16"),
        (ids_of("\u4e16")[:1], ids_of("ab"), "ab"),
        (ids_of("a\ufffd"), ids_of("b"), "b"),
        (ids_of("\u4e16")[:1], [], ""),
        (ids_of("\u4e16")[1:] * 3, ids_of("b"), "b"),
    ],
    ids=str,
)
def test_a_prompt_may_end_inside_a_character(prompt: list[int], added: list[int], text: str) -> None:
    stream = TextStream(TOKENIZER, prompt)
    for token_id in added:
        stream.push(token_id, 1)
    stream.close()
    assert "".join(token.text for token in stream.tokens) == text and [t.id for t in stream.tokens] == added
