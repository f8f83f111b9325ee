"""Preflight: every finding on given figures, the measurements on two processes, and the whole command."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipeline.manifest import read_manifest
from looplm.accounting import checkpoint_bytes, parameter_counts
from looplm.checkpoint import HostMemory
from looplm.cli import to_dict
from looplm.config import EngineConfig, ParallelConfig, RunConfig, TaskConfig, WordProblemConfig
from looplm.failures import UserError
from looplm.megatron.device import Description
from pretrain import preflight
from pretrain.cluster import examine, findings, probes
from pretrain.cluster.findings import GB, Finding
from pretrain.cluster.probes import RankInfo, WriteSpeed
from pretrain.cluster.rehearsal import rehearse_stage
from pretrain.data import check_corpus
from pretrain.train import train
from tests.support import preflight_worker
from tests.support.launch import run_ranks
from tests.support.preflight_worker import FORWARD
from tests.support.tiny import run_config

H100 = Description("H100", 80 * 10**9, 79 * 10**9, (9, 0), "13.1", "13.1")
RANK = RankInfo(0, "n1", H100, "torch 2.10", 1000.0, 6e14, 10**12, 10**12)
SUBJECTS = [
    "all-reduce",
    "network",
    "gpus",
    "engine",
    "gradients",
    "software",
    "speed",
    "clocks",
    "shm",
    "data",
    "mix",
    "start",
    "disk",
    "saving",
    "memory",
]


def four_ranks(**changed: Any) -> list[RankInfo]:
    """Four ranks on two nodes, the last one changed."""
    ranks = [dataclasses.replace(RANK, rank=rank, node=f"n{1 + rank // 2}") for rank in range(4)]
    device = {key: changed.pop(key) for key in list(changed) if hasattr(H100, key)}
    last = dataclasses.replace(ranks[3], device=dataclasses.replace(H100, **device), **changed)
    return [*ranks[:3], last]


NEEDS = HostMemory(saving=20 * GB, loading=4 * GB, staying=12 * GB)
SPEED = WriteSpeed(writers=2, writing=2e9, hashing=1.5e9)
CASES: list[tuple[Callable[[], Finding], str, str]] = [
    (lambda: findings.enough_gpus(8, 8), "ok", "8 ranks on this node, 8 GPUs"),
    (lambda: findings.enough_gpus(8, 4), "FAIL", "8 ranks on this node, 4 GPUs; start as many"),
    (lambda: findings.open_files(5420, 5420), "ok", "a rank may have 5,420 open, and needs at most 5,420"),
    (
        lambda: findings.open_files(5420, 4096),
        "FAIL",
        "a rank may have 4,096 open, and needs at most 5,420; raise the hard limit (ulimit -Hn, limits.conf, "
        "LimitNOFILE of slurmd) to at least 5420",
    ),
    (lambda: findings.no_gpu("", ""), "warn", "would train on the CPU"),
    (lambda: findings.no_gpu("NVRM 580", "13.1"), "FAIL", "torch is built for CUDA 13.1; take a newer driver"),
    (lambda: findings.no_gpu("NVRM 580", ""), "FAIL", "this is torch's CPU build"),
    (lambda: findings.gpus(four_ranks(), ["bf16"]), "ok", "4 x H100, 80 GB each"),
    (
        lambda: findings.gpus(four_ranks(name="V100", capability=(7, 0)), ["bf16"]),
        "FAIL",
        "rank 3 on n2: V100 has compute capability 7.0, bf16 needs 8.0",
    ),
    (
        lambda: findings.gpus(four_ranks(name="V100", capability=(7, 0)), ["fp32"]),
        "warn",
        "3 x H100, 1 x V100; the slowest sets",
    ),
    (
        lambda: findings.gpus(four_ranks(free_bytes=40 * 10**9), ["bf16"]),
        "FAIL",
        "rank 3 on n2: 50% of the memory of H100 is in use",
    ),
    (
        lambda: findings.gpus(four_ranks(driver_for="12.9"), ["bf16"]),
        "warn",
        "the driver is made for CUDA 12.9, torch for 13.1",
    ),
    (lambda: findings.engine(EngineConfig(), ["", ""]), "ok", "local, fp8 none"),
    (lambda: findings.engine(EngineConfig(), ["", "too old"]), "FAIL", "rank 1: too old"),
    (lambda: findings.software(four_ranks()), "ok", "torch 2.10"),
    (
        lambda: findings.software(four_ranks(versions="torch 2.9")),
        "FAIL",
        "rank 3 on n2 has torch 2.9; others have torch 2.10",
    ),
    (lambda: findings.speed(four_ranks()), "ok", "600.00 TFLOP/s, the slowest of 4 ranks at 100%"),
    (lambda: findings.speed(four_ranks(flops=3e14)), "warn", "at 50% of it: rank 3 on n2"),
    (lambda: findings.clocks(four_ranks(clock=1000.4)), "ok", "at most 0.400 s"),
    (lambda: findings.clocks(four_ranks(clock=1005.0)), "warn", "at most 5.000 s from the median: rank 3 on n2"),
    (lambda: findings.clocks(four_ranks(clock=900.0)), "FAIL", "at most 100.000 s from the median: rank 3 on n2"),
    (lambda: findings.sums([]), "ok", "right in every group"),
    (lambda: findings.sums(["tensor"]), "FAIL", "wrong sums in the groups tensor"),
    (lambda: findings.sums([], fault="ncclSystemError"), "FAIL", "failed: ncclSystemError; NCCL_DEBUG=INFO"),
    (lambda: findings.network(0, 1, 1, True), "ok", "single rank"),
    (lambda: findings.network(9e10, 16, 2, True), "ok", "all-reduce over 16 ranks (nodes: 2): 90.0 GB/s"),
    (lambda: findings.network(1e9, 16, 2, True), "warn", "1.0 GB/s; NVLink and InfiniBand give more than 10"),
    (lambda: findings.network(1e9, 16, 2, False), "ok", "1.0 GB/s"),
    (lambda: findings.environment(2, (9, 0), "1"), "ok", "CUDA_DEVICE_MAX_CONNECTIONS=1"),
    (lambda: findings.environment(2, (9, 0), None), "warn", "CUDA_DEVICE_MAX_CONNECTIONS=unset; set it to 1"),
    (lambda: findings.environment(1, (9, 0), None), "ok", ""),
    (lambda: findings.environment(2, (10, 0), None), "ok", ""),
    (lambda: findings.same_data({"n1": "a", "n2": "a"}), "ok", "on 2 nodes"),
    (lambda: findings.same_data({"n1": "a", "n2": "b", "n3": "a"}), "FAIL", "n2 sees other data"),
    (
        lambda: findings.passes({"a": 4e9, "b": 1e9}, {"a": 2 * 10**9, "b": 10**9}),
        "ok",
        "5 billion tokens to train on, 3 there; a is read 2.00 times",
    ),
    (
        lambda: findings.passes({"a": 4e9, "b": 9e9}, {"a": 2 * 10**9, "b": 10**9}),
        "warn",
        "b is read 9.00 times; add data",
    ),
    (lambda: findings.disk(100 * GB, 20 * GB, 4, 0), "ok", "4 + 1 checkpoints of 20.00 GB, 0 there, need 100.0"),
    (lambda: findings.disk(99 * GB, 20 * GB, 4, 0), "FAIL", "99.0 GB free"),
    (lambda: findings.disk(20 * GB, 20 * GB, 4, 4), "ok", "need 20.0"),
    (lambda: findings.disk(19 * GB, 20 * GB, 4, 4), "FAIL", "need 20.0"),
    (
        lambda: findings.saving(SPEED, 20 * GB, 1000, False),
        "ok",
        "2.00 GB/s from 2 ranks, each hashes 1.50 GB/s: a save takes about 10 s, in which training waits, every 1000",
    ),
    (
        lambda: findings.saving(dataclasses.replace(SPEED, hashing=0.5e9), 20 * GB, 0, True),
        "ok",
        "each hashes 0.50 GB/s: a save takes about 20 s, beside training, at the end",
    ),
    (lambda: findings.saving(SPEED, 800 * GB, 0, True), "ok", "a save takes about 400 s, beside training, at the end"),
    (
        lambda: findings.saving(SPEED, 800 * GB, 0, False),
        "warn",
        "a save takes about 400 s, in which training waits, at the end; set checkpoint.in_background",
    ),
    (lambda: findings.saving(WriteSpeed(fault="x cannot be written"), 1, 1, True), "FAIL", "x cannot be written"),
    (
        lambda: findings.memory(four_ranks(), NEEDS, 1, False),
        "ok",
        "at least 1000.0 GB free on every node; a save takes 20.00 of a node, a resume 8.00",
    ),
    (
        lambda: findings.memory(four_ranks(ram_bytes=12 * GB), NEEDS, 1, False),
        "FAIL",
        "at least 12.0 GB free on every node; a save takes 20.00 of a node, a resume 8.00: too little on n2; "
        "ask for all of the node's memory (--mem=0, --exclusive)",
    ),
    (
        lambda: findings.memory(four_ranks(ram_bytes=12 * GB), NEEDS._replace(loading=7 * GB), 4, False),
        "FAIL",
        "a save takes 10.00 of a node, a resume 14.00: too little on n2",
    ),
    (
        lambda: findings.memory(four_ranks(ram_bytes=12 * GB), NEEDS, 4, False),
        "ok",
        "a save takes 10.00 of a node, a resume 8.00",
    ),
    (
        lambda: findings.memory(four_ranks(ram_bytes=12 * GB), NEEDS, 4, True),
        "FAIL",
        "a save takes 10.00 of a node, a rollback 14.00: too little on n2",
    ),
    (lambda: findings.shared_memory(four_ranks()), "ok", "1000.0 GB of /dev/shm"),
    (lambda: findings.shared_memory(four_ranks(shm_bytes=64 * 10**6)), "warn", "0.1 GB of /dev/shm, on n2"),
]


@pytest.mark.parametrize(("judge", "level", "text"), CASES)
def test_findings_on_given_figures(judge: Callable[[], Finding], level: str, text: str) -> None:
    found = judge()
    assert found.level == level and text in found.text
    assert "\n" not in str(found)


def test_the_layout_is_compared_with_the_ranks(tmp_path: Path) -> None:
    config = run_config(tmp_path, tmp_path, parallel=ParallelConfig(tensor=2))
    assert findings.layout(config, 4, 4).level == "ok"
    assert "2 replicas of tensor 2" in findings.layout(config, 4, 4).text
    across = findings.layout(config, 4, 1)
    assert across.level == "warn" and "should divide the 1 ranks of a node" in across.text
    with pytest.raises(UserError, match=r"parallel.tensor x pipeline x context: 2 .* the number of ranks, 3"):
        findings.layout(config, 3, 3)
    with pytest.raises(UserError, match=r"data.global_batch_size: 4 .*=2 x 4 data-parallel ranks = 8"):
        findings.layout(config, 8, 8)


COARSE = (
    "summed in fp32; but a weight's over the 3 loops in bf16: take parallel.recompute=loop, or install Apex's kernels"
)


@pytest.mark.parametrize(
    ("precision", "layout", "fused", "text"),
    [
        ("bf16", {}, False, COARSE),
        ("bf16", {"recompute": "selective"}, False, COARSE),
        ("bf16", {}, True, "summed in fp32"),
        ("bf16", {"recompute": "loop"}, False, "summed in fp32"),
        ("bf16", {"recompute": "full"}, False, "summed in fp32"),
        ("bf16", {"pipeline": 2}, False, "summed in fp32"),
        ("bf16", {"accumulate_fp32": False}, False, "summed in bf16"),
        ("fp32", {"accumulate_fp32": False}, False, "summed in fp32"),
    ],
)
def test_where_the_gradients_of_a_looped_weight_are_summed(tmp_path, precision, layout, fused, text):
    config = run_config(tmp_path, tmp_path, optim={"precision": precision}, parallel=ParallelConfig(**layout))
    assert findings.gradients(config, fused) == ("warn" if text == COARSE else "ok", "gradients", text)


def test_too_few_files_end_the_command_before_the_ranks_join(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "raise_file_limit", lambda: 100)
    monkeypatch.setattr(preflight.process_groups, "start", pytest.fail)
    with pytest.raises(UserError, match=r"^files: a rank may have 100 open, and needs at most 310; raise"):
        run(run_config(tmp_path, tmp_path), tmp_path)


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory, single_process: Any) -> Path:
    """Return the folder of a run, which no test may change."""
    folder = tmp_path_factory.mktemp("trained") / "stage1"
    config = run_config(corpus, folder, optim={"train_steps": 2, "warmup_steps": 0, "decay_steps": 0})
    train(config, check_corpus(config.data, config.model.vocab_size), single_process)
    return folder


@pytest.fixture(scope="module")
def on_two_ranks(
    corpus: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, list[str]]]:
    """Return the findings by subject, of two sound ranks and with a damaged rank 1, of a run from other weights."""
    folder = tmp_path_factory.mktemp("preflight")
    config = run_config(corpus, folder / "runs/stage", checkpoint={"initial": str(trained)})
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    log = tmp_path_factory.mktemp("log") / "log.txt"
    run_ranks(2, preflight_worker.run, (folder / "config.json", folder / "found.json"), log, timeout=300)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "found.json"], "something was left behind"
    found = json.loads((folder / "found.json").read_text())
    return {name: {about: [level, text] for level, about, text in lines} for name, lines in found.items()}


@pytest.mark.slow
def test_two_sound_ranks(on_two_ranks: dict) -> None:
    sound = on_two_ranks["sound"]
    assert list(sound) == SUBJECTS
    assert {about for about, (level, _) in sound.items() if level == "FAIL"} == set()
    assert "all-reduce over 2 ranks (nodes: 1)" in sound["network"][1]
    assert "from 1 ranks" in sound["saving"][1], "one of two replicas writes"
    assert "which are complete and fit" in sound["start"][1]


@pytest.mark.slow
def test_a_wrong_clock_and_wrong_sums_are_found(on_two_ranks: dict) -> None:
    damaged = on_two_ranks["damaged"]
    assert {about for about, (level, _) in damaged.items() if level == "FAIL"} == {"all-reduce", "clocks"}
    assert "wrong sums in the groups all, data;" in damaged["all-reduce"][1], "each rank is its own tensor group"
    apart = float(damaged["clocks"][1].split()[2])
    assert apart == pytest.approx(FORWARD / 2, abs=5), "the median of two clocks is halfway between them"


def run(config: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(config)))  # JSON is YAML
    preflight.main(["--config", str(path)])


@pytest.mark.slow
def test_go(
    keep_process_groups: None,
    corpus: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(run_config(corpus, tmp_path / "runs/stage"), tmp_path)
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["layout", "files", "ranks", *SUBJECTS]
    assert lines[-1] == "go"
    monkeypatch.setenv("RANK", "1")
    run(run_config(corpus, tmp_path / "runs/stage"), tmp_path)
    assert capfd.readouterr().out == "", "only rank 0 prints"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def finding_on(subject: str, config: RunConfig, groups: Any) -> Finding:
    return {finding.subject: finding for finding in examine.examine(config, groups)}[subject]


@pytest.mark.slow
def test_the_checkpoint_that_a_run_starts_from(
    corpus: Path, trained: Path, tmp_path: Path, single_process: Any
) -> None:
    def start(output: Path, **sections: Any) -> Finding:
        return finding_on("start", run_config(corpus, output, **sections), single_process)

    assert start(tmp_path / "new").text == "step 1 of 6, from fresh weights"
    assert "after step 2 of 6" in start(trained).text
    initial = {"initial": str(trained)}
    assert "which are complete and fit" in start(tmp_path / "new", checkpoint=initial).text
    wider = start(tmp_path / "new", checkpoint=initial, model={"ffn_hidden_size": 64})
    assert (wider.level, "model.ffn_hidden_size=48" in wider.text) == ("FAIL", True)
    other = start(trained, seed=7)
    assert (other.level, "was trained on other data" in other.text) == ("FAIL", True)
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    (copy / "checkpoints/step_00000002/about.json").write_text("{}")
    broken = start(copy)
    assert broken.level == "warn"
    assert broken.text.endswith("step_00000002 is broken; the run would resume from the start")
    lost = start(tmp_path / "new", checkpoint={"initial": str(copy)})
    assert (lost.level, "no whole checkpoint here" in lost.text) == ("FAIL", True)
    assert "after step 2 of 6" in start(trained, checkpoint={"initial": str(copy)}).text, "it needs no other weights"
    again = start(trained, checkpoint={"resume": False})
    assert (again.level, "checkpoint.resume: False is not allowed; " in again.text) == ("FAIL", True)
    assert start(tmp_path / "new", checkpoint={"resume": False}).text == "step 1 of 6, from fresh weights"
    for other in (
        start(trained, optim={"precision": "bf16"}),
        start(tmp_path / "new", checkpoint=initial | {"initial_optimizer": True}, optim={"precision": "bf16"}),
    ):
        assert other.level == "FAIL" and "optim.precision" in other.text, "the first job would end so"
    short = start(trained, optim={"train_steps": 1, "warmup_steps": 0, "decay_steps": 0})
    assert (short.level, "has trained 2 steps; give at least as many" in short.text) == ("FAIL", True)


@pytest.mark.slow
def test_the_passes_count_what_earlier_stages_have_read(
    corpus: Path, trained: Path, tmp_path: Path, single_process: Any
) -> None:
    held = read_manifest(corpus / "train").tokens
    for initial, read in ((str(trained), 8 + 24), (None, 24), (str(tmp_path), 24)):
        config = run_config(corpus, tmp_path / "new", checkpoint={"initial": initial})
        assert f"is read {read * 32 / held:.2f} times" in finding_on("mix", config, single_process).text


@pytest.mark.slow
def test_a_synthetic_task_is_made_while_training(corpus: Path, tmp_path: Path, single_process: Any) -> None:
    task = {"task": TaskConfig(word_problem=WordProblemConfig(group="S3")), "train": (), "valid": ()}
    config = run_config(corpus, tmp_path / "run", data=task)
    found = {finding.subject: finding for finding in examine.examine(config, single_process)}
    assert list(found) == SUBJECTS and "FAIL" not in {finding.level for finding in found.values()}
    tokens = 6 * 4 * 32 / 1e9
    assert found["mix"].text == f"{tokens:,.4g} billion tokens to train on, made while training"
    assert found["start"].text == "step 1 of 6, from fresh weights"


@pytest.mark.slow
def test_no_go_lists_every_failed_check(
    keep_process_groups: None,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def full(path: Path, num_bytes: int) -> None:
        path.write_text("a part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(probes, "_write", full)
    monkeypatch.setattr(examine, "disk_usage", lambda path: SimpleNamespace(free=1000))
    config = run_config(
        corpus,
        tmp_path / "runs",
        engine=EngineConfig(transformer_impl="transformer_engine"),
        data={"seq_length": 64, "micro_batch_size": 2, "global_batch_size": 4},
    )
    shutil.copytree(corpus, tmp_path / "data")
    (tmp_path / "data/train.bin").write_bytes(b"short")
    sources = tuple(dataclasses.replace(one, prefix=str(tmp_path / "data/train")) for one in config.data.train)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=sources))
    with pytest.raises(UserError) as caught:
        run(config, tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "no go: 4 of 13 checks failed"
    assert [line.removeprefix("error: ").split(":")[0] for line in lines[1:]] == ["engine", "data", "disk", "saving"]
    assert "Transformer Engine is not installed" in lines[1]
    assert "train.bin: 5 bytes" in lines[2] and "No space left on device" in lines[4]
    assert "go" not in capfd.readouterr().out.splitlines()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "data"]


def test_an_error_of_nccl_is_one_line(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single_process: Any
) -> None:
    def fail(num_bytes: int) -> float:
        raise RuntimeError("NCCL error: unhandled system error\nmore")

    monkeypatch.setattr(probes, "bandwidth", fail)
    found = list(examine.examine(run_config(corpus, tmp_path / "runs"), single_process))
    assert [finding.level for finding in found] == ["ok", "FAIL"], "nothing after it, because it would hang"
    assert "failed: NCCL error: unhandled system error;" in found[1].text


@pytest.mark.slow
def test_the_predicted_size_of_a_checkpoint_is_the_real_one(corpus: Path, tmp_path: Path, single_process: Any) -> None:
    wide = {
        "hidden_size": 128,
        "ffn_hidden_size": 768,
        "num_layers": 1,
    }  # wide, because a file has some bytes of overhead for each tensor
    optim = {"train_steps": 1, "warmup_steps": 0, "decay_steps": 0, "precision": "bf16"}
    stage = run_config(corpus, tmp_path / "stage", model=wide, optim=optim)
    start = {"initial": str(tmp_path / "stage")}
    gate_loss = {"objective": "adaptive_gate"}
    gate = run_config(corpus, tmp_path / "gate", model=wide, optim=optim, loss=gate_loss, checkpoint=start)
    for config, frozen in ((stage, False), (gate, True)):
        train(config, check_corpus(config.data, config.model.vocab_size), single_process)
        state = Path(config.output_dir) / "checkpoints/step_00000001/state"
        real = sum(path.stat().st_size for path in state.iterdir())
        predicted = checkpoint_bytes(config.model, config.gate, "bf16", frozen)
        assert 0 < real - predicted < 250_000, (
            "overhead for names, shapes and headers, of 5.4 MB (stage 1) or 0.8 MB (gate)"
        )
    total = sum(parameter_counts(stage.model, stage.gate).values())
    assert checkpoint_bytes(stage.model, stage.gate, "bf16") == 14 * total
    assert checkpoint_bytes(stage.model, stage.gate, "fp32") == 12 * total


def test_a_preflight_rehearses_on_request(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts the command without torchrun's variables, and a fault is a failed check."""
    commands = list[list[str]]()

    def start(command: list[str], env: dict[str, str]) -> SimpleNamespace:
        assert "RANK" not in env and env["CUDA_VISIBLE_DEVICES"] == ""
        commands.append(command)
        return SimpleNamespace(returncode=len(commands) - 1)

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("pretrain.cluster.rehearsal.subprocess.run", start)
    levels = [rehearse_stage(["--config", "a.yaml"], 16).level for _ in range(2)]
    assert levels == ["ok", "FAIL"]
    assert commands[0][1:] == ["-m", "tools.rehearse", "--config", "a.yaml", "--gpus", "16"]
