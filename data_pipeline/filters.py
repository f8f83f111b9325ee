"""A source's quality filters: datatrove's, held to what works without a network.

C4's list of bad words and every model-based filter would be downloaded, so they are not offered. Words and sentences
are split by spaCy's blank pipelines, which ship their rules with the package.
"""

from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.word_tokenizers import StanzaTokenizer, TibetanTokenizer, load_word_tokenizer

from data_pipeline.chat import AnswerFilter
from data_pipeline.config import SourceConfig
from looplm.cli import UserError

_QUALITY = {
    "gopher_quality": GopherQualityFilter,  # Rae et al. 2021, section A.1.1
    "gopher_repetition": GopherRepetitionFilter,  # Rae et al. 2021, table A1
    "c4": C4QualityFilter,  # Raffel et al. 2020, section 2.2; rewrites the text: lines without an end are cut
    "fineweb_quality": FineWebQualityFilter,  # Penedo et al. 2024, section 3.6
}


def build_filters(source: SourceConfig) -> list[BaseFilter]:
    """The length filter, then the source's quality filters in their order; a conversation needs an answer."""
    quality = [_QUALITY[name](language=source.language) for name in source.filters]
    answered = [] if source.chat is None else [AnswerFilter()]
    return [LengthFilter(source.min_chars, source.max_chars), *answered, *quality]


def check_language(code: str, key: str) -> None:
    """Refuse a language whose words datatrove cannot split here and now.

    Raises:
        UserError: an unknown code, a package that is missing, or a tokenizer that would be downloaded.
    """
    try:
        tokenizer = load_word_tokenizer(code)
        if isinstance(tokenizer, StanzaTokenizer | TibetanTokenizer):
            raise UserError(f"{key}: {code!r} needs a model that would be downloaded; choose a language without one")
        tokenizer.word_tokenize("a")  # some packages are only looked for here
    except (ValueError, ImportError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"{key}: {code!r} cannot be used ({reason}); give a code of datatrove's such as eng or deu"
        ) from error


class LengthFilter(BaseFilter):
    """Keeps documents of ``min_chars`` to ``max_chars`` characters."""

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
