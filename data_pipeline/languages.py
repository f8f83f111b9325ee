"""Languages that can be split into words on this machine, and those that a source's filters can judge.

datatrove's table tells which package splits a language, and whether that is its own or one made for a similar language.
"""

import csv
from importlib.resources import files

from datatrove.utils.word_tokenizers import SpaCyTokenizer, StanzaTokenizer, TibetanTokenizer, load_word_tokenizer

from data_pipeline.config import SourceConfig
from looplm.bounds import require
from looplm.failures import UserError

_LATIN_MARKS = {"Latn", "Cyrl", "Grek", "Hebr", "Geor", "Hang"}  # scripts whose sentences end as English ones do
_SHORT_WORDS = {"Hani", "Jpan"}  # scripts whose words have fewer than three characters on average


def check_filters(source: SourceConfig) -> None:
    """Raise a :class:`UserError` if a filter of the source cannot judge texts of its language."""
    if not source.filters:
        return
    language, key = source.language, f"sources.{source.name}"
    check_language(language, f"{key}.language")
    rows, tokenizer = _rows_of(language), load_word_tokenizer(language)
    own = any(row["tok_code"] == tokenizer.language and row["proxy"] == "FALSE" for row in rows)
    spaced = isinstance(tokenizer, SpaCyTokenizer) and not any(row["script"] in _SHORT_WORDS for row in rows)
    judged = {
        "gopher_quality": own and spaced and stop_words(language) != [],
        "c4": any(row["script"] in _LATIN_MARKS for row in rows),
    }
    for name, suits in judged.items():
        fix = f"{name} cannot judge texts in language={language!r}; leave it out"
        require(name not in source.filters or suits, f"{key}.filters", list(source.filters), fix)


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


def stop_words(code: str) -> list[str] | None:
    """Return spaCy's stop words of a language, or None for those that datatrove has itself, the English ones."""
    tokenizer = load_word_tokenizer(code)
    assert isinstance(tokenizer, SpaCyTokenizer)
    return None if tokenizer.language == "en" else sorted(tokenizer.tokenizer.Defaults.stop_words)


def _rows_of(code: str) -> list[dict[str, str]]:
    """Return the rows of datatrove's table for a code such as deu, de or deu_Latn."""
    with (files("datatrove") / "assets" / "tokenizer_assignment.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    named = [(row, {row["code_3"], row["code_1"]}) for row in rows]
    return [
        row
        for row, codes in named
        if code in {f"{name}_{row['script']}" for name in codes} or (code in codes and row["default_script"] == "TRUE")
    ]
