"""evaluation.json: the results of an evaluation, written by ``pretrain.evaluate``, read by reports and model cards."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

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
    """Loss and mean depth if every token exits once its summed exit probability reaches ``threshold``."""

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
    accuracy: float | None = None  # share of tokens whose likeliest label is right; null in older files


@dataclass(frozen=True, kw_only=True)
class LevelAnswers:
    """The levels of a task's labels, and how deep the gate thinks about each.

    Args:
        name: what a level counts.
        levels: in ascending order.
        labels: number of labels of each.
        expected_depth: mean of ``sum_r r p_r`` over the labels of each.
        latent_steps: steps that the units inside attention expect to take, a mean over layers, loops and the labels of
            each; empty without ``model.latent_halting``, and in older files.
    """

    name: str
    levels: tuple[int, ...]
    labels: tuple[int, ...]
    expected_depth: tuple[float, ...]
    latent_steps: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AnswersAtDepth:
    """Answers if every token runs ``depth`` loops, and what the last of them changed (0 after the first loop).

    Args:
        depth: 1-based.
        loss: mean cross-entropy in nats.
        accuracy: share of labels whose token is the likeliest.
        whole_samples: share of samples with every label right.
        accuracy_by_level: of each level.
        loss_by_level: of each level.
        state_change: mean of ``|h_r - h_{r-1}| / |h_{r-1}|``.
        state_cosine: mean cosine between h_r and h_{r-1}.
        divergence: mean of KL(prediction after this loop || before it), in nats.
        answers_changed: share of labels whose likeliest token this loop changed.
    """

    depth: int
    loss: float
    accuracy: float
    whole_samples: float
    accuracy_by_level: tuple[float, ...]
    loss_by_level: tuple[float, ...]
    state_change: float
    state_cosine: float
    divergence: float
    answers_changed: float


@dataclass(frozen=True, kw_only=True)
class AnswersAtThreshold:
    """Answers if every token exits once its summed exit probability reaches ``threshold``."""

    RETIRED: ClassVar[dict[str, str]] = {"depth_by_level": "nothing read it"}

    threshold: float
    mean_depth: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class VotedAnswers:
    """Share of samples whose last answer is right if the model writes ``votes`` chains and the most frequent wins."""

    votes: int
    solved: float


@dataclass(frozen=True, kw_only=True)
class TaskAnswers:
    """Answers to a synthetic task.

    Args:
        trained_loops: loops of the exit distribution.
        levels: the labels.
        depths: answers at each depth from 1 on.
        exits: answers along the exit gate's thresholds.
        refitted: accuracy at each depth of a head that was fitted to the states of that depth, all else frozen; empty
            if none was fitted.
        attention_sink: weight of attention on a sample's first token in each loop, a mean over layers, heads and
            positions of the first batch; empty in older files.
        loop_radius: spectral radius of the Jacobian of each loop from the second on, a mean over a few samples; below 1
            the state settles; empty in older files.
        voted: last answers after the model's own chain of tokens; empty if they were not asked for.
    """

    trained_loops: int
    levels: LevelAnswers
    depths: tuple[AnswersAtDepth, ...]
    exits: tuple[AnswersAtThreshold, ...]
    refitted: tuple[float, ...] = ()
    attention_sink: tuple[float, ...] = ()
    loop_radius: tuple[float, ...] = ()
    voted: tuple[VotedAnswers, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The results of one evaluation.

    Args:
        checkpoint: its step directory; empty for a model that is in memory only.
        step: of the checkpoint.
        trained_loops: loops that the model was trained with.
        tokens: tokens that counted.
        data: prefixes of the text that was read, or the task and its split, as in ``p_hop (test)``; empty (and absent
            from the file) for data in memory and in older files.
        depths: losses at fixed depths.
        exit_curve: losses along the exit gate's thresholds.
        exit_distribution: mean probability of exiting after each trained loop.
        decoding: losses through caches; null (and absent from the file) if they were not measured.
        answers: to a synthetic task; null (and absent from the file) for text.
    """

    checkpoint: str = ""
    step: int = 0
    trained_loops: int
    tokens: int
    data: tuple[str, ...] = ()
    depths: tuple[DepthLoss, ...]
    exit_curve: tuple[ThresholdLoss, ...]
    exit_distribution: tuple[float, ...]
    decoding: tuple[CacheLoss, ...] | None = None
    answers: TaskAnswers | None = None

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        values = to_dict(self)
        for optional in ("data", "decoding", "answers"):
            if not values[optional]:
                del values[optional]
        for row in values.get("decoding", ()):
            if row["accuracy"] is None:
                del row["accuracy"]
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
