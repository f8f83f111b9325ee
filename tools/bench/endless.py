"""A generator whose texts do not end early, for measurements of speed: all of them have the same length."""

from collections.abc import Sequence

from looplm.inference import Generator
from looplm.model import LoopLM


class NoTokenizer:
    """Tokenizer for ids whose text is not read."""

    def decode(self, ids: Sequence[int]) -> str:
        return ""


def endless_generator(model: LoopLM) -> Generator:
    """Return a generator that continues each text up to ``max_new_tokens``."""
    return Generator(model, NoTokenizer(), eos_ids=-1)  # type: ignore[arg-type]
