"""The question of an experiment and how it is decided, written before the experiment runs."""

import re
from dataclasses import dataclass
from typing import Literal

from looplm.bounds import at_least, check_bounds, non_empty, require


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two arms that are compared seed by seed, as ``better`` minus ``than``.

    Args:
        better: arm that is expected to win.
        than: arm that it is compared with.
        matched: quantity that both arms have equal; a comparison that is not matched says nothing about loops.
    """

    better: str = non_empty()
    than: str = non_empty()
    matched: Literal["parameters", "flops", "trained tokens"]

    def __post_init__(self) -> None:
        check_bounds(self, "pairs")
        require(self.better != self.than, "pairs.than", self.than, "name another arm than pairs.better")


@dataclass(frozen=True, kw_only=True)
class Decides:
    """The one comparison that answers the question. It is also one of the experiment's pairs.

    Args:
        figure: name of the figure that is compared.
        better: arm that the question is about.
        than: arm that it is compared with.
        claim: ``better`` is higher or lower than ``than`` by more than the margin, or the same within the margin.
        margin: smallest difference that matters, in the figure's unit.
    """

    figure: str = non_empty()
    better: str = non_empty()
    than: str = non_empty()
    claim: Literal["higher", "lower", "same"] = "higher"
    margin: float = at_least(0, 0.0, below=float("inf"))

    def __post_init__(self) -> None:
        check_bounds(self, "decides")
        if self.claim == "same":
            require(self.margin > 0, "decides.margin", self.margin, "give one above 0: no two arms are equal")


@dataclass(frozen=True, kw_only=True)
class Retired:
    """Arms with keys that are gone from the code: they are not run any more, and their records stay.

    Args:
        revision: the last one of the code that runs them.
        arms: their names.
    """

    revision: str = non_empty()
    arms: tuple[str, ...] = non_empty()

    def __str__(self) -> str:
        return f"{', '.join(self.arms)}: retired; revision {self.revision} is the last that runs them"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A question, and how it is decided.

    Args:
        question: a sentence that yes, no or undecided answers.
        decides: the comparison that answers it.
        pairs: all comparisons that are made.
        figures: figures that each pair is compared in; the first is drawn largest.
        curves: series of results that are drawn.
        tuned_by: the loss on validation data by which an arm's learning rate was chosen: valid.loss, or
            valid.loss@depth=N.
        retired: arms that are compared and not run any more.
    """

    question: str = non_empty()
    decides: Decides
    pairs: tuple[Pair, ...] = non_empty()
    figures: tuple[str, ...] = non_empty()
    curves: tuple[str, ...] = ("test.accuracy by level", "test.accuracy by depth")
    tuned_by: str = non_empty("valid.loss")
    retired: Retired | None = None

    def __post_init__(self) -> None:
        check_bounds(self, "")
        require(self.decides.figure in self.figures, "decides.figure", self.decides.figure, "name it in figures too")
        arms = [(pair.better, pair.than) for pair in self.pairs]
        deciding = (self.decides.better, self.decides.than)
        require(deciding in arms, "decides", " − ".join(deciding), "list this pair in pairs too")
        names: tuple[tuple[str, list[object]], ...] = (("pairs", [*arms]), ("figures", [*self.figures]))
        for key, values in names:
            for value in values:
                require(values.count(value) == 1, key, value, "list it once")
        fix = "give valid.loss or valid.loss@depth=N, which every trial has"
        require(bool(re.fullmatch(r"valid\.loss(@depth=\d+)?", self.tuned_by)), "tuned_by", self.tuned_by, fix)
        for key, named in (("figures", self.figures), ("curves", self.curves)):
            tuned = [name for name in named if name.startswith("valid.")]
            require(not tuned, key, tuned, "name held-out data; what is compared must not have been tuned")
