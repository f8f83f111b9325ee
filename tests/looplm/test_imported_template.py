"""Chat templates of imported models: the tokens that transformers gives, and what is refused."""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from megatron.core.process_groups_config import ProcessGroupCollection
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from looplm import generate as command
from looplm import imported_template as templates
from looplm.chat import JINJA, SPECIAL_TOKENS, ChatTemplate, Message
from looplm.checkpoint import COMPANION_FOLDER
from looplm.failures import UserError
from looplm.imported_template import ImportedTemplate, imported_template
from looplm.inference import Generation, Generator
from looplm.inference import generator as library
from looplm.inference.request import Request
from looplm.megatron import process_groups
from tests.support.generation_oracle import EOS, GATES, MLA, build, byte_tokenizer

pytestmark = pytest.mark.slow  # templates are rendered in a process

# As SmolLM2's: a system message where the conversation has none.
DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are kind<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + (message['content']) + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "a default system message": DEFAULT_SYSTEM,
    "blocks and special tokens": (
        "{{ bos_token }}\n{%- set ns = namespace(turns=0) %}\n  {% for message in messages %}\n"
        "    {% if message.role == 'system' %}\n{% continue %}\n    {% endif %}\n"
        "{% set ns.turns = ns.turns + 1 %}[{{ ns.turns }}] {{ message.content | trim }}{{ eos_token }}\n"
        "  {% endfor %}\n"
        "{% if tools is none and documents is not defined %}no tools{% endif %}{{ dict(a=1).a }}"
    ),
    "json and marks": (
        "{% for message in messages %}{% generation %}{% set seen = 1 %}{{ message | tojson(indent=1) }}"
        "{% endgeneration %}{{ seen is defined }}{% endfor %}"
        "{{ dict.fromkeys(['<é>'], '&') | tojson }}{{ strftime_now('%Y') | length }}"
    ),
}
TALK = [
    Message("user", " What is 2 + 2? "),
    Message("assistant", "4<|im_end|> \n"),
    Message("user", "Thanks,\n<é> & 世界"),
]
KNOWN = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": None}


def tokenizer_with_marks() -> Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.enable_truncation(5)
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_equal_those_of_transformers(name: str) -> None:
    special: dict[str, Any] = {"bos_token": "<bos>", "eos_token": "<eos>"}
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer_with_marks(), **special)
    theirs.chat_template = TEMPLATES[name]
    ours = ImportedTemplate(TEMPLATES[name], tokenizer_with_marks(), special, "t.jinja")
    for talk in (TALK, TALK[:1], [Message("system", "Be brief."), *TALK]):
        dicts = [{"role": message.role, "content": message.content} for message in talk]
        assert ours.render(talk) == theirs.apply_chat_template(dicts, add_generation_prompt=True, tokenize=False)
        found: Any = theirs.apply_chat_template(dicts, add_generation_prompt=True, return_dict=True)
        assert ours.ask(talk) == found["input_ids"]


# What transformers is told to be an answer by the template's own tags, and we find without them.
MARKED = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETS = "['content'] if loop.last or message['role'] == 'user' else '-'"  # as some drop earlier reasoning
ANSWERS = [Message("assistant", content) for content in ("4 \n", "", "世界")]
LONG_TALK = [message for answer in ANSWERS for message in (TALK[2], answer)]


def test_what_is_learned_is_what_transformers_masks() -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer_with_marks(), bos_token="<bos>", eos_token="<eos>")
    theirs.chat_template = MARKED
    ours = ImportedTemplate(MARKED, tokenizer_with_marks(), {"bos_token": "<bos>"}, "t.jinja")
    talks = [LONG_TALK, LONG_TALK[:2], [Message("system", "Be brief."), *LONG_TALK[:4]]]
    for talk, (ids, learned) in zip(talks, ours.encode(talks), strict=True):
        dicts = [{"role": message.role, "content": message.content} for message in talk]
        found: Any = theirs.apply_chat_template(dicts, return_dict=True, return_assistant_tokens_mask=True)
        assert ids == found["input_ids"] and any(learned)
        assert [int(is_learned) for is_learned in learned] == found["assistant_masks"]
    end, bos = (tokenizer_with_marks().token_to_id(name) for name in ("<|im_end|>", "<bos>"))
    assert ours.end_id == end and ours.mark_ids == {bos, end, tokenizer_with_marks().token_to_id("<|im_start|>")}


def test_a_template_that_writes_the_date_packs_the_same_on_every_day(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_with_marks()
    dated = "{% macro today() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ today() }}" + DEFAULT_SYSTEM
    packed, asked = list[str](), list[str]()
    for year in (2026, 2027):

        class Day(datetime):
            @classmethod
            def now(cls, tz: Any = None, year: int = year) -> "Day":
                return cls(year, 1, 2)

        monkeypatch.setattr(templates, "datetime", Day)
        template = ImportedTemplate(dated, tokenizer, {}, "t.jinja")
        packed.append(tokenizer.decode(template.encode([LONG_TALK[:2]])[0].ids, skip_special_tokens=False))
        asked.append(template.render(TALK[:1]))
    assert packed[0] == packed[1] and packed[0].startswith("26 Jul 2024<|im_start|>")
    assert [text[:11] for text in asked] == ["02 Jan 2026", "02 Jan 2027"]


def test_an_answer_that_is_context_is_not_learned() -> None:
    template = ImportedTemplate(DEFAULT_SYSTEM, tokenizer_with_marks(), {}, "t.jinja")
    question, first = Message("user", "2 + 2?"), Message("assistant", "4", learned=False)
    ids, learned = template.encode([[question, first, question, Message("assistant", "five")]])[0]
    said = [token for token, is_learned in zip(ids, learned, strict=True) if is_learned]
    assert tokenizer_with_marks().decode(said, skip_special_tokens=False) == "five<|im_end|>"


@pytest.mark.parametrize(
    "source, answer, words",
    [
        (DEFAULT_SYSTEM, "a <|im_end|> b", "a message holds the token '<|im_end|>' itself: 'a <|im_end|> b'"),
        (DEFAULT_SYSTEM.replace("['content']", "['content'] | upper"), "four", "where the answer 'four' begins"),
        (DEFAULT_SYSTEM.replace("['content']", FORGETS), "4", "where the answer '4' begins"),
        (DEFAULT_SYSTEM.replace("loop.first", "loop.last"), "4", "something else before an answer than when it asks"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "4", "ends an answer with no special token"),
    ],
    ids=["a token in a message", "rewritten", "forgotten", "asks otherwise", "no end"],
)
def test_what_cannot_be_trained_on_is_refused(source: str, answer: str, words: str) -> None:
    template = ImportedTemplate(source, tokenizer_with_marks(), {}, "t.jinja")
    with pytest.raises(UserError) as caught:
        template.encode([[TALK[2], Message("assistant", answer), TALK[2]]])
    assert str(caught.value).startswith("t.jinja: ") and words in str(caught.value)


@pytest.mark.parametrize(
    "source, words",
    [
        ("{{ raise_exception('only  users\nmay speak') }}", "does not render this conversation (only users may speak)"),
        ("{{ messages[9].content + 1 }}", "does not render this conversation ("),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ dict.__class__.mro() }}", "unsafe"),
        ("{% set ns = namespace(__call__=1) %}", "a namespace stores no attribute '__call__'"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "a namespace stores no attribute '_x'"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("\n{% for %}", "t.jinja:2: not a valid template ("),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        (f"{{{{ {'(' * 3000}1{')' * 3000} }}}}", "recursion"),
    ],
    ids=lambda value: value[:40],
)
def test_templates_that_fail_or_reach_out_are_refused_in_one_line(source: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        ImportedTemplate(source, byte_tokenizer(), {}, "t.jinja").render(TALK)
    assert str(caught.value).startswith("t.jinja:") and words in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).endswith("repair the template, or remove it to chat in LoopLM's own")


TOO_MANY_DIGITS = (
    "Exceeds the limit (4300 digits) for integer string conversion; use sys.set_int_max_str_digits() to increase the "
    "limit"
)


@pytest.mark.parametrize(
    "source, reason",
    [
        ("{% break %}", "'break' outside loop"),
        ("{% for a in [1] %}" * 25 + "{% endfor %}" * 25, "too many statically nested blocks"),
        ("{{ dict(a=1, a=2) }}", "keyword argument repeated: a"),
        ("{% macro m(a, a) %}{% endmacro %}", "duplicate argument 'l_1_a' in function definition"),
        ("{{ ('a' | center(10000000)) | wordwrap(1) | length }}", "it takes longer than 0.5 seconds"),
        (f"{{{{ {'9' * 5000} }}}}", TOO_MANY_DIGITS.replace("conversion", "conversion: value has 5000 digits")),
    ],
    ids=lambda value: value[:40],
)
def test_templates_that_cannot_be_compiled_are_refused_in_one_line(
    source: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "_SECONDS", 0.5)
    with pytest.raises(UserError) as caught:
        ImportedTemplate(source, byte_tokenizer(), {}, "t.jinja")
    fix = "repair the template, or remove it to chat in LoopLM's own"
    assert str(caught.value) == f"t.jinja: not a valid template ({reason}); {fix}"


@pytest.mark.parametrize(
    "source, reason",
    [
        ("{{ cycler() }}", "at least one item has to be provided"),
        ("{{ '\\ud800' }}", "its text holds half of a surrogate pair"),
        ("{{ messages[0].role * 5000000 }}", "its text is longer than 16,777,216 characters"),
        ("{{ 9 ** (9 ** 9) }}", "it asks for a power that is too large"),
        ("{{ ('a' * 10 ** 13) | length }}", "it takes more than 1 GiB of memory"),
        ("{{ ('a' * 2000000000) | length }}", "it takes more than 1 GiB of memory"),
        ("{{ ('%2000000000d' % 1) | length }}", "it takes more than 1 GiB of memory"),
        (
            "{% for a in range(9999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "it takes longer than 0.5 seconds",
        ),
        ("{{ lipsum(n=100000000) }}", "it takes longer than 0.5 seconds"),
        (
            "{% set ns = namespace(a=[0], b=[0]) %}{% for i in range(40) %}{% set ns.a = [ns.a, ns.a] %}"
            "{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}",
            "it takes longer than 0.5 seconds",
        ),
        ("{{ ('a' * 3000000).rfind('ab' ~ 'a' * 1500000) }}", "it takes longer than 0.5 seconds"),
        (f"{{{{ raise_exception({' * '.join(['9 ** 999'] * 5)}) }}}}", TOO_MANY_DIGITS),
        ("{{ raise_exception('no ' * 1000) }}", f"{'no ' * 66}no"),
    ],
    ids=lambda value: value[:40],
)
def test_templates_that_hang_or_fill_the_memory_are_refused_in_one_line(
    source: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "_SECONDS", 0.5)
    with pytest.raises(UserError) as caught:
        ImportedTemplate(source, byte_tokenizer(), {}, "t.jinja").render(TALK)
    fix = "repair the template, or remove it to chat in LoopLM's own"
    assert str(caught.value) == f"t.jinja: does not render this conversation ({reason}); {fix}"


def test_a_thread_renders_as_the_main_one_does() -> None:
    template = ImportedTemplate(DEFAULT_SYSTEM + "{{ 2 ** 10 }}", byte_tokenizer(), {}, "t.jinja")
    with ThreadPoolExecutor() as threads:
        rendered = threads.submit(template.render, TALK).result()
    assert rendered == template.render(TALK) and rendered.endswith("1024")


def test_a_forked_process_asks_one_of_its_own() -> None:
    """Two that shared a process would read each other's answers."""
    template = ImportedTemplate("{{ messages[0].content }}", byte_tokenizer(), {}, "t.jinja")
    before = templates._PROCESS._process
    child = os.fork()
    if child == 0:  # which must not run the other tests, whatever it raises
        status = 1
        try:
            template.render([Message("user", "2")])
            status = int(templates._PROCESS._process is before)
        finally:
            os._exit(status)
    assert template.render([Message("user", "1")]) == "1" and templates._PROCESS._process is before
    assert os.waitpid(child, 0)[1] == 0


def test_an_interrupted_rendering_leaves_no_answer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ImportedTemplate("{{ messages[0].content }}", byte_tokenizer(), {}, "t.jinja")

    def interrupt(process: Any, request: str) -> str:
        process.stdin.write(request + "\n")
        process.stdin.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(templates._PROCESS, "_exchange", interrupt)
        template.render([Message("user", "first")])
    assert template.render([Message("user", "second")]) == "second"


def test_a_process_that_was_killed_is_started_again() -> None:
    template = ImportedTemplate("{{ messages[0].content }}", byte_tokenizer(), {}, "t.jinja")
    process = templates._PROCESS._process
    assert process is not None
    process.kill()
    process.wait()
    with pytest.raises(UserError, match=r"does not render this conversation \(it ends Python with status -9\); repair"):
        template.render(TALK)
    assert template.render(TALK) == TALK[0].content


def write(folder: Path, template: str | None, config: dict[str, Any] | None = None) -> Path:
    """Write companion files and return their folder."""
    folder.mkdir(exist_ok=True)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_where_a_template_is_looked_for(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()

    def rendered(folder: Path) -> str | None:
        found = imported_template(folder, tokenizer, KNOWN)
        return None if found is None else found.render(TALK)

    assert rendered(tmp_path / "absent") is None
    assert rendered(write(tmp_path / "ours", JINJA, {"chat_template": "older"})) is None, "a later stage wrote ours"
    assert rendered(write(tmp_path / "file", "file {{ bos_token }}{{ eos_token }}", {"chat_template": "config"})) == (
        "file <bos><eos>"
    )
    named = {"eos_token": {"content": "<pad>"}, "unk_token": "<bos>", "chat_template": "{{ eos_token }}{{ unk_token }}"}
    assert rendered(write(tmp_path / "config", None, named)) == "<pad><bos>"
    listed = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "default"}]
    assert rendered(write(tmp_path / "listed", None, {"chat_template": listed})) == "default"
    for wrong in (listed[:1], 7, "{# \ud800 #}"):
        with pytest.raises(UserError, match=r"tokenizer_config.json: chat_template: .* is not a template; repair"):
            rendered(write(tmp_path / "wrong", None, {"chat_template": wrong}))
    (tmp_path / "file/chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template.jinja: cannot be read as UTF-8"):
        rendered(tmp_path / "file")


class About(NamedTuple):
    gate_trained: bool = True
    eos_ids: tuple[int, ...] = (EOS,)
    bos_id: int | None = 257
    pad_id: int | None = None
    begin_id: int | None = None


class Opened(NamedTuple):
    """The result of ``open_model``, as far as the command uses it."""

    model: object
    folder: Path
    tokenizer: Tokenizer
    about: About = About()


@pytest.fixture
def asked(
    tmp_path: Path, single_process: ProcessGroupCollection, monkeypatch: pytest.MonkeyPatch
) -> list[Sequence[int]]:
    """Let the command open a small model at ``tmp_path``; the ids of its prompts are recorded."""
    tokenizer, prompts = tokenizer_with_marks(), list[Any]()
    model = build(replace(MLA, vocab_size=tokenizer.get_vocab_size()), GATES["lru"], single_process)
    opened = Opened(model, tmp_path, tokenizer)
    for module in (command, library):
        monkeypatch.setattr(module, "open_model", lambda *_: opened)
    monkeypatch.setattr(process_groups, "stop", lambda: None)
    generate = Generator.generate

    def record(self: Generator, given: Any, *others: Any) -> list[Generation]:
        prompts.extend(one.prompt if isinstance(one, Request) else one for one in given)
        return generate(self, given, *others)

    monkeypatch.setattr(Generator, "generate", record)
    return prompts


RUN = ["--checkpoint=runs/any", "--chat=true", "--max_new_tokens=3", "--temperature=0"]


def test_the_command_asks_in_the_imported_template(asked: list[Sequence[int]], tmp_path: Path) -> None:
    write(tmp_path / COMPANION_FOLDER, DEFAULT_SYSTEM)
    command.main([*RUN, "--prompt=2 + 2?"])
    template = ImportedTemplate(DEFAULT_SYSTEM, tokenizer_with_marks(), {}, "t")
    assert asked == [template.ask([Message("user", "2 + 2?")])]
    assert template.render([Message("user", "2 + 2?")]).startswith("<|im_start|>system\nYou are kind<|im_end|>")


def test_a_conversation_is_rendered_as_a_whole(
    asked: list[Sequence[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuses = "{% if messages[-1].content == 'no' %}{{ raise_exception('not that') }}{% endif %}" + DEFAULT_SYSTEM
    write(tmp_path / COMPANION_FOLDER, refuses)
    lines = iter(["hi", "no", "and?", "/reset", "anew"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, "/quit"))
    command.main([*RUN, "--interactive=true"])
    captured = capsys.readouterr()
    assert "does not render this conversation (not that)" in captured.err
    answer = captured.out.split("\n\n3 tokens")[0]
    template = ImportedTemplate(refuses, tokenizer_with_marks(), {}, "t")
    turns = [Message("user", "hi"), Message("assistant", answer), Message("user", "and?")]
    assert asked == [template.ask(turns[:1]), template.ask(turns), template.ask([Message("user", "anew")])]


def test_without_an_imported_template_the_command_asks_in_ours(asked: list[Sequence[int]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the model was not tuned on conversations"):
        command.main([*RUN, "--prompt=2 + 2?"])
    assert ChatTemplate(tokenizer_with_marks(), "t").end_id not in About().eos_ids and not asked
