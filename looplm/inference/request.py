"""Requests to continue a text: what is asked for, its state while it runs, and the result."""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from tokenizers import Tokenizer

from looplm.config import ModelConfig
from looplm.encoding import encode
from looplm.files import is_unicode
from looplm.inference.settings import GenerationConfig
from looplm.inference.text_stream import TextStream, Token

FinishReason = Literal["eos", "stop", "length", "context", "error"]


@dataclass(frozen=True)
class Request:
    """A text to continue.

    Args:
        prompt: text, or token ids, which are taken as they are.
        seed: of its random numbers; None for the run's seed plus the request's index in the run.
        max_new_tokens: None for the run's.
    """

    prompt: str | Sequence[int]
    seed: int | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Generation:
    """The result of a request.

    Args:
        prompt: as text.
        tokens: id, text and depth of each new token.
        finish: why the text ended.
        error: what is wrong with the request, if ``finish`` is "error".
        drafted: number of tokens that were drafted, with speculation.
        accepted: how many of those were accepted.
    """

    prompt: str
    tokens: list[Token]
    finish: FinishReason
    error: str | None = None
    drafted: int = 0
    accepted: int = 0

    @property
    def text(self) -> str:
        """The continuation, without the end-of-text token or stop string."""
        return "".join(token.text for token in self.tokens)

    @property
    def ids(self) -> list[int]:
        """Token ids of the continuation."""
        return [token.id for token in self.tokens]

    @property
    def depths(self) -> list[int]:
        """Number of loops that ran before each token was sampled."""
        return [token.depth for token in self.tokens]


class ActiveRequest:
    """A request while it runs. If it is invalid, it has finished with an error from the start.

    Args:
        request: what is asked for.
        index: its index in the run.
        config: the settings that all requests share.
        tokenizer: the model's.
        model: the config that bounds ids and length.
        eos: the ids that end a text.
        begin: the id before a prompt that is a text; None for none.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        config: GenerationConfig,
        tokenizer: Tokenizer,
        model: ModelConfig,
        eos: Collection[int],
        begin: int | None = None,
    ) -> None:
        prompt, context, vocab_size = request.prompt, model.max_sequence_length, model.vocab_size
        broken = isinstance(prompt, str) and not is_unicode(prompt)
        prompt = "" if broken else prompt
        ids = encode(tokenizer, prompt, begin) if isinstance(prompt, str) else list(prompt)
        unknown = [token_id for token_id in ids if not 0 <= token_id < vocab_size]
        self.index, self.ids = index, ids  # of the whole text: the prompt and what is added
        self.prompt = prompt if isinstance(prompt, str) else tokenizer.decode([] if unknown else ids)
        self.finish: FinishReason | None = None
        self.error: str | None = None
        self.drafted = self.accepted = 0
        self.random = random.Random(config.seed + index if request.seed is None else request.seed)
        self._stream, self._eos_ids = TextStream(tokenizer, [] if unknown else ids, config.stop), eos
        max_new = config.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        self._end, self._context = len(ids) + max_new, context
        if broken:
            self.fail("the prompt holds half of a surrogate pair, which is no text; remove it")
        elif not ids:
            self.fail("the prompt is empty; give at least one token")
        elif unknown:
            self.fail(f"token id {unknown[0]} is not below the vocabulary's {vocab_size}; use the model's tokenizer")
        elif len(ids) >= context:
            self.fail(f"the prompt has {len(ids)} tokens and leaves no room in the context of {context}; shorten it")
        elif max_new < 1:
            self.fail(f"max_new_tokens is {max_new}; give at least 1")

    def fail(self, error: str) -> None:
        """Finish with an error."""
        self.finish, self.error = "error", error

    def add(self, token_id: int, depth: int) -> list[Token]:
        """Add a sampled id, finish if the text ends with it, and return the tokens whose text has become final."""
        if self.finish is None and token_id in self._eos_ids:
            self.finish = "eos"
        if self.finish is not None:
            return self._stream.close()
        final = self._stream.push(token_id, depth)
        self.ids.append(token_id)
        if self._stream.stopped:
            self.finish = "stop"
        elif len(self.ids) == self._end:
            self.finish = "length"
        elif len(self.ids) == self._context:
            self.finish = "context"
        return final + self._stream.close() if self.finish else final

    def generation(self) -> Generation:
        """Return the result of a finished request."""
        assert self.finish is not None
        return Generation(self.prompt, self._stream.tokens, self.finish, self.error, self.drafted, self.accepted)
