"""The tiny experiments of make evidence-smoke: valid, fair and complete in tasks; one of them runs up to its page."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.synthetic.registry import TASKS
from looplm.cli import from_dict
from looplm.failures import UserError
from pretrain.data import check_corpus
from pretrain.train import train
from tests.support.tiny import VOCAB, train_rows, write_corpus
from tools.experiments import smoke
from tools.experiments.runs import ExperimentConfig, final_units, sweep_units

ROOT = Path(__file__).resolve().parents[3]


def read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    return values


def is_live(path: Path) -> bool:
    """Return False if all arms of an experiment are retired."""
    values = read(path)
    return set(values["arms"]) != set(values.get("retired", {"arms": ()})["arms"])


FILES = sorted(filter(is_live, (ROOT / "configs/experiments").glob("*.yaml")))


def test_a_file_of_every_task_is_run():
    files = smoke.one_per_task(ROOT / "configs/experiments")
    tasks = [task for path in files for task in read(path)["base"]["data"]["task"]]
    assert sorted(tasks) == sorted(TASKS) and any("kv_caches" in read(path)["measure"] for path in files)
    assert len(FILES) >= 12


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_experiment_in_small_asks_the_same_with_little_work(path):
    config = from_dict(ExperimentConfig, smoke.shrunk(read(path), whole=False), where=str(path))
    whole = from_dict(ExperimentConfig, read(path), where=str(path))
    assert (config.question, config.decides, config.figures) == (whole.question, whole.decides, whole.figures)
    assert set(config.arms) == {config.decides.better, config.decides.than}
    assert not sweep_units(config) and len(list(final_units(config, []))) == 2
    for arm in config.arms:
        run, full = config.run_config(arm), whole.run_config(arm)
        assert run.optim.train_steps <= 8 and run.data.global_batch_size == 8
        assert (run.model, run.gate, run.loss, run.data.task) == (full.model, full.gate, full.loss, full.data.task)


def test_the_first_experiment_keeps_a_sweep_and_two_seeds():
    values = read(ROOT / "configs/experiments/p_hop.yaml")
    config = from_dict(ExperimentConfig, smoke.shrunk(values, whole=True), where="test")
    assert len(sweep_units(config)) == 2 * len(config.arms) == 4 and len(config.seeds) == 2


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_arm_trains(path, tmp_path, single_process):
    config = from_dict(ExperimentConfig, read(path), where=str(path))
    for arm in config.live_arms:
        folder = tmp_path / arm
        few = {"micro_batch_size": 4, "global_batch_size": 4}
        changes = {"optim": {"train_steps": 1, "warmup_steps": 0}, "checkpoint": {"save_every": 0}, "data": few}
        run = config.run_config(arm, output_dir=str(folder), **changes)
        assert train(run, check_corpus(run.data, run.model.vocab_size), single_process)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = [row["loss"] for row in rows if row["kind"] == "train"]
        assert len(losses) == 1 and losses[0] == pytest.approx(math.log(run.model.vocab_size), rel=0.5), arm


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text-levers", "worth"])
def test_every_arm_on_text_trains(name, tmp_path, single_process):
    write_corpus(tmp_path)
    path = ROOT / f"configs/experiments/text/{name}.yaml"
    config = from_dict(ExperimentConfig, read(path), where=str(path))
    prefixes = {split: [{"prefix": str(tmp_path / split)}] for split in ("train", "valid")}
    data = {**prefixes, "seq_length": 32, "micro_batch_size": 2, "global_batch_size": 2}
    model = {"vocab_size": VOCAB, "max_sequence_length": 32}
    for arm in config.arms:
        optim = {"train_steps": 2, "warmup_steps": 0, "decay_steps": 1}
        changes = {"optim": optim, "model": model, "data": data, "checkpoint": {"save_every": 0}}
        run = config.run_config(arm, output_dir=str(tmp_path / arm), **changes)
        assert train(run, check_corpus(run.data, VOCAB), single_process)
        losses = [row["loss"] for row in train_rows(tmp_path / arm)]
        assert losses and losses[0] == pytest.approx(math.log(VOCAB), rel=0.5), arm


@pytest.mark.slow
def test_one_file_runs_up_to_its_page(tmp_path, capfd):
    (tmp_path / "in").mkdir()
    values = read(ROOT / "configs/experiments/caches_words.yaml")
    (tmp_path / "in/caches.yaml").write_text(yaml.safe_dump(values))
    smoke.main(["--experiments", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out")])
    page = (tmp_path / "out/evidence/caches.md").read_text()
    assert values["question"] in page and "test.accuracy\\_lost@cache=first" in page and "not recorded" not in page
    assert "1 experiments in" in capfd.readouterr().out


def test_a_folder_without_experiments_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"experiments: .* has no YAML file; name the folder"):
        smoke.main(["--experiments", str(tmp_path)])
    with pytest.raises(UserError, match=r"experiments: .*text has no experiment on a task; name the folder"):
        smoke.main(["--experiments", "configs/experiments/text"])
