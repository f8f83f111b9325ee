"""The planner: formulas against accounting and Megatron's schedule, figures computed by hand, and the command."""

import json
import re
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from looplm.accounting import parameter_counts, training_flops_per_token
from looplm.cli import parse_config
from looplm.config import (
    DataConfig,
    DataSource,
    GateConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RampUpConfig,
    RunConfig,
)
from looplm.failures import UserError
from looplm.parameters import gate_parameters
from pretrain.batch_schedule import BatchSchedule
from pretrain.loops import loops_of_step
from tools import plan as plan_command
from tools.plan import PlanConfig, main
from tools.planning import communication, schedule
from tools.planning import estimate as estimates
from tools.planning.activations import core_bytes, in_flight, layer_bytes, peak_activation_bytes
from tools.planning.estimate import budget_of, days, estimate, pass_time, step_time
from tools.planning.flops import backward_flops, forward_flops, fp8_share, model_flops_per_token
from tools.planning.hardware import GIB, GPUS, LATENCY_S, Assumptions, Cluster, is_legal_number
from tools.planning.layouts import find_layouts
from tools.planning.planned_run import PlannedRun
from tools.planning.search import _more_gpus, rank_layouts

ROOT = Path(__file__).resolve().parents[2]
COMMON: dict[str, Any] = {
    **{"vocab_size": 4096, "hidden_size": 512, "ffn_hidden_size": 1408, "num_layers": 8, "num_loops": 4},
    **{"num_attention_heads": 4, "max_sequence_length": 2048},
}
LATENT = {"q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
MLA = ModelConfig(**COMMON | LATENT)
MHA = ModelConfig(**COMMON, attention="mha", num_query_groups=2)
# Forward, of a micro-batch of 2 x 1,024 tokens: accounting counts matrices, not biases.
GATE_FLOPS = 2 * 2 * 1024 * sum(row.size for row in gate_parameters(MLA, GateConfig()) if row.role == "matrix")
OURO = ["--config", str(ROOT / "configs/ouro-1.4b/mha.yaml"), "--config", str(ROOT / "configs/ouro-1.4b/stage1a.yaml")]
# A handful of layouts: the command does the same work for any number.
FEW = [*OURO, "--gpu", "h100", "--gpus", "2", "--model.num_loops", "2", "--data.seq_length", "1024"]
TOO_LARGE = ["--gpu", "a100-40", "--data.seq_length", "4096", "--model.hidden_size", "9216"]
TOO_LARGE += ["--data.rampup", "null", "--data.global_batch_size", "1152"]
FP8 = ["--engine.transformer_impl", "transformer_engine", "--engine.fp8", "hybrid"]

AROUND = replace(MLA, prelude_layers=1, coda_layers=2)
INJECTED = replace(MHA, injection="linear")
ENGINE = {"transformer_impl": "transformer_engine", "fp8": "hybrid"}
# Keys that refuse some of the layouts that are tried.
RESTRICTIVE: dict[str, dict[str, Any]] = {
    "sampled loops": {"loss": {"sampled_loops": "uniform"}},
    "loop onset": {"loss": {"loop_onset": 0.5}},
    "delayed scaling": {"engine": ENGINE | {"fp8_recipe": "delayed"}},
    "FP8 weights": {"engine": ENGINE | {"fp8_params": True}, "parallel": {"distributed_optimizer": True}},
    "penalized states": {"loss": {"stability": 0.1}},
}


def recipe(model: ModelConfig = MLA, **sections: Any) -> RunConfig:
    config = RunConfig(
        output_dir="unused",
        model=model,
        optim=OptimConfig(train_steps=10),
        data=DataConfig(
            train=(DataSource(prefix="unused"),), seq_length=1024, micro_batch_size=2, global_batch_size=64
        ),
    )
    return replace(config, **{key: replace(getattr(config, key), **values) for key, values in sections.items()})


def planned(replicas: int = 1, model: ModelConfig = MLA, **sections: Any) -> PlannedRun:
    return PlannedRun(recipe(model, **sections), replicas)


def cluster(gpus: int = 8, **changes: Any) -> Cluster:
    plain = Cluster(gpu=GPUS["h100"], gpus=gpus, node=8, network_gbs=50, fp8=False, assume=Assumptions())
    return replace(plain, **changes)


@pytest.mark.parametrize("model", [MLA, MHA, replace(MLA, q_lora_rank=None, sandwich_norm=False), AROUND])
def test_ranks_together_hold_the_whole_model(model: ModelConfig) -> None:
    gate = GateConfig()
    whole = sum(parameter_counts(model, gate).values())
    assert planned(model=model).trained(0) == whole
    split = planned(model=model, parallel={"pipeline": 4, "last_stage_layers": 2})
    assert sum(split.trained(rank) for rank in range(4)) == whole
    halves = planned(model=model, parallel={"tensor": 2})
    replicated = 2 * halves.trained(0) - whole
    layers = 8 + model.prelude_layers + model.coda_layers
    norms = layers * (4 if model.sandwich_norm else 2) * 512 + (1024 if model.coda_layers else 512)
    latent = 0
    if model.attention == "mla":
        widths = (model.q_lora_rank or 0) + 64
        latent = layers * (512 * (widths + 32) + widths)
    assert replicated == norms + latent + parameter_counts(model, gate)["gate"]


@pytest.mark.parametrize("sizes", [(2, 1, 4), (2, 4, 2), (2, 4, 8), (4, 2, 8), (4, 4, 4), (4, 4, 16), (8, 3, 24)])
def test_in_flight_passes_match_the_schedule(sizes: tuple[int, int, int]) -> None:
    ranks, loops, micro_batches = sizes
    model = replace(MLA, num_loops=loops)
    one = planned(model=model, parallel={"pipeline": ranks}, data={"global_batch_size": 2 * micro_batches})
    slots = schedule.simulate([schedule.interleaved_order(*sizes)], schedule.Costs())
    assert [in_flight(one, rank) for rank in range(ranks)] == [schedule.in_flight([row]) for row in slots]


@pytest.mark.parametrize("model", [MLA, MHA, AROUND, INJECTED])
@pytest.mark.parametrize("weights", ["gate", "last", "uniform"])
def test_flops_of_all_passes_match_accounting(model: ModelConfig, weights: str) -> None:
    """Without recomputation and mask, all loops and ranks together compute the model's FLOPs.

    Attention's kernels compute more than that: padded values, and the scores again in backward.
    """
    plain: dict[str, Any] = {"data": {"document_masking": False}, "loss": {"weights": weights}}
    one = planned(2, model, **plain, parallel={"tensor": 2, "pipeline": 2, "context": 2})
    widths = model.attention_widths
    padded = 2 * widths.query_key / (widths.query_key + widths.value)
    each = 0.0
    for rank in range(2):
        forward, backward = forward_flops(one, rank), backward_flops(one, rank)
        coda_of_last = weights == "last" and model.coda_layers and rank == 1
        assert coda_of_last or backward.attention == 2.5 * forward.attention
        attention = (forward.attention + 2 * backward.attention / 2.5) / padded
        each += (forward + backward).total - forward.attention - backward.attention + attention
    asked = training_flops_per_token(model, GateConfig(), one.config.loss, 1024, 4) * 2 * 1024
    assert 4 * each * 2 * 2 == pytest.approx(asked)
    assert model_flops_per_token(one) * 2 * 1024 == pytest.approx(asked)


def test_recomputation_costs_a_forward() -> None:
    def backward(mode: str) -> float:
        return backward_flops(planned(parallel={"recompute": mode}), 0).total

    forward = forward_flops(planned(), 0)
    assert backward("none") == pytest.approx(2 * (forward.layers + GATE_FLOPS) + 2.5 * forward.attention)
    assert backward("selective") - backward("none") == pytest.approx(forward.attention)
    assert backward("loop") == backward("full")
    assert backward("loop") - backward("none") == pytest.approx(forward.layers + forward.attention)


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}, {"context": 8}, {"pipeline": 2, "context": 2}])
@pytest.mark.parametrize("model", [MLA, MHA, replace(MHA, qk_norm=True), AROUND])
def test_selective_recomputation_takes_time(model: ModelConfig, layout: dict[str, int]) -> None:
    """Forward writes the same whatever it keeps, and backward writes what attention's core does once more."""
    on = cluster(8)
    plain, selective = (planned(2, model, parallel=layout | {"recompute": mode}) for mode in ("none", "selective"))
    assert pass_time(selective, 0, on, backward=False) == pass_time(plain, 0, on, backward=False)
    found, unrecomputed = (pass_time(one, 0, on, backward=True) for one in (selective, plain))
    assert found.traffic > unrecomputed.traffic and found.attention > unrecomputed.attention
    assert step_time(selective, on, 64).total > step_time(plain, on, 64).total


def test_the_head_computes_its_gradients_in_the_forward_pass() -> None:
    """Three products of the head's size in stage 1, one where only the gate is trained; none in backward."""
    stages = planned(), planned(loss={"objective": "adaptive_gate"}, checkpoint={"initial": "unused"})
    product = 2 * MLA.vocab_size * MLA.hidden_size * 2 * 1024
    assert [forward_flops(stage, 0).head - GATE_FLOPS for stage in stages] == [3 * product, product]
    assert backward_flops(stages[0], 0).head == 2 * GATE_FLOPS


def test_a_last_loops_loss_has_one_backward_of_the_head_and_the_coda() -> None:
    """The other loops have one product of the head's size; the gate is not trained, so it runs forward only."""
    one, all_loops = planned(model=AROUND, loss={"weights": "last"}), planned(model=AROUND)
    product, loops = 2 * AROUND.vocab_size * AROUND.hidden_size * 2 * 1024, AROUND.num_loops
    assert loops * (forward_flops(one, 0).head - GATE_FLOPS) == pytest.approx(product * (loops - 1 + 3))
    assert forward_flops(one, 0).layers == forward_flops(all_loops, 0).layers
    assert backward_flops(one, 0).head == 0
    layer = forward_flops(all_loops, 0).layers / all_loops.layers_in_a_pass(0)
    saved = 2 * 2 * layer * (loops - 1)  # two layers
    assert loops * (backward_flops(all_loops, 0).layers - backward_flops(one, 0).layers) == pytest.approx(saved)
    on = cluster(1)
    assert all(pass_time(one, 0, on, way).total < pass_time(all_loops, 0, on, way).total for way in (False, True))


def test_the_injection_is_on_the_first_rank_and_in_every_later_loop() -> None:
    product = 2 * 512 * (2 * 512) * 2 * 1024 / 2  # of the half of the positions that a tensor-parallel rank holds
    without, one = (planned(model=model, parallel={"pipeline": 2, "tensor": 2}) for model in (MHA, INJECTED))
    for flops, factor in ((forward_flops, 1), (backward_flops, 2)):
        more = flops(one, 0).head - flops(without, 0).head
        assert more == pytest.approx(factor * product * 3 / 4)
        assert flops(one, 1) == flops(without, 1)


def test_documents_cost_no_mask() -> None:
    """They are counted as one document a sample, whose scores context parallelism divides evenly."""
    engine = {"transformer_impl": "transformer_engine"}
    for context in (1, 4):
        layout: dict[str, Any] = {"parallel": {"context": context}}
        one_document = planned(data={"document_masking": False}, **layout)
        for packed in (planned(**layout), planned(engine=engine, **layout)):
            assert forward_flops(packed, 0) == forward_flops(one_document, 0)
            assert peak_activation_bytes(packed, 0) == peak_activation_bytes(one_document, 0)
        assert forward_flops(one_document, 0).attention == pytest.approx(
            forward_flops(planned(), 0).attention / context
        )


def test_only_a_gpu_pads_values_to_the_width_of_queries() -> None:
    def padding(**sections: Any) -> float:
        run = planned(parallel={"recompute": "none"}, **sections)
        return layer_bytes(run) - layer_bytes(replace(run, padded_heads=False))

    assert padding(model=MHA) == 0
    tokens, heads, widths = 2 * 1024, MLA.num_attention_heads, MLA.attention_widths
    padded_value_and_output = 2 * widths.query_key - widths.value
    assert padding(model=MLA) == tokens * heads * padded_value_and_output * 2


@pytest.mark.parametrize(
    ("model", "context", "numbers"),
    [
        (MHA, 1, 4 * 128 + 2 * 128),  # the result, and a copy of the values
        (MHA, 8, 4 * 128 + 8 * 2 * (128 + 128)),  # the result, and all ranks' keys and values
        (MLA, 1, 4 * (64 + 96 + 32)),  # the result, also padded to 96, and the values' padding
        (
            MLA,
            8,
            4 * (64 + 96 + 8 * (96 + 64 + 96)),
        ),  # the result, also padded; gathered keys and values; padded values
    ],
)
def test_the_bytes_that_attentions_core_writes(model: ModelConfig, context: int, numbers: int) -> None:
    """For each token and besides the sums of the rows, which are in fp32."""
    found = core_bytes(planned(model=model, parallel={"context": context}))
    assert found == 2 * 1024 / context * (2 * numbers + 4 * 4)


def test_a_frozen_trunk_has_no_backward() -> None:
    frozen = planned(loss={"objective": "adaptive_gate"}, checkpoint={"initial": "unused"}, parallel={"pipeline": 2})
    gate = parameter_counts(MLA, GateConfig())["gate"]
    assert [frozen.trained(rank) for rank in range(2)] == [0, gate]
    assert backward_flops(frozen, 0).total == 0
    assert backward_flops(frozen, 1).total == 2 * GATE_FLOPS
    assert estimate(frozen, cluster(2)).memory.activations < 2**26


def test_messages_computed_by_hand() -> None:
    """One pass of 2 x 1,024 tokens in bf16."""
    hidden = 2 * 1024 * 512 * 2
    both = planned(2, MHA, parallel={"tensor": 2, "pipeline": 2, "context": 2, "distributed_optimizer": True})
    big = cluster(16)
    # Two sublayers, gathered and scattered, on this context rank's half, half of which is its own; the head's gather.
    tensor = communication.tensor_traffic(both, 1, big, backward=False)
    assert tensor.bytes == (4 * 4 * hidden / 2 + hidden / 2) / 2
    assert communication.tensor_traffic(both, 0, big, backward=False).bytes == 4 * 4 * hidden / 2 / 2
    # Keys and values of one head of 128 each, all 1,024 positions, 4 layers; half of it is the rank's own.
    keys = communication.context_traffic(both, 0, big, backward=False)
    assert keys.bytes == 4 * (2 * 1024) * (2 * 1 * 128) * 2 / 2
    assert communication.pipeline_message(both, big).bytes == hidden / 2 / 2
    # fp32 gradients and bf16 weights over the 2 x 2 ranks that hold the same parameters.
    assert communication.gradient_traffic(both, 0, big).bytes == both.trained(0) * 4 * 3 / 4
    assert communication.weight_traffic(both, 0, big).bytes == both.trained(0) * 2 * 3 / 4
    whole = planned(2, MHA, parallel={"tensor": 2, "pipeline": 2, "context": 2})
    assert communication.gradient_traffic(whole, 0, big).bytes == 2 * both.trained(0) * 4 * 3 / 4
    assert communication.weight_traffic(whole, 0, big).bytes == 0
    loop = planned(2, MHA, parallel={"tensor": 2, "recompute": "loop"})
    ways = [communication.tensor_traffic(loop, 0, big, backward=way).bytes for way in (False, True)]
    # Recomputed, but for the head; and the inputs of both sublayers are gathered once more in each of 8 layers.
    assert ways[1] == 2 * ways[0] - hidden / 2 + 8 * 2 * hidden / 2


@pytest.mark.parametrize(
    ("network", "node", "found"),
    [
        ("ib-400", 8, {(8, 1): 450, (4, 2): 450, (16, 1): 400, (8, 8): 50, (32, 2): 200, (2, 32): 50}),
        ("ib-400", 4, {(8, 1): 200, (4, 2): 100, (16, 1): 200, (8, 8): 50, (32, 2): 100, (2, 32): 50}),
        ("eth-100", 8, {(8, 1): 450, (4, 2): 450, (16, 1): 12.5, (8, 8): 12.5 / 8, (32, 2): 6.25, (2, 32): 12.5 / 8}),
        ("eth-100", 4, {(8, 1): 12.5, (4, 2): 6.25, (16, 1): 12.5, (8, 8): 12.5 / 4, (32, 2): 6.25, (2, 32): 12.5 / 4}),
    ],
)
def test_link_bandwidth(network: str, node: int, found: dict[tuple[int, int], float]) -> None:
    """NVLink inside a node; across nodes, the adapters of all the group's members on a node, or their part of one."""
    arguments = ["--network", network, "--gpus", "64", "--gpus_per_node", str(node), "--assume.links", "1"]
    big = parse_config(PlanConfig, [*FEW, *arguments], prog="plan", description="").cluster
    assert {key: big.link_bytes_per_s(*key) / 1e9 for key in found} == found


def test_messages_take_the_links_time() -> None:
    big = cluster(64, assume=Assumptions(links=1.0))
    one = communication._ring(big, 8, 8, 8e9, 2)
    assert one.bytes == 7e9 and one.seconds == pytest.approx(7e9 / 50e9 + 2 * LATENCY_S)
    crossing = planned(16, parallel={"pipeline": 4})
    assert communication.pipeline_message(crossing, big).seconds == pytest.approx(2 * 1024 * 512 * 2 / 50e9 + LATENCY_S)


@pytest.mark.parametrize("micro_batches", [4, 16])
@pytest.mark.parametrize("last", [None, 5])
def test_a_pipeline_step_takes_as_long_as_its_schedule(micro_batches: int, last: int | None) -> None:
    """The head makes the last rank the slowest; messages take no time."""
    layers = {None: 8, 5: 17}[last]
    one = planned(
        model=replace(MLA, num_layers=layers),
        parallel={"pipeline": 4, "last_stage_layers": last},
        data={"global_batch_size": 2 * micro_batches},
    )
    on = cluster(4)
    (forward, backward), slowest = ([pass_time(one, rank, on, way).total for way in (False, True)] for rank in (0, 3))
    assert sum(slowest) > 1.1 * (forward + backward)
    head = sum(slowest) / (1 + backward / forward) - forward  # the schedule's head has the layers' ratio
    costs = schedule.Costs(forward=forward, backward=backward, head=head)
    simulated = schedule.end_of(schedule.simulate([schedule.interleaved_order(4, 4, micro_batches)], costs))
    time = step_time(one, on, 2 * micro_batches)
    messages = 2 * 3 * communication.pipeline_message(one, on).seconds
    assert time.matmul + time.attention + time.traffic + time.bubble - messages == pytest.approx(simulated)


@pytest.mark.parametrize("mode", ["none", "selective", "full", "loop"])
def test_a_steps_seconds_computed_by_hand(mode: str) -> None:
    """MHA on two replicas: 16 micro-batches of 2 x 1,024 tokens in 4 loops of 8 layers, numbers of 2 bytes."""
    layout = {"recompute": mode, "distributed_optimizer": True, "overlap_grad_reduce": False}
    time = step_time(planned(2, MHA, parallel=layout), cluster(2), 64)
    tokens, passes, again = 2048, 16 * 4, 1 if mode in ("full", "loop") else 0
    projections = 512 * (4 + 2 + 2 + 4) * 128 + 3 * 512 * 1408
    layers, head = 8 * 2 * tokens * projections, 2 * tokens * 512 * 4096 * 3
    assert time.matmul == pytest.approx(passes * (layers * (3 + again) + head + 3 * GATE_FLOPS) / (989e12 * 0.65))
    core = 1 if mode != "none" else 0
    scores = 8 * tokens * 4 * 4 * 128 * 1024 / 2
    assert time.attention == pytest.approx(passes * scores * (3.5 + core) / (989e12 * 0.4))
    # Norms and first projections' inputs; queries, keys, values, twice, and the result; feed-forward layer; rotation.
    written = tokens * (4 * (512 * 2 + 4) + 2 * 512 * 2 + (2 * 1024 + 512) * 2 + 4 * 4 + 3 * 1408 * 2)
    written += 4 * 1024 * 128 * 2
    of_core = tokens * ((256 + 512) * 2 + 4 * 4)  # values and result, and sums of the rows
    recomputed = {"none": 0, "selective": of_core}.get(mode, written)
    logits = tokens * 4096 * (16 + 10) + 12 * 4096 * 512
    traffic = 8 * (3 * written + recomputed) * 6 / 3 + logits
    assert time.traffic == pytest.approx(passes * traffic / 3350e9)
    weights = sum(parameter_counts(MHA, GateConfig()).values())
    assert time.gradients == pytest.approx(4 * weights / 2 / (450e9 * 0.75) + LATENCY_S)
    assert time.weights == pytest.approx(2 * weights / 2 / (450e9 * 0.75) + LATENCY_S)
    assert time.optimizer == pytest.approx(64 * weights / 2 / 3350e9)
    assert time.tensor == time.context == time.bubble == 0


def test_gradient_reduction_overlaps_the_backward_of_one_loop() -> None:
    def exposed(overlap: bool, replicas: int = 64) -> float:
        parallel = {"overlap_grad_reduce": overlap, "distributed_optimizer": True}
        one = planned(replicas, parallel=parallel, data={"global_batch_size": 128, "micro_batch_size": 1})
        return step_time(one, slow, 128).gradients

    slow = cluster(64, network_gbs=0.5)
    one = planned(64, parallel={"distributed_optimizer": True}, data={"global_batch_size": 128, "micro_batch_size": 1})
    assert exposed(False) == communication.gradient_traffic(one, 0, slow).seconds > 0
    assert exposed(True) == pytest.approx(exposed(False) - pass_time(one, 0, slow, backward=True).total)
    assert exposed(True, replicas=1) == 0


def test_the_budget_follows_a_growing_batch() -> None:
    ramp = RampUpConfig(start=16, increment=16, samples=96)
    grown = recipe(data={"global_batch_size": 64, "rampup": ramp}, optim={"train_steps": 12})
    budget = budget_of(grown)
    assert budget.tokens == BatchSchedule(grown.data, 1).samples_of(12) * 1024
    assert sum(budget.steps.values()) == 12 and set(budget.steps) == {(size, 4) for size in (16, 32, 48, 64)}
    one, on = PlannedRun(grown, 4), cluster(4)
    by_hand = sum(count * step_time(one, on, size).total for (size, _), count in budget.steps.items()) / 86400
    assert days(one, on, budget) == pytest.approx(by_hand)


def steps_one_by_one(config: RunConfig) -> Counter[tuple[int, int]]:
    """Count what training asks for in each step: its samples and its loops."""
    batches, consumed, steps = BatchSchedule(config.data, 1), 0, Counter[tuple[int, int]]()
    for step in range(config.optim.train_steps):
        size = batches.at(consumed)[1]
        steps[size, loops_of_step(config, step)] += 1
        consumed += size
    return steps


@pytest.mark.parametrize(
    "loss",
    [
        {"sampled_loops": "uniform"},
        {"sampled_loops": "poisson"},
        {"loop_onset": 0.35, "onset_loops": 2},
        {"loop_onset": 0.35, "sampled_loops": "uniform"},
        {"loop_onset": 0.999},  # every one of the 75 steps, by rounding
    ],
)
def test_the_budget_counts_the_loops_of_each_step(loss: dict[str, Any]) -> None:
    ramp = RampUpConfig(start=16, increment=16, samples=1600)
    varied = recipe(data={"global_batch_size": 64, "rampup": ramp}, optim={"train_steps": 75}, loss=loss)
    budget, steps = budget_of(varied), steps_one_by_one(varied)
    assert budget.steps == steps
    assert budget.tokens == BatchSchedule(varied.data, 1).samples_of(75) * 1024
    assert budget.mean_loops == pytest.approx(sum(loops_of_step(varied, step) for step in range(75)) / 75)
    one, on = PlannedRun(varied, 4), cluster(4)
    by_hand = sum(n * step_time(replace(one, loops=loops), on, size).total for (size, loops), n in steps.items())
    assert days(one, on, budget) == pytest.approx(by_hand / 86400)


def test_a_long_runs_loops_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Millions of steps ask for no more than thousands of numbers, whose mean is near the expected one."""
    asked: list[int] = []

    def counted(config: RunConfig, step: int) -> int:
        asked.append(step)
        return loops_of_step(config, step)

    monkeypatch.setattr(estimates, "loops_of_step", counted)
    long = recipe(optim={"train_steps": 3_000_000}, loss={"sampled_loops": "uniform", "loop_onset": 0.1})
    budget = budget_of(long)
    assert asked == list(range(300_000, 300_000 + estimates.DRAWS))
    assert sum(budget.steps.values()) == 3_000_000
    assert budget.mean_loops == pytest.approx(0.1 * 1 + 0.9 * 2.5, rel=0.01)


@pytest.mark.parametrize("parallel", [{}, {"pipeline": 2}])
@pytest.mark.parametrize("model", [AROUND, INJECTED])
def test_a_step_of_fewer_loops_is_one_of_a_model_with_fewer(model: ModelConfig, parallel: dict[str, Any]) -> None:
    fewer = planned(2, replace(model, num_loops=2), parallel=parallel)
    shortened = replace(planned(2, model, parallel=parallel), loops=2)
    assert step_time(shortened, cluster(4), 64) == step_time(fewer, cluster(4), 64)
    assert peak_activation_bytes(shortened, 0) == peak_activation_bytes(fewer, 0)
    assert model_flops_per_token(shortened) == model_flops_per_token(fewer)


def test_ouro_computed_by_hand() -> None:
    """FLOPs are 6 N R plus causal attention, and the days follow from model FLOPs utilization."""
    plan = parse_config(PlanConfig, [*OURO, "--gpu", "h100", "--gpus", "512"], prog="plan", description="")
    model, gate = plan.model, plan.gate
    counts = parameter_counts(model, gate)
    weights = counts["layers"] + counts["head"]  # the embedding is a look-up
    flops = training_flops_per_token(model, gate, plan.loss, 4096, 8)
    attention = 6 * 8 * 24 * 16 * (128 + 128) * 4096 / 2
    assert flops == pytest.approx(6 * 8 * weights + attention, rel=1e-3)
    one = PlannedRun(replace(plan.recipe, data=replace(plan.data, rampup=None, micro_batch_size=1)), 512)
    found, budget = estimate(one, plan.cluster), budget_of(one.config)
    seconds = budget.tokens * flops / (512 * 989e12 * found.utilization(plan.cluster))
    assert days(one, plan.cluster, budget) == pytest.approx(seconds / 86400)


def test_every_legal_layout_is_found() -> None:
    """Compare with every division of the ranks, checked one by one."""
    small = recipe(replace(MHA, num_layers=6), data={"global_batch_size": 48})
    found = find_layouts(small, 8, node=4)
    seen = {
        (layout.tensor, layout.pipeline, layout.context, layout.last_stage_layers, one.config.data.micro_batch_size)
        for one in found.legal
        for layout in [one.config.parallel]
    }
    expected = set()
    for tensor in (1, 2, 4):
        for pipeline in (1, 2, 4):
            for context in (1, 2):
                replicas, rest = divmod(8, tensor * pipeline * context)
                for last in (None, *range(1, 6)):
                    for micro in (1, 2, 4, 8, 16):
                        try:
                            layout = ParallelConfig(
                                tensor=tensor, pipeline=pipeline, context=context, last_stage_layers=last
                            )
                            data = replace(small.data, micro_batch_size=micro)
                            replace(small, parallel=layout, data=data)
                            BatchSchedule(data, max(1, replicas), pipeline)
                        except UserError:
                            continue
                        if rest == 0 and (last is None or layout.layers_per_rank(6)[0] > last):
                            expected.add((tensor, pipeline, context, last, micro))
    assert seen == expected and len(seen) > 20
    assert {one.replicas * one.config.parallel.model_ranks for one in found.legal} == {8}
    modes = {(one.config.parallel.recompute, one.config.parallel.distributed_optimizer) for one in found.legal}
    assert len(modes) == 8
    assert found.refused["parallel.tensor"] > 0 and "num_query_groups=2" in found.reasons["parallel.tensor"]
    assert found.refused["data.global_batch_size"] > 0


@pytest.mark.parametrize("sections", RESTRICTIVE.values(), ids=RESTRICTIVE)
def test_a_key_refuses_only_the_layouts_that_it_cannot_have(sections: dict[str, dict[str, Any]]) -> None:
    """Every variant is tried, and each refusal counted, whatever is refused before it."""
    plain, found = find_layouts(recipe(MHA), 4, node=4), find_layouts(recipe(MHA, **sections), 4, node=4)
    assert len(found.legal) + found.refused.total() == len(plain.legal) + plain.refused.total()
    assert len(found.legal) == sum(is_legal(one.config, sections) for one in plain.legal) > 0
    assert rank_layouts(recipe(MHA, **sections), cluster(4)).fitting


def is_legal(config: RunConfig, sections: dict[str, dict[str, Any]]) -> bool:
    """Return True if a run accepts these keys in its layout, without overlap if its loops vary."""
    changed = {key: replace(getattr(config, key), **sections[key]) for key in sections if key != "parallel"}
    overlap = not changed.get("loss", config.loss).varies_loops
    try:
        replace(config, **changed, parallel=replace(config.parallel, overlap_grad_reduce=overlap))
    except UserError:
        return False
    return True


def test_fitting_layouts_are_ranked_by_time() -> None:
    small, on = recipe(), cluster(4)
    ranking = rank_layouts(small, on)
    times = [one.time.total for one in ranking.fitting]
    assert times == sorted(times) and len(times) == len(ranking.search.legal)
    limit = sorted(one.memory.total for one in ranking.fitting)[len(times) // 2]
    tight = replace(on, gpu=replace(on.gpu, memory_gib=limit / GIB), assume=Assumptions(margin=0.0))
    some = rank_layouts(small, tight).fitting
    assert 0 < len(some) < len(times) and all(one.memory.total <= limit for one in some)
    layouts = [one.run.config.parallel for one in ranking.fitting]
    divisions = {(layout.tensor, layout.pipeline, layout.context) for layout in layouts}
    assert len(ranking.fastest_per_division()) == len(divisions)


def test_fp8_speeds_up_only_the_layers() -> None:
    one = planned()
    bf16, fp8 = (pass_time(one, 0, cluster(1, fp8=way), backward=False) for way in (False, True))
    flops, peak = forward_flops(one, 0), 989e12 * 0.65
    assert bf16.matmul == pytest.approx((flops.layers + flops.head) / peak)
    assert fp8.matmul == pytest.approx((flops.layers * 989 / 1979 + flops.head) / peak)
    assert replace(fp8, matmul=0.0) == replace(bf16, matmul=0.0)


def test_only_the_engines_linear_layers_are_in_fp8() -> None:
    """Not those of the layers that stay in bf16, of prelude and coda, and of latent reasoning."""
    kept: dict[str, Any] = {"engine": ENGINE | {"first_layers_bf16": 2, "last_layers_bf16": 1}}
    halves = planned(model=AROUND, **kept, parallel={"pipeline": 2})
    # Four layers, of which two and one are kept; the prelude runs in one of four loops, and the coda has two layers.
    assert fp8_share(halves, 0, backward=False) == pytest.approx((4 - 2) / (4 + 1 / 4))
    assert fp8_share(halves, 1, backward=False) == pytest.approx((4 - 1) / (4 + 2))
    assert fp8_share(planned(**kept), 0, backward=False) == pytest.approx(5 / 8)
    refined = planned(model=replace(MLA, latent_iterations=3))
    cell = 2 * 3 * 64**2 * (1 + 3)  # once for the latent, and for the state in every step
    layer = forward_flops(refined, 0).layers / 8 / (2 * 1024)
    assert fp8_share(refined, 0, backward=True) == pytest.approx(1 - cell / layer)
    one, on, peak = planned(**kept), cluster(1, fp8=True), 989e12 * 0.65
    flops = backward_flops(one, 0)
    by_hand = flops.layers * (5 / 8 * 989 / 1979 + 3 / 8) + flops.head
    assert pass_time(one, 0, on, backward=True).matmul == pytest.approx(by_hand / peak)


def test_the_recipes_engine_section_decides_the_matmul_precision(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = []
    for engine, peak in (([], "989 bf16"), (FP8, "1979 fp8")):
        main([*FEW, *engine, "--top", "1"])
        lines = capsys.readouterr().out.splitlines()
        assert f"65% of {peak} TFLOP/s in matrix products" in lines[2]
        seconds.append(next(float(line.split()[12]) for line in lines if line.startswith(" own ")))
    assert seconds[1] < 0.8 * seconds[0]


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    written = tmp_path / "plan.json"
    main([*FEW, "--price_per_gpu_hour", "2", "--top", "3", "--explain", "true", "--json", str(written)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("recipe: 1,434,652,673 parameters, 24 layers x 2 loops, 1,024 positions")
    start = next(number for number, line in enumerate(lines) if "micro x M" in line) + 1
    rows = [line.split() for line in lines[start : start + 3]]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    found = json.loads(written.read_text())
    assert [f"{one['step_seconds']:.2f}" for one in found["layouts"]] == [row[12] for row in rows]
    assert [f"{one['memory_bytes'] / GIB:.1f}" for one in found["layouts"]] == [row[11] for row in rows]
    (own,) = [line.split() for line in lines if line.startswith(" own ")]
    assert own[1:11] == ["1", "1", "1", "2", "24", "1", "x", "1024", "loop", "shared"], "as stage1a.yaml has it"
    took, cost = float(rows[0][-2]), float(rows[0][-1].replace(",", ""))
    assert cost == pytest.approx(took * 24 * 2 * 2, rel=1e-2)
    first = found["layouts"][0]
    assert sum(first["memory"].values()) == pytest.approx(first["memory_bytes"])
    assert sum(first["time"].values()) == pytest.approx(first["step_seconds"])
    pasted = yaml.safe_load("\n".join(lines[lines.index("parallel:") :]))
    assert asdict(ParallelConfig(**pasted["parallel"])) == first["parallel"]
    assert pasted["data"] == {"micro_batch_size": first["micro_batch_size"]}


def test_the_pasted_lines_are_the_planned_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They leave nothing of the recipe's own layout in force."""
    own = {
        **{"tensor": 2, "sequence": False, "pipeline": 4, "first_stage_layers": 7, "last_stage_layers": 3},
        **{"distributed_optimizer": True, "overlap_param_gather": True, "accumulate_fp32": False},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"parallel": own, "data": {"micro_batch_size": 8}}))
    stacked = [*FEW, "--config", str(tmp_path / "own.yaml")]
    main([*stacked, "--json", str(tmp_path / "plan.json")])
    lines = capsys.readouterr().out.splitlines()
    (tmp_path / "pasted.yaml").write_text("\n".join(lines[lines.index("parallel:") :]))
    first = json.loads((tmp_path / "plan.json").read_text())["layouts"][0]
    config = parse_config(
        PlanConfig, [*stacked, "--config", str(tmp_path / "pasted.yaml")], prog="plan", description=""
    )
    assert asdict(config.parallel) == first["parallel"] and not config.parallel.overlap_param_gather
    assert config.parallel.pipeline == 1 and config.data.micro_batch_size == first["micro_batch_size"]


def test_sampled_loops_make_a_run_shorter(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for sampled in ([], ["--loss.sampled_loops", "uniform"]):
        main([*FEW, "--model.num_loops", "4", "--parallel.overlap_grad_reduce", "false", "--top", "1", *sampled])
        lines = capsys.readouterr().out.splitlines()
        found.append(float(next(line.split()[-1] for line in lines if line.startswith(" own "))))
    assert "365,628 steps of 2.5" in lines[0] and any("at the full batch and 4 loops" in line for line in lines)
    assert 0.55 < found[1] / found[0] < 0.7  # 2.5 loops of 4, and what a step has once


def test_help_shows_only_the_planners_own_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*OURO, "--help"])
    shown = capsys.readouterr().out
    assert "--price_per_gpu_hour" in shown and "--assume.matmul" in shown and "--model.num_loops" not in shown
    assert "python -m tools.plan --config configs/ouro-1.4b/mha.yaml" in shown


def test_a_cluster_can_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("gpu: h200\ngpus: 16\nnetwork: ib-200\nassume: {matmul: 0.6}\n")
    config = parse_config(PlanConfig, [*OURO, "--config", str(tmp_path / "cluster.yaml")], prog="plan", description="")
    assert config.cluster.gpu == GPUS["h200"] and config.cluster.network_gbs == 25 and config.assume.matmul == 0.6


def test_the_recipes_own_layout_may_not_fit_the_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    main([*FEW, "--parallel.context", "8"])
    reason = "parallel.tensor x pipeline x context: 8 is not allowed; it must divide the number of ranks, 2"
    assert f"this recipe cannot run here as written: {reason}" in capsys.readouterr().out


def test_a_rehearsal_begins_after_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report is printed whatever the rehearsal does, and the recipe's own layout need not fit the GPUs."""
    names: list[str] = []
    printed: list[str] = []

    def rehearse(plans: list[Any], jobs: int) -> list[Any]:
        names.extend(one.name for one in plans)
        printed.append(capsys.readouterr().out)
        assert "\nparallel:\n" in printed[-1]
        return []

    monkeypatch.setattr(plan_command, "rehearse", rehearse)
    main([*FEW, "--rehearse", "true"])
    assert names == ["fastest", "own"]
    names.clear()
    main([*FEW, "--parallel.context", "8", "--rehearse", "true"])
    assert names == ["fastest"] and "\nown, not rehearsed: parallel.tensor x pipeline x context: 8 is" in printed[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*OURO, "--gpus", "8"], "gpu: required and not given"),
        ([*FEW, "--gpu", "h1000"], "gpu: 'h1000' is not allowed; give one of .* h100, "),
        ([*FEW, "--gpus", "0"], "gpus: 0 is not allowed"),
        ([*FEW, "--gpus", "12"], "gpus: 12 is not allowed; give whole nodes of gpus_per_node=8, 16 for instance"),
        ([*FEW, *FP8, "--gpu", "a100-80"], "engine.fp8: 'hybrid' is not allowed; a100-80 has none; these have: h100"),
        (
            [*FEW, *FP8, "--engine.fp8_recipe", "mxfp8"],
            r"engine.fp8_recipe: 'mxfp8' is not allowed; it needs compute capability 10\.0, h100 has 9\.0; "
            "these have it: b200$",
        ),
        ([*FEW, "--optim.precision", "fp32"], "optim.precision: 'fp32' is not allowed; .* --optim.precision bf16"),
        ([*FEW, "--price_per_gpu_hour", "0"], "price_per_gpu_hour: 0.0 is not allowed"),
        ([*FEW, "--assume.matmul", "1.5"], "assume.matmul: 1.5 is not allowed"),
        ([*FEW, "--assume.margin", "1"], "assume.margin: 1.0 is not allowed"),
        ([*FEW, "--gpu_count", "8"], "--gpu_count: unknown key"),
        (
            [*FEW, "--gpus", "7"],
            "gpus: 7 is not allowed; the recipe has no layout .* data.global_batch_size.* 4 below and 8 above",
        ),
        (
            [*FEW, "--gpus", "24", "--data.rampup", "null", "--data.global_batch_size", "20"],
            "gpus: 24 is not allowed; the recipe has no layout .* 16 below and 32 above",
        ),
        (
            [*FEW, "--gpu", "a100-40", "--data.seq_length", "4096", "--model.hidden_size", "6144"],
            "gpus: 2 hold no layout .* recompute .* GiB of 35.5 usable on each; "
            "nearest that fits: --gpu a100-80 or --gpus 4$",
        ),
        (
            [*FEW, *TOO_LARGE, "--gpus", "3", "--gpus_per_node", "4"],
            "gpus: 3 hold no layout .* nearest that fits: --gpu h200 or --gpus 8$",
        ),
    ],
)
def test_bad_input_gives_a_one_line_error(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        main(arguments)
    assert "\n" not in str(caught.value)


def test_every_module_named_in_the_docs_exists() -> None:
    page = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
    named = re.findall(r"tools/planning/\w+\.py", page)
    assert named and all((ROOT / name).is_file() for name in named)


@pytest.mark.parametrize(
    ("gpus", "node", "larger"), [(1, 8, [2, 4, 8, 16, 32]), (3, 4, [4, 8, 16]), (5, 8, [8, 16]), (24, 8, [48, 96])]
)
def test_more_gpus_are_a_number_that_the_planner_takes(gpus: int, node: int, larger: list[int]) -> None:
    for wanted in larger:
        gpus = _more_gpus(gpus, node)
        assert gpus == wanted and is_legal_number(gpus, node)


@pytest.mark.slow
def test_rehearsed_figures_stand_beside_the_planned_ones(capsys):
    main([*FEW, "--model.num_layers", "2", "--top", "1", "--rehearse", "true"])
    printed = capsys.readouterr().out
    assert "\nfastest, 2 GPUs: " in printed and "\nown, 2 GPUs: " in printed
    off = [float(line.split()[-1].rstrip("%")) for line in printed.splitlines() if line.startswith("  memory, GiB")]
    assert len(off) == 2 and all(abs(percent) <= 3 for percent in off)
