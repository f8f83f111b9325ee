"""Every layout compared with a single process: losses and all gradients, because equal losses hide wrong gradients."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.process_groups_config import ProcessGroupCollection

from looplm.config import GateConfig, ModelConfig, ParallelConfig, RunConfig
from looplm.megatron import process_groups
from looplm.model import LoopLM
from tests.support import worker
from tests.support.launch import EVERYTHING, launch
from tests.support.parity import assert_close_relative, relative_error
from tests.support.tiny import MODEL, run_config

# Large initial weights make the loops differ. The gate's gradients are differences of the loops' losses: if those were
# small, the test would measure rounding.
MLA = dataclasses.replace(MODEL, num_attention_heads=4, q_lora_rank=12, init_std=0.2)
MHA = ModelConfig(
    vocab_size=MODEL.vocab_size,
    hidden_size=32,
    ffn_hidden_size=48,
    num_layers=2,
    num_loops=2,
    num_attention_heads=8,
    num_query_groups=4,
    attention="mha",
    init_std=0.2,
    max_sequence_length=64,
)
LRU = GateConfig(state_size=8, sequence_level=True)
LINEAR = GateConfig(kind="linear")
# With the default slope of 50, the gate stage's targets (sigmoids of the slope times differences of losses) would be
# dominated by rounding.
GATE_STAGE = {"loss": {"objective": "adaptive_gate", "slope": 5.0}, "checkpoint": {"initial": "unused"}}

LATER = (
    "mha biases, normed heads",
    "mla mlp",
    "mha tied head",
    "mla geometric prior",
    "mha last loop",
    "mla uniform weights",
    "mha batch regularizer",
    "mla prelude and coda",
    "mha prelude, coda, readout norm",
    "mla coda gate stage",
    "mla linear injection",
    "mha diagonal injection",
    "mha prelude, additive injection",
    "mha truncated gradients",
    "mla stability",
    "mla plain latent",
    "mla step embedding",
    "mla element gate",
    "mha head gate",
    "mla loop onset",
    "mha sampled loops",
    "mla latent reasoning",
    "mla one loop",
)  # initialized last: a new model must not move the others' seeds
MODELS: dict[str, tuple[ModelConfig, GateConfig, dict[str, Any]]] = {
    "mla lru": (MLA, LRU, {}),
    "mla linear": (MLA, LINEAR, {}),
    "mha lru": (MHA, LRU, {}),
    "mha linear": (MHA, LINEAR, {}),
    LATER[0]: (dataclasses.replace(MHA, qkv_bias=True, qk_norm=True), LINEAR, {}),
    LATER[1]: (MLA, GateConfig(kind="mlp", hidden_size=8), {}),
    LATER[2]: (dataclasses.replace(MHA, tie_embeddings=True), LINEAR, {}),
    LATER[3]: (MLA, LRU, {"loss": {"prior": "geometric", "geometric_rate": 0.3}}),
    LATER[4]: (MHA, LRU, {"loss": {"weights": "last"}}),
    LATER[5]: (MLA, LINEAR, {"loss": {"weights": "uniform"}}),
    LATER[6]: (MHA, LRU, {"loss": {"regularizer": "batch", "beta": 0.3, "ponder_cost": 0.05}}),
    LATER[7]: (dataclasses.replace(MLA, prelude_layers=1, coda_layers=2), LRU, {}),
    LATER[8]: (dataclasses.replace(MHA, prelude_layers=2, coda_layers=1, loop_norm="readout"), LINEAR, {}),
    LATER[9]: (dataclasses.replace(MLA, coda_layers=1, loop_norm="readout"), LRU, GATE_STAGE),
    LATER[10]: (dataclasses.replace(MLA, injection="linear"), LRU, {}),
    LATER[11]: (dataclasses.replace(MHA, injection="diagonal"), LINEAR, {}),
    LATER[12]: (dataclasses.replace(MHA, injection="additive", prelude_layers=1, tie_embeddings=True), LRU, {}),
    LATER[13]: (MHA, LRU, {"loss": {"backward_loops": 1}}),
    LATER[14]: (MLA, LRU, {"loss": {"stability": 0.3}}),
    LATER[15]: (dataclasses.replace(MLA, kv_latent_norm=False), LRU, {}),
    LATER[16]: (dataclasses.replace(MLA, step_embedding="learned", injection="diagonal"), LRU, {}),
    LATER[17]: (dataclasses.replace(MLA, attention_gate="element"), LRU, {}),
    LATER[18]: (dataclasses.replace(MHA, attention_gate="head"), LINEAR, {}),
    LATER[19]: (MLA, LRU, {"loss": {"loop_onset": 0.5, "onset_loops": 2}}),
    LATER[20]: (dataclasses.replace(MHA, num_loops=3), LINEAR, {"loss": {"sampled_loops": "uniform"}}),  # 2, then 1
    LATER[21]: (dataclasses.replace(MLA, latent_iterations=2, latent_halting=True), LRU, {}),
    LATER[22]: (dataclasses.replace(MLA, num_loops=1), LRU, {}),
    "mla lru one document": (MLA, LRU, {"data": {"document_masking": False}}),
    "mla lru gate stage": (MLA, LRU, GATE_STAGE),
    "mha linear gate stage": (MHA, LINEAR, GATE_STAGE),
}
DRAWN = ("gate.", ".halt.")  # parts of the names of weights that the tests draw themselves
STEPS = 10 if EVERYTHING else 4  # of SEVERAL_STEPS; the other models train for two
SEVERAL_STEPS = ("mla lru", "mha linear")
MODELS |= {f"{name} in brief": MODELS[name] for name in SEVERAL_STEPS}  # the same for two steps


class Layout(NamedTuple):
    """Parallel layout of a case. Small micro-batches fill a pipeline, large ones save tensor parallelism messages."""

    ranks: int
    parallel: ParallelConfig
    micro_batch: int
    num_layers: int = 2


DISTRIBUTED = ParallelConfig(distributed_optimizer=True)
OVERLAPPED = dataclasses.replace(DISTRIBUTED, overlap_grad_reduce=True)
GATHERED_LATE = dataclasses.replace(OVERLAPPED, overlap_param_gather=True)
MAIN_LAYOUTS = {
    "TP2 + SP": Layout(2, ParallelConfig(tensor=2), 4),
    "PP2": Layout(2, ParallelConfig(pipeline=2), 1),
    "CP2": Layout(2, ParallelConfig(context=2), 4),
    "DP2": Layout(2, ParallelConfig(), 1),
    "DP2 + distributed optimizer": Layout(2, DISTRIBUTED, 1),
    "TP4 + SP": Layout(4, ParallelConfig(tensor=4), 4),
    "PP4": Layout(4, ParallelConfig(pipeline=4), 1, num_layers=4),
    "TP2 + SP x PP2": Layout(4, ParallelConfig(tensor=2, pipeline=2), 2),
    "TP2 + SP x CP2": Layout(4, ParallelConfig(tensor=2, context=2), 4),
}
LAYOUTS = MAIN_LAYOUTS | {
    "alone": Layout(1, ParallelConfig(), 4),
    "alone, one by one": Layout(1, ParallelConfig(), 1),
    "alone, 4 layers": Layout(1, ParallelConfig(), 4, num_layers=4),
    "TP2 without SP": Layout(2, ParallelConfig(tensor=2, sequence=False), 4),
    "PP2, 3 + 1 layers": Layout(2, ParallelConfig(pipeline=2, first_stage_layers=3), 1, num_layers=4),
    "CP2 x DP2": Layout(4, ParallelConfig(context=2), 2),
    "CP2 x PP2": Layout(4, ParallelConfig(context=2, pipeline=2), 1),
    "TP2 + SP x DP2, overlapped": Layout(4, dataclasses.replace(OVERLAPPED, tensor=2), 2),
    "PP2 x DP2": Layout(4, ParallelConfig(pipeline=2), 1),
    "PP2 x DP2, overlapped": Layout(4, dataclasses.replace(OVERLAPPED, pipeline=2), 1),
    "DP2, overlapped": Layout(2, ParallelConfig(overlap_grad_reduce=True), 1),
    "DP2 + distributed optimizer, overlapped": Layout(2, OVERLAPPED, 1),
    "DP2 + distributed optimizer, gathered late": Layout(2, GATHERED_LATE, 1),
    "PP2 x DP2, gathered late": Layout(4, dataclasses.replace(GATHERED_LATE, pipeline=2), 1),
    "TP2 + SP, selective": Layout(2, ParallelConfig(tensor=2, recompute="selective"), 4),
    "TP2 + SP, full": Layout(2, ParallelConfig(tensor=2, recompute="full"), 4),
    "TP2 + SP, loop": Layout(2, ParallelConfig(tensor=2, recompute="loop"), 4),
    "PP2, full": Layout(2, ParallelConfig(pipeline=2, recompute="full"), 1),
    "PP2, loop": Layout(2, ParallelConfig(pipeline=2, recompute="loop"), 1),
    "CP2, full": Layout(2, ParallelConfig(context=2, recompute="full"), 4),
}
REPEATS = 19 if EVERYTHING else 3  # of a step in RACES: messages that overtake each other would change its bits
RACES = ("PP2", "TP2 + SP x PP2")


class ModelInLayout(NamedTuple):
    """One model in one layout."""

    layout: str
    model: str

    @property
    def alone(self) -> "ModelInLayout":
        """The same model on one process, in micro-batches of the same size if that matters."""
        if self.model == LATER[6] and LAYOUTS[self.layout].micro_batch == 1:
            return ModelInLayout("alone, one by one", self.model)
        return ModelInLayout("alone" if LAYOUTS[self.layout].num_layers == 2 else "alone, 4 layers", self.model)


def cases(model: str, *layouts: str) -> list[ModelInLayout]:
    return [ModelInLayout(layout, model) for layout in layouts]


CASES = [
    *(case for model in ("mla lru", "mla linear", "mha lru", "mha linear") for case in cases(model, *MAIN_LAYOUTS)),
    *cases("mla lru gate stage", *MAIN_LAYOUTS, "PP2 x DP2, overlapped"),
    *cases("mha linear gate stage", "PP2", "TP2 + SP x PP2"),
    *cases("mla lru one document", "PP2, 3 + 1 layers", "CP2 x DP2", "CP2 x PP2", "TP2 + SP x DP2, overlapped"),
    *cases("mla lru one document", "PP2 x DP2", "PP2 x DP2, overlapped"),
    *cases("mla lru", "DP2, overlapped", "DP2 + distributed optimizer, overlapped"),
    *cases("mla lru", "DP2 + distributed optimizer, gathered late", "PP2 x DP2, gathered late"),
    *cases("mha linear gate stage", "DP2 + distributed optimizer, gathered late"),
    *cases("mla lru in brief", "TP2 + SP, selective", "TP2 + SP, full", "PP2, loop", "CP2, full"),
    *cases("mha linear in brief", "TP2 + SP, loop", "PP2, full"),
    *cases("mha lru", "TP2 without SP"),
    *cases(LATER[0], "TP2 + SP", "TP2 without SP", "PP2"),
    *cases(LATER[1], "TP2 + SP", "PP2", "CP2", "TP2 + SP x PP2"),
    *cases(LATER[2], "TP2 + SP", "TP2 without SP", "CP2", "DP2, overlapped", "TP2 + SP x DP2, overlapped"),
    *cases(LATER[2], "TP2 + SP, loop"),
    *cases(LATER[3], "TP2 + SP", "PP2", "CP2", "PP2, loop"),
    *cases(LATER[4], "TP2 + SP", "PP2", "CP2", "DP2, overlapped", "PP2 x DP2, overlapped"),
    *cases(LATER[5], "TP2 + SP", "PP2", "CP2", "TP2 + SP x PP2"),
    *cases(LATER[6], "TP2 + SP", "PP2", "CP2", "TP2 + SP x CP2", "CP2 x PP2"),
    *cases(LATER[7], "TP2 + SP", "PP2, loop", "CP2, full"),
    *cases(LATER[8], "TP2 + SP, loop", "PP2, full"),
    *cases(LATER[9], "PP2"),
    *cases(LATER[10], "TP2 + SP", "PP2"),
    *cases(LATER[11], "TP2 without SP", "PP2, loop"),
    *cases(LATER[12], "CP2"),
    *cases(LATER[13], "TP2 + SP", "PP2"),
    *cases(LATER[14], "TP2 + SP", "CP2"),
    *cases(LATER[15], "TP2 + SP"),
    *cases(LATER[16], "TP2 + SP", "PP2"),
    *cases(LATER[17], "TP2 + SP, selective"),
    *cases(LATER[18], "TP2 without SP"),
    *cases(LATER[19], "PP2"),
    *cases(LATER[20], "PP2"),
    *cases(LATER[21], "TP2 + SP", "PP2"),
]
if EVERYTHING:
    CASES += [
        *cases(LATER[7], "PP2", "CP2", "TP2 + SP x PP2", "PP4", "TP2 + SP x CP2", "CP2 x PP2"),
        *cases(LATER[7], "DP2 + distributed optimizer, gathered late"),
        *cases(LATER[8], "TP2 + SP", "PP2", "CP2", "TP2 without SP", "PP2 x DP2"),
        *cases(LATER[9], "TP2 + SP", "PP2 x DP2, overlapped"),
        *cases(LATER[10], "CP2", "TP2 + SP x PP2", "PP2 x DP2, gathered late"),
        *cases(LATER[11], "TP2 + SP", "PP2", "PP2 x DP2, overlapped"),
        *cases(LATER[12], "TP2 + SP", "DP2, overlapped"),
        *cases(LATER[13], "CP2", "CP2 x PP2", "PP2 x DP2, overlapped"),
        *cases(LATER[14], "DP2, overlapped"),
        *cases(LATER[15], "PP2", "CP2"),
        *cases(LATER[16], "CP2", "TP2 + SP, loop", "TP2 + SP x PP2", "PP2 x DP2, overlapped"),
        *cases(LATER[17], "TP2 + SP", "PP2, full", "CP2", "TP2 + SP x PP2"),
        *cases(LATER[18], "CP2", "TP2 + SP, loop", "PP2", "DP2, overlapped"),
        *cases(LATER[19], "TP2 + SP", "CP2", "PP2, loop", "TP2 + SP x PP2", "DP2 + distributed optimizer"),
        *cases(LATER[20], "TP2 + SP", "CP2", "TP2 + SP, loop", "TP2 + SP x PP2", "DP2"),
        *cases(LATER[21], "CP2", "PP2, loop", "DP2, overlapped", "DP2 + distributed optimizer, gathered late"),
        *cases(LATER[22], "PP2", "PP4", "TP2 + SP x PP2", "PP2 x DP2, overlapped"),
    ]
FOUR_RANK_SAMPLE = {
    ModelInLayout("TP2 + SP x PP2", "mla lru"),
    ModelInLayout("TP2 + SP x CP2", "mla linear"),
    ModelInLayout("PP4", "mla lru gate stage"),
    ModelInLayout("PP2 x DP2", "mla lru one document"),
    ModelInLayout("PP2 x DP2, overlapped", "mla lru one document"),
}
# Replicas treat all models alike, so two of them are enough.
REPLICAS = ("DP2", "DP2 + distributed optimizer")
MODELS_OF_REPLICAS = ("mla lru", "mha linear")
if not EVERYTHING:
    CASES = [case for case in CASES if LAYOUTS[case.layout].ranks < 4 or case in FOUR_RANK_SAMPLE]
    CASES = [case for case in CASES if case.layout not in REPLICAS or case.model in MODELS_OF_REPLICAS]
# A sum of two terms does not depend on their order, so these gradients must agree in every bit.
SAME_BITS = [
    (ModelInLayout(plain, model), ModelInLayout(other, model))
    for model, plain, *others in (
        (
            "mla lru",
            "DP2",
            *("DP2, overlapped", "DP2 + distributed optimizer", "DP2 + distributed optimizer, overlapped"),
        ),
        ("mla lru one document", "PP2 x DP2", "PP2 x DP2, overlapped"),
    )
    for other in others
]


def config_of(case: ModelInLayout, corpus: Path, folder: Path) -> RunConfig:
    config, gate, sections = MODELS[case.model]
    layout = LAYOUTS[case.layout]
    data = sections.get("data", {}) | {"global_batch_size": 4, "micro_batch_size": layout.micro_batch}
    model = dataclasses.replace(config, num_layers=layout.num_layers)
    optim = {"train_steps": STEPS if case.model in SEVERAL_STEPS else 2, "decay_steps": 0, "warmup_steps": 1}
    sections = sections | {"data": data, "optim": optim, "model": model, "gate": gate, "parallel": layout.parallel}
    return run_config(corpus, folder / "run", **sections)


REPLICATED = ModelInLayout("TP2 + SP", "mla lru")
STOCK = "stock projections"  # the folder of the same case with Megatron's own down projections


def folder_of(case: ModelInLayout) -> str:
    return f"{case.layout} of {case.model}".replace(" ", "_").replace(",", "")


@pytest.fixture(scope="module")
def results(corpus, tmp_path_factory, single_process) -> Path:
    """Return the folder with the workers' results: for each model on one process, and for each case."""
    folder = tmp_path_factory.mktemp("layouts")
    later = {model: 1 + index for index, model in enumerate(LATER)}
    references = sorted({case.alone for case in CASES}, key=lambda case: (later.get(case.model, 0), case))
    for number, case in enumerate(references):
        config = config_of(case, corpus, folder)
        # With these seeds no gradient cancels to nearly zero, where the comparison would measure rounding.
        torch.manual_seed(200 + number)
        model = LoopLM(config.model, config.gate, single_process)
        with torch.no_grad():  # some gradients are zero at the initial weights of the gate and of latent reasoning
            for key, parameter in model.named_parameters():
                if any(part in key for part in DRAWN):
                    parameter.normal_(std=0.3)
        weights = folder / "weights" / folder_of(case)
        weights.mkdir(parents=True)
        dist_checkpointing.save({"model": model.sharded_state_dict()}, str(weights))

    jobs: dict[int, list[Callable[[], None]]] = {1: [], 2: [], 4: []}
    for case in [*references, *CASES]:
        repeats = REPEATS if case.layout in RACES and case.model == "mla lru" else 0
        weights, output = folder / "weights" / folder_of(case.alone), folder / folder_of(case)
        job = partial(worker.train_steps, config_of(case, corpus, folder), weights, output, repeats)
        jobs[LAYOUTS[case.layout].ranks].append(job)
    config = config_of(REPLICATED, corpus, folder)
    # Only the gradients of the first step are compared.
    brief = dataclasses.replace(config, optim=dataclasses.replace(config.optim, train_steps=2))
    weights = folder / "weights" / folder_of(REPLICATED.alone)
    jobs[2].append(partial(worker.train_steps, brief, weights, folder / STOCK, stock_projections=True))
    for ranks, todo in jobs.items():
        launch(ranks, todo, folder)
    return folder


def as_affine_maps(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Join the gradients of the gate's read-outs, which together are one affine map onto one logit.

    The bias is one column of that map. Compared alone, this single number would measure rounding if its sum over the
    tokens happened to cancel.
    """
    readouts = sorted(key for key in gradients if "readout" in key)
    if not readouts:  # the gate is not trained
        return gradients
    others = {key: value for key, value in gradients.items() if key not in readouts}
    return others | {"gate read-outs": torch.cat([gradients[key].flatten() for key in readouts])}


def read(
    case: ModelInLayout, results: Path, corpus: Path, groups: ProcessGroupCollection, name: str | None = None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the statistics and the whole gradients of a case."""
    config = config_of(case.alone, corpus, results)
    model = LoopLM(config.model, config.gate, groups)
    folder = results / (name or folder_of(case))
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder / "state"))
    model.load_state_dict(state["model"], strict=False)
    stats = json.loads((folder / "stats.json").read_text())
    return stats, {key: value.detach().clone() for key, value in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.layout}: {case.model}")
def test_gradients_and_losses_equal_those_of_a_single_process(case, results, corpus, single_process):
    stats, expected = read(case.alone, results, corpus, single_process)
    found_stats, found = read(case, results, corpus, single_process)
    assert found_stats["tokens"] == stats["tokens"]
    for key in ("loss", "entropy", "mean_depth", "loss_per_loop", "exit_distribution", "losses", "valid"):
        assert found_stats[key] == pytest.approx(stats[key], rel=1e-5, nan_ok=True), key
    for key in ("hidden_rms", "hidden_grad_norm", "hidden_cosine", "grad_norms"):
        assert found_stats[key] == pytest.approx(stats[key], rel=1e-4, nan_ok=True), key
    assert len(set(found_stats["losses"])) == len(found_stats["losses"]), "training did not change the loss"
    trained = {key for key, value in expected.items() if value.abs().max() > 0}
    assert len(trained) > 1 and all(found[key].abs().max() == 0 for key in set(expected) - trained)
    actual, wanted = (as_affine_maps({key: side[key] for key in trained}) for side in (found, expected))
    assert_close_relative(actual, wanted, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("one", "other"), SAME_BITS, ids=lambda case: case.layout)
def test_all_ways_to_reduce_gradients_give_the_same_bits(one, other, results, corpus, single_process):
    (_, expected), (_, found) = (read(case, results, corpus, single_process) for case in (one, other))
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.slow
def test_weights_that_are_gathered_late_give_the_same_bits(results):
    """A module that read its weights before they have arrived would compute with those of the step before."""
    late = ModelInLayout("DP2 + distributed optimizer, gathered late", "mla lru")
    early = late._replace(layout="DP2 + distributed optimizer, overlapped")
    found, expected = (json.loads((results / folder_of(case) / "stats.json").read_text()) for case in (late, early))
    assert found == expected


@pytest.mark.slow
def test_megatrons_own_mla_projections_give_the_right_loss_and_wrong_gradients(results, corpus, single_process):
    """The gradients compared above show the fault that looplm.model.local_layers.ReplicatedLinear works around."""
    stats, expected = read(REPLICATED.alone, results, corpus, single_process)
    found_stats, found = read(REPLICATED, results, corpus, single_process, STOCK)
    assert found_stats["loss"] == pytest.approx(stats["loss"], rel=1e-6)
    wrong = {name for name in expected if relative_error(found[name], expected[name]) > 1e-4}
    assert {name for name in expected if "linear_kv_down_proj" in name} <= wrong, sorted(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("layout", RACES)
def test_a_repeated_step_gives_the_same_bits(layout, results):
    """Messages that overtake each other would change the statistics or a gradient on some rank."""
    stats = json.loads((results / folder_of(ModelInLayout(layout, "mla lru")) / "stats.json").read_text())
    assert stats["different"] == 0


def test_starting_the_process_groups_twice_is_allowed(single_process):
    assert process_groups.start(1234).tp.size() == 1
