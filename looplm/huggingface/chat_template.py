"""The chat template that came with imported weights, rendered as transformers renders it.

transformers' ``apply_chat_template`` runs a template in jinja2's immutable sandbox, with a few additions, and encodes
the text at once. The same happens here without transformers, so a model answers the same tokens in both. A template
comes from anyone: it can read nothing but the messages and the names of special tokens.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Environment, Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from tokenizers import Tokenizer

from looplm.chat import JINJA, TEMPLATE_FILE, Message
from looplm.cli import UserError
from looplm.huggingface.companion_files import TOKENIZER_CONFIG
from looplm.huggingface.config_json import TokenIds, read_json

_FIX = "repair the template, or remove it to chat in LoopLM's own"


class ImportedTemplate:
    """A chat template of others, for one tokenizer.

    Args:
        source: the template, in Jinja.
        tokenizer: it is copied.
        special_tokens: names and texts of special tokens, such as ``bos_token``, that the template may read.
        where: the template's file, for messages.

    Raises:
        UserError: the template is not valid Jinja.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, special_tokens: Mapping[str, str], where: str | Path) -> None:
        self._tokens, self._where = dict(special_tokens), where
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()  # a tokenizer.json may carry settings of the model it was made for
        self._tokenizer.no_padding()
        try:
            self._template = _compile(source)
        except TemplateSyntaxError as error:
            raise UserError(f"{where}:{error.lineno}: not a valid template ({error.message}); {_FIX}") from error

    def render(self, messages: Sequence[Message]) -> str:
        """Return a conversation so far as text, up to the point where the model's answer begins.

        Raises:
            UserError: the template refuses the conversation, or fails.
        """
        listed = [{"role": message.role, "content": message.content} for message in messages]
        given: dict[str, Any] = {"messages": listed, "tools": None, "documents": None, "add_generation_prompt": True}
        try:
            return self._template.render({**self._tokens, **given})
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{self._where}: does not render this conversation ({reason}); {_FIX}") from error

    def ask(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of :meth:`render`. Special tokens in a message's content count as such, as in transformers."""
        return list(self._tokenizer.encode(self.render(messages), add_special_tokens=False).ids)


def imported_template(companions: Path, tokenizer: Tokenizer, ids: TokenIds) -> ImportedTemplate | None:
    """Return the template among the files that came with imported weights; None without one, or if it is ours.

    Args:
        companions: the folder of those files; may be absent.
        tokenizer: the model's.
        ids: the special tokens, for those that ``tokenizer_config.json`` does not name.

    Raises:
        UserError: a file cannot be read, or holds no valid template.
    """
    path, config = companions / TEMPLATE_FILE, companions / TOKENIZER_CONFIG
    values = read_json(config) if config.is_file() else {}
    if path.is_file():
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as UTF-8 ({error}); {_FIX}") from error
    else:
        path, found = config, _default(values.get("chat_template"))
        if found is None:
            return None
        if not isinstance(found, str):
            raise UserError(f"{config}: chat_template: {found!r} is not a template; {_FIX}")
        source = found
    if source == JINJA:  # written by a stage that trained on conversations
        return None
    found_tokens = {f"{name}_token": tokenizer.id_to_token(known[0]) for name, known in ids.known().items()}
    named = {name: value for name, value in values.items() if name.endswith("_token")}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
    tokens = {name: text for name, text in (found_tokens | texts).items() if isinstance(text, str)}
    return ImportedTemplate(source, tokenizer, tokens, path)


def _default(found: Any) -> Any:
    """Return the template named default of a list of named ones, which older files hold; anything else as it is."""
    if not isinstance(found, list):
        return found
    named = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
    return named[0].get("template") if named else found


def _compile(source: str) -> Template:
    """Compile a template with what transformers adds to Jinja."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(source)


class _GenerationTag(Extension):
    """``{% generation %}``: marks what the assistant says, for the mask of transformers; here only its body counts."""

    tags = {"generation"}  # noqa: RUF012

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)

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
    raise TemplateError(message)
