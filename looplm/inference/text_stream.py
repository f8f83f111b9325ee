"""Streaming of one row's token ids as text: whole characters only, ending before a stop string."""

from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

_INCOMPLETE = "\ufffd"  # tokenizers decode bytes that do not (yet) form a character to this


class Token(NamedTuple):
    """A generated token.

    Its text is empty if its bytes are only the beginning of a character. The token that completes the character carries
    it, so the texts of all tokens join to the whole text.
    """

    id: int
    text: str
    depth: int


class TextStream:
    """The tokens of one text.

    Args:
        tokenizer: any. Byte-level ones may split characters, others may drop a leading space; both are handled.
        prompt_ids: the prompt that the text continues.
        stop: strings that end the text before them.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.tokens: list[Token] = []
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, stop
        self._context, self._pending = list(prompt_ids), list[int]()
        self._text = ""
        self._shown = 0

    def push(self, token_id: int, depth: int) -> list[Token]:
        """Add a token, and return the tokens whose text has become final."""
        self._pending.append(token_id)
        piece = self._decode_pending()
        if piece.endswith(_INCOMPLETE):
            self.tokens.append(Token(token_id, "", depth))
            return []
        self._context, self._pending = self._pending, []
        self.tokens.append(Token(token_id, piece, depth))
        self._text += piece
        self._end_before_stop(len(piece))
        # The longest ending of the text that a stop string begins with may still be cut off.
        held = (n for stop in self._stop for n in range(len(stop)) if self._text.endswith(stop[:n]))
        return self._release(len(self._text) - (0 if self.stopped else max(held, default=0)))

    def close(self) -> list[Token]:
        """End the text, and return the tokens that have not been returned yet."""
        if self._pending:
            piece = self._decode_pending()
            self.tokens[-1] = self.tokens[-1]._replace(text=piece)
            self._text += piece
        return self._release(len(self._text))

    def _decode_pending(self) -> str:
        """Decode in context, because some tokenizers drop the space before the first word of a text."""
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]

    def _end_before_stop(self, new: int) -> None:
        """Cut the text before the first stop string that the last ``new`` characters complete."""
        found = [self._text.find(stop, max(0, len(self._text) - new - len(stop) + 1)) for stop in self._stop]
        end = min((place for place in found if place >= 0), default=None)
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

    def _release(self, final: int) -> list[Token]:
        """Return the tokens that end within the first ``final`` characters and have not been returned yet."""
        first = self._shown
        length = sum(len(token.text) for token in self.tokens[:first])
        for token in self.tokens[first:]:
            length += len(token.text)
            if length > final:
                break
            self._shown += 1
        return self.tokens[first : self._shown]
