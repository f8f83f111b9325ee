"""evaluation.json: the results of an evaluation, written by ``pretrain.evaluate``, read by reports and model cards."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from looplm.cli import from_dict, to_dict
from looplm.files import write_whole
from looplm.json_file import read_object

FILE_NAME = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class DepthLoss:
    """Loss if every token runs ``depth`` loops."""

    depth: int
    loss: float
    perplexity: float


@dataclass(frozen=True, kw_only=True)
class ThresholdLoss:
    """Loss and mean depth if every token exits once its exit probability reaches ``threshold``."""

    threshold: float
    mean_depth: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class CacheLoss:
    """Loss and mean depth of tokens that are decoded one by one through a cache, under an exit rule."""

    kv_cache: str
    exit_signal: str
    exit_threshold: float
    tokens: int
    loss: float
    perplexity: float
    mean_depth: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The results of one evaluation.

    Args:
        checkpoint: its step directory; empty for a model that is in memory only.
        step: of the checkpoint.
        trained_loops: loops that the model was trained with.
        tokens: validation tokens that counted.
        depths: losses at fixed depths.
        exit_curve: losses along the exit gate's thresholds.
        exit_distribution: mean probability of exiting after each trained loop.
        decoding: losses through caches; null (and absent from the file) if they were not measured.
    """

    checkpoint: str = ""
    step: int = 0
    trained_loops: int
    tokens: int
    depths: tuple[DepthLoss, ...]
    exit_curve: tuple[ThresholdLoss, ...]
    exit_distribution: tuple[float, ...]
    decoding: tuple[CacheLoss, ...] | None = None

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        values = to_dict(self)
        if self.decoding is None:
            del values["decoding"]
        write_whole(path, json.dumps(values, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Evaluation":
        """Read the file.

        Raises:
            UserError: it cannot be read, or is not what :meth:`write` writes.
        """
        values = read_object(path, "run pretrain.evaluate again or remove it")
        return from_dict(cls, values, where=str(path))


def perplexity(loss: float) -> float:
    """Return exp(loss), bounded so that a diverged model's is finite."""
    return math.exp(min(loss, 700.0))
