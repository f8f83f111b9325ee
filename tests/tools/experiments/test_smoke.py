"""The tiny experiments of make evidence-smoke: valid, fair and complete in tasks; one of them runs up to its page."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.synthetic.registry import TASKS
from looplm.cli import UserError, from_dict
from tools.experiments import smoke
from tools.experiments.runs import ExperimentConfig, final_units, sweep_units

FILES = sorted(Path("configs/experiments").glob("*.yaml"))


def read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    return values


def test_together_they_run_every_task():
    tasks = {task for path in FILES for task in read(path)["base"]["data"]["task"]}
    assert tasks == set(TASKS) and len(FILES) >= 12


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


def test_the_first_experiment_keeps_its_sweep_seeds_and_arms():
    values = read(Path("configs/experiments/p_hop.yaml"))
    config = from_dict(ExperimentConfig, smoke.shrunk(values, whole=True), where="test")
    assert set(config.arms) == set(values["arms"]) and len(config.pairs) == len(values["pairs"])
    assert len(sweep_units(config)) == 2 * len(config.arms) and len(config.seeds) == 2


@pytest.mark.slow
def test_one_file_runs_up_to_its_page(tmp_path, capfd):
    (tmp_path / "in").mkdir()
    values = read(Path("configs/experiments/caches_words.yaml"))
    (tmp_path / "in/caches.yaml").write_text(yaml.safe_dump(values))
    smoke.main(["--experiments", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out")])
    page = (tmp_path / "out/evidence/caches.md").read_text()
    assert values["question"] in page and "test.accuracy\\_lost@cache=first" in page and "not recorded" not in page
    assert "1 experiments in" in capfd.readouterr().out


def test_a_folder_without_experiments_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"experiments: .* has no YAML file; name the folder"):
        smoke.main(["--experiments", str(tmp_path)])
