"""Commands between two trainings of a recipe: how their words are read, and that the shipped ones are valid."""

import re
import sys
from pathlib import Path

import pytest
import yaml

from looplm.failures import UserError
from pretrain.cluster.submit import Job, StageConfig, SubmitConfig, find_faults, plan
from tools import rehearse

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("", "run: '' is not allowed; give the words after \"python -m\""),
        ("tools.upcycle 'x", 'run: "tools.upcycle \'x" is not allowed; quote it as in a shell (No closing quotation)'),
        ("tools.upcicle", "run: 'tools.upcicle' is not allowed; it is not a module of this repository"),
        ("tools/upcycle", "run: 'tools/upcycle' is not allowed; it is not a module of this repository"),
        ("tools.upcycle --output=", "--output: '' is not allowed; name a path"),
    ],
)
def test_a_command_that_cannot_be_read(run: str, message: str) -> None:
    jobs, faults = plan(SubmitConfig(name="x", stages=(StageConfig(name="a", run=run),)))
    assert (jobs, faults) == ([], [f"a: {message}"])


def test_paths_of_a_command_may_follow_an_equals_sign() -> None:
    stage = StageConfig(name="a", run="tools.upcycle depth --checkpoint=runs/a --output=runs/b=c --layers 4")
    [job], faults = plan(SubmitConfig(name="x", stages=(stage,)))
    assert (job.reads, job.writes, faults) == ("runs/a", "runs/b=c", [])


def faults(run: str, writes: str | None = None) -> list[str]:
    """Return what is found in a command after a stage that writes ``writes``."""
    [job], found = plan(SubmitConfig(name="x", stages=(StageConfig(name="a", run=run),)))
    before = [Job("first", "task.sbatch", (), 1, 0, writes=writes)] if writes else []
    return found + list(find_faults(job, before))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("pretrain.evaluate --depths 1 --nosuchkey 3", "--nosuchkey: unknown key; give one of "),
        ("pretrain.evaluate --checkpoint CHECKPOINT --depths banana", "depths: 'banana' is not allowed; "),
        ("looplm.generate --checkpoint CHECKPOINT", "prompt: '' is not allowed; give one of prompt, prompts and inter"),
        (
            "tools.upcycle depht --checkpoint CHECKPOINT",
            "python -m tools.upcycle: depht: unknown command; ",
        ),
        ("tools.convert_hf", "run: 'tools.convert_hf' is not allowed; it prints its help or its keys and does nothing"),
        ("pretrain.evaluate --help", "run: 'pretrain.evaluate --help' is not allowed; it prints its help or its keys"),
        ("looplm.bounds", "run: 'looplm.bounds' is not allowed; it is a module, but not a command"),
        ("pretrain.report runs/x --nosuchkey 1", "--nosuchkey: unknown key; "),
        ("looplm.generate --checkpoint CHECKPOINT --prompt a --output=no/x", "output: 'no/x' is not allowed; its dir"),
    ],
)
def test_the_words_of_a_command_are_read_by_its_own_parser(run: str, message: str, tmp_path: Path, capsys) -> None:
    (fault,) = faults(run.replace("CHECKPOINT", str(tmp_path)), writes=str(tmp_path))
    assert fault.startswith(f"a: {message}") and capsys.readouterr().out == ""


@pytest.mark.parametrize("words", ["--prompt a --output=FOLDER/made/samples.jsonl", "--config FOLDER/made/keys.yaml"])
def test_what_an_earlier_stage_makes_may_be_missing(words: str, tmp_path: Path) -> None:
    run = f"looplm.generate --checkpoint {tmp_path} {words.replace('FOLDER', str(tmp_path))}"
    assert len(faults(run, writes=str(tmp_path / "other"))) == 2, "the checkpoint, and what the words name"
    assert faults(run, writes=str(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


def test_what_lies_beside_a_folder_to_come_or_in_an_awaited_one_may_be_missing(tmp_path: Path) -> None:
    made = tmp_path / "run/stage1"
    words = f"pretrain.evaluate --checkpoint {made} --output {tmp_path}"
    assert faults(f"{words}/run/evaluation.json", writes=str(made)) == []
    [job], _ = plan(SubmitConfig(name="x", stages=(StageConfig(name="a", run=f"{words}/run/stage1/evaluation.json"),)))
    assert list(find_faults(job, [], awaited=True)) == [] != list(find_faults(job, []))


def test_a_command_whose_package_is_absent_here_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tools.eval_harness", None)
    assert faults("tools.eval_harness --nosuchkey 1") == []


def test_a_package_runs_as_the_file_that_the_launcher_looks_for() -> None:
    [job], found = plan(SubmitConfig(name="x", stages=(StageConfig(name="a", run="pretrain.report runs/x"),)))
    assert (job.arguments, found) == (("pretrain.report.__main__", "runs/x"), [])


def test_shipped_recipes_use_options_that_their_commands_have() -> None:
    lines = [
        stage["run"]
        for path in sorted((ROOT / "configs").glob("*/chain.yaml"))
        for stage in yaml.safe_load(path.read_text())["stages"]
        if "run" in stage
    ]
    assert {line.split()[0] for line in lines} == {"tools.upcycle", "tools.convert_hf", "pretrain.evaluate"}
    for line in lines:
        reads = re.search(r"--checkpoint[ =](\S+)", line)
        assert reads is not None and faults(line, writes=reads[1]) == []


@pytest.mark.parametrize(("key", "value"), [("nodes", 3), ("arguments", "--optim.lr 1"), ("rehearse", True)])
def test_a_key_of_training_is_refused_if_only_commands_run(key: str, value: object) -> None:
    with pytest.raises(UserError) as caught:
        SubmitConfig(name="x", stages=(StageConfig(name="a", run="tools.upcycle"),), **{key: value})  # type: ignore[arg-type]
    fix = "it is for training, and no stage here trains; leave it out"
    assert str(caught.value) == f"{key}: {value!r} is not allowed; {fix}"
    stages = (StageConfig(name="a", config=("x.yaml",)), StageConfig(name="b", run="tools.upcycle"))
    SubmitConfig(name="x", stages=stages, start="b", **{key: value})  # type: ignore[arg-type]  # of the recipe's file


def test_a_job_before_the_first_one_has_a_number() -> None:
    with pytest.raises(UserError) as caught:
        SubmitConfig(name="x", stages=(StageConfig(name="a", run="tools.upcycle"),), after=-5)
    assert str(caught.value) == "after: -5 is not allowed; give null or a number above 0"


def test_a_chain_that_trains_nothing_cannot_be_rehearsed(tmp_path: Path) -> None:
    recipe = tmp_path / "chain.yaml"
    recipe.write_text("{name: x, stages: [{name: a, run: tools.convert_hf inspect --input x}]}")
    with pytest.raises(UserError) as caught:
        rehearse.main(["--chain", "--config", str(recipe)])
    fix = "none of them trains, so there is nothing to rehearse; choose others with start and stop"
    assert str(caught.value) == f"stages: ['a'] is not allowed; {fix}"
