"""Data parallelism: gradients and runs of every kind of it against the single process.

``dist`` is Megatron's distributed optimizer, ``overlap`` reduces gradients while backward runs (in several buckets, see
``optimizer_worker``); ``full``, ``selective`` and ``loop`` make activations again in backward.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.process_groups_config import ProcessGroupCollection

from looplm import parallel
from looplm.cli import to_dict
from looplm.config import GateConfig, RunConfig
from looplm.layout import ParallelConfig
from looplm.model import LoopLM
from pretrain.data import check_corpus
from pretrain.train import train
from tests.parallel.launch import launch
from tests.parity import assert_close_relative
from tests.tiny import MODEL, run_config, train_rows

SEED = 8  # with it no gradient cancels to nearly nothing, where the test would measure rounding
WORKER = "tests.parallel.optimizer_worker"
MLA = dataclasses.replace(MODEL, num_attention_heads=4, q_lora_rank=12)
MHA = dataclasses.replace(MODEL, num_attention_heads=4, attention="mha", num_query_groups=4)
GATE = GateConfig(state_size=8)
DATA = {"micro_batch_size": 2, "global_batch_size": 8}
GATE_STAGE = {"loss": {"objective": "adaptive_gate", "slope": 5.0}, "checkpoint": {"initial": "unused"}}

PLAIN = ParallelConfig()
OVERLAP = ParallelConfig(overlap_grad_reduce=True)
DIST = ParallelConfig(distributed_optimizer=True)
BOTH = ParallelConfig(distributed_optimizer=True, overlap_grad_reduce=True)


def over(layout: ParallelConfig, **keys: object) -> ParallelConfig:
    return dataclasses.replace(layout, **keys)


# name: ranks, layout, model, other sections
CASES = {
    "DP2": (2, PLAIN, MLA, {}),
    "DP2 overlap": (2, OVERLAP, MLA, {}),
    "DP2 dist": (2, DIST, MLA, {}),
    "DP2 dist overlap": (2, BOTH, MLA, {}),
    "DP2 dist overlap, gate stage": (2, BOTH, MLA, GATE_STAGE),
    "DP2 dist overlap, full": (2, over(BOTH, recompute="full"), MLA, {}),
    "DP2 overlap, loop": (2, over(OVERLAP, recompute="loop"), MLA, {}),
    "TP2, full": (2, ParallelConfig(tensor=2, recompute="full"), MLA, {}),
    "TP2, loop, mha": (2, ParallelConfig(tensor=2, recompute="loop"), MHA, {}),
    "TP2, selective": (2, ParallelConfig(tensor=2, recompute="selective"), MLA, {}),
    "PP2, full, mha": (2, ParallelConfig(pipeline=2, recompute="full"), MHA, {}),
    "PP2, loop": (2, ParallelConfig(pipeline=2, recompute="loop"), MLA, {}),
    "PP2 x DP2": (4, ParallelConfig(pipeline=2), MLA, {}),
    "PP2 x DP2 overlap": (4, over(OVERLAP, pipeline=2), MLA, {}),
    "PP2 x DP2 dist overlap": (4, over(BOTH, pipeline=2), MLA, {}),
    "PP2 x DP2 dist overlap, gate stage": (4, over(BOTH, pipeline=2), MLA, GATE_STAGE),
    "TP2 x DP2 dist overlap, loop": (4, over(BOTH, tensor=2, recompute="loop"), MLA, {}),
}
# Two addends have one sum: these may not differ in a single bit.
SAME_BITS = [
    ("DP2", "DP2 overlap"),
    ("DP2", "DP2 dist"),
    ("DP2", "DP2 dist overlap"),
    ("PP2 x DP2", "PP2 x DP2 overlap"),
    ("PP2 x DP2", "PP2 x DP2 dist overlap"),
]


def case_config(name: str, corpus: Path, folder: Path, layout: ParallelConfig | None = None) -> RunConfig:
    _, of_case, model, sections = CASES[name]
    return run_config(
        corpus, folder / "unused", model=model, gate=GATE, parallel=layout or of_case, data=DATA, **sections
    )


def reference(name: str) -> str:
    """The single process that a case is held against: one for each model and stage."""
    _, _, model, sections = CASES[name]
    return f"alone {model.attention} {'gate' if sections else 'all'}"


@pytest.fixture(scope="module")
def gradients(corpus, tmp_path_factory, single_process) -> dict[str, tuple[dict, dict[str, torch.Tensor]]]:
    """Statistics and gradients by case, and by :func:`reference`."""
    folder = tmp_path_factory.mktemp("gradients")
    jobs: dict[int, dict[str, dict]] = {1: {}, 2: {}, 4: {}}
    for name, (ranks, _, model, _) in CASES.items():
        config, weights = case_config(name, corpus, folder, PLAIN), folder / f"weights {model.attention}"
        if not weights.exists():
            save_weights(weights, config, single_process)
        for key, ranks_, layout in ((reference(name), 1, PLAIN), (name, ranks, None)):
            values = to_dict(case_config(name, corpus, folder, layout))
            job = {"kind": "gradients", "config": values, "weights": str(weights), "output": str(folder / key)}
            jobs[ranks_][key] = job
    for ranks, todo in jobs.items():
        launch(WORKER, ranks, list(todo.values()), folder)

    read = {}
    for name in CASES:
        for key in {name, reference(name)} - set(read):
            config = case_config(name, corpus, folder, PLAIN)
            model = LoopLM(config.model, config.gate, single_process)
            state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder / key / "state"))
            model.load_state_dict(state["model"])
            values = {key: value.detach().clone() for key, value in model.named_parameters()}
            read[key] = json.loads((folder / key / "stats.json").read_text()), values
    return read


def save_weights(folder: Path, config: RunConfig, groups: ProcessGroupCollection) -> None:
    """The same first weights for every case; off its start, where all of them are zero, the gate has gradients."""
    torch.manual_seed(SEED)
    model = LoopLM(config.model, config.gate, groups)
    with torch.no_grad():
        for parameter in model.gate.parameters():
            parameter.normal_(std=0.3)
    folder.mkdir()
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(folder))


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_those_of_a_single_process(name, gradients):
    (stats, expected), (found_stats, found) = gradients[reference(name)], gradients[name]
    assert found_stats["tokens"] == stats["tokens"] and found_stats["loss"] == pytest.approx(stats["loss"], rel=1e-5)
    assert {key for key in expected if expected[key].any()} == {key for key in found if found[key].any()}
    moving = [key for key in expected if expected[key].any()]
    assert len(moving) > 2
    assert_close_relative({key: found[key] for key in moving}, {key: expected[key] for key in moving}, 1e-5)


@pytest.mark.parametrize(("one", "other"), SAME_BITS)
def test_ways_to_reduce_gradients_agree_to_the_last_bit(one, other, gradients):
    (_, expected), (_, found) = gradients[one], gradients[other]
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


TP2_PP2 = ParallelConfig(tensor=2, pipeline=2)
LAST = "step_00000006"


def run_of(corpus: Path, folder: Path, layout: ParallelConfig, precision: str = "fp32") -> RunConfig:
    """Six steps, with a save after three."""
    return run_config(
        corpus,
        folder,
        model=MLA,
        gate=GATE,
        parallel=layout,
        data=DATA,
        checkpoint={"save_every": 3, "keep": 2},
        logging={"tensorboard": False, "peak_tflops": 1.0},
        optim={"precision": precision},
    )


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory, single_process) -> dict[str, list[dict]]:
    """Training lines of each run: whole ones by their layout; ``A to B`` made three steps in A and three in B."""
    folder = tmp_path_factory.mktemp("runs")

    def begun(source: str, target: str) -> Path:
        """A copy of a whole run that died before its last save."""
        copy = folder / f"{source} to {target}"
        shutil.copytree(folder / source, copy)
        (copy / "checkpoints" / LAST / "manifest.json").unlink()
        lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
        (copy / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 3))
        return copy

    def job(path: Path, layout: ParallelConfig, precision: str = "fp32") -> dict:
        return {"kind": "train", "config": to_dict(run_of(corpus, path, layout, precision))}

    def alone(path: Path) -> None:
        config = run_of(corpus, path, PLAIN)
        train(config, check_corpus(config), parallel.start(config.seed))

    alone(folder / "alone")
    whole = {"DP2": PLAIN, "DP2 dist": DIST, "DP2 dist overlap": BOTH}
    jobs = [job(folder / name, layout) for name, layout in whole.items()]
    jobs += [job(folder / "DP2 bf16", PLAIN, "bf16"), job(folder / "DP2 dist overlap bf16", BOTH, "bf16")]
    jobs += [job(begun("alone", "DP2 dist overlap"), BOTH)]
    launch(WORKER, 2, jobs, folder)

    jobs = [job(folder / "TP2 PP2", TP2_PP2), job(begun("alone", "TP2 PP2"), TP2_PP2)]
    jobs += [job(begun("DP2 dist overlap", "TP2 PP2"), TP2_PP2)]
    jobs += [job(begun("DP2 dist overlap", "TP2 DP2 dist"), over(DIST, tensor=2))]
    launch(WORKER, 4, jobs, folder)

    jobs = [job(begun("TP2 PP2", "DP2 dist overlap"), BOTH), job(begun("DP2", "DP2 dist"), DIST)]
    jobs += [job(begun("DP2 dist overlap", "DP2"), PLAIN), job(begun("DP2 dist overlap", "the same"), BOTH)]
    jobs += [job(begun("DP2 bf16", "DP2 dist bf16"), DIST, "bf16")]
    jobs += [job(begun("DP2 dist overlap bf16", "DP2 bf16"), PLAIN, "bf16")]
    jobs += [job(begun("DP2 dist overlap bf16", "the same"), BOTH, "bf16")]
    launch(WORKER, 2, jobs, folder)

    for source in ("DP2 dist", "DP2 dist overlap", "TP2 PP2"):
        alone(begun(source, "alone"))
    return {path.name: train_rows(path) for path in folder.iterdir() if (path / "metrics.jsonl").exists()}


RESHARDED = [
    "DP2 to DP2 dist",
    "DP2 dist to alone",
    "DP2 dist overlap to DP2",
    "DP2 dist overlap to TP2 DP2 dist",
    "DP2 dist overlap to TP2 PP2",
    "DP2 dist overlap to alone",
    "TP2 PP2 to DP2 dist overlap",
    "TP2 PP2 to alone",
    "alone to DP2 dist overlap",
    "alone to TP2 PP2",
]


@pytest.mark.parametrize("name", [*RESHARDED, "DP2", "DP2 dist", "DP2 dist overlap", "TP2 PP2"])
def test_a_run_in_another_layout_goes_on_as_if_never_interrupted(name, runs):
    assert [row["step"] for row in runs[name]] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in runs[name]] == pytest.approx([row[key] for row in runs["alone"]], rel=1e-5), key


@pytest.mark.parametrize("name", ["DP2 dist overlap", "DP2 dist overlap bf16"])
def test_resume_in_the_same_layout_changes_no_bit(name, runs):
    for key in ("step", "loss", "loss_per_loop", "exit_distribution", "grad_norm", "learning_rate"):
        found, expected = runs[f"{name} to the same"], runs[name]
        assert [json.dumps(row[key]) for row in found] == [json.dumps(row[key]) for row in expected], key


@pytest.mark.parametrize("name", ["DP2 bf16 to DP2 dist bf16", "DP2 dist overlap bf16 to DP2 bf16"])
def test_bf16_main_weights_pass_between_the_optimizers(name, runs):
    """bf16 weights alone would have forgotten what the main weights hold."""
    assert [row["step"] for row in runs[name]] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in runs[name]] == pytest.approx([row["loss"] for row in runs["DP2 bf16"]], rel=1e-5)
