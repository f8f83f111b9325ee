"""The chat template that came with imported weights, rendered as transformers renders it.

transformers' ``apply_chat_template`` runs a template in jinja2's immutable sandbox, with a few additions, and encodes
the text at once. The same happens here without transformers, so a model answers the same tokens in both. A template
comes from anyone: it can read nothing but the messages and the names of special tokens, its time and its memory are
bounded by a process of its own, and whatever it raises is a fault of its file.

To be trained on, a conversation is rendered as a whole. An answer is what the template adds after the point where it
would ask for that answer, up to the special token that ends it::

    <|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n      rendered up to the question, asking for an answer
                                                               4<|im_end|>   learned
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from tokenizers import Tokenizer

from looplm.chat import ANSWERS, JINJA, TEMPLATE_FILE, TOKENIZER_CONFIG, Encoded, Message
from looplm.encoding import remove_limits
from looplm.failures import UserError
from looplm.files import is_unicode
from looplm.json_file import read_object
from looplm.template_process import TemplateFault, TemplateProcess, serve

_FIX = "repair the template, or remove it to chat in LoopLM's own"
_PROCESS = TemplateProcess("looplm.imported_template")
_SECONDS, _MEMORY = 5.0, 2**30  # processor time of one rendering, which usually takes a millisecond; bytes
_LONGEST, _POWER_BITS = 2**24, 2**12  # characters of a conversation; bits of an integer that is a power
_PROBE = (Message("user", "2 + 2?"), Message(ANSWERS, "4"))
_SHOWN = 40  # characters of a content in a message
_PACKED_ON = datetime(2024, 7, 26)  # the day that Llama's templates write where they are given none


class ImportedTemplate:
    """A chat template of others, for one tokenizer.

    Args:
        source: the template, in Jinja.
        tokenizer: it is copied.
        special_tokens: names and texts of special tokens, such as ``bos_token``, that the template may read.
        where: the template's file, for messages.

    Attributes:
        source: as given.

    Raises:
        UserError: the template is not valid Jinja.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, special_tokens: Mapping[str, str], where: str | Path) -> None:
        self.source, self._tokens, self._where = source, dict(special_tokens), where
        self._tokenizer = remove_limits(Tokenizer.from_str(tokenizer.to_str()))
        added = tokenizer.get_added_tokens_decoder()
        self._special = {number: token.content for number, token in added.items() if token.special}
        try:
            _PROCESS.render(source, None, _SECONDS)
        except TemplateFault as fault:
            line = "" if fault.line is None else f":{fault.line}"
            raise UserError(f"{where}{line}: not a valid template ({fault.reason}); {_FIX}") from fault

    def render(self, messages: Sequence[Message]) -> str:
        """Return a conversation so far as text, up to the point where the model's answer begins.

        Raises:
            UserError: the template refuses the conversation, or fails.
        """
        return self._render(messages, asks=True, now=datetime.now())

    def _render(self, messages: Sequence[Message], *, asks: bool, now: datetime = _PACKED_ON) -> str:
        listed = [{"role": message.role, "content": message.content} for message in messages]
        given: dict[str, Any] = {"messages": listed, "tools": None, "documents": None, "add_generation_prompt": asks}
        given["strftime_now"] = now.isoformat()  # its method does not travel to the process of templates
        try:
            return _PROCESS.render(self.source, {**self._tokens, **given}, _SECONDS)
        except TemplateFault as fault:
            raise UserError(f"{self._where}: does not render this conversation ({fault.reason}); {_FIX}") from fault

    def ask(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of :meth:`render`. Special tokens in a message's content count as such, as in transformers."""
        return self._ids(self.render(messages))

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded]:
        """Encode complete conversations to be trained on.

        A template that writes today's date writes the same one always, or a build would depend on its day.

        Raises:
            UserError: a content holds the text of a special token, or it cannot be told what of the text is an answer.
        """
        rendered = [self._with_answers(messages) for messages in conversations]
        found = self._tokenizer.encode_batch([text for text, _ in rendered], add_special_tokens=False)
        return [
            Encoded(encoding.ids, [any(begin <= at < end for begin, end in answers) for at, _ in encoding.offsets])
            for encoding, (_, answers) in zip(found, rendered, strict=True)
        ]

    @cached_property
    def end_id(self) -> int:
        """The token that ends an answer: the first special one behind it.

        Raises:
            UserError: no special token follows an answer.
        """
        question, answer = _PROBE
        asked, answered = self._render([question], asks=True), self._render([question, answer], asks=False)
        if not answered.startswith(asked):
            fix = "pack conversations in ChatML"
            raise UserError(f"{self._where}: writes something else before an answer than when it asks for one; {fix}")
        ends = [token for token in self._ids(answered.removeprefix(asked)) if token in self._special]
        if not ends:
            raise UserError(f"{self._where}: ends an answer with no special token of the tokenizer; {_FIX}")
        return ends[0]

    @cached_property
    def mark_ids(self) -> frozenset[int]:
        """The special tokens that the template writes."""
        return frozenset(self._ids(self._render(_PROBE, asks=True))) & self._special.keys()

    def _with_answers(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """Return a conversation as text, and where in it each learned answer begins and ends, with its end token."""
        for message in messages:
            held = next((name for name in self._special.values() if name in message.content), None)
            if held is not None:
                shown = f"{message.content[:_SHOWN]!r}"
                raise UserError(
                    f"{self._where}: a message holds the token {held!r} itself: {shown}; remove the message"
                )
        text, answers = self._render(messages, asks=False), list[tuple[int, int]]()
        for number, message in enumerate(messages):
            if message.role == ANSWERS and message.learned:
                asked = self._render(messages[:number], asks=True)
                answered = self._render(messages[: number + 1], asks=False)
                content = answered.find(message.content.strip(), len(asked))
                end = answered.find(self._special[self.end_id], content + len(message.content.strip()))
                if not (text.startswith(answered) and answered.startswith(asked) and 0 <= content <= end):
                    shown = f"{message.content[:_SHOWN]!r}"
                    fix = "mark the answer as not learned, or pack conversations in ChatML"
                    raise UserError(f"{self._where}: does not say where the answer {shown} begins and ends; {fix}")
                answers.append((len(asked), end + len(self._special[self.end_id])))
        return text, answers

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def imported_template(folder: Path, tokenizer: Tokenizer, known: Mapping[str, str | None]) -> ImportedTemplate | None:
    """Return the template among the files that came with imported weights; None without one, or if it is ours.

    Args:
        folder: of those files; may be absent.
        tokenizer: the model's.
        known: special tokens by name, such as ``eos_token``, for those that ``tokenizer_config.json`` does not name.

    Raises:
        UserError: a file cannot be read, or holds no valid template.
    """
    path, config = folder / TEMPLATE_FILE, folder / TOKENIZER_CONFIG
    values = read_object(config, "get the file again") if config.is_file() else {}
    if path.is_file():
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as UTF-8 ({error}); {_FIX}") from error
    else:
        path, found = config, _default(values.get("chat_template"))
        if found is None:
            return None
        if not isinstance(found, str) or not is_unicode(found):
            raise UserError(f"{config}: chat_template: {found!r} is not a template; {_FIX}")
        source = found
    if source == JINJA:  # written by a stage that trained on conversations
        return None
    named = {name: value for name, value in values.items() if name.endswith("_token")}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
    tokens = {name: text for name, text in {**known, **texts}.items() if isinstance(text, str)}
    return ImportedTemplate(source, tokenizer, tokens, path)


def _default(found: Any) -> Any:
    """Return the template named default of a list of named ones, which older files hold; anything else as it is."""
    if not isinstance(found, list):
        return found
    named = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
    return named[0].get("template") if named else found


def _rendered(source: str, given: Mapping[str, Any] | None) -> str:
    """Return the text of a template; nothing if it is only to be compiled. Run in the process of templates."""
    template = _compile(source)
    if given is None:
        return ""
    text = template.render({**given, "strftime_now": datetime.fromisoformat(given["strftime_now"]).strftime})
    if len(text) > _LONGEST:
        raise OverflowError(f"its text is longer than {_LONGEST:,} characters")
    if not is_unicode(text):
        raise ValueError("its text holds half of a surrogate pair")
    return text


def _explained(error: Exception) -> tuple[str, int | None]:
    return _reason(error), error.lineno if isinstance(error, TemplateSyntaxError) else None


def _reason(error: BaseException) -> str:
    """Return what a template has raised, in one line that is not too long."""
    if isinstance(error, MemoryError):
        return f"it takes more than {_MEMORY / 2**30:g} GiB of memory"
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return " ".join(text.split())[:200] or type(error).__name__


@lru_cache(maxsize=8)
def _compile(source: str) -> Template:
    """Compile a template with what transformers adds to Jinja."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(source)


class _Sandbox(ImmutableSandboxedEnvironment):
    """transformers' sandbox, which refuses a power of integers with too many bits instead of computing it."""

    intercepted_binops = frozenset(["**"])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Return the power of two operands; it is not folded into the template while that is compiled."""
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _POWER_BITS:
            raise OverflowError("it asks for a power that is too large")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """``{% generation %}``: marks what the assistant says, for the mask of transformers; here only its body counts."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the body, in a scope of its own as in transformers."""
        line = next(parser.stream).lineno
        return nodes.Scope(list(parser.parse_statements(("name:endgeneration",), drop_needle=True)), lineno=line)


class _Dict:
    """``dict`` without its type, whose attributes a template must not reach."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """``namespace`` that stores no attribute beginning with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may name an attribute self
        self, *others = args
        attributes = dict(*others, **kwargs)
        for name in attributes:
            _check_public(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace stores no attribute {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(str(message))  # whose own str() may fail, as that of a long integer does


if __name__ == "__main__":
    serve(_rendered, _explained, _MEMORY)
