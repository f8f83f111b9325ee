"""Every layout against the single process: loss, and the gradient of each parameter. Equal losses hide wrong gradients."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from megatron.core import dist_checkpointing

from looplm import parallel
from looplm.cli import to_dict
from looplm.config import GateConfig, ModelConfig, RunConfig
from looplm.layout import ParallelConfig
from looplm.model import LoopLM
from tests.parallel.launch import launch
from tests.parity import assert_close_relative
from tests.tiny import MODEL, run_config

MLA = dataclasses.replace(MODEL, num_layers=4, num_attention_heads=4, q_lora_rank=12)
MHA = ModelConfig(
    vocab_size=MODEL.vocab_size, hidden_size=32, ffn_hidden_size=48, num_layers=4, num_loops=2, num_attention_heads=8,
    num_query_groups=4, attention="mha", max_sequence_length=64,
)  # fmt: skip
LRU = GateConfig(state_size=8, sequence_level=True)
LINEAR = GateConfig(kind="linear")
# The gate stage's targets are sigmoids of 50 times a difference of losses: at that slope the test would measure rounding.
GATE_STAGE = {"loss": {"objective": "adaptive_gate", "slope": 5.0}, "checkpoint": {"initial": "unused"}}
DOCUMENTS = {"data": {"document_masking": True}}

MODELS: dict[str, tuple[ModelConfig, GateConfig, dict[str, Any]]] = {
    "mla lru": (MLA, LRU, {}),
    "mla linear": (MLA, LINEAR, {}),
    "mha lru": (MHA, LRU, {}),
    "mha linear": (MHA, LINEAR, {}),
    "mla lru documents": (MLA, LRU, DOCUMENTS),
    "mla lru gate stage": (MLA, LRU, GATE_STAGE),
    "mha linear gate stage": (MHA, LINEAR, GATE_STAGE),
}
FOUR = ("mla lru", "mla linear", "mha lru", "mha linear")
LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "TP2 + SP": (2, ParallelConfig(tensor=2)),
    "PP2": (2, ParallelConfig(pipeline=2)),
    "DP2": (2, ParallelConfig()),
    "TP4 + SP": (4, ParallelConfig(tensor=4)),
    "PP4": (4, ParallelConfig(pipeline=4)),
    "TP2 + SP x PP2": (4, ParallelConfig(tensor=2, pipeline=2)),
    "TP2 + SP x DP2": (4, ParallelConfig(tensor=2)),
    "PP2 x DP2": (4, ParallelConfig(pipeline=2)),
    "TP2 without SP": (2, ParallelConfig(tensor=2, sequence=False)),
    "PP2, 3 + 1 layers": (2, ParallelConfig(pipeline=2, first_stage_layers=3)),
}
EVERY_MODEL = ("TP2 + SP", "PP2", "DP2", "TP4 + SP", "PP4", "TP2 + SP x PP2")
GATE_LAYOUTS = ("TP2 + SP", "PP2", "DP2", "TP2 + SP x PP2")
RACES = {"PP2": 19, "TP2 + SP x PP2": 19}  # repeated on the first model


class Case(NamedTuple):
    """One model in one layout."""

    layout: str
    model: str


CASES = [
    *(Case(layout, model) for layout in EVERY_MODEL for model in FOUR),
    *(Case(layout, model) for layout in GATE_LAYOUTS for model in ("mla lru gate stage", "mha linear gate stage")),
    *(Case(layout, "mla lru documents") for layout in ("TP2 + SP", "PP2", "TP2 + SP x DP2", "PP2 x DP2", "PP2, 3 + 1 layers")),
    Case("TP2 without SP", "mha lru"),
]  # fmt: skip


def config_of(model: str, corpus: Path, folder: Path, layout: ParallelConfig) -> RunConfig:
    shape, gate, sections = MODELS[model]
    sections = sections | {"data": sections.get("data", {}) | {"global_batch_size": 4, "micro_batch_size": 1}}
    return run_config(corpus, folder / "run", model=shape, gate=gate, parallel=layout, **sections)


def folder_of(case: Case) -> str:
    return f"{case.layout} of {case.model}".replace(" ", "_").replace(",", "")


@pytest.fixture(scope="module")
def results(corpus, tmp_path_factory, single_process) -> Path:
    """What the worker saved of every model alone, and of every case."""
    folder = tmp_path_factory.mktemp("layouts")
    for number, name in enumerate(MODELS):
        config = config_of(name, corpus, folder, ParallelConfig())
        # A gradient that cancels to nearly nothing would measure rounding; with these seeds none does.
        torch.manual_seed(100 + number)
        model = LoopLM(config.model, config.gate, single_process)
        with torch.no_grad():  # off its start the gate's gradients are not zero
            for parameter in model.gate.parameters():
                parameter.normal_(std=0.3)
        weights = folder / name
        weights.mkdir()
        dist_checkpointing.save({"model": model.sharded_state_dict()}, str(weights))

    jobs: dict[int, list[dict[str, Any]]] = {1: [], 2: [], 4: []}
    alone = (1, ParallelConfig())
    for case in [*(Case("alone", name) for name in MODELS), *CASES]:
        ranks, layout = LAYOUTS.get(case.layout, alone)
        values = to_dict(config_of(case.model, corpus, folder, layout))
        repeats = RACES.get(case.layout, 0) if case.model == "mla lru" else 0
        job = {"kind": "steps", "config": values, "weights": str(folder / case.model), "repeats": repeats}
        jobs[ranks].append(job | {"output": str(folder / folder_of(case))})
    for ranks, todo in jobs.items():
        launch(ranks, todo, folder, timeout=600)
    return folder


def as_affine_maps(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gate's read-outs are one affine map onto one logit, of which a bias is a column: judged alone, that single
    number measures rounding whenever its sum over the tokens happens to cancel."""
    readouts = sorted(key for key in gradients if "readout" in key)
    whole = {key: value for key, value in gradients.items() if key not in readouts}
    return whole | {"gate read-outs": torch.cat([gradients[key].flatten() for key in readouts])}


def read(case: Case, results: Path, corpus: Path, groups) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Statistics and gradients of a case, as one process holds them."""
    config = config_of(case.model, corpus, results, ParallelConfig())
    model = LoopLM(config.model, config.gate, groups)
    folder = results / folder_of(case)
    model.load_state_dict(
        dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder / "state"))["model"]
    )
    stats = json.loads((folder / "stats.json").read_text())
    return stats, {key: value.detach().clone() for key, value in model.named_parameters()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.layout}: {case.model}")
def test_gradients_and_ten_losses_equal_those_of_a_single_process(case, results, corpus, single_process):
    stats, expected = read(Case("alone", case.model), results, corpus, single_process)
    found_stats, found = read(case, results, corpus, single_process)
    assert found_stats["tokens"] == stats["tokens"]
    for key in ("loss", "entropy", "mean_depth", "loss_per_loop", "exit_distribution", "losses", "valid"):
        assert found_stats[key] == pytest.approx(stats[key], rel=1e-5), key
    assert len(set(found_stats["losses"])) == len(found_stats["losses"]), "the ten steps changed nothing"
    moving = {key for key, value in expected.items() if value.abs().max() > 0}
    assert len(moving) > 1 and all(found[key].abs().max() == 0 for key in set(expected) - moving)
    assert_close_relative(*(as_affine_maps({key: side[key] for key in moving}) for side in (found, expected)), 1e-5)


@pytest.mark.parametrize("layout", RACES)
def test_a_step_repeated_twenty_times_gives_the_same_bits(layout, results):
    """Statistics and every gradient on every rank: a message that overtakes another would change them."""
    stats = json.loads((results / folder_of(Case(layout, "mla lru")) / "stats.json").read_text())
    assert stats["different"] == 0


def test_parallel_start_is_idempotent(single_process):
    assert parallel.start(1234).tp.size() == 1
