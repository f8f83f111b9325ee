"""The chat template compared with transformers' rendering of it."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from looplm.chat import END, JINJA, SPECIAL_TOKENS, START, ChatTemplate, Message
from looplm.cli import UserError
from tests.support.tiny import CONVERSATIONS, write_tokenizer

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
    contents = [content for messages in CONVERSATIONS for _, content in messages]
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
