"""One row's ids as they become text: whole characters only, and an end where a stop string begins."""

from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

_HALF_A_CHARACTER = "\ufffd"  # what tokenizers puts where bytes are no character, or none yet


class Token(NamedTuple):
    """A generated token. Its text is empty while its bytes are the beginning of a character: the token that completes
    the character carries it, so that the texts of all tokens are the whole text."""

    id: int
    text: str
    depth: int


class TextStream:
    """Collects a row's tokens.

    Args:
        tokenizer: any; byte-level ones may split characters, others may drop a leading space: both come out right.
        prompt_ids: what the text continues.
        stop: strings the text ends before.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.tokens: list[Token] = []
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, stop
        self._context, self._pending = list(prompt_ids), list[int]()
        self._text = ""
        self._shown = 0

    def push(self, token_id: int, depth: int) -> list[Token]:
        """Take one more token; returns those that may be shown now, since nothing can change them any more."""
        self._pending.append(token_id)
        piece = self._decode_pending()
        if piece.endswith(_HALF_A_CHARACTER):
            self.tokens.append(Token(token_id, "", depth))
            return []
        self._context, self._pending = self._pending, []
        self.tokens.append(Token(token_id, piece, depth))
        self._text += piece
        self._end_before_stop(len(piece))
        return self._release(len(self._text) - (0 if self.stopped else self._may_become_stop()))

    def close(self) -> list[Token]:
        """No more tokens come: returns what has not been shown yet."""
        if self._pending:
            piece = self._decode_pending()
            self.tokens[-1] = self.tokens[-1]._replace(text=piece)
            self._text += piece
        return self._release(len(self._text))

    def _decode_pending(self) -> str:
        """Decoded in context, as some tokenizers write the first word of a text without its space."""
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]

    def _end_before_stop(self, new: int) -> None:
        places = [self._text.find(stop, max(0, len(self._text) - new - len(stop) + 1)) for stop in self._stop]
        end = min((place for place in places if place >= 0), default=None)
        if end is None:
            return
        self.stopped, self._text = True, self._text[:end]
        length, tokens = 0, []
        for token in self.tokens:
            if length == end:
                break
            tokens.append(token._replace(text=token.text[: end - length]))
            length += len(tokens[-1].text)
        self.tokens = tokens

    def _may_become_stop(self) -> int:
        """Length of the longest ending of the text that begins a stop string."""
        return max((n for stop in self._stop for n in range(len(stop)) if self._text.endswith(stop[:n])), default=0)

    def _release(self, settled: int) -> list[Token]:
        """Tokens, not shown so far, that end within the first ``settled`` characters."""
        first = self._shown
        length = sum(len(token.text) for token in self.tokens[:first])
        for token in self.tokens[first:]:
            length += len(token.text)
            if length > settled:
                break
            self._shown += 1
        return self.tokens[first : self._shown]
