"""An experiment with real processes: killed, shared by two runners, nothing repeated, and reported."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from looplm.cli import parse_config
from looplm.failures import UserError
from tests.support.experiments import a_row
from tests.tools.experiments.test_runs import MINI, mini, with_retired_arm
from tools import experiment
from tools.experiments.rows import Row, merge_rows, read_row, write_row
from tools.experiments.runner import Runner, keep_niceness
from tools.experiments.runs import ExperimentConfig, Size, Unit, config_of, merged, settings_of, sweep_units
from tools.experiments.unit import Order

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tools.experiment", "run", str(folder / "mini.yaml")]
    command += ["--output_dir", str(folder / "runs"), "--evidence", str(folder / "evidence"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evidence/mini.jsonl").read_text().splitlines()]


def test_a_session_gets_its_runners_niceness():
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        scheduled = Path(f"/proc/{process.pid}/autogroup")
        keep_niceness(process.pid, 7)
        text = scheduled.read_text() if scheduled.exists() else ""
        process.kill()
    if not text:
        pytest.skip("the kernel does not schedule sessions as groups")
    assert text.endswith("nice 7\n")


def test_two_runners_share_an_experiment_and_a_killed_one_is_continued(tmp_path, capsys):
    one_seed = MINI.replace("seeds: [1, 2]", "seeds: [1]").replace("rates: [0.001, 0.002]", "rates: [0.001]")
    (tmp_path / "mini.yaml").write_text(one_seed)
    first = start(tmp_path)
    while not list((tmp_path / "runs/mini").glob("*/unit.json")):
        time.sleep(0.1)
    os.kill(first.pid, signal.SIGKILL)  # its run goes on alone, or is continued
    first.communicate()
    pair = [start(tmp_path) for _ in range(2)]
    texts = [process.communicate(timeout=300)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], texts
    rows = records(tmp_path)
    assert sorted((row["trial"], row["arm"], row["seed"]) for row in rows) == [("final", "1x1", 1), ("final", "1x2", 1)]
    for row in rows:
        assert row["figures"]["valid.loss"] > 0 and row["tokens"] == 64 * row["steps"] == 384
    curves = next(row["curves"] for row in rows if row["arm"] == "1x2")
    assert len(curves["test.accuracy by depth"]) == len(curves["test.refitted accuracy by depth"]) == 4
    assert curves["longer.levels"] == [float(n) for n in range(1, 12)]
    for metrics in (tmp_path / "runs/mini").glob("*/run/metrics.jsonl"):
        steps = [row["step"] for row in map(json.loads, metrics.read_text().splitlines()) if row["kind"] == "train"]
        assert steps == [1, 2, 3, 4, 5, 6], "a step was trained twice, or left out"

    again = start(tmp_path, "--output_dir", str(tmp_path / "elsewhere"))
    text = again.communicate(timeout=100)[0]
    assert again.returncode == 0 and not (tmp_path / "elsewhere").exists(), f"recorded runs were repeated: {text}"
    experiment.main(["report", str(tmp_path / "mini.yaml"), "--evidence", str(tmp_path / "evidence")])
    assert "Does it run?" in (tmp_path / "evidence/mini.md").read_text() and "undecided" in capsys.readouterr().out


def a_record(config: ExperimentConfig, unit: Unit, **changes: Any) -> Row:
    size = Size.of(config_of(config, unit, Path("f")))
    sizes = {"parameters": size.parameters, "flops_per_token": size.flops_per_token, "tokens": size.trained_tokens}
    about = {"arm": unit.arm, "seed": unit.seed, "trial": unit.trial, "lr": unit.lr}
    return a_row(**{**sizes, **about, "settings": settings_of(config, unit.arm), **changes})


def test_a_record_of_other_settings_is_refused(tmp_path):
    config, unit, record = mini(), Unit("final", "1x2", 1, 0.001), tmp_path / "mini.jsonl"
    runner = Runner(config, tmp_path / "runs", record)
    merge_rows(record, [a_record(config, unit)])
    runner.rows()
    assert Runner(mini(measure={"votes": []}), tmp_path, record).rows() == (), "its rate is not known yet"
    for other in (mini(base={"optim": {"train_steps": 7}}), mini(measure={"samples": 32})):
        with pytest.raises(UserError, match=r"mini.jsonl: arm 1x2, seed 1, final, lr 0.001: was made with other sett"):
            Runner(other, tmp_path / "runs", record).rows()
    old = replace(a_record(config, unit), tokens=17)
    write_row(tmp_path / "old/row.json", old)
    with pytest.raises(UserError, match=r"old/row.json: arm 1x2.* was made with other settings"):
        Runner(config, tmp_path, tmp_path / "no.jsonl").rows()
    write_row(tmp_path / "runs/final_9x9/row.json", replace(old, arm="9x9"))
    with pytest.raises(UserError, match=r"final_9x9/row.json: arm 9x9, .*: the experiment has no such arm; restore"):
        Runner(config, tmp_path / "runs", record).rows()


def test_the_records_of_retired_arms_stay(tmp_path):
    config, record = with_retired_arm(), tmp_path / "mini.jsonl"
    settings = settings_of(config, "gone")
    old = a_row(arm="gone", seed=1, settings=settings)
    trials = [a_record(config, unit, figures={"valid.loss": 1.0}) for unit in sweep_units(config)]
    merge_rows(record, [*trials, old])
    write_row(tmp_path / "runs/same/row.json", old)  # its folder may still be there
    runner = Runner(config, tmp_path / "runs", record)
    rows = runner.rows()
    assert rows[-1] == old and rows.count(old) == 1 and {unit.arm for unit in runner.missing(rows)} == {"1x1", "1x2"}
    assert (runner.done(rows), runner.total) == (8, 8 + 4)
    write_row(tmp_path / "runs/old/row.json", replace(old, seed=2, settings="0"))
    with pytest.raises(UserError, match=r"row.json: arm gone, seed 2, .* was made with other settings"):
        runner.rows()


def test_an_experiment_whose_arms_are_all_retired_has_nothing_to_do(tmp_path, capsys):
    """``make evidence`` repeats the others; a page is written only where the records are."""
    file, places = tmp_path / "mini.yaml", ["--output_dir", str(tmp_path / "runs"), "--evidence", str(tmp_path / "e")]
    file.write_text(MINI + "retired: {revision: 0123abc, arms: [1x1, 1x2]}\n")
    for word in ("run", "report"):
        experiment.main([word, str(file), *places])
        assert "1x1, 1x2: retired; revision 0123abc is the last that runs them" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists() and not list(tmp_path.glob("e/*.*"))


def test_a_final_run_at_another_rate_than_the_best_is_refused(tmp_path):
    """Its double at the best rate could not be recorded, and a report would count neither."""
    config, record = mini(), tmp_path / "mini.jsonl"
    trials = [a_record(config, unit, figures={"valid.loss": unit.lr}) for unit in sweep_units(config)]
    unit = Unit("final", "1x2", 1, 0.002)
    merge_rows(record, [*trials, a_record(config, unit)])
    message = r"mini.jsonl: arm 1x2, seed 1, final, lr 0.002: the best of the sweep's rates is 0.001; remove the run's"
    with pytest.raises(UserError, match=message):
        Runner(config, tmp_path / "runs", record).run(1)


def test_a_folder_that_was_begun_with_other_settings_is_refused(tmp_path):
    folder = tmp_path / "sweep_1x1_lr0.001_seed1000"
    run = config_of(mini(), sweep_units(mini())[0], folder)
    order = Order(trial="sweep", arm="1x1", measure=mini().measure, run=run, settings="0123")
    order.write(folder)
    with pytest.raises(UserError, match=r"sweep_1x1_lr0.001_seed1000: was begun with other settings \(0123, now"):
        Runner(mini(), tmp_path, tmp_path / "mini.jsonl").run(1)


@pytest.mark.parametrize("record", sorted((ROOT / "docs/evidence").glob("*.jsonl")), ids=lambda path: path.stem)
def test_the_records_of_the_repository_are_of_its_experiments(record, tmp_path):
    [file] = (ROOT / "configs/experiments").rglob(f"{record.stem}.yaml")
    config = parse_config(ExperimentConfig, ["--config", str(file)], prog="test", description="")  # as the command does
    assert Runner(config, tmp_path, record).rows()


def test_a_run_that_diverges_is_recorded(tmp_path):
    config, unit = mini(sweep={"rates": [1e30]}), Unit("final", "1x2", 1, 1e30)
    config = replace(config, base=merged(config.base, {"health": {"max_skipped": 1}}))
    folder = tmp_path / unit.name
    run = config_of(config, unit, folder)
    Order(trial="final", arm="1x2", measure=config.measure, run=run, settings="0").write(folder)
    command = [sys.executable, "-m", "tools.experiments.unit", str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0 and "allows no further step without an update" in ended.stderr, ended.stderr
    found = read_row(folder / "row.json")
    assert found.diverged and found.figures == {} and found.tokens == 384


def test_an_initial_checkpoint_is_looked_at_before_anything_runs(tmp_path):
    """An arm that comes last would find it missing, or of another shape, after hours."""
    config = mini(arms={"1x2": {"checkpoint": {"initial": str(tmp_path / "dense")}}}, sweep={"rates": [1e-3]})
    with pytest.raises(UserError, match=r"arms\.1x2: checkpoint\.initial: .*/dense"):
        Runner(config, tmp_path / "runs", tmp_path / "mini.jsonl").run(1)
    assert not (tmp_path / "runs").exists()


def test_a_failing_run_is_named_with_its_log(tmp_path):
    broken = mini(base={"model": {"vocab_size": 3}}, sweep={"rates": [1e-3]})
    with pytest.raises(UserError, match=r"final_1x1_lr0.001_seed1 ended with status 2; see .*log.txt"):
        Runner(broken, tmp_path / "runs", tmp_path / "mini.jsonl").run(1)
    [log] = (tmp_path / "runs").glob("final_1x1*/log.txt")
    assert "model.vocab_size: 3 is not allowed" in log.read_text()
