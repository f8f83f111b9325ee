"""Context parallelism against the single process: the deal itself, gradients of each parameter, and whole runs."""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

from looplm import context
from looplm.cli import to_dict
from looplm.config import GateConfig, ModelConfig, RunConfig
from looplm.layers import document_mask
from looplm.layout import ParallelConfig
from looplm.model import LoopLM
from pretrain.data import check_corpus
from pretrain.train import train
from tests.parallel.launch import launch
from tests.parallel.test_layouts import as_affine_maps
from tests.parallel.worker import steps
from tests.parity import assert_close_relative
from tests.tiny import MODEL, run_config, train_rows

MLA = dataclasses.replace(MODEL, num_attention_heads=4, q_lora_rank=12)
GQA = ModelConfig(
    vocab_size=MODEL.vocab_size, hidden_size=32, ffn_hidden_size=48, num_layers=2, num_loops=3, num_attention_heads=4,
    attention="mha", num_query_groups=2, max_sequence_length=64,
)  # fmt: skip
SEQUENCE = GateConfig(state_size=8, sequence_level=True)
LINEAR = GateConfig(kind="linear")
DOCUMENTS = {"data": {"document_masking": True}}
ONE_DOCUMENT = {"data": {"document_masking": False}}
# The targets are sigmoids of the slope times a difference of losses: at 50 the test would measure rounding.
GATE_STAGE = {"loss": {"objective": "adaptive_gate", "slope": 5.0}, "checkpoint": {"initial": "unused"}}

MODELS: dict[str, tuple[ModelConfig, GateConfig, dict[str, Any]]] = {
    "mla lru": (MLA, SEQUENCE, DOCUMENTS),
    "mla lru, one document": (MLA, SEQUENCE, ONE_DOCUMENT),
    "mla lru, gate stage": (MLA, SEQUENCE, GATE_STAGE),
    "gqa linear, one document": (GQA, LINEAR, ONE_DOCUMENT),
    "gqa lru": (GQA, SEQUENCE, DOCUMENTS),
}
LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "CP2": (2, ParallelConfig(context=2)),
    "CP2 x DP2": (4, ParallelConfig(context=2)),
    "CP2 x TP2 + SP": (4, ParallelConfig(context=2, tensor=2)),
    "CP2 x TP2 without SP": (4, ParallelConfig(context=2, tensor=2, sequence=False)),
    "CP2 x PP2": (4, ParallelConfig(context=2, pipeline=2)),
    "CP4": (4, ParallelConfig(context=4)),
}
CASES = [
    ("CP2", "mla lru"),
    ("CP2", "mla lru, gate stage"),
    ("CP2", "gqa linear, one document"),
    ("CP2 x DP2", "gqa lru"),
    ("CP2 x TP2 + SP", "mla lru"),
    ("CP2 x TP2 without SP", "gqa lru"),
    ("CP2 x PP2", "mla lru"),
    ("CP2 x PP2", "mla lru, gate stage"),
    ("CP4", "mla lru, one document"),
]


@dataclass(frozen=True)
class Rank:
    """Stands in for a process group, seen from one of its ranks."""

    place: int
    ranks: int

    def rank(self) -> int:
        return self.place

    def size(self) -> int:
        return self.ranks


def group_of(ranks: int) -> list[Rank]:
    return [Rank(place, ranks) for place in range(ranks)]


def documents(length: int) -> torch.Tensor:
    """[S, 2]: one sample of three documents, one of a single one."""
    starts = torch.zeros(length, 2, dtype=torch.int64)
    starts[3:, 0], starts[length - 5 :, 0] = 3, length - 5
    return starts


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_what_is_dealt_can_be_put_back(ranks, monkeypatch):
    whole = torch.randn(8 * ranks, 2, 3)
    held = [context.deal(whole, rank) for rank in group_of(ranks)]
    monkeypatch.setattr(context, "gather_from_sequence_parallel_region", lambda mine, group: torch.cat(held))
    for rank in group_of(ranks):
        assert torch.equal(context.restore(held[rank.place], rank), whole)
        assert torch.equal(context.deal(whole.transpose(0, 1), rank, dim=1), held[rank.place].transpose(0, 1))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_positions_are_those_of_megatrons_rotary_embedding(ranks, single_process):
    angles = torch.arange(12.0 * ranks).view(-1, 1, 1, 1)
    for rank in group_of(ranks):
        mine = context.positions(12 * ranks, rank)
        assert torch.equal(get_pos_emb_on_this_cp_rank(angles, 0, rank).flatten(), mine.float())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_spans_are_consecutive_and_see_no_later_key(ranks):
    work = set()
    for rank in group_of(ranks):
        mine, found = context.positions(8 * ranks, rank), []
        for own, seen in context.spans(len(mine), rank):
            run = mine[own]
            assert torch.equal(run, torch.arange(seen - len(run), seen))
            found.append(run)
        assert torch.equal(torch.cat(found), mine)
        work.add(int((mine + 1).sum()))
    assert len(work) == 1, f"causal work is uneven: {work}"


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_ranks_document_mask_is_its_rows_of_the_whole_one(ranks):
    starts = documents(8 * ranks)
    whole = document_mask(starts, torch.float32)
    for rank in group_of(ranks):
        mine = document_mask(context.deal(starts, rank), torch.float32, rank)
        assert torch.equal(mine, context.deal(whole, rank, dim=2))


def test_a_sequence_that_cannot_be_dealt_is_refused():
    with pytest.raises(RuntimeError):
        context.deal(torch.zeros(10, 1), Rank(0, 2))


def config_of(model: str, corpus: Path, folder: Path, layout: ParallelConfig) -> RunConfig:
    shape, gate, sections = MODELS[model]
    return run_config(corpus, folder / "run", model=shape, gate=gate, parallel=layout, **sections)


def train_config(name: str, corpus: Path, folder: Path, layout: ParallelConfig) -> RunConfig:
    saving = {"save_every": 3, "keep": 2}
    logging = {"eval_every": 3, "eval_samples": 4}
    return run_config(
        corpus, folder / name, model=MLA, gate=SEQUENCE, parallel=layout, checkpoint=saving, logging=logging
    )


def lose_the_last_save(run: Path) -> None:
    (run / "checkpoints/step_00000006/manifest.json").unlink()


@pytest.fixture(scope="module")
def results(corpus, tmp_path_factory, single_process) -> Path:
    """Gradients of every model alone and of every case; runs that change from one process to CP2 and back."""
    folder = tmp_path_factory.mktemp("context")
    for number, name in enumerate(MODELS):
        config = config_of(name, corpus, folder, ParallelConfig())
        torch.manual_seed(200 + number)
        model = LoopLM(config.model, config.gate, single_process)
        with torch.no_grad():  # off its start the gate's gradients are not zero
            for parameter in model.gate.parameters():
                parameter.normal_(std=0.3)
        (folder / name).mkdir()
        dist_checkpointing.save({"model": model.sharded_state_dict()}, str(folder / name))
        steps(config, str(folder / name), folder / f"alone of {name}")
    jobs: dict[int, list[dict[str, Any]]] = {2: [], 4: []}
    for layout, name in CASES:
        ranks, config = LAYOUTS[layout][0], config_of(name, corpus, folder, LAYOUTS[layout][1])
        job = {"kind": "steps", "config": to_dict(config), "weights": str(folder / name)}
        jobs[ranks].append(job | {"output": str(folder / f"{layout} of {name}")})

    alone = train_config("alone", corpus, folder, ParallelConfig())
    train(alone, check_corpus(alone), single_process)
    shutil.copytree(folder / "alone", folder / "to_cp2")
    lose_the_last_save(folder / "to_cp2")
    for name in ("to_cp2", "from_cp2"):
        config = train_config(name, corpus, folder, ParallelConfig(context=2))
        jobs[2].append({"kind": "train", "config": to_dict(config)})
    for ranks, todo in jobs.items():
        launch(ranks, todo, folder, timeout=600)
    return folder


def read(layout: str, name: str, results: Path, corpus: Path, groups) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Statistics and gradients, as one process holds them."""
    config = config_of(name, corpus, results, ParallelConfig())
    model = LoopLM(config.model, config.gate, groups)
    folder = results / f"{layout} of {name}"
    model.load_state_dict(
        dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder / "state"))["model"]
    )
    stats = json.loads((folder / "stats.json").read_text())
    return stats, {key: value.detach().clone() for key, value in model.named_parameters()}


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_gradients_and_ten_losses_equal_those_of_a_single_process(layout, name, results, corpus, single_process):
    stats, expected = read("alone", name, results, corpus, single_process)
    found_stats, found = read(layout, name, results, corpus, single_process)
    assert found_stats["tokens"] == stats["tokens"]
    for key in ("loss", "entropy", "mean_depth", "loss_per_loop", "exit_distribution", "losses", "valid"):
        assert found_stats[key] == pytest.approx(stats[key], rel=1e-5), key
    moving = {key for key, value in expected.items() if value.abs().max() > 0}
    assert len(moving) > 2 and all(found[key].abs().max() == 0 for key in set(expected) - moving)
    assert_close_relative(*(as_affine_maps({key: side[key] for key in moving}) for side in (found, expected)), 1e-5)


def test_a_run_may_change_between_one_process_and_context_ranks(results, corpus, single_process):
    """Training, validation, saving and resuming at CP2: as if one process had done it all."""
    lose_the_last_save(results / "from_cp2")
    resumed = train_config("from_cp2", corpus, results, ParallelConfig())
    train(resumed, check_corpus(resumed), single_process)
    expected = [row["loss"] for row in train_rows(results / "alone")]
    validation = valid_losses(results / "alone")
    assert len(expected) == 6 and len(validation) == 2
    for name in ("to_cp2", "from_cp2"):
        assert [row["loss"] for row in train_rows(results / name)] == pytest.approx(expected, rel=1e-5)
        assert valid_losses(results / name) == pytest.approx(validation, rel=1e-5)


def valid_losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "valid"]
