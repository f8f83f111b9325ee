"""The trainer's steps against plain torch: the reference's loss, torch's AdamW, gradients summed by hand."""

import dataclasses
import math
from functools import partial
from itertools import chain, pairwise, repeat
from typing import Any, get_args

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig

import pretrain.optim
from looplm import reference
from looplm.config import GateConfig, LossConfig, ModelConfig, OptimConfig, ParallelConfig, Recompute
from looplm.model import LoopLM, head
from pretrain.data import Batch
from pretrain.norms import module_of
from pretrain.optim import freeze_trunk
from pretrain.trainer import Trainer, _gradient_factor
from tests.support.parity import assert_close_relative, grad_of, oracle_copy
from tests.support.tiny import MODEL

# No key of AdamW has its default, or that of Megatron's.
ADAM: dict[str, Any] = {"beta1": 0.8, "beta2": 0.9, "eps": 1e-4, "weight_decay": 0.3}
OPTIM = OptimConfig(train_steps=10, lr=3e-3, min_lr=1e-3, warmup_steps=2, decay_steps=4, precision="fp32", **ADAM)
GATE = GateConfig(state_size=8)


def make_batch(seed: int, masked: int) -> Batch:
    """Return two sequences of 12 tokens; the first ``masked`` positions have no loss."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(MODEL.vocab_size, (2, 13), generator=generator)
    mask_SB = torch.ones(12, 2)
    mask_SB[:masked] = 0
    return Batch(ids[:, :-1], ids[:, 1:].t().contiguous(), mask_SB, None)


def make_trainer(single_process, loss=LossConfig(), optim=OPTIM, model=MODEL) -> tuple[LoopLM, Trainer]:  # noqa: B008
    torch.manual_seed(3)
    looped = LoopLM(model, GATE, single_process)
    return looped, Trainer(looped, loss, optim, ParallelConfig(), single_process)


@pytest.mark.slow
def test_steps_equal_plain_torch(single_process):
    """Three steps of two uneven micro-batches: loss, gradient norm and every weight after them."""
    loss = LossConfig(beta=0.1)
    # Large initial weights: Adam divides each gradient by its size, so rounding errors of tiny gradients would show.
    looped, trainer = make_trainer(single_process, loss, model=dataclasses.replace(MODEL, init_std=0.1))
    weights = {name: value.detach().clone().requires_grad_() for name, value in looped.named_parameters()}
    spared = [name for name, weight in weights.items() if weight.dim() == 1 or name.startswith("gate.")]
    groups: list[dict[str, Any]] = [
        {"params": [weight for name, weight in weights.items() if name not in spared]},
        {"params": [weights[name] for name in spared], "weight_decay": 0.0},
    ]
    plain = torch.optim.AdamW(
        groups,
        betas=(OPTIM.beta1, OPTIM.beta2),
        eps=OPTIM.eps,
        weight_decay=OPTIM.weight_decay,
    )
    for step, lr in enumerate((1.5e-3, 3e-3, 3e-3)):
        batches = [make_batch(2 * step, masked=7), make_batch(2 * step + 1, masked=0)]
        stats, norms, healthy, learning_rate, _ = trainer.train(iter(batches), 2)
        assert healthy
        assert learning_rate == pytest.approx(lr)

        tokens = torch.stack([batch.mask_SB.sum() for batch in batches])
        losses = torch.stack([_reference_loss(weights, batch, loss.beta) for batch in batches])
        total = (losses * tokens).sum() / tokens.sum()
        plain.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(weights.values()), OPTIM.clip_grad)
        for group in plain.param_groups:
            group["lr"] = lr
        plain.step()

        assert stats.tokens == tokens.sum() and stats.loss == pytest.approx(total.item(), rel=1e-5)
        assert norms.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    assert_close_relative(dict(looped.named_parameters()), weights, 5e-5)


def _reference_loss(weights: dict, batch: Batch, beta: float, model=MODEL, prior_R=None) -> torch.Tensor:
    output = reference.forward(weights, model, GATE, batch.ids_BS)
    head = reference.head_weight(weights, model)
    losses = torch.stack([reference.token_losses(h, head, batch.labels_SB) for h in output.hidden])
    return reference.entropy_regularised_loss(losses, output.gate_logit_RSB, beta, batch.mask_SB, prior_R)


def _close_to_reference(
    looped: LoopLM, trainer: Trainer, batches: list[Batch], loss: LossConfig, tolerance: float = 1e-5, scale: float = 1
) -> None:
    """Compare loss and every gradient of a step with the reference in double precision."""
    model = looped.model_config
    weights = oracle_copy(dict(looped.named_parameters()))
    prior_R = reference.geometric_prior(model.num_loops, loss.geometric_rate) if loss.prior == "geometric" else None
    losses = [_reference_loss(weights, batch, loss.beta, model, prior_R) * batch.mask_SB.sum() for batch in batches]
    mean = torch.stack(losses).sum() / sum(batch.mask_SB.sum() for batch in batches)
    mean.backward()
    stats, _ = trainer.backward(iter(batches), len(batches))
    assert stats.loss == pytest.approx(mean.item(), rel=max(tolerance, 1e-6))
    found = {name: parameter.main_grad / scale for name, parameter in looped.named_parameters()}
    expected = {name: grad_of(weight) for name, weight in weights.items()}
    for gradients in (found, expected):  # one affine map: the bias alone may cancel over the tokens, up to rounding
        readout = gradients.pop("gate.readout.weight").flatten(), gradients.pop("gate.readout.bias")
        gradients["gate.readout"] = torch.cat(readout)
    assert_close_relative(found, expected, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("prior", ["uniform", "geometric"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_one_pass_heads_gradients_equal_plain_torch(single_process, monkeypatch, tied, prior):
    """Two uneven micro-batches, a mask, chunks of five tokens, gates that differ from the prior; twice in a row."""
    monkeypatch.setitem(head.LOGIT_BYTES, "cpu", 4 * MODEL.vocab_size * 5)
    loss = LossConfig(beta=0.1, prior=prior, geometric_rate=0.3 if prior == "geometric" else 0.5)
    looped, trainer = make_opinionated(single_process, loss, tie_embeddings=tied)
    for step in range(2):
        batches = [make_batch(2 * step, masked=7), make_batch(2 * step + 1, masked=0)]
        _close_to_reference(looped, trainer, batches, loss)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["last", "uniform"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_fixed_weights_of_the_loops_equal_plain_torch(single_process, tied, weights):
    """Loss and gradients of two uneven micro-batches; the gate has none, and keeps its weights over a step."""
    looped, trainer = make_opinionated(single_process, LossConfig(weights=weights), tie_embeddings=tied)
    batches, model = [make_batch(0, masked=7), make_batch(1, masked=0)], looped.model_config
    plain = oracle_copy(dict(looped.named_parameters()))
    share_R = torch.tensor([0, 0, 1.0] if weights == "last" else [1 / 3] * 3, dtype=torch.float64)
    total, tokens = torch.zeros((), dtype=torch.float64), sum(batch.mask_SB.sum() for batch in batches)
    for batch in batches:
        output = reference.forward(plain, model, GATE, batch.ids_BS)
        head_VD = reference.head_weight(plain, model)
        losses = torch.stack([reference.token_losses(h, head_VD, batch.labels_SB) for h in output.hidden])
        total = total + (torch.einsum("r,rsb->sb", share_R, losses) * batch.mask_SB).sum()
    (total / tokens).backward()
    stats, _ = trainer.backward(iter(batches), 2)
    assert stats.loss == pytest.approx((total / tokens).item(), rel=1e-6)
    found = {n: p.main_grad for n, p in looped.named_parameters() if not n.startswith("gate.")}
    assert_close_relative(found, {name: grad_of(plain[name]) for name in found}, 1e-5)
    before = {name: value.clone() for name, value in looped.gate.state_dict().items()}
    trainer.train(iter(batches), 2)
    assert all(torch.equal(value, before[name]) for name, value in looped.gate.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["gate", "last"])
@pytest.mark.parametrize("keys", [{"backward_loops": 1}, {"backward_loops": 2}, {"stability": 0.3}])
def test_truncated_gradients_and_the_penalty_of_the_states_equal_plain_torch(single_process, weights, keys):
    """Loss and gradients of two uneven micro-batches, of three loops."""
    loss = LossConfig(weights=weights, beta=0.1, **keys)
    looped, trainer = make_opinionated(single_process, loss, prelude_layers=1, injection="diagonal")
    batches, model = [make_batch(0, masked=7), make_batch(1, masked=0)], looped.model_config
    plain = oracle_copy(dict(looped.named_parameters()))
    total, tokens = torch.zeros((), dtype=torch.float64), sum(batch.mask_SB.sum() for batch in batches)
    for batch in batches:
        output = reference.forward(plain, model, GATE, batch.ids_BS, backward_loops=loss.backward_loops)
        head_VD = reference.head_weight(plain, model)
        losses = torch.stack([reference.token_losses(h, head_VD, batch.labels_SB) for h in output.hidden])
        penalty_SB = loss.stability * reference.state_changes(output.hidden)
        mean = reference.masked_mean(losses[-1] + penalty_SB, batch.mask_SB)
        if weights == "gate":
            by_gate = reference.entropy_regularised_loss(losses, output.gate_logit_RSB, loss.beta, batch.mask_SB)
            mean = mean - reference.masked_mean(losses[-1], batch.mask_SB) + by_gate
        total = total + mean * batch.mask_SB.sum()
    (total / tokens).backward()
    stats, _ = trainer.backward(iter(batches), 2)
    assert stats.loss == pytest.approx((total / tokens).item(), rel=1e-6)
    trained = [name for name in plain if weights == "gate" or not name.startswith("gate.")]
    found = {name: parameter.main_grad for name, parameter in looped.named_parameters() if name in trained}
    assert_close_relative(found, {name: grad_of(plain[name]) for name in trained}, 1e-5)


def make_opinionated(single_process, loss: LossConfig, precision="fp32", layout=ParallelConfig(), **changes):  # noqa: B008
    """Return a model and its trainer whose gate is not at its initial weights, which are the uniform prior."""
    torch.manual_seed(4)  # with it no gradient of the gate cancels to nearly zero, where rounding would be compared
    model = dataclasses.replace(MODEL, init_std=0.1, **changes)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    looped = LoopLM(model, GATE, single_process, dtype, layout)
    with torch.no_grad():
        for parameter in looped.gate.parameters():
            parameter.normal_(std=0.5)
    optim = dataclasses.replace(OPTIM, precision=precision)
    return looped, Trainer(looped, loss, optim, layout, single_process)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("accumulate_fp32", [True, False])
def test_the_one_pass_heads_gradients_in_bf16_are_within_its_rounding(single_process, tied, accumulate_fp32):
    layout = ParallelConfig(accumulate_fp32=accumulate_fp32)
    looped, trainer = make_opinionated(single_process, LossConfig(), "bf16", layout, tie_embeddings=tied)
    head_weight: Any = looped.head_weight()
    assert head_weight.main_grad.dtype == (torch.float32 if accumulate_fp32 else torch.bfloat16)
    _close_to_reference(looped, trainer, [make_batch(0, masked=3), make_batch(1, masked=0)], LossConfig(), 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_scaled_loss_scales_every_gradient(single_process, tied):
    """Megatron scales the loss with ``grad_scale_func`` before backward; the head must know, because it is earlier."""
    looped, trainer = make_opinionated(single_process, LossConfig(), tie_embeddings=tied)
    looped.config.grad_scale_func = lambda loss: 4096 * loss
    _close_to_reference(looped, trainer, [make_batch(0, masked=3), make_batch(1, masked=0)], LossConfig(), scale=4096)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", get_args(Recompute))
def test_recomputation_adds_the_heads_gradient_once(single_process, recompute):
    loss = LossConfig()
    looped, trainer = make_opinionated(single_process, loss, layout=ParallelConfig(recompute=recompute))
    _close_to_reference(looped, trainer, [make_batch(0, masked=3)], loss)


@pytest.mark.slow
def test_evaluation_between_steps_changes_no_gradient(single_process):
    looped, trainer = make_opinionated(single_process, LossConfig())
    trainer.backward(repeat(make_batch(0, masked=3)), 2)
    before = {name: parameter.main_grad.clone() for name, parameter in looped.named_parameters()}
    trainer.evaluate(repeat(make_batch(1, masked=0)), 2)
    assert all(torch.equal(parameter.main_grad, before[name]) for name, parameter in looped.named_parameters())


def test_statistics_equal_the_reference(single_process):
    looped, trainer = make_trainer(single_process)
    batch = make_batch(5, masked=3)
    weights = dict(looped.named_parameters())
    output = reference.forward(weights, MODEL, GATE, batch.ids_BS)
    losses = torch.stack(
        [reference.token_losses(h, reference.head_weight(weights, MODEL), batch.labels_SB) for h in output.hidden]
    )
    stats = trainer.evaluate(repeat(batch), 1)
    expected = [reference.masked_mean(loss_SB, batch.mask_SB).item() for loss_SB in losses]
    assert stats.loss_per_loop == pytest.approx(expected, rel=1e-5)
    assert stats.exit_distribution == pytest.approx([1 / 3] * 3, abs=1e-6)
    assert stats.mean_depth == pytest.approx(2.0, abs=1e-5) and stats.entropy == pytest.approx(1.0986123, abs=1e-5)


def test_weight_decay_spares_norms_biases_and_gate(single_process):
    looped, trainer = make_trainer(single_process)
    decayed = {id(p) for g in trainer.optimizer.param_groups if g["wd_mult"] for p in g["params"]}
    names = {name for name, parameter in looped.named_parameters() if id(parameter) in decayed}
    assert names == {n for n, p in looped.named_parameters() if p.dim() == 2 and not n.startswith("gate.")}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "constant", "min_lr": 0.0, "decay_steps": 0}, [1.5, 3, 3, 3, 3, 3, 3, 3, 3, 3]),
        ({"schedule": "wsd"}, [1.5, 3, 3, 3, 3, 3, 2.5, 2, 1.5, 1]),
        ({"schedule": "cosine", "decay_steps": 0, "warmup_steps": 0, "train_steps": 4}, [2.7071, 2, 1.2929, 1]),
        (
            {"schedule": "constant", "min_lr": 0.0, "decay_steps": 0, "warmup_steps": 10},
            [0.3 * n for n in range(1, 11)],
        ),
    ],
)
def test_schedules(single_process, changes, expected):
    optim = dataclasses.replace(OPTIM, **changes)
    _, trainer = make_trainer(single_process, optim=optim)
    rates = []
    for _ in range(optim.train_steps):
        trainer.scheduler.step(1)
        rates.append(1e3 * trainer.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The next bucket's parameter all-gather")  # so small are the buckets
def test_weights_that_a_module_reads_without_owning_them_are_gathered_before(single_process, monkeypatch):
    """In small buckets: with Megatron's, of 40 million parameters, a tiny model has one."""
    small = partial(DistributedDataParallelConfig, bucket_size=500)
    monkeypatch.setattr(pretrain.optim, "DistributedDataParallelConfig", small)
    model = dataclasses.replace(MODEL, latent_iterations=2, latent_halting=True)
    late = ParallelConfig(distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
    losses = []
    for layout in (ParallelConfig(), late):
        torch.manual_seed(3)
        trainer = Trainer(LoopLM(model, GATE, single_process), LossConfig(), OPTIM, layout, single_process)
        losses.append([trainer.train(iter([make_batch(step, masked=0)]), 1).stats for step in range(3)])
    assert losses[0] == losses[1]


def test_the_gradients_norm_is_logged_under_the_module_of_its_parameter():
    attention = "decoder.layers.0.self_attention."
    assert {module_of(f"{name}.weight") for name in ("injection", "step_embedding", "embedding.word_embeddings")} == {
        "embedding"
    }
    units = ("kv_layernorm.cell", "kv_layernorm.halt", "linear_kv_down_proj.unit.mix")  # where latent reasoning is
    assert {module_of(f"{attention}{name}.weight") for name in ("linear_gate", "linear_qkv", *units)} == {"attention"}
    norms = ("kv_layernorm.weight", "kv_layernorm.norm.weight", "linear_qkv.layer_norm_weight")
    assert {module_of(f"{attention}{name}") for name in norms} == {"norms"}
    assert module_of("gate.readout.weight") == "gate"


@pytest.mark.slow
def test_the_gate_stage_equals_the_reference_without_trunk_gradients(single_process):
    loss = LossConfig(objective="adaptive_gate", target="next")
    looped, trainer = make_trainer(single_process, loss, dataclasses.replace(OPTIM, clip_grad=0.0))
    with torch.no_grad():
        looped.gate.readout.weight.normal_()
    weights = {name: value.detach().clone().requires_grad_() for name, value in looped.named_parameters()}
    batch = make_batch(1, masked=2)
    stats = trainer.train(repeat(batch), 1).stats

    output = reference.forward(weights, MODEL, GATE, batch.ids_BS)
    head = reference.head_weight(weights, MODEL)
    losses = torch.stack([reference.token_losses(h, head, batch.labels_SB) for h in output.hidden])
    expected = reference.adaptive_gate_loss(losses, output.gate_logit_RSB, mask_SB=batch.mask_SB, target="next")
    assert stats.loss == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    gate = {name: p.main_grad for name, p in looped.named_parameters() if name.startswith("gate.")}
    assert_close_relative(gate, {name: weights[name].grad for name in gate})
    for name, parameter in looped.named_parameters():
        assert name in gate or not (parameter.requires_grad or hasattr(parameter, "main_grad"))


def test_a_frozen_trunk_builds_no_graph(single_process):
    torch.manual_seed(0)
    looped = LoopLM(MODEL, GATE, single_process)
    freeze_trunk(looped)
    output = looped(make_batch(0, 0).ids_BS, frozen_trunk=True)
    assert not any(h.requires_grad for h in output.hidden) and output.gate_logit_RSB.requires_grad


@pytest.mark.slow
def test_accumulation_equals_one_large_batch(single_process):
    """The mean is over tokens, not over micro-batches."""
    small = [make_batch(n, masked=3 * n) for n in range(3)]
    large = Batch(
        torch.cat([batch.ids_BS for batch in small]),
        torch.cat([batch.labels_SB for batch in small], 1),
        torch.cat([batch.mask_SB for batch in small], 1),
        None,
    )
    norms = []
    for batches in (small, [large]):
        _, trainer = make_trainer(single_process)
        norms.append(trainer.train(chain(batches), len(batches)).norms.grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_weights_stay_shared_in_the_trainer(single_process):
    """There is one tensor per weight for any number of loops, also in DDP's buffers and in the optimizer."""
    for loops in (1, 2, 5):
        model: ModelConfig = dataclasses.replace(MODEL, num_loops=loops)
        looped, trainer = make_trainer(single_process, model=model)
        owned = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
        assert len(owned) == len(set(owned)) == len(list(looped.parameters()))
        other = LoopLM(MODEL, GATE, single_process)
        assert sum(p.numel() for p in looped.parameters()) == sum(p.numel() for p in other.parameters())


@pytest.mark.parametrize("clip_grad", [0.0, 0.5, 100.0])
def test_the_gradients_factor_equals_torchs_clipping_of_the_mean(clip_grad):
    tokens, weight = 7.0, torch.nn.Parameter(torch.zeros(3))
    summed = torch.tensor([3.0, -20.0, 9.0])
    weight.grad = summed / tokens
    if clip_grad:
        torch.nn.utils.clip_grad_norm_([weight], clip_grad)
    square = summed.double().square().sum()
    factor = _gradient_factor(torch.tensor(tokens, dtype=torch.float64), square, clip_grad)
    assert_close_relative({"gradient": summed * factor}, {"gradient": weight.grad}, 1e-6)


def test_a_gradient_that_is_not_finite_is_not_clipped():
    """The parameters with NaNs are looked for after the step; a factor of NaN would make all of them suspects."""
    for square in (math.nan, math.inf):
        factor = _gradient_factor(torch.tensor(4.0), torch.tensor(square), clip_grad=1.0)
        assert factor == 0.25
    assert _gradient_factor(torch.tensor(0.0), torch.tensor(0.0), clip_grad=1.0) == 1.0, "no token has a loss"


@pytest.mark.slow
@pytest.mark.parametrize("news", [False, True])
def test_the_ranks_exchange_numbers_once_in_a_step(single_process, monkeypatch, news):
    """Megatron sums the gradients, in tensors as large as its buffers; everything else is one small message."""
    _, trainer = make_trainer(single_process)
    messages = list[int]()

    def counted(function):
        def call(tensor, *args, **keys):
            messages.append(tensor.numel())
            return function(tensor, *args, **keys)

        return call

    for name in ("all_reduce", "broadcast", "all_gather_into_tensor", "reduce"):
        monkeypatch.setattr(torch.distributed, name, counted(getattr(torch.distributed, name)))
    done = trainer.train(repeat(make_batch(1, masked=2)), 2, has_news=lambda: news)
    assert done.healthy and done.has_news == news
    assert len([size for size in messages if size < 100]) == 1, messages


def test_an_evaluation_of_several_chunks_is_the_mean_of_all(single_process):
    _, trainer = make_trainer(single_process)
    batches = [make_batch(seed, masked=seed) for seed in range(6)]
    alone = [trainer.evaluate(repeat(batch), 1) for batch in batches]
    tokens, whole = sum(stats.tokens for stats in alone), trainer.evaluate(iter(batches), 6)
    assert whole.tokens == tokens
    assert whole.loss == pytest.approx(sum(stats.loss * stats.tokens for stats in alone) / tokens, rel=1e-6)


@pytest.mark.parametrize("changes", [{}, {"loop_norm": "readout"}, {"coda_layers": 1}], ids=str)
def test_norms_of_the_states_equal_the_reference(changes, single_process):
    looped, trainer = make_opinionated(single_process, LossConfig(weights="last"), **changes)
    batch, plain = make_batch(5, masked=3), oracle_copy(dict(looped.named_parameters()))
    expected = reference.forward(plain, looped.model_config, GATE, batch.ids_BS)
    head = reference.head_weight(plain, looped.model_config)
    losses = reference.token_losses(expected.hidden[-1], head, batch.labels_SB)
    gradients = torch.autograd.grad(reference.masked_mean(losses, batch.mask_SB), expected.state)
    assert all(gradient.any() for gradient in gradients), "every loop's state reaches the last loop's loss"
    _, norms = trainer.backward(iter([batch]), 1)
    flat = [h.flatten() for h in expected.state]
    cosines = [1.0, *(torch.cosine_similarity(a, b, dim=0).item() for a, b in pairwise(flat))]
    assert norms.hidden_cosine == pytest.approx(cosines, rel=1e-5) and max(cosines[1:]) < 0.999
    assert norms.hidden_grad_norm == pytest.approx([g.norm().item() for g in gradients], rel=1e-4)


def test_exits_of_a_gate_with_an_opinion_equal_the_reference(single_process):
    looped, trainer = make_opinionated(single_process, LossConfig())
    batch, weights = make_batch(5, masked=3), oracle_copy(dict(looped.named_parameters()))
    output = reference.forward(weights, looped.model_config, GATE, batch.ids_BS)
    p_RSB = reference.exit_distribution(output.gate_logit_RSB)
    exits = [reference.masked_mean(p_SB, batch.mask_SB).item() for p_SB in p_RSB]
    stats = trainer.evaluate(repeat(batch), 1)
    assert stats.exit_distribution == pytest.approx(exits, rel=1e-5)
    assert stats.mean_depth == pytest.approx(sum(n * share for n, share in enumerate(exits, 1)), rel=1e-5)
    entropy_SB = reference.entropy(p_RSB)
    assert stats.entropy == pytest.approx(reference.masked_mean(entropy_SB, batch.mask_SB).item(), rel=1e-5)
