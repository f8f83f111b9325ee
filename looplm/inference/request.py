"""A request on its way: what was asked for, what is there so far, why it ended."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tokenizers import Tokenizer

from looplm.inference.settings import GenerationConfig
from looplm.inference.text_stream import TextStream, Token

Finish = Literal["eos", "stop", "length", "context", "error"]


@dataclass(frozen=True)
class Request:
    """A text to continue.

    Args:
        prompt: the text, or its token ids.
        seed: of its random numbers; None takes the run's seed plus the request's place in the run.
        max_new_tokens: None takes the run's.
    """

    prompt: str | Sequence[int]
    seed: int | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Generation:
    """What became of a request.

    Args:
        prompt: as text.
        tokens: what was added: id, text and depth of each.
        finish: why it ended.
        error: with finish "error": what was wrong with this request.
        trained_loops: what depths are to be held against.
        drafted: tokens that were drafted for it, if it was speculated.
        accepted: how many of those stood the check.
    """

    prompt: str
    tokens: list[Token]
    finish: Finish
    error: str | None = None
    trained_loops: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def text(self) -> str:
        """The continuation, without the end-of-text token or stop string."""
        return "".join(token.text for token in self.tokens)

    @property
    def ids(self) -> list[int]:
        """The continuation's token ids."""
        return [token.id for token in self.tokens]

    @property
    def depths(self) -> list[int]:
        """How many loops each token of the continuation was drawn after."""
        return [token.depth for token in self.tokens]

    @property
    def beyond_training(self) -> int:
        """How many tokens ran more loops than the model was trained with."""
        return sum(depth > self.trained_loops for depth in self.depths)


class Running:
    """A request in a run: checked, its tokens collected, ended where that is due.

    Args:
        request: what was asked for.
        index: its place in the run.
        config: what all requests share.
        tokenizer: of the model.
        vocab_size: ids below it are known.
        context: longest text of the model, in tokens.
        eos_id: end of text.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        config: GenerationConfig,
        tokenizer: Tokenizer,
        vocab_size: int,
        context: int,
        eos_id: int,
    ) -> None:
        prompt = request.prompt
        text = prompt if isinstance(prompt, str) else ""
        self.ids = tokenizer.encode(prompt, add_special_tokens=False).ids if isinstance(prompt, str) else list(prompt)
        foreign = [token_id for token_id in self.ids if not 0 <= token_id < vocab_size]
        known = [] if foreign else self.ids
        most = config.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        self.index, self.prompt = index, text or tokenizer.decode(known)
        self.finish: Finish | None = None
        self.error: str | None = None
        self.drafted = self.accepted = 0
        self.random = random.Random(config.seed + index if request.seed is None else request.seed)
        self._stream = TextStream(tokenizer, known, config.stop)
        self._eos_id, self._most, self._context = eos_id, most, context
        if not self.ids:
            self.fail("the prompt is empty; give at least one token")
        elif foreign:
            self.fail(f"token id {foreign[0]} is not below the vocabulary's {vocab_size}; use the model's tokenizer")
        elif len(self.ids) >= context:
            self.fail(
                f"the prompt has {len(self.ids)} tokens and leaves no room in the context of {context}; shorten it"
            )
        elif most < 1:
            self.fail(f"max_new_tokens is {most}; give at least 1")

    def fail(self, error: str) -> None:
        """End here."""
        self.finish, self.error = "error", error

    def take(self, token_id: int, depth: int) -> list[Token]:
        """Take a drawn id into the text, end the text if that is due, and return what can be shown."""
        if self.finish is None and token_id == self._eos_id:
            self.finish = "eos"
        if self.finish is not None:
            return self._stream.close()
        shown = self._stream.push(token_id, depth)
        added = len(self._stream.tokens)
        if self._stream.stopped:
            self.finish = "stop"
        elif added == self._most:
            self.finish = "length"
        elif len(self.ids) + added == self._context:
            self.finish = "context"
        return shown + self._stream.close() if self.finish else shown

    def generation(self, trained_loops: int) -> Generation:
        """The result, once it has ended."""
        assert self.finish is not None
        return Generation(
            self.prompt, self._stream.tokens, self.finish, self.error, trained_loops, self.drafted, self.accepted
        )
