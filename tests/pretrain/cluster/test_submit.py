"""Submission of a recipe's stages, against a stand-in for sbatch that numbers and records what it is given."""

import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from looplm.cli import parse_config, to_dict
from looplm.failures import UserError
from pretrain import chain
from pretrain.batch_schedule import schedule_on
from pretrain.cluster.submit import StageConfig, SubmitConfig, find_faults, plan
from pretrain.data import check_corpus
from pretrain.train import train
from tests.support.tiny import EOS, TEXTS, run_config, write_prefix, write_tokenizer
from tests.test_recipes import OURO, STAGES, load

ROOT = Path(__file__).resolve().parents[3]
# Number jobs from 100 on, and refuse the one named in the file `refused`.
SBATCH = """#!/bin/bash
cd "$(dirname "$0")"
for word; do [[ $word != --job-name=$(cat refused) ]] || { echo "sbatch: error: Invalid
account" >&2; exit 1; }; done
printf '%s ' "$@" >>submitted; echo >>submitted
echo "$((99 + $(wc -l <submitted)));cluster"
"""
SCANCEL = '#!/bin/bash\necho "$@" >>"$(dirname "$0")/cancelled"\n'


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the stand-ins."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in {"sbatch": SBATCH, "scancel": SCANCEL}.items():
        (folder / name).write_text(script)
        (folder / name).chmod(stat.S_IRWXU)
    (folder / "refused").write_text("none")
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


@pytest.fixture
def recipe(corpus: Path, tmp_path: Path) -> Path:
    """Write a recipe of two stages and a conversion of a tiny model, on one node with one GPU."""
    folder = tmp_path / "recipe"
    folder.mkdir()
    first = run_config(corpus, folder / "runs/one")
    second = {"output_dir": f"{folder}/runs/two", "checkpoint": {"initial": f"{folder}/runs/one"}}
    (folder / "one.yaml").write_text(yaml.safe_dump(to_dict(first)))
    (folder / "two.yaml").write_text(yaml.safe_dump(second))
    export = f"tools.convert_hf export --checkpoint {folder}/runs/two --output {folder}/runs/exported"
    stages = [
        {"name": "one", "config": [f"{folder}/one.yaml"], "gpus": 1},
        {"name": "two", "config": [f"{folder}/two.yaml"], "gpus": 1},
        {"name": "exported", "run": export},
    ]
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump({"name": "tiny", "stages": stages}))
    return path


def submitted(slurm: Path) -> list[str]:
    path = slurm / "submitted"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.slow
def test_each_stage_waits_for_the_previous_one(slurm: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain.main(["--config", str(recipe), "--after", "7", "--arguments", "--optim.lr 0.5"])
    jobs = submitted(slurm)
    text = "\n".join(jobs)
    assert re.findall(r"--job-name=tiny-(\S+)", text) == ["preflight", "one", "two", "exported"]
    assert re.findall(r"--dependency=afterok:(\d+) --kill-on-invalid-dep=yes", text) == ["7", "100", "101", "102"]
    first, second = (f"--config {recipe.parent}/{name}.yaml" for name in ("one", "two"))
    assert "--gpus-per-node=1 --dependency=afterok:7 --kill-on-invalid-dep=yes pretrain/slurm/" in jobs[0]
    assert jobs[0].strip().endswith(f"yes pretrain/slurm/preflight.sbatch {first} --optim.lr 0.5")
    assert f"pretrain/slurm/multi_node.sbatch {first} --optim.lr 0.5" in jobs[1]
    assert f"pretrain/slurm/multi_node.sbatch {first} {second} --optim.lr 0.5" in jobs[2]
    assert "pretrain/slurm/task.sbatch tools.convert_hf export" in jobs[3] and "--gpus-per-node" not in jobs[3]
    assert capsys.readouterr().out.splitlines()[-1] == "103  tiny-exported, 1 node, after 102"


@pytest.mark.slow
def test_start_and_stop_select_stages(slurm: Path, recipe: Path, corpus: Path, single_process: Any) -> None:
    one = run_config(corpus, recipe.parent / "runs/one", optim={"train_steps": 1, "warmup_steps": 0, "decay_steps": 0})
    train(one, check_corpus(one.data, one.model.vocab_size), single_process)
    chain.main(["--config", str(recipe), "--start", "two", "--stop", "two", "--preflight", "false"])
    (job,) = submitted(slurm)
    assert "--job-name=tiny-two" in job and "--dependency" not in job


@pytest.mark.slow
def test_after_stands_for_a_missing_checkpoint(slurm: Path, recipe: Path) -> None:
    chain.main(["--config", str(recipe), "--start", "two", "--preflight", "false", "--after", "7"])
    assert "--job-name=tiny-two" in submitted(slurm)[0] and "--dependency=afterok:7" in submitted(slurm)[0]


@pytest.mark.slow
def test_a_refused_job_cancels_the_earlier_ones(slurm: Path, recipe: Path) -> None:
    (slurm / "refused").write_text("tiny-two")
    with pytest.raises(UserError, match=r"^two: sbatch: sbatch: error: Invalid account; nothing stays submitted$"):
        chain.main(["--config", str(recipe)])
    assert len(submitted(slurm)) == 2
    assert (slurm / "cancelled").read_text() == "100 101\n"


@pytest.mark.slow
def test_a_dry_run_prints_a_script_that_submits_the_same_jobs(
    slurm: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chain.main(["--config", str(recipe), "--dry_run", "true"])
    printed = capsys.readouterr().out
    assert not submitted(slurm)
    subprocess.run(["bash", "-euc", printed], check=True)
    by_script = submitted(slurm)
    (slurm / "submitted").unlink()
    chain.main(["--config", str(recipe)])
    by_command = [re.sub(r"afterok:(\d+)", r"afterok:\1;cluster", job) for job in submitted(slurm)]
    assert by_script == by_command, "--parsable also names the cluster if there are several"
    comments = [line for line in printed.splitlines() if line.startswith("#   srun ")]
    modules = [re.findall(r"-m (pretrain\.\w+|tools\.\w+)", line)[0] for line in comments]
    assert modules == ["pretrain.preflight", "pretrain.train", "pretrain.train", "tools.convert_hf"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "arguments", "messages"),
    [
        ({}, ["--start", "three"], ["start: 'three' is not allowed; the stages are one, two, exported"]),
        ({}, ["--start", "two", "--stop", "one"], ["stop: 'one' is not allowed; it comes before start=two"]),
        (
            {},
            ["--start", "two"],
            ["two: starts from FOLDER/runs/one, which holds no checkpoint and which no earlier stage"],
        ),
        (
            {},
            ["--nodes", "3"],
            ["one on 3 GPUs: data.global_batch_size: 4 is not allowed; give a multiple of", "two on 3 GPUs: "],
        ),
        (
            {},
            ["--arguments=--parallel.pipeline 2"],
            [
                "one on 1 GPUs: parallel.tensor x pipeline x context: 2 is not allowed; "
                "it must divide the number of ranks, 1",
                "two on 1",
            ],
        ),
        ({}, ["--arguments=--optim.rl 1"], ["one: --optim.rl: unknown key", "two: --optim.rl: unknown key"]),
        (
            {"two.yaml": {"model": {"hidden_size": 64}}},
            [],
            ["two: model.hidden_size is 64, in one 32; it shapes the weights"],
        ),
        ({"two.yaml": {"model": {"num_loops": 2}}}, ["--dry_run", "true"], []),
        (
            {"one.yaml": {"model": {"step_embedding": "learned"}}, "two.yaml": {"model": {"num_loops": 2}}},
            [],
            ["two: model.num_loops is 2, in one 3; it shapes the weights"],
        ),
        (
            {"two.yaml": {"gate": {"state_size": 16}}},
            [],
            ["two: gate.state_size is 16, in one 8; it shapes the weights"],
        ),
        (
            {
                "one.yaml": {"model": {"attention": "mha", "num_query_groups": None}},
                "two.yaml": {"model": {"num_query_groups": 2}},
            },
            ["--dry_run", "true"],
            [],
        ),
        (
            {"two.yaml": {"output_dir": "FOLDER/runs//one", "checkpoint": {"initial": None}}},
            [],
            ["two: writes to FOLDER/runs//one, as one does; give each stage an output directory of its own"],
        ),
        ({"two.yaml": {"output_dir": "FOLDER/runs/one"}}, ["--stop", "one", "--dry_run", "true"], []),
        (
            {"two.yaml": {"output_dir": "FOLDER/runs/one"}},
            ["--start", "two"],
            ["two: writes to FOLDER/runs/one, as one does; "],
        ),
        (
            {
                "one.yaml": {"output_dir": "FOLDER/runs/one/"},
                "two.yaml": {"checkpoint": {"initial": "FOLDER/runs/./one"}},
            },
            ["--dry_run", "true"],
            [],
        ),
        (
            {},
            ["--arguments", "--optim.lr 'x"],
            ['arguments: "--optim.lr \'x" is not allowed; quote it as in a shell (No'],
        ),
        (
            {"two.yaml": {"data": {"train": [{"prefix": "FOLDER/others/train"}], "valid": []}}},
            [],
            ["two: its data are made with another tokenizer ("],
        ),
        (
            {"two.yaml": {"data": {"train": [], "valid": [], "task": {"word_problem": {"group": "S3"}}}}},
            [],
            ["two: its data are made with another tokenizer ("],
        ),
        (
            {"two.yaml": {"data": {"train": [{"prefix": "no"}], "valid": [{"prefix": "nor"}]}}},
            [],
            ["two: no.manifest.json: cannot be read", "two: nor.manifest.json: "],
        ),
        ({"one.yaml": {"data": {"train": [{"prefix": "no"}]}}}, [], ["one, two: no.manifest.json: cannot be read"]),
        (
            {"one.yaml": {"model": {"vocab_size": 100}}},
            [],
            ["one, two: model.vocab_size: 100 is not allowed; the tokenizer"],
        ),
    ],
)
def test_faults_are_reported_before_submission(
    slurm: Path, recipe: Path, changed: dict[str, Any], arguments: list[str], messages: list[str]
) -> None:
    folder = str(recipe.parent)
    if "others/" in str(changed):
        write_prefix_of_another_tokenizer(recipe.parent / "others")
    for name, sections in changed.items():
        path = recipe.parent / name
        values = yaml.safe_load(path.read_text())
        for section, keys in sections.items():
            values[section] = {**values.get(section, {}), **keys} if isinstance(keys, dict) else keys
        path.write_text(yaml.safe_dump(values).replace("FOLDER", folder))
    command = ["--config", str(recipe), *arguments]
    if not messages:
        return chain.main(command)
    with pytest.raises(UserError) as caught:
        chain.main(command)
    lines = str(caught.value).removeprefix("error: ").split("\nerror: ")
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages, strict=True):
        assert line.startswith(message.replace("FOLDER", folder))
    assert not submitted(slurm)


def write_prefix_of_another_tokenizer(folder: Path) -> None:
    """Write the prefix ``train``, whose tokenizer has learned other words."""
    tokenizer, record = write_tokenizer(folder, [text.upper() for text in TEXTS])
    write_prefix(folder / "train", [[*tokenizer.encode(text).ids, EOS] for text in TEXTS], record, "train")


@pytest.mark.slow
def test_weights_that_exist_already_are_compared_too(
    slurm: Path, recipe: Path, corpus: Path, single_process: Any
) -> None:
    """An earlier stage that has ended is not submitted again, and its tokenizer passes through a conversion."""
    one = run_config(corpus, recipe.parent / "runs/one", optim={"train_steps": 1, "warmup_steps": 0, "decay_steps": 0})
    train(one, check_corpus(one.data, one.model.vocab_size), single_process)
    command = ["--config", str(recipe), "--start", "two", "--stop", "two", "--dry_run", "true"]
    chain.main(command)
    write_prefix_of_another_tokenizer(recipe.parent / "others")
    path = recipe.parent / "two.yaml"
    stage = yaml.safe_load(path.read_text())
    data = {"train": [{"prefix": f"{recipe.parent}/others/train"}], "valid": []}
    path.write_text(yaml.safe_dump({**stage, "data": data}))
    with pytest.raises(UserError, match=r"^two: its data are made with another tokenizer \(.* than the weights of /"):
        chain.main(command)
    path.write_text(yaml.safe_dump({**stage, "model": {"ffn_hidden_size": 64}}))
    with pytest.raises(UserError, match=r"^two: .*/step_00000001: made with model.ffn_hidden_size=48, this run has 64"):
        chain.main(command)

    deeper = f"tools.upcycle depth --checkpoint={recipe.parent}/runs/one --output={recipe.parent}/runs/deep --layers 4"
    whole = to_dict(one)
    stage |= {"data": whole["data"] | data, "checkpoint": {"initial": f"{recipe.parent}/runs/deep/"}}
    path.write_text(yaml.safe_dump(whole | stage))
    stages = [{"name": "deep", "run": deeper}, {"name": "two", "config": [str(path)], "gpus": 1}]
    recipe.write_text(yaml.safe_dump({"name": "tiny", "stages": stages}))
    with pytest.raises(UserError, match=r"^two: its data are made with another tokenizer \(.* the weights of deep \("):
        chain.main(["--config", str(recipe)])


@pytest.mark.slow
def test_a_dry_run_prints_commands_and_faults(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="two: starts from"):
        chain.main(["--config", str(recipe), "--start", "two", "--dry_run", "true"])
    assert "pretrain/slurm/multi_node.sbatch" in capsys.readouterr().out


def test_without_slurm(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(UserError, match="sbatch: not on this machine"):
        chain.main(["--config", str(recipe)])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "a"}, "stages[].config: [] is not allowed; a stage has either config, to train, or run"),
        ({"name": "a", "config": ("x",), "run": "y"}, "stages[].config: ['x']"),
        ({"name": "a", "config": ("x",), "nodes": 0}, "stages[].nodes: 0"),
        ({"name": "a", "run": "y", "nodes": 2}, "stages[].nodes: 2 is not allowed; a command runs on one node"),
        ({"name": "a", "config": ("x",), "gpus": 0}, "stages[].gpus: 0"),
        ({"name": "1a", "run": "y"}, "stages[].name: '1a' is not allowed; give letters, then also digits"),
        ({"name": "a b", "run": "y"}, "stages[].name: 'a b' is not allowed; give letters, then also digits"),
    ],
)
def test_invalid_stages(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        StageConfig(**values)


def test_stage_names_must_differ() -> None:
    for first, second in (("a", "a"), ("a-b", "a_b")):
        with pytest.raises(UserError, match=rf"stages\[\].name: \['{first}', '{second}'\]"):
            SubmitConfig(name="x", stages=(StageConfig(name=first, run="y"), StageConfig(name=second, run="y")))


@pytest.mark.parametrize(("size", "attention"), [("1.4b", "mla"), ("2.6b", "mha")])
def test_shipped_recipes_are_planned_and_fit_their_nodes(size: str, attention: str) -> None:
    arguments = ["--config", f"configs/ouro-{size}/chain.yaml", "--attention", attention]
    jobs, faults = plan(parse_config(SubmitConfig, arguments, prog="test", description=""))
    for index, job in enumerate(jobs):
        faults += find_faults(
            job, jobs[:index], awaited=size == "2.6b"
        )  # it starts from the smaller model's first stage
    assert faults == []
    trained = {job.name: job for job in jobs if job.run is not None}
    assert list(trained) == list(STAGES[size == "2.6b" :])
    for name, job in trained.items():
        assert job.run == load(*OURO[size, attention, name])
        too_many = {64} if name == "sft" else set()  # for its batch of 64
        for nodes in {job.nodes, 1, 8, 64} - too_many:
            schedule_on(job.run, nodes * job.gpus)


def test_a_chain_is_rehearsed_before_it_is_submitted(
    slurm: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[list[str]]()
    monkeypatch.setattr(chain, "rehearse", lambda words: asked.append(words))  # returns None: it found a fault
    words = ["--config", str(recipe), "--rehearse", "true"]
    with pytest.raises(UserError, match="a stage failed in its rehearsal, see above; nothing was submitted"):
        chain.main(words)
    assert asked == [["--chain", *words]]
    assert submitted(slurm) == []
