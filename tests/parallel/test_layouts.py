"""Every layout against the single process: loss, and the gradient of each parameter. Equal losses hide wrong gradients."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from looplm import parallel
from looplm.cli import to_dict
from looplm.config import GateConfig, ModelConfig, RunConfig
from looplm.layout import ParallelConfig
from looplm.model import LoopLM
from pretrain.data import check_corpus
from pretrain.train import train
from tests.parity import assert_close_relative
from tests.tiny import MODEL, run_config, train_rows

ROOT = Path(__file__).parent.parent.parent
MHA = ModelConfig(
    vocab_size=MODEL.vocab_size, hidden_size=32, ffn_hidden_size=48, num_layers=2, num_loops=3, num_attention_heads=4,
    attention="mha", num_query_groups=4, max_sequence_length=64,
)  # fmt: skip
MLA = dataclasses.replace(MODEL, num_attention_heads=4, q_lora_rank=12)
SEQUENCE = GateConfig(state_size=8, sequence_level=True)
LINEAR = GateConfig(kind="linear")

# The gate stage's targets are sigmoids of 50 times a difference of losses: at that slope the test would measure rounding.
# name: ranks, layout, model, gate, other sections
CASES = {
    "mla lru: DP2": (2, ParallelConfig(), MLA, SEQUENCE, {}),
    "mla lru: TP2 + SP": (2, ParallelConfig(tensor=2), MLA, SEQUENCE, {}),
    "mha linear: TP2 + SP": (2, ParallelConfig(tensor=2), MHA, LINEAR, {}),
    "mha lru: TP2 without SP": (2, ParallelConfig(tensor=2, sequence=False), MHA, SEQUENCE, {}),
    "mla lru: TP2 + SP, gate stage": (2, ParallelConfig(tensor=2), MLA, SEQUENCE, {"loss": {"objective": "adaptive_gate", "slope": 5.0}}),
    "mla lru: PP2": (2, ParallelConfig(pipeline=2), MLA, SEQUENCE, {}),
    "mha linear: PP2": (2, ParallelConfig(pipeline=2), MHA, LINEAR, {}),
    "mla lru: PP2, gate stage": (2, ParallelConfig(pipeline=2), MLA, SEQUENCE, {"loss": {"objective": "adaptive_gate", "slope": 5.0}}),
    "mla lru: TP2 + SP x PP2": (4, ParallelConfig(tensor=2, pipeline=2), MLA, SEQUENCE, {}),
    "mla lru: TP4 + SP": (4, ParallelConfig(tensor=4), MLA, SEQUENCE, {}),
    "mha linear: TP4 + SP": (4, ParallelConfig(tensor=4), MHA, LINEAR, {}),
    "mla linear: TP2 + SP x DP2": (4, ParallelConfig(tensor=2), MLA, LINEAR, {}),
}  # fmt: skip


def case_config(name: str, corpus: Path, folder: Path, layout: ParallelConfig | None = None) -> RunConfig:
    _, of_case, model, gate, sections = CASES[name]
    return run_config(
        corpus,
        folder / "run",
        model=model,
        gate=gate,
        parallel=layout or of_case,
        checkpoint={"initial": "unused"} if "loss" in sections else {},
        **sections,
    )


def launch(ranks: int, jobs: list[dict], folder: Path) -> None:
    """Run the jobs on ``ranks`` processes."""
    path = folder / f"jobs{ranks}.json"
    path.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "-m", "tests.parallel.worker", str(path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def results(corpus, tmp_path_factory, single_process) -> Path:
    """Gradients of every case, alone and in its layout, as checkpoints in folders named by the case's number."""
    folder = tmp_path_factory.mktemp("layouts")
    jobs: dict[int, list[dict]] = {1: []}
    for number, name in enumerate(CASES):
        config = case_config(name, corpus, folder)
        # A gradient that cancels to nearly nothing would measure rounding; with these seeds none does.
        torch.manual_seed(100 + number)
        model = LoopLM(config.model, config.gate, single_process)
        with torch.no_grad():  # off its start the gate's gradients are not zero
            for parameter in model.gate.parameters():
                parameter.normal_(std=0.3)
        weights = folder / f"weights{number}"
        weights.mkdir()
        dist_checkpointing.save({"model": model.sharded_state_dict()}, str(weights))
        for ranks, layout in ((1, ParallelConfig()), (CASES[name][0], None)):
            values = to_dict(case_config(name, corpus, folder, layout))
            output = str(folder / f"case{number}_{'alone' if ranks == 1 else 'layout'}")
            job = {"kind": "gradients", "config": values, "weights": str(weights), "output": output}
            jobs.setdefault(ranks, []).append(job)
    for ranks, todo in jobs.items():
        launch(ranks, todo, folder)
    return folder


def as_affine_maps(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gate's read-outs are one affine map onto one logit, of which a bias is a column: judged alone, that single
    number measures rounding whenever its sum over the tokens happens to cancel."""
    readouts = sorted(key for key in gradients if "readout" in key)
    whole = {key: value for key, value in gradients.items() if key not in readouts}
    return whole | {"gate read-outs": torch.cat([gradients[key].flatten() for key in readouts])}


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_those_of_a_single_process(name, results, corpus, single_process):
    number = list(CASES).index(name)
    config = case_config(name, corpus, results, ParallelConfig())
    read = {}
    for side in ("alone", "layout"):
        model = LoopLM(config.model, config.gate, single_process)
        state = dist_checkpointing.load(
            {"model": model.sharded_state_dict()}, str(results / f"case{number}_{side}/state")
        )
        model.load_state_dict(state["model"])
        stats = json.loads((results / f"case{number}_{side}/stats.json").read_text())
        read[side] = stats, {key: value.detach().clone() for key, value in model.named_parameters()}
    (stats, expected), (found_stats, found) = read["alone"], read["layout"]
    assert found_stats["tokens"] == stats["tokens"]
    for key in ("loss", "entropy", "mean_depth", "loss_per_loop", "exit_distribution"):
        assert found_stats[key] == pytest.approx(stats[key], rel=1e-5), key
    moving = {key for key, value in expected.items() if value.abs().max() > 0}
    assert len(moving) > 2 and all(found[key].abs().max() == 0 for key in set(expected) - moving)
    assert_close_relative(*(as_affine_maps({key: side[key] for key in moving}) for side in (found, expected)), 1e-5)


def test_a_run_may_change_its_layout(corpus, tmp_path, single_process):
    """Started alone and continued at TP2, started at PP2 and continued alone: as if never interrupted."""

    def config(name: str, layout: ParallelConfig) -> RunConfig:
        saving = {"save_every": 3, "keep": 2}
        return run_config(corpus, tmp_path / name, model=MLA, gate=SEQUENCE, parallel=layout, checkpoint=saving)

    def lose_the_last_save(name: str) -> None:
        (tmp_path / name / "checkpoints/step_00000006/manifest.json").unlink()

    alone = config("alone", ParallelConfig())
    train(alone, check_corpus(alone), single_process)
    expected = [row["loss"] for row in train_rows(tmp_path / "alone")]
    shutil.copytree(tmp_path / "alone", tmp_path / "to_tp2")
    lose_the_last_save("to_tp2")
    layouts = {"to_tp2": ParallelConfig(tensor=2), "from_pp2": ParallelConfig(pipeline=2)}
    launch(
        2, [{"kind": "train", "config": to_dict(config(name, layout))} for name, layout in layouts.items()], tmp_path
    )
    lose_the_last_save("from_pp2")
    resumed = config("from_pp2", ParallelConfig())
    train(resumed, check_corpus(resumed), single_process)
    for name in layouts:
        rows = train_rows(tmp_path / name)
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert [row["loss"] for row in rows] == pytest.approx(expected, rel=1e-5)


def test_parallel_start_is_idempotent(single_process):
    assert parallel.start(1234).tp.size() == 1
