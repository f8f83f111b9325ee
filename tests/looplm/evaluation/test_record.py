"""evaluation.json: its exact form, and one-line errors for files that are not evaluations."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from looplm.evaluation.record import CacheLoss, DepthLoss, Evaluation, ThresholdLoss, perplexity
from looplm.failures import UserError

CACHE = {"kv_cache": "last", "exit_signal": "gate", "exit_threshold": 0.5, "tokens": 90}
EVALUATION = Evaluation(
    checkpoint="runs/x/checkpoints/step_00000006",
    step=6,
    trained_loops=2,
    tokens=100,
    depths=(DepthLoss(depth=1, loss=2.5, perplexity=12.25),),
    exit_curve=(ThresholdLoss(threshold=0.5, mean_depth=1.5, loss=2.25),),
    exit_distribution=(0.75, 0.25),
    decoding=(CacheLoss(**CACHE, loss=2.0, perplexity=7.5, mean_depth=1.25),),  # type: ignore[arg-type]
)
FILE = {
    "checkpoint": "runs/x/checkpoints/step_00000006",
    "step": 6,
    "trained_loops": 2,
    "tokens": 100,
    "depths": [{"depth": 1, "loss": 2.5, "perplexity": 12.25}],
    "exit_curve": [{"threshold": 0.5, "mean_depth": 1.5, "loss": 2.25}],
    "exit_distribution": [0.75, 0.25],
    "decoding": [{**CACHE, "loss": 2.0, "perplexity": 7.5, "mean_depth": 1.25}],
}


def test_file_has_the_form_of_version_0_1(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    EVALUATION.write(path)
    assert path.read_text() == json.dumps(FILE, indent=1) + "\n"
    assert Evaluation.read(path) == EVALUATION
    without = replace(EVALUATION, decoding=None)
    without.write(path)
    assert path.read_text() == json.dumps({key: FILE[key] for key in FILE if key != "decoding"}, indent=1) + "\n"
    assert Evaluation.read(path) == without
    replace(without, data=("data/valid",)).write(path)
    assert Evaluation.read(path).data == ("data/valid",)


def test_a_diverged_model_is_recorded(tmp_path: Path) -> None:
    diverged = DepthLoss(depth=1, loss=math.nan, perplexity=perplexity(math.nan))
    replace(EVALUATION, depths=(diverged,)).write(tmp_path / "evaluation.json")
    assert math.isnan(Evaluation.read(tmp_path / "evaluation.json").depths[0].perplexity)
    assert math.isfinite(perplexity(math.inf))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as JSON"),
        ("[1]", "holds a list, not a JSON object"),
        ("{}", "trained_loops"),
        (json.dumps(FILE | {"depth": []}), "depth: unknown key; did you mean depths?"),
        (json.dumps(FILE | {"exit_distribution": ["a"]}), "exit_distribution"),
    ],
)
def test_invalid_files_are_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        Evaluation.read(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)
