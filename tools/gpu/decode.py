"""Speed of decoding by cache, exit threshold and batch, prompts included. The weights are random.

An untrained gate of kind lru is the uniform prior over the loops. So a threshold of 0.45 exits at the second loop and
one of 0.2 at the first: the rows compare speed at given depths, not quality. The model is the MLA model of the speed
measurements, in bf16.
"""

import time
from functools import partial
from itertools import product
from typing import get_args

from looplm.inference import GenerationConfig, Generator
from looplm.inference.kv_cache import CacheMode
from looplm.megatron import device
from looplm.megatron.settings import DTYPES
from looplm.model import LoopLM
from tools.bench.endless import endless_generator
from tools.gpu.parts import DeviceName, Job
from tools.gpu.recipes import recipe, started
from tools.gpu.record import Rows, Value

PROMPT: dict[DeviceName, int] = {"cuda": 64, "cpu": 4}
NEW: dict[DeviceName, int] = {"cuda": 32, "cpu": 2}
BATCHES = (1, 16, 128)
THRESHOLDS = (None, 0.45, 0.2)  # None runs all loops


def run(job: Job) -> None:
    """Measure every combination, the smallest batch first."""
    config = recipe(job.device, "mla")
    with started(job) as groups:
        rows = Rows(job.rows, job.deadline)
        model = LoopLM(config.model, config.gate, groups, DTYPES[config.optim.precision]).eval()
        generator = endless_generator(model)
        for batch, cache, threshold in product(BATCHES, get_args(CacheMode), THRESHOLDS):
            exits = "all loops" if threshold is None else f"threshold {threshold:g}"
            name = f"batch {batch}, {cache}, {exits}"
            rows.measure(name, partial(measure, generator, job, batch, cache, threshold))


def measure(generator: Generator, job: Job, batch: int, cache: CacheMode, threshold: float | None) -> dict[str, Value]:
    """Return tokens per second over the whole batch, and the mean depth of its tokens."""
    length, new, vocabulary = PROMPT[job.device], NEW[job.device], generator.model.model_config.vocab_size
    prompts = [[(7 * row + 3 * place) % vocabulary for place in range(length)] for row in range(batch)]
    settings = GenerationConfig(
        temperature=0.0, max_new_tokens=new, kv_cache=cache, exit_threshold=threshold, batch_size=batch
    )
    warm_up = GenerationConfig(temperature=0.0, max_new_tokens=1, kv_cache=cache, batch_size=batch)
    generator.generate(prompts, warm_up)
    device.synchronize()
    start = time.perf_counter()
    found = generator.generate(prompts, settings)
    device.synchronize()
    seconds = time.perf_counter() - start
    broken = [generation.error for generation in found if generation.error]
    if broken:
        raise ArithmeticError(f"{len(broken)} of {batch} texts failed: {broken[0]}")
    depths = [depth for generation in found for depth in generation.depths]
    return {
        "tokens/s": round(len(depths) / seconds, 1),
        "ms/token and row": round(1000 * seconds / new, 2),
        "mean depth": round(sum(depths) / len(depths), 2),
        "tokens": len(depths),
    }
