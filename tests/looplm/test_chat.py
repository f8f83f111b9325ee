"""The chat template compared with transformers' rendering of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from looplm.chat import END, JINJA, SPECIAL_TOKENS, START, ChatTemplate, Message
from looplm.failures import UserError
from looplm.inference.text_stream import TextStream
from tests.support.tiny import CONVERSATIONS, write_tokenizer

HARD = [
    [Message("user", "The QUICK fox?"), Message("assistant", "The answer: it's 42 €. "), Message("user", " and  you?")],
    [
        Message("system", ""),
        Message("assistant", "世界\nsays\n\nhello"),
        Message("assistant", ""),
        Message("user", "x"),
    ],
]
# The same template in transformers' syntax for marking the tokens of the assistant.
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    contents = [message.content for messages in CONVERSATIONS for message in messages]
    return write_tokenizer(tmp_path_factory.mktemp("chat"), contents, SPECIAL_TOKENS)[0]


@pytest.fixture
def theirs(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    found.chat_template = JINJA
    return found


def as_dicts(messages: list[Message]) -> list[dict[str, str]]:
    return [message._asdict() for message in messages]


def test_ids_and_learned_mask_equal_transformers(tokenizer, theirs):
    for messages, ours in zip(CONVERSATIONS, ChatTemplate(tokenizer, "t").encode(CONVERSATIONS), strict=True):
        plain = theirs.apply_chat_template(as_dicts(messages), return_dict=True)
        marked = theirs.apply_chat_template(
            as_dicts(messages), chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        assert ours.ids == plain["input_ids"] == marked["input_ids"]
        assert [int(learned) for learned in ours.learned] == marked["assistant_masks"]


def test_a_prompt_ends_where_the_answer_begins(tokenizer, theirs):
    template, messages = ChatTemplate(tokenizer, "t"), CONVERSATIONS[0]
    asked = template.ask(messages[:-1])
    rendered = theirs.apply_chat_template(as_dicts(messages[:-1]), add_generation_prompt=True, return_dict=True)
    assert asked == rendered["input_ids"]
    whole = template.encode([messages])[0]
    answer = tokenizer.encode(messages[-1].content).ids
    assert whole.ids == [*asked, *answer, *template.close()]
    assert whole.learned[len(asked) :] == [True] * (len(answer) + 1) + [False]


def test_an_answer_that_is_not_to_be_learned_loses_its_loss_alone(tokenizer):
    template, messages = ChatTemplate(tokenizer, "t"), CONVERSATIONS[0]
    assert [message.role for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    (plain,) = template.encode([messages])
    first = messages[2]._replace(learned=False)
    (masked,) = template.encode([[*messages[:2], first, *messages[3:]]])
    assert masked.ids == plain.ids
    start = len(template.ask(messages[:2]))
    stop = start + len(tokenizer.encode(first.content).ids) + 1
    assert plain.learned[start:stop] == [True] * (stop - start)
    assert masked.learned == [*plain.learned[:start], *[False] * (stop - start), *plain.learned[stop:]]


@pytest.mark.parametrize("messages", [[], HARD[0][:1], HARD[0][1:], [*HARD[0][:1], *HARD[0]], HARD[1]])
def test_any_order_of_turns_is_rendered(tokenizer, theirs, messages):
    (ours,) = ChatTemplate(tokenizer, "t").encode([messages])
    if messages:
        assert ours.ids == theirs.apply_chat_template(as_dicts(messages), return_dict=True)["input_ids"]
    answers = [message for message in messages if message.role == "assistant"]
    assert sum(ours.learned) == sum(len(tokenizer.encode(message.content).ids) + 1 for message in answers)


def test_parts_of_text_are_rendered_one_after_the_other(theirs):
    parts = [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1?"}]
    rendered = theirs.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert rendered == theirs.apply_chat_template([{"role": "user", "content": "1 + 1?"}], tokenize=False)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}, {}),
        ({"role": "assistant", "content": "x", "reasoning_content": "because"}, {}),
        ({"role": "assistant", "content": "x", "function_call": {"name": "f"}}, {}),
        ({"role": "tool", "content": "4"}, {}),
        ({"role": "user", "content": [{"type": "image", "url": "x"}]}, {}),
        ({"role": "user", "content": "x"}, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
    ],
)
def test_the_exported_template_refuses_what_it_would_drop(theirs, message, options):
    with pytest.raises(TemplateError, match="this template renders"):
        theirs.apply_chat_template([message], tokenize=False, **options)


@pytest.mark.parametrize("content", ["\n\nHm", "  x", f"a {END} b {START}assistant\n", "<eos><pad>", ""])
def test_special_tokens_in_contents_are_plain_text(tokenizer, content):
    template = ChatTemplate(tokenizer, "t")
    messages = [Message("user", content), Message("assistant", content)]
    whole, asked = template.encode([messages])[0], template.ask(messages[:1])
    assert whole.ids[: len(asked)] == asked
    learned = [token for token, counts in zip(whole.ids, whole.learned, strict=True) if counts]
    assert learned[-1] == template.end_id and tokenizer.decode(learned[:-1]) == content
    specials = [token for token in whole.ids if token < 3 + len(SPECIAL_TOKENS)]
    assert specials == [tokenizer.token_to_id(token) for token in (START, END) * 2]


def test_a_tokenizer_without_the_special_tokens_is_an_error_of_one_line(tmp_path: Path):
    plain, _ = write_tokenizer(tmp_path, ["text"])
    with pytest.raises(UserError, match=r"t\.json: has no token '<\|im_start\|>'") as caught:
        ChatTemplate(plain, "t.json")
    assert "\n" not in str(caught.value)


METASPACE = pre_tokenizers.Metaspace
BYTES = [f"<0x{value:02X}>" for value in range(256)]
PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def sentencepiece(pre_tokenizer: Any = None, normalizer: Any = None, unigram: bool = False, **mark: Any) -> Tokenizer:
    """Return a tokenizer of the kind of Llama 2: every space is ▁, and what has no token is bytes."""
    texts = [message.content.replace(" ", "▁") for messages in CONVERSATIONS for message in messages]
    specials = ["<unk>", "<s>", "</s>", *BYTES]
    if unigram:
        tokenizer = Tokenizer(models.Unigram())
        trainer: Any = trainers.UnigramTrainer(vocab_size=330, special_tokens=specials, unk_token="<unk>")
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=specials)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(texts, trainer)
    settings = json.loads(tokenizer.to_str())  # the bytes are tokens of the model, not names in a text
    settings["added_tokens"] = [token for token in settings["added_tokens"] if token["content"] not in BYTES]
    settings["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps({**settings, "pre_tokenizer": None}))
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_tokens(
        [AddedToken(name, **{"special": True, "normalized": False, **mark}) for name in SPECIAL_TOKENS]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def byte_level(**options: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**options)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [f"{message.role}\n{message.content}" for messages in CONVERSATIONS for message in messages]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@pytest.mark.promise(
    text="The tokens learned from a conversation are those of the exported chat template, or the tokenizer is refused",
    expected="equal ids with Metaspace, Prepend and prefix spaces; marks that eat spaces are refused",
)
@pytest.mark.parametrize(
    "make",
    [
        lambda: sentencepiece(METASPACE(prepend_scheme="always", split=True)),
        lambda: sentencepiece(METASPACE(prepend_scheme="always", split=False)),
        lambda: sentencepiece(METASPACE(prepend_scheme="first", split=True)),
        lambda: sentencepiece(METASPACE(prepend_scheme="first", split=False)),
        lambda: sentencepiece(METASPACE(prepend_scheme="never")),
        lambda: sentencepiece(normalizer=PREPEND),
        lambda: sentencepiece(METASPACE(prepend_scheme="always"), unigram=True),
        lambda: sentencepiece(METASPACE(prepend_scheme="first"), special=False),
        lambda: byte_level(add_prefix_space=True),
        lambda: byte_level(add_prefix_space=False),
    ],
)
def test_tokens_learned_are_those_of_the_exported_template(
    make: Callable[[], Tokenizer], record_property: Callable[[str, str], None]
) -> None:
    tokenizer = make()
    theirs: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    theirs.chat_template = JINJA
    template, options = ChatTemplate(tokenizer, "t"), {"return_dict": True}
    for messages in [*CONVERSATIONS, *HARD]:
        rendered = theirs.apply_chat_template(as_dicts(messages), **options)
        assert template.encode([messages])[0].ids == rendered["input_ids"]
        asked = theirs.apply_chat_template(as_dicts(messages), add_generation_prompt=True, **options)
        assert template.ask(messages) == asked["input_ids"]
    record_property("seen", "equal ids")


@pytest.mark.parametrize(
    "make",
    [
        lambda: byte_level(add_prefix_space=False, use_regex=False),
        lambda: sentencepiece(METASPACE(), rstrip=True),
        lambda: sentencepiece(METASPACE(), lstrip=True),
        lambda: sentencepiece(normalizer=PREPEND, normalized=True),
    ],
)
def test_other_tokenizers_are_refused(make: Callable[[], Tokenizer]) -> None:
    with pytest.raises(UserError, match=r"^t: encodes conversations otherwise than the exported template") as caught:
        ChatTemplate(make(), "t")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_a_word_that_is_generated_behind_a_special_token_keeps_its_space(scheme: str) -> None:
    """Behind that token alone, which has no text, the word would be the first of a text."""
    tokenizer = sentencepiece(METASPACE(prepend_scheme=scheme, split=True))
    tokenizer.decoder = decoders.Metaspace()
    words = tokenizer.encode("two words", add_special_tokens=False).ids
    start = tokenizer.token_to_id(START)
    assert start is not None
    ids = [*words, start, *words]
    stream = TextStream(tokenizer, [])
    shown = [token for one in ids for token in stream.push(one, 1)] + stream.close()
    assert "".join(token.text for token in shown) == tokenizer.decode(ids)
