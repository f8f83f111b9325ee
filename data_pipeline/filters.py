"""Filters of a source: length, answers, and those of datatrove's quality filters that work without a network.

C4's list of bad words and all model-based filters would be downloaded, so they are not offered. Words and sentences are
split by spaCy's blank pipelines, whose rules are part of the package.
"""

from datatrove.data import Document
from datatrove.pipeline import filters
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.word_tokenizers import StanzaTokenizer, TibetanTokenizer, load_word_tokenizer

from data_pipeline.chat import AnswerFilter
from data_pipeline.config import SourceConfig
from looplm.cli import UserError

_QUALITY = {
    "gopher_quality": filters.GopherQualityFilter,  # Rae et al. 2021, section A.1.1
    "gopher_repetition": filters.GopherRepetitionFilter,  # Rae et al. 2021, table A1
    "c4": filters.C4QualityFilter,  # Raffel et al. 2020, section 2.2; cuts lines without final punctuation
    "fineweb_quality": filters.FineWebQualityFilter,  # Penedo et al. 2024, section 3.6
}


def build_filters(source: SourceConfig) -> list[BaseFilter]:
    """Return the length filter, for conversations the answer filter, then the quality filters in the source's order."""
    quality = [_QUALITY[name](language=source.language) for name in source.filters]
    answered = [] if source.chat is None else [AnswerFilter()]
    return [LengthFilter(source.min_chars, source.max_chars), *answered, *quality]


def check_language(code: str, key: str) -> None:
    """Raise a :class:`UserError` if datatrove cannot split words of this language on this machine without a network.

    The reason is an unknown code, a missing package, or a tokenizer that would be downloaded.
    """
    try:
        tokenizer = load_word_tokenizer(code)
        if isinstance(tokenizer, StanzaTokenizer | TibetanTokenizer):
            raise UserError(f"{key}: {code!r} needs a model that would be downloaded; choose a language without one")
        tokenizer.word_tokenize("a")  # some packages are imported only here
    except (ValueError, ImportError) as error:
        reason = str(error).split("\n")[0]
        fix = "give one of datatrove's codes such as eng or deu"
        raise UserError(f"{key}: {code!r} cannot be used ({reason}); {fix}") from error


class LengthFilter(BaseFilter):
    """Filter that keeps documents of ``min_chars`` to ``max_chars`` characters."""

    name = "📏 Length"

    def __init__(self, min_chars: int, max_chars: int | None) -> None:
        super().__init__()
        self.min_chars, self.max_chars = min_chars, max_chars

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if len(doc.text) < self.min_chars:
            return False, "too_short"
        if self.max_chars is not None and len(doc.text) > self.max_chars:
            return False, "too_long"
        return True
