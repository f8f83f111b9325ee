"""Which tokens are learnt, in the token file itself: an id that bears no loss has the bit :data:`NO_LOSS` set.

Files of conversations hold int32 ids with such marks. A mark travels with its token through merging, blending and resuming.
"""

from collections.abc import Sequence

import numpy as np

NO_LOSS = 1 << 30  # above every id (config.MAX_VOCAB_SIZE), below the sign


def mark(ids: Sequence[int], learnt: Sequence[bool]) -> list[int]:
    """Ids as a token file holds them."""
    return [token if counts else token | NO_LOSS for token, counts in zip(ids, learnt, strict=True)]


def unmark(tokens_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ids, and which of them are learnt: the inverse of :func:`mark`."""
    return tokens_N & (NO_LOSS - 1), tokens_N & NO_LOSS == 0
