"""The examples run on a tiny model that they train, and on a checkpoint with a trained gate."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from looplm.cli import to_dict
from pretrain.train import main as train
from tests.support.tiny import run_config

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture
def quickstart(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_process_groups: None) -> Path:
    """Change to a directory with a tiny ``runs/quickstart/gate``, and return it."""
    monkeypatch.chdir(tmp_path)
    runs, steps = tmp_path / "runs/quickstart", {"train_steps": 2, "warmup_steps": 0, "decay_steps": 0}
    stage1 = run_config(corpus, runs / "stage1", optim=steps)
    gate = run_config(
        corpus,
        runs / "gate",
        optim=steps,
        loss={"objective": "adaptive_gate"},
        checkpoint={"initial": str(runs / "stage1")},
    )
    for config in (stage1, gate):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
        train(["--config", str(tmp_path / "config.yaml")])
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    """Run an example as ``python examples/NAME`` does, in this process."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.syspath_prepend(EXAMPLES)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_train_tiny_lowers_the_loss(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "train_tiny.py", "--steps", "40")
    losses = [float(loss) for loss in re.findall(r"everything.* loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 3 and losses[-1] < losses[0] - 2


def test_look_at_exits_trains_a_model_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "look_at_exits.py", "--steps", "4", "--text", "if x:\n")
    _, *tokens, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in tokens[:2]] == ["'i'", "'f'"] and len(tokens) == 5, (
        "the last token has no next token to predict"
    )
    assert last.startswith("mean depth ")


@pytest.mark.slow
def test_the_examples_open_a_checkpoint(
    quickstart: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "use_from_python.py")
    assert re.search(r"\[[1-3](, [1-3]){7}\]$", capsys.readouterr().out), "no depths of eight tokens"
    run(monkeypatch, "look_at_exits.py", "--checkpoint", "runs/quickstart/gate")
    *tokens, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"mean depth \S+ of 3, .*", last)
    for line in tokens[1:]:
        probabilities = [float(word) for word in line.split("'")[-1].split()[:3]]
        assert sum(probabilities) == pytest.approx(1, abs=0.02)


def test_the_documentation_shows_the_example() -> None:
    block = re.search(r"^```python\n(.*?)^```", (ROOT / "docs/inference.md").read_text(), re.MULTILINE | re.DOTALL)
    assert block and (EXAMPLES / "use_from_python.py").read_text().endswith(f'"""\n\n{block[1]}')
