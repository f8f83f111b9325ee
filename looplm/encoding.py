"""Text to token ids, with the token that stands before a text, as transformers encodes a prompt."""

from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer

from looplm.failures import UserError


def read_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer in a tokenizer.json, without truncation and padding, which transformers does not apply.

    Raises:
        UserError: the file is missing, or is not a tokenizer.json.
    """
    return remove_limits(open_tokenizer(path, "get the file again"))


def remove_limits(tokenizer: Tokenizer) -> Tokenizer:
    """Take truncation and padding, which a tokenizer.json may carry from its model, out of a tokenizer; return it."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def open_tokenizer(path: Path, fix: str) -> Tokenizer:
    """Return the tokenizer in a tokenizer.json as it is; ``fix`` ends the :class:`UserError` if there is none."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a regular file; {fix}")
        tokenizer = Tokenizer.from_file(str(path))
        Tokenizer.from_str(tokenizer.to_str())  # copies with other settings are made of it later
        return tokenizer
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # the package raises plain Exception, and one for its panics
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be read as a tokenizer.json ({reason}); {fix}") from error


def added_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer's post-processor adds before and after each text."""
    probe = _probe(tokenizer)
    plain, full = (tokenizer.encode(probe, add_special_tokens=special).ids for special in (False, True))
    width = len(plain)
    start = next((place for place in range(len(full) - width + 1) if full[place : place + width] == plain), len(full))
    return full[:start], full[start + width :]


def _probe(tokenizer: Tokenizer) -> str:
    """Return a text that has tokens, none of them special: "a" unless that is not in the vocabulary."""
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    pieces = (tokenizer.decode([index]) for piece, index in tokenizer.get_vocab().items() if piece not in special)
    return next((text for text in chain("a", pieces) if tokenizer.encode(text, add_special_tokens=False).ids), "")


def begin_id(tokenizer: Tokenizer) -> int | None:
    """Return the id that a tokenizer's post-processor adds before each text; None if it adds nothing."""
    before, _ = added_ids(tokenizer)
    return before[0] if before else None


def encode(tokenizer: Tokenizer, text: str, begin: int | None) -> list[int]:
    """Return the ids of a text, after the id ``begin`` unless that is None or the text itself starts with it."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids if begin is None or ids[:1] == [begin] else [begin, *ids]


def unlike_transformers(tokenizer: Tokenizer, begin: int | None) -> str | None:
    """Say how transformers, which puts in all that the post-processor adds, differs from :func:`encode`, if it does."""
    before, after = added_ids(tokenizer)
    ours = [] if begin is None else [begin]
    if (before, after) == (ours, []):
        return None
    texts = [" ".join(str(tokenizer.id_to_token(one)) for one in ids) or "nothing" for ids in (before, after, ours)]
    return f"transformers puts {texts[0]} before each text and {texts[1]} after it; here it is {texts[2]} before it"
