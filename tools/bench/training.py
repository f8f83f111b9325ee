"""Speed and memory of training, against a looped trainer in plain torch and against the machine's matrix products.

The plain trainer is ``looplm/reference`` with its own parameters, torch's fused attention, all logits and torch's
AdamW. Contenders run in turns in one process; memory is the resident peak of a step in a process of its own.

Shapes: B batch, S sequence, D hidden, F feed-forward, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import repeat
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from looplm.accounting import training_flops_per_token
from looplm.config import LossConfig, ModelConfig, Recompute, RunConfig
from looplm.megatron import device, process_groups
from looplm.megatron.settings import DTYPES
from looplm.model import LoopLM
from looplm.reference import ReferenceLM
from pretrain.data import Batch
from pretrain.trainer import Trainer
from tools.bench.memory import peak_saved_bytes, random_batch
from tools.bench.new_process import in_new_process, resident_peak
from tools.bench.timing import Rates, has_fast_bf16, per_second, print_speeds
from tools.bench.verdicts import Figure

Step = Callable[[], object]


def small_recipe(recipe: RunConfig) -> RunConfig:
    """Return the shape of a small pretraining: 44 M parameters, half of them the tied head's, 2 x 512 tokens."""
    return _resized(
        recipe,
        (2, 512),
        vocab_size=49_152,
        hidden_size=512,
        ffn_hidden_size=1408,
        num_layers=6,
        num_attention_heads=8,
        tie_embeddings=True,
    )


def tiny_recipe(recipe: RunConfig) -> RunConfig:
    """Return the shape of an experiment on symbols: one layer of width 64, 128 x 16 tokens."""
    return _resized(
        recipe,
        (128, 16),
        vocab_size=16,
        hidden_size=64,
        ffn_hidden_size=192,
        num_layers=1,
        num_attention_heads=2,
        tie_embeddings=False,
    )


def _resized(recipe: RunConfig, batch: tuple[int, int], **model: Any) -> RunConfig:
    size, length = batch
    data = replace(recipe.data, seq_length=length, micro_batch_size=size, global_batch_size=size, rampup=None)
    sizes = ("vocab_size", "hidden_size", "ffn_hidden_size", "num_layers", "num_attention_heads")
    model = {key: getattr(recipe.model, key) for key in sizes} | model
    shape = ModelConfig(attention="mha", num_loops=4, max_sequence_length=length, **model)
    return replace(recipe, data=data, model=shape, loss=LossConfig(beta=recipe.loss.beta))


def bench_training(recipe: RunConfig, repeats: int) -> Iterator[Figure]:
    """Print and yield the figures of training; each section has a process of its own, which finds memory as new."""
    for section in SECTIONS:
        yield from in_new_process(measured, section, recipe, repeats)
    yield from _memory(small_recipe(recipe))


def measured(section: str, recipe: RunConfig, repeats: int) -> list[Figure]:
    """Measure one of :data:`SECTIONS`, and print what was found."""
    groups = process_groups.start(recipe.seed)
    try:
        return list(SECTIONS[section](recipe, groups, repeats))
    finally:
        process_groups.stop()


def in_precision(recipe: RunConfig, precision: Any) -> RunConfig:
    """Return a recipe with another ``optim.precision``."""
    return replace(recipe, optim=replace(recipe.optim, precision=precision))


def recomputing(recipe: RunConfig, mode: Recompute) -> RunConfig:
    """Return a recipe with another ``parallel.recompute``."""
    return replace(recipe, parallel=replace(recipe.parallel, recompute=mode))


def _small(recipe: RunConfig, groups: ProcessGroupCollection, repeats: int) -> Iterator[Figure]:
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        yield from _against_plain(small_recipe(recipe), groups, repeats, threads)


def _tiny(recipe: RunConfig, groups: ProcessGroupCollection, repeats: int) -> Iterator[Figure]:
    torch.set_num_threads(1)
    tiny = tiny_recipe(recipe)
    speeds = _speeds({"plain": _plain_step(tiny), "ours": _our_step(tiny, groups)}, tiny, repeats)
    print_speeds("one layer of 64, 4 loops, 128 x 16 tokens, one thread", speeds)
    yield Figure("tiny model: time of ours / plain", speeds.ratio("plain", "ours"), 1.3, at_least=False)


def _recipe(recipe: RunConfig, groups: ProcessGroupCollection, repeats: int) -> Iterator[Figure]:
    for precision, aim in (("fp32", 1.0), ("bf16", 1.05)):
        same = in_precision(recipe, precision)
        speeds = _speeds({"plain": _plain_step(same), "ours": _our_step(same, groups)}, same, repeats)
        print_speeds(f"the recipe, {precision}", speeds)
        yield Figure(f"recipe, {precision}: speed of ours / plain", speeds.ratio("ours", "plain"), aim)


def _against_plain(recipe: RunConfig, groups: ProcessGroupCollection, repeats: int, threads: int) -> Iterator[Figure]:
    steps = {"plain": _plain_step(recipe), "ours": _our_step(recipe, groups)}
    modes: tuple[Recompute, ...] = ("loop", "full")
    steps |= {f"ours, recompute: {mode}": _our_step(recomputing(recipe, mode), groups) for mode in modes}
    if has_fast_bf16():
        steps["ours, bf16"] = _our_step(in_precision(recipe, "bf16"), groups)
    steps["matrix products alone"] = _products(recipe)
    speeds = _speeds(steps, recipe, repeats)
    print_speeds(f"6 layers of 512, V = 49,152, 4 loops, 2 x 512 tokens, {threads} threads", speeds)
    name = f"small model, {threads} threads"
    yield Figure(f"{name}: speed of ours / plain, fp32", speeds.ratio("ours", "plain"), 1.05)
    for mode in modes:
        speed = speeds.ratio(f"ours, recompute: {mode}", "plain")
        yield Figure(f"{name}: speed of ours with recompute: {mode} / plain", speed, 0.95)
    if has_fast_bf16():
        yield Figure(f"{name}: speed of ours in bf16 / plain in fp32", speeds.ratio("ours, bf16", "plain"), 2.0)
    share = speeds.ratio("ours", "matrix products alone") * _all_flops(recipe) / _product_flops(recipe)
    yield Figure(f"{name}: FLOPs of a step / of matrix products in its time", share, 0.85)


def _speeds(steps: Mapping[str, Step], recipe: RunConfig, repeats: int) -> Rates:
    """Time the steps, which read as many tokens each."""
    tokens = recipe.data.micro_batch_size * recipe.data.seq_length
    return per_second(steps, tokens, repeats)


def _our_step(
    recipe: RunConfig,
    groups: ProcessGroupCollection,
    batch: Batch | None = None,
    loops: int | None = None,
    loss: LossConfig | None = None,
) -> Step:
    model_config = replace(recipe.model, num_loops=loops or recipe.model.num_loops)
    model = LoopLM(model_config, recipe.gate, groups, DTYPES[recipe.optim.precision], recipe.parallel)
    trainer = Trainer(model, loss or recipe.loss, recipe.optim, recipe.parallel, groups)
    batch = batch or random_batch(recipe, recipe.data.micro_batch_size)
    return lambda: trainer.train(repeat(batch), 1)


def _plain_step(recipe: RunConfig) -> Step:
    optim, batch = recipe.optim, random_batch(recipe, recipe.data.micro_batch_size)
    model = ReferenceLM(recipe.model, recipe.gate).to(device.DEVICE, DTYPES[optim.precision])
    betas = (optim.beta1, optim.beta2)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=optim.lr, betas=betas, eps=optim.eps, weight_decay=optim.weight_decay
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(batch.ids_BS, batch.labels_SB, recipe.loss.beta, batch.mask_SB).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad)
        optimizer.step()

    return step


def _product_shapes(model: ModelConfig) -> list[tuple[int, int]]:
    """Return the shapes of the weights that one loop multiplies with; attention has a key head for each query head."""
    width, feed = model.hidden_size, model.ffn_hidden_size
    block = [(3 * width, width), (width, width), (2 * feed, width), (width, feed)]
    return block * model.num_layers + [(model.vocab_size, width)]


def _product_flops(recipe: RunConfig) -> float:
    """Return the FLOPs of :func:`_products`, by token."""
    return 3 * 2.0 * recipe.model.num_loops * sum(rows * columns for rows, columns in _product_shapes(recipe.model))


def _all_flops(recipe: RunConfig) -> float:
    """Return the FLOPs of a step by token; to those of the weights they add attention's and the gate's."""
    model = recipe.model
    return training_flops_per_token(model, recipe.gate, recipe.loss, recipe.data.seq_length, model.num_loops)


def _products(recipe: RunConfig) -> Step:
    """Return the matrix products with the weights in one step, alone.

    Each weight is multiplied three times: forward, for the input's gradient, and for its own.
    """
    model, dtype = recipe.model, DTYPES[recipe.optim.precision]
    tokens, place = recipe.data.micro_batch_size * recipe.data.seq_length, device.DEVICE
    shapes = _product_shapes(model)
    weights = {shape: torch.ones(shape, dtype=dtype, device=place) for shape in set(shapes)}
    gradients = {shape: torch.zeros_like(weight) for shape, weight in weights.items()}
    inputs = {n: torch.ones(tokens, n, dtype=dtype, device=place) for _, n in weights}
    outputs = {n: torch.empty(tokens, n, dtype=dtype, device=place) for n, _ in weights}

    def products() -> None:
        for shape in shapes * model.num_loops:
            y, x = outputs[shape[0]], inputs[shape[1]]
            torch.mm(x, weights[shape].t(), out=y)
            torch.mm(y, weights[shape])
            gradients[shape].addmm_(y.t(), x)

    return products


# ---- memory, stages, loops, documents


def _memory(recipe: RunConfig) -> Iterator[Figure]:
    modes: tuple[Recompute | None, ...] = (None, "none", "loop", "full")
    peaks = {mode: in_new_process(peak_bytes, mode, recipe) for mode in modes}
    print("\nresident peak of two steps above the start, fp32")
    for mode, peak in peaks.items():
        name = "plain" if mode is None else f"ours, recompute: {mode}"
        print(f"  {name:<28}{peak / 2**20:>10,.0f} MiB{peak / peaks[None]:>8.1%}")
        if mode in ("loop", "full"):
            title = f"small model: peak memory of ours with recompute: {mode} / plain"
            yield Figure(title, peak / peaks[None], 0.35, at_least=False)


def peak_bytes(mode: Recompute | None, recipe: RunConfig) -> int:
    """Return the bytes by which two steps raise this process's resident peak; without a mode, the plain trainer's."""
    torch.set_num_threads(1)
    groups = process_groups.start(recipe.seed)
    try:
        before = resident_peak()
        step = _plain_step(recipe) if mode is None else _our_step(recomputing(recipe, mode), groups)
        for _ in range(2):
            step()
        return resident_peak() - before
    finally:
        process_groups.stop()


def _stages(recipe: RunConfig, groups: ProcessGroupCollection, repeats: int) -> Iterator[Figure]:
    gate = _our_step(recipe, groups, loss=replace(recipe.loss, objective="adaptive_gate"))
    speeds = _speeds({"stage 1": _our_step(recipe, groups), "gate stage": gate}, recipe, repeats)
    print_speeds("stages", speeds)
    ratio = speeds.ratio("stage 1", "gate stage")
    yield Figure("time of a gate-stage step / a stage-1 step", ratio, 0.35, at_least=False)


def _loops(recipe: RunConfig, groups: ProcessGroupCollection, repeats: int) -> Iterator[Figure]:
    loops, recipe = recipe.model.num_loops, recomputing(recipe, "loop")
    speeds = _speeds({f"{n} loops": _our_step(recipe, groups, loops=n) for n in (1, loops)}, recipe, repeats)
    print_speeds("recompute: loop", speeds)
    ratio = speeds.ratio("1 loops", f"{loops} loops") / loops
    yield Figure(f"time of {loops} loops / {loops} times that of one", ratio, 1.0, at_least=False)
    batch = random_batch(recipe, recipe.data.micro_batch_size)
    single = replace(recipe, model=replace(recipe.model, num_loops=1))
    ratio = peak_saved_bytes(recipe, batch, groups) / peak_saved_bytes(single, batch, groups)
    yield Figure(f"kept for backward with recompute: loop, {loops} loops / one", ratio, 1.25, at_least=False)


def _documents(recipe: RunConfig, groups: ProcessGroupCollection, repeats: int) -> Iterator[Figure]:
    recipe = _resized(recipe, (1, 2048))
    one = random_batch(recipe, 1)
    start_SB = torch.arange(2048, device=device.DEVICE).div(512, rounding_mode="floor").mul(512)[:, None]
    four = one._replace(document_start_SB=start_SB)
    steps = {"one document": _our_step(recipe, groups, one), "four documents": _our_step(recipe, groups, four)}
    speeds = _speeds(steps, recipe, repeats)
    print_speeds("2,048 tokens", speeds)
    ratio = speeds.ratio("one document", "four documents")
    yield Figure("time of four packed documents / one, 2,048 tokens", ratio, 1.02, at_least=False)


SECTIONS: dict[str, Callable[[RunConfig, ProcessGroupCollection, int], Iterator[Figure]]] = {
    "small": _small,
    "tiny": _tiny,
    "recipe": _recipe,
    "stages": _stages,
    "loops": _loops,
    "documents": _documents,
}
