"""Streaming of one row's token ids as text: whole characters only, ending before a stop string."""

from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

_INCOMPLETE = "\ufffd"  # tokenizers decode bytes that do not (yet) form a character to this
_LONGEST = 3  # bytes of an incomplete character, each of which may be a token
_FIRST_MARK = 0xD800


class Token(NamedTuple):
    """A generated token.

    Its text is empty if its bytes are only the beginning of a character. The token that completes the character carries
    it, so the texts of all tokens join to the whole text. In place of a token that a stop string cuts are the tokens of
    its text before that, if the tokenizer has such.
    """

    id: int
    text: str
    depth: int


class TextStream:
    """The tokens of one text.

    Special tokens have no text. A stop string may name them all the same; a mark then stands for each of them while
    stop strings are looked for, and bytes before it form no character with those after it.

    Args:
        tokenizer: any. Byte-level ones may split characters, others may drop a leading space; both are handled.
        prompt_ids: the prompt that the text continues.
        stop: strings that end the text before them.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.tokens: list[Token] = []
        self.stopped = False
        self._tokenizer = tokenizer
        self._marks, self._stop = _marks(tokenizer, stop) if stop else ({}, [])
        self._prompt_ids = list(prompt_ids)
        begun = self._begun()  # tokens of a character that the prompt begins and the text may complete
        self._context, self._pending = self._prompt_ids[: len(prompt_ids) - begun], self._prompt_ids[-begun:][:begun]
        self._begun_text = self._decode_pending() if begun else ""
        self._text = ""  # with marks
        self._lengths: list[int] = []  # of each token's part of it
        self._shown = 0

    def push(self, token_id: int, depth: int) -> list[Token]:
        """Add a token, and return the tokens whose text has become final."""
        mark = self._marks.get(token_id)
        if mark is not None:
            self._flush()
        self._pending.append(token_id)
        piece = self._decode_pending() if mark is None else ""
        if piece.endswith(_INCOMPLETE):
            self._append(Token(token_id, "", depth), "")
            return []
        piece = self._end_piece(piece)
        self._append(Token(token_id, piece, depth), piece if mark is None else mark)
        self._end_before_stop(self._lengths[-1])
        # The longest ending of the text that a stop string begins with may still be cut off.
        held = (n for stop in self._stop for n in range(len(stop)) if self._text.endswith(stop[:n]))
        return self._release(len(self._text) - (0 if self.stopped else max(held, default=0)))

    def close(self) -> list[Token]:
        """End the text, and return the tokens that have not been returned yet."""
        self._flush()
        return self._release(len(self._text))

    def _append(self, token: Token, part: str) -> None:
        self.tokens.append(token)
        self._lengths.append(len(part))
        self._text += part

    def _flush(self) -> None:
        """Give the newest token the text of bytes that will form no character."""
        if self._pending:
            piece = self._end_piece(self._decode_pending())
            if self.tokens:
                self.tokens[-1] = self.tokens[-1]._replace(text=piece)
                self._lengths[-1] = len(piece)
                self._text += piece

    def _end_piece(self, piece: str) -> str:
        """Decode the next token behind the pending ones, and behind what was before them if they have no text.

        Behind a special token alone, the next word would be the first of a text, and lose its space. Returned is the
        piece without what the prompt has shown of it, if that became no character.
        """
        self._context, self._pending = self._pending if piece else self._context + self._pending, []
        shown, self._begun_text = self._begun_text, ""
        return piece.removeprefix(shown)

    def _begun(self) -> int:
        """Return how many of the prompt's last tokens are the beginning of a character."""
        texts = [self._tokenizer.decode(self._prompt_ids)]
        while texts[-1].endswith(_INCOMPLETE) and len(texts) <= min(_LONGEST, len(self._prompt_ids)):
            texts.append(self._tokenizer.decode(self._prompt_ids[: -len(texts)]))
        return 0 if texts[-1].endswith(_INCOMPLETE) else len(texts) - 1

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
        length, kept, is_cut = 0, 0, False
        while length < end:
            room = end - length
            is_cut = self._lengths[kept] > room
            self.tokens[kept] = self.tokens[kept]._replace(text=self.tokens[kept].text[:room])
            self._lengths[kept] = min(self._lengths[kept], room)
            length += self._lengths[kept]
            kept += 1
        del self.tokens[kept:], self._lengths[kept:]
        if is_cut:
            self._encode_again()

    def _encode_again(self) -> None:
        """Put in place of the last token, whose text was cut, those of its text, if they decode to it."""
        *_, (_, text, depth) = self.tokens
        before = [*self._prompt_ids, *(token.id for token in self.tokens[:-1])]
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._tokenizer.decode(before + ids) == self._tokenizer.decode(before) + text:
            *begin, end = ids
            self.tokens[-1:] = [*(Token(index, "", depth) for index in begin), Token(end, text, depth)]
            self._lengths[-1:] = [*(0 for _ in begin), len(text)]

    def _release(self, final: int) -> list[Token]:
        """Return the tokens that end within the first ``final`` characters and have not been returned yet."""
        first, length = self._shown, sum(self._lengths[: self._shown])
        while self._shown < len(self.tokens) and length + self._lengths[self._shown] <= final:
            length += self._lengths[self._shown]
            self._shown += 1
        return self.tokens[first : self._shown]


def _marks(tokenizer: Tokenizer, stop: Sequence[str]) -> tuple[dict[int, str], list[str]]:
    """Return a mark for each special token that a stop string names, and the stop strings with marks too.

    A mark is half of a surrogate pair, which no decoded text holds.
    """
    special = {index: token.content for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    marks, marked = dict[int, str](), list(stop)
    for index, content in sorted(special.items(), key=lambda item: -len(item[1])):
        if any(content in one for one in marked):
            marks[index] = chr(_FIRST_MARK + len(marks))
            marked = [one.replace(content, marks[index]) for one in marked]
    return marks, [*stop, *(one for one in marked if one not in stop)]
